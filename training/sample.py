"""Make images with a pipeline and save them in a folder.

    python training/sample.py runs/digits --class_labels 3 7 --num_images 32 --upscale 8
    python training/sample.py runs/digits --denoising gif --interpolation gif
    python training/sample.py runs/twemoji64 --prompts "red heart" "green apple" --output_dir samples/hearts_and_apples
    accelerate launch training/sample.py runs/digits --num_images 5000 --grid_columns 0 --output_dir samples/many

PIPELINE is a folder, or a name on the Hub, of a pipeline of this package or of diffusers that makes images from nothing, from
labels or from texts. Image i is made from a seed of its own: the same whatever the batch size and the number of processes, and
the same that `training/evaluate.py` measures. `images/` can be measured by `training/evaluate.py` and be trained on: labels are
its subfolders, and `metadata.jsonl` has the seed and the label or the text of each file.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.sample import SampleConfig, main, parse, run


__all__ = ["SampleConfig", "main", "parse", "run"]

if __name__ == "__main__":
    run()
