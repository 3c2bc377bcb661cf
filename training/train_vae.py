"""Train a variational autoencoder on images or sequences.

    python training/train_vae.py
    python training/train_vae.py --dataset_name path/to/fashion_mnist --architecture conv --max_train_time 5m
    python training/train_vae.py --dataset_name path/to/fashion_mnist --architecture hierarchical --max_train_time 5m

Without options it trains a fully connected one on scikit-learn's handwritten digits; convolutional ones make the latents
that a diffusion model is trained on; hierarchical ones have a prior that is learned, and make images by themselves.
`--help` lists the options, `--config FILE.yaml` reads them from a file. `training/evaluate_vae.py OUTPUT_DIR` measures
the result on held-out images.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.train_vae import TrainVAEConfig, main, run


__all__ = ["TrainVAEConfig", "main", "run"]

if __name__ == "__main__":
    run()
