"""Train a Gaussian diffusion model on images and their captions.

    python training/train_text_to_image.py --dataset_name path/to/twemoji64 --resolution 32
    python training/train_text_to_image.py --dataset_name path/to/twemoji64 --pretrained_text_encoder path/to/clip
    python training/train_text_to_image.py --dataset_name path/to/twemoji64 --pretrained_pipeline runs/twemoji64

Without a text encoder that is there, a small one is made and trained together with the denoiser. Without options it
trains on scikit-learn's handwritten digits, whose captions are their labels. `--help` lists the options, `--config
FILE.yaml` reads them from a file. `training/sample_prompts.py OUTPUT_DIR` draws texts at several guidance scales.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.train_text_to_image import TextConfig, main, run


__all__ = ["TextConfig", "main", "run"]

if __name__ == "__main__":
    run()
