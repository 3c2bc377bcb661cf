"""An autoencoder of digits with two latents, all of which can be drawn.

python docs/walkthroughs/vae.py runs/two_latents docs/figures/vae_plane.png

Trains it, draws the figure and prints the figures of docs/walkthroughs/vae.md.
"""

import sys

import matplotlib
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from diffusers_ext import TrainVAEConfig, VAEModel, train


matplotlib.use("Agg")
import matplotlib.pyplot as plt


def load_data() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits in [-1, 1], shape `(1797, 1, 8, 8)`, and their labels."""
    digits = load_digits()
    return torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(digits.target)


def train_vae(folder: str, num_steps: int = 3000) -> VAEModel:
    config = TrainVAEConfig(
        dataset_name="digits",
        architecture="mlp",
        latent_dim=2,
        hidden_dims=(256, 256),
        max_train_steps=num_steps,
        train_batch_size=128,
        num_threads=1,
        output_dir=folder,
        overwrite_output_dir=True,
    )
    return train(config)


@torch.no_grad()
def encode(vae: VAEModel, images: Tensor) -> tuple[Tensor, float]:
    """The means of the posteriors, shape `(batch, 2)`, and the mean of KL(q(z | x) || p(z)) in nats."""
    posterior = vae.encode(images).latent_dist
    return posterior.mode(), posterior.kl().mean().item()


@torch.no_grad()
def decode_plane(vae: VAEModel, side: int = 14) -> Tensor:
    """Images of latents at the quantiles of the prior, so that each stands for as much of it; one picture in [0, 1]."""
    quantiles = torch.special.ndtri((torch.arange(side) + 0.5) / side)
    z = torch.cartesian_prod(quantiles.flip(0), quantiles).flip(1)  # rows from the top, columns from the left
    images = (vae.decode(z - vae.config.latent_offset).sample.clamp(-1, 1) + 1) / 2
    return images.view(side, side, 8, 8).transpose(1, 2).reshape(8 * side, 8 * side)


def draw(means: Tensor, labels: Tensor, plane: Tensor, path: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    points = left.scatter(*means.T.tolist(), c=labels.tolist(), cmap="tab10", s=6, linewidths=0)
    left.legend(*points.legend_elements(), loc="upper right", fontsize=8)
    left.set(title="where the encoder puts the images, by label", aspect="equal", xlim=(-3.5, 3.5), ylim=(-3.5, 3.5))
    right.imshow(plane, cmap="gray", vmin=0, vmax=1)
    right.set(title="what the decoder makes of the plane, by quantiles of N(0, 1)", xticks=(), yticks=())
    figure.savefig(path, dpi=75)


def main(folder: str, path: str, num_steps: int = 3000) -> None:
    vae = train_vae(folder, num_steps).eval()
    images, labels = load_data()
    means, rate = encode(vae, images)
    means = means + vae.config.latent_offset
    with torch.no_grad():
        error = (vae.decode(means - vae.config.latent_offset).sample - images).square().mean().sqrt().item()
    print(f"rate {rate:.2f} nats, root mean square error {error:.3f} of values in [-1, 1]")
    print(f"latents of all images: mean {means.mean():.2f}, standard deviation {means.std():.2f}")
    draw(means, labels, decode_plane(vae), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
