"""Pictures of a hierarchical autoencoder: draws, what each level decides, and what the upper levels alone recall."""

from pathlib import Path

import torch
from torch import Tensor

from diffusers_ext.figures import labelled_grid, save_picture
from diffusers_ext.models.hierarchical_vae import HierarchicalVAEModel
from diffusers_ext.recipes.vae_figures import in_unit_range


PICTURES = {
    "samples.png": "draws from the model, all levels drawn",
    "levels.png": "draws with the upper levels held fixed, one more of them in each row: what the other levels decide",
    "reconstructions.png": "images, and what comes back from their latents: of all levels, then of fewer and fewer",
}

LIMITATIONS = (
    "It encodes, decodes and makes images like those it was trained on, and shares their gaps and biases. Its draws are of its"
    " own prior, which a diffusion model of the same data usually surpasses; its latents, of several levels, are none for the"
    " latent pipelines. What a reconstruction loses is lost."
)


def pictures_of(vae: HierarchicalVAEModel) -> dict[str, str]:
    """Names of the pictures that `draw_pictures` makes, with what they show."""
    return PICTURES


@torch.no_grad()
def draw_pictures(vae: HierarchicalVAEModel, images: Tensor, folder: Path, *, columns: int = 8, seed: int = 0) -> None:
    """Draws all of `pictures_of` into a folder.

    Args:
        images: In [-1, 1], at least `columns`.
        columns: Pictures in a row.
        seed: Of the draws.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(vae.device).manual_seed(seed)
    drawn = in_unit_range(vae.sample(columns * columns, generator))
    save_picture(labelled_grid(drawn.unflatten(0, (columns, columns))), folder / "samples.png")
    rows, names = held_fixed(vae, columns, generator)
    save_picture(labelled_grid(rows, names), folder / "levels.png")
    rows, names = recalled(vae, images[:columns])
    save_picture(labelled_grid(rows, names), folder / "reconstructions.png")


def held_fixed(
    vae: HierarchicalVAEModel, columns: int, generator: torch.Generator | None = None
) -> tuple[list[Tensor], list[str]]:
    """Rows of draws in [0, 1] and their names: the first draws every level, each further row holds one more level from
    the top at the latents of the first row's first picture."""
    latents = vae.sample_prior(columns, generator)
    rows, names = [in_unit_range(vae.decode(latents[-1]).sample)], ["all levels drawn"]
    for number in range(1, len(latents)):
        held = [z[:1] for z in latents[:number]]
        others = vae.sample(columns - 1, generator, latents=held)
        rows.append(torch.cat([rows[0][:1], in_unit_range(others)]))
        names.append(f"{_numbers(vae, number)} held fixed")
    return rows, names


def recalled(vae: HierarchicalVAEModel, images: Tensor) -> tuple[list[Tensor], list[str]]:
    """Rows of pictures in [0, 1] and their names: images, then what is decoded of their latents of all levels, and of the
    upper levels alone, where those below take the means of their priors."""
    latents = vae.encode(images).latent_dist.latents
    rows, names = [in_unit_range(images)], ["image"]
    for number in range(len(latents), 0, -1):
        rows.append(in_unit_range(vae.decode(latents[:number]).sample))
        names.append("all levels" if number == len(latents) else f"from {_numbers(vae, number)} alone")
    return rows, names


def _numbers(vae: HierarchicalVAEModel, upper: int) -> str:
    """The numbers of the upper levels in words: "level 3", "levels 3 and 2", "levels 4, 3 and 2"."""
    *others, last = [str(level.number) for level in vae.levels[:upper]]
    return f"levels {', '.join(others)} and {last}" if others else f"level {last}"
