"""Regions of a call: masks as a user has them, with a label or a text and a weight."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from diffusers_ext.pipelines.image_inputs import ImageInput, soft_mask_to_tensor
from diffusers_ext.sizes import compression


class Region(NamedTuple):
    """A part of the image, what it shows, and how much of that direction is added."""

    mask: ImageInput
    condition: Any
    weight: float


def read_regions(regions: Sequence[tuple[ImageInput, Any, float]] | None) -> list[Region]:
    """The regions of a call.

    Raises:
        ValueError: if one is not a mask, a label or text, and a finite weight.
    """
    if regions is None:
        return []
    if not isinstance(regions, list | tuple) or not regions:
        raise ValueError(f"regions must be a list of (mask, label or text, weight), got {regions!r}")
    read = []
    for index, region in enumerate(regions):
        if not isinstance(region, list | tuple) or len(region) != 3:
            raise ValueError(f"regions[{index}] must be (mask, label or text, weight), got {_short(region)}")
        mask, condition, weight = region
        if isinstance(weight, bool) or not (isinstance(weight, Real) and math.isfinite(weight)):
            raise ValueError(f"the weight of regions[{index}] must be a finite number, got {weight!r}")
        read.append(Region(mask, condition, float(weight)))
    return read


def masks_for(pipe, regions: Sequence[Region]) -> list[Tensor]:
    """The masks at the size of a pipeline's samples, in [0, 1], each of shape `(batch, 1, *spatial)`.

    A latent gets the mean of the mask over the pixels that it stands for.

    Args:
        pipe: With `vae`, `_dims` and `_sample_shape`.

    Raises:
        ValueError: if a mask is not of the size of the images, or has values outside of [0, 1].
    """
    spatial = tuple(pipe._sample_shape[1:])
    factor = 1 if pipe.vae is None else compression(pipe.vae.config)
    size, masks = tuple(side * factor for side in spatial), []
    for index, region in enumerate(regions):
        mask = soft_mask_to_tensor(region.mask, pipe._dims, f"the mask of regions[{index}]")
        if tuple(mask.shape[2:]) != size:
            expected, got = ("x".join(map(str, each)) for each in (size, mask.shape[2:]))
            raise ValueError(f"the mask of regions[{index}] must be of the size of the images, {expected}, got {got}")
        if factor > 1:
            mask = (F.avg_pool2d if len(spatial) == 2 else F.avg_pool1d)(mask, factor)
        masks.append(mask)
    return masks


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
