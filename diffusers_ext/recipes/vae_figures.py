"""Pictures of an autoencoder: reconstructions, draws from the prior, interpolations and traversals of the latents."""

from pathlib import Path

import torch
from torch import Tensor

from diffusers_ext.figures import labelled_grid, save_picture
from diffusers_ext.models.vae import VAEModel
from diffusers_ext.pipelines.inversion import slerp
from diffusers_ext.value_scale import ValueScale


PICTURES = {
    "reconstructions.png": "images, and what comes back from the means of their posteriors",
    "samples.png": "decoded draws from the prior, which are not samples of the data (of feature maps: textures)",
    "interpolations.png": "from one image to another, along a line and along a great circle",
    "traversals.png": "the latents that tell most, one in each row, from low to high",
}
MANIFOLD = {"manifold.png": "the plane of the two latents, in equal steps of the prior's probability"}

LIMITATIONS = (
    "It encodes and decodes images like those it was trained on. Its prior is not the distribution of their latents, so"
    " that what is decoded of draws from the prior is no sample of the data: for those, train a diffusion model on the"
    " latents. What a reconstruction loses, no model on the latents can give back."
)

SPAN = 3.0  # of a traversal, in standard deviations to either side
MAX_ROWS = 10


def pictures_of(vae: VAEModel) -> dict[str, str]:
    """Names of the pictures that `draw_pictures` makes, with what they show."""
    return PICTURES | (MANIFOLD if vae.latent_shape == (2,) else {})


@torch.no_grad()
def draw_pictures(vae: VAEModel, images: Tensor, folder: Path, *, columns: int = 8, seed: int = 0) -> None:
    """Draws all of `pictures_of` into a folder.

    Args:
        images: In [-1, 1], at least `columns`; the variance of the latents' means is taken over all of them.
        columns: Pictures in a row.
        seed: Of the draws from the prior.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = images[:columns]
    both = [as_shown(vae, shown), decoded(vae, vae.encode(shown).latent_dist.mode())]
    save_picture(labelled_grid(both, ["image", "decoded"]), folder / "reconstructions.png")
    generator = torch.Generator(vae.device).manual_seed(seed)
    drawn = decoded(vae, vae.sample_prior(columns * columns, generator))
    title = prior_title(vae)
    save_picture(labelled_grid(drawn.unflatten(0, (columns, columns)), title=title), folder / "samples.png")
    draw_interpolations(vae, images[: min(len(images), 6)], folder / "interpolations.png", columns=columns)
    draw_traversals(vae, images, folder / "traversals.png", columns=columns)
    if "manifold.png" in pictures_of(vae):
        draw_manifold(vae, folder / "manifold.png")


def prior_title(vae: VAEModel) -> str:
    """The title of a grid of draws from the prior; of feature maps it says why they show no objects."""
    if len(vae.latent_shape) == 1:
        return "decoded draws from the prior"
    if vae.config.dims == 1:
        return "Decoded draws from the prior, which are no samples of the data: a diffusion model on the latents makes those."
    return (
        "Decoded draws from the prior, which takes each place of the latents for itself: they show textures and no objects. "
        "Images are made by a diffusion model trained on the latents."
    )


def interpolate(vae: VAEModel, first: Tensor, second: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Latents on the way between the means of two images, along a line and along a great circle about the prior's mean.

    Args:
        first, second: Shape `(1, channels, height, width)`, in [-1, 1].
        weights: In [0, 1], shape `(points,)`.

    Returns:
        Two tensors of shape `(points, *latent_shape)`.
    """
    posterior = vae.encode(torch.cat([first, second])).latent_dist
    a, b = (posterior.mode() - posterior.prior_mean).chunk(2)
    w = weights.to(a).view(-1, *[1] * (a.ndim - 1))
    return (1 - w) * a + w * b + posterior.prior_mean, slerp(a, b, weights) + posterior.prior_mean


@torch.no_grad()
def draw_interpolations(vae: VAEModel, images: Tensor, path: Path, *, columns: int = 8) -> None:
    """Two rows for each pair of neighbours among the images: the line and the great circle between them."""
    rows, weights = [], torch.linspace(0, 1, columns)
    for first in range(0, len(images) - 1, 2):
        for latents in interpolate(vae, images[first : first + 1], images[first + 1 : first + 2], weights):
            rows.append(decoded(vae, latents))
    names = ["linear", "spherical"] * (len(rows) // 2)
    save_picture(labelled_grid(rows, names, [f"{weight:.2f}" for weight in weights.tolist()]), path)


@torch.no_grad()
def draw_traversals(vae: VAEModel, images: Tensor, path: Path, *, columns: int = 8) -> None:
    """A row for each of the latents whose mean differs most between images: from low to high, the others as they are.

    A flat latent takes the values from -3 to 3 of the prior. Of a feature map a whole channel is moved by up to 3 of its
    standard deviations over the images.
    """
    posterior = vae.encode(images).latent_dist
    var = posterior.mean.var(0, unbiased=False)  # latent_shape
    by_channel = var.flatten(1).mean(1) if var.ndim > 1 else var
    order = by_channel.argsort(descending=True)[:MAX_ROWS].tolist()
    z, values, rows = posterior.mean[:1], torch.linspace(-SPAN, SPAN, columns).to(posterior.mean), []
    for latent in order:
        moved = z.repeat(columns, *[1] * (z.ndim - 1))
        if var.ndim == 1:
            moved[:, latent] = values + posterior.prior_mean
        else:
            moved[:, latent] += (values * by_channel[latent].sqrt()).view(-1, *[1] * (z.ndim - 2))
        rows.append(decoded(vae, moved))
    what = "latent" if var.ndim == 1 else "channel"
    heads = [f"{value:+.1f}" for value in values.tolist()]
    save_picture(labelled_grid(rows, [f"{what} {latent}" for latent in order], heads), path)


def manifold_latents(side: int, prior_mean: float = 0.0) -> Tensor:
    """A square grid of latents in the plane, shape `(side, side, 2)`: in equal steps of the prior's probability.

    The prior's quantiles at (i + 1/2) / side (Kingma & Welling 2013, Figure 4): each cell has the same probability. The
    first axis is the second latent, from high to low, so that the grid lies as a plot does.
    """
    quantiles = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side).float() + prior_mean
    rows, columns = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    return torch.stack([columns, rows], dim=-1)


@torch.no_grad()
def draw_manifold(vae: VAEModel, path: Path, *, side: int = 16) -> None:
    """A grid of what the plane of a two-dimensional latent decodes to."""
    z = manifold_latents(side, -vae.config.latent_offset).to(vae.device, vae.dtype)
    save_picture(labelled_grid(decoded(vae, z.flatten(0, 1)).unflatten(0, (side, side))), path)


def decoded(vae: VAEModel, z: Tensor) -> Tensor:
    """Latents to images in [0, 1], or to sequences in own units."""
    return as_shown(vae, vae.decode(z).sample)


def as_shown(vae: VAEModel, samples: Tensor) -> Tensor:
    """Samples in [-1, 1] to images in [0, 1], cut to it; or to sequences in own units."""
    scale = ValueScale.of_config(vae.config.value_scale)
    return in_unit_range(samples) if scale is None else scale.to_values(samples.float())


def in_unit_range(images: Tensor) -> Tensor:
    """Images in [-1, 1] to [0, 1], cut to it."""
    return (images.float() / 2 + 0.5).clamp(0, 1)
