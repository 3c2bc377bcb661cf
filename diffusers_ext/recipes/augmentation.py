"""Augmentation that does not leak: images are flipped, scaled, turned, stretched and shifted, and the network is given by how much.

What it learns of the changed images then helps with the others, and sampling asks for images that are not changed.

Reference: Karras, Aittala, Aila, Laine 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv
2206.00364, Appendix F.2.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import LatentData
from diffusers_ext.data.sequences import SequenceData
from diffusers_ext.data.stream import StreamData


if TYPE_CHECKING:
    from diffusers_ext.recipes.denoising import DenoisingConfig


# Standard deviations of the logarithms to the base 2 of size and aspect, and of a shift as a share of the side.
SIZE_STD, ASPECT_STD, SHIFT_STD = 0.2, 0.2, 0.125

NUM_LABELS = 9  # numbers that say what was done to an image

Prepare = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def augment(images: Tensor, uniform: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Changes images, each in each of six ways with the given probability; the others stay as they are, bit for bit.

    Args:
        images: Shape `(batch, channels, height, width)`.
        uniform: Random numbers in [0, 1), shape `(batch, NUM_AUGMENTATION)`, float32.

    Returns: images of the same shape, and what was done to them, float32, shape `(batch, NUM_LABELS)`: whether they are mirrored left to
        right and upside down, size, cosine - 1 and sine of a rotation, two numbers of a change of aspect, and the shift down
        and to the right in units of `SHIFT_STD`. All of it is 0 for an image that was not changed.
    """
    chosen = (uniform[:, :6] < probability).float()
    # A uniform number of each way, two of the last three.
    u = uniform[:, 6:].clamp(1e-6, 1 - 1e-6)
    flips = (u[:, :2] < 0.5).float() * chosen[:, :2]
    size = torch.special.ndtri(u[:, 2]) * chosen[:, 2]
    angle = math.pi * (2 * u[:, 3] - 1) * chosen[:, 3]
    aspect, direction = torch.special.ndtri(u[:, 4]) * chosen[:, 4], math.pi * (2 * u[:, 5] - 1)
    shift = torch.special.ndtri(u[:, 6:8]) * chosen[:, 5:]

    of_turn = torch.stack([angle.cos() - 1, angle.sin()], dim=1)
    of_aspect = aspect[:, None] * torch.stack([direction.cos(), direction.sin()], dim=1)
    labels = torch.cat([flips, size[:, None], of_turn, of_aspect, shift], dim=1)

    changed = images
    for axis, flipped in ((3, flips[:, 0]), (2, flips[:, 1])):
        changed = torch.where(flipped.bool()[:, None, None, None], changed.flip(axis), changed)
    moved = (chosen[:, 2:] > 0).any(1)[:, None, None, None]
    return torch.where(moved, _warped(changed, size, angle, aspect, direction, shift), changed), labels


def _warped(images: Tensor, size: Tensor, angle: Tensor, aspect: Tensor, direction: Tensor, shift: Tensor) -> Tensor:
    """Images as they are seen after a change of aspect along a direction, one of size, a rotation and a shift.

    Beyond its edges an image goes on as its mirror image.
    """
    height, width = images.shape[2:]
    # From a point of the result to one of the image, (x, y) from the middle, in pixels: each change undone, the last one first.
    stretch = torch.exp2(-ASPECT_STD * aspect)
    scales = torch.diag_embed(torch.stack([stretch, 1 / stretch], dim=1))
    undo = _rotation(direction) @ scales @ _rotation(-direction) @ _rotation(-angle)
    undo = undo * torch.exp2(-SIZE_STD * size)[:, None, None]
    # By numbers of the host alone, which copy nothing to a device.
    moved = -SHIFT_STD * torch.stack([width * shift[:, 1], height * shift[:, 0]], dim=1)
    offset = (undo @ moved[:, :, None])[:, :, 0]
    # grid_sample counts in halves of the sides.
    rows = [
        [undo[:, 0, 0], undo[:, 0, 1] * (height / width), offset[:, 0] * (2 / width)],
        [undo[:, 1, 0] * (width / height), undo[:, 1, 1], offset[:, 1] * (2 / height)],
    ]
    theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    grid = F.affine_grid(theta, [*images.shape], align_corners=False)
    return F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False).to(images.dtype)


def _rotation(angle: Tensor) -> Tensor:
    """Matrices `(batch, 2, 2)` that turn by angles `(batch,)`."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)


def check_augmentation(config: "DenoisingConfig", data: ImageData | StreamData) -> None:
    """Refuses to augment what is no image any more.

    Raises:
        ValueError: if so.
    """
    if config.augmentation_probability and isinstance(data, SequenceData | LatentData):
        what = (
            "sequences"
            if isinstance(data, SequenceData)
            else "latents; give the images, which --vae encodes at each batch"
        )
        raise ValueError(f"augmentation_probability is for images, and {data.name} holds {what}")


def augmenting(config: "DenoisingConfig", prepare: Prepare | None) -> Prepare | None:
    """What prepares a batch on its device: augments its images, if the options ask for it, and calls `prepare`."""
    if not config.augmentation_probability:
        return prepare

    def prepared(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "augmentation_uniform" in batch:  # which held-out images have not
            batch = dict(batch)
            uniform = batch.pop("augmentation_uniform")
            with torch.autocast(uniform.device.type, enabled=False):
                changed = augment(batch["images"], uniform, config.augmentation_probability)
            batch["images"], batch["augmentation"] = changed
        return batch if prepare is None else prepare(batch)

    return prepared
