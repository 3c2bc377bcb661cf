"""Compare ways to guide a pipeline: do the images show their labels, and how far are they from real ones?

    python training/compare_guidance.py runs/fashion --classifier runs/fashion-classifier
    accelerate launch training/compare_guidance.py runs/fashion --weak_pipeline runs/fashion-small --num_images 5000

PIPELINE is the folder of a run of training/train_ddpm.py, or another pipeline of this package. For each method and
guidance scale it makes the same number of images, image i of each from the same noise, and measures them as
training/evaluate.py does. `guidance.png`, `guidance.md` and `guidance.json` go into the folder. What is in the last is
not made again, so that a command that was stopped goes on when it is given again. `guidance_samples.png` shows the first
image of each label by each method, at its scale of least distance.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.compare_guidance import CompareConfig, main, parse, run


__all__ = ["CompareConfig", "main", "parse", "run"]

if __name__ == "__main__":
    run()
