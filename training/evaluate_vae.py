"""Measure an autoencoder on images that it was not trained on.

    python training/evaluate_vae.py runs/digits-vae
    python training/evaluate_vae.py runs/fashion-vae --num_images 1000 --num_samples 64

MODEL is the folder of a run of training/train_vae.py, or any folder of a `VAEModel` or a `HierarchicalVAEModel` with
--dataset_name. The bound on -log p(x) with its two terms (the rate by level too, where there are several) and the importance-weighted bound are in nats an image, and in bits a value of a pixel where
that means something; how close the decoded images are, in PSNR, SSIM and the Fréchet distance in the features of a
classifier. What a training run says in train_config.yaml need not be said again.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.evaluate_vae import EvaluateVAEConfig, main, parse, run


__all__ = ["EvaluateVAEConfig", "main", "parse", "run"]

if __name__ == "__main__":
    run()
