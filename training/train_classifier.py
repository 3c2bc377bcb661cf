"""Train a classifier of noisy images, for guiding a diffusion model by its gradient.

    python training/train_classifier.py --pipeline runs/digits
    python training/train_classifier.py --dataset_name path/to/fashion_mnist --resolution 32 --max_train_time 5m
    python training/train_classifier.py --dataset_name latents/fashion --vae runs/vae

Without options it trains on scikit-learn's handwritten digits, on the noise levels that are `train_ddpm.py`'s by
default. For a pipeline of latents it learns the latents of the same VAE. `--help` lists the options, `--config FILE.yaml`
reads them from a file.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.train_classifier import TrainClassifierConfig, main, run


__all__ = ["TrainClassifierConfig", "main", "run"]

if __name__ == "__main__":
    run()
