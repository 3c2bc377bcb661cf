"""Measure the images of a pipeline, or a folder of images, against the real ones of a data set.

    python training/evaluate.py runs/digits
    accelerate launch training/evaluate.py runs/fashion --num_images 5000 --num_inference_steps 50
    python training/evaluate.py runs/digits --bits_per_dim
    python training/evaluate.py runs/digits --sweep --sweep_steps 5 10 20 --sweep_schedulers ExtDDIMScheduler DPMSolverMultistepScheduler

PIPELINE is the folder of a training run, any pipeline of diffusers that makes images from nothing, from labels or from
texts (a folder, or a name on the Hub), or a folder of images, in a subfolder for each label if they have labels. What a
training run says in train_config.yaml, about its data set above all, need not be said again. Labels are asked for in the
proportions of the training images, or equally often where the classes are of nearly one size; the result says which. Images
from texts are asked for by the captions of the held-out split, or of the training split if that has none. Labelled images
in other proportions, such as a folder with equally many of each label, are compared with real ones weighted to the same.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.evaluate import EvaluateConfig, main, parse, run


__all__ = ["EvaluateConfig", "main", "parse", "run"]

if __name__ == "__main__":
    run()
