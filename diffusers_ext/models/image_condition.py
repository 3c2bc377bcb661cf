"""A condition image in a denoiser: channels beside those of x_t, one more that says whether there is an image, its noise level.

Reference: Saharia et al. 2021, arXiv 2104.07636 (concatenation); Ho et al. 2021, arXiv 2106.15282 (the noise level as an input).
"""

import torch
from torch import Tensor

from diffusers_ext.models.embeddings import TimestepEmbedding


# What a level in [0, 1] is multiplied by, to be embedded as timesteps are.
LEVEL_SCALE = 1000.0


def input_channels(condition_channels: int) -> int:
    """Channels that a condition image of so many adds to a network's input; none for none."""
    return condition_channels + 1 if condition_channels else 0


def concatenate_condition(
    x: Tensor, channels: int, condition_image: Tensor | None, condition_given: Tensor | None
) -> Tensor:
    """`x` with the condition image behind its channels and, last, 1 where there is one and 0 where there is none.

    Args:
        x: Shape `(batch, any, *spatial)`.
        channels: Of the condition image; 0 leaves `x` as it is.
        condition_image: Shape `(batch, channels, *spatial)`, or `None` for none.
        condition_given: Which samples have one, shape `(batch,)`; `None` for all.
    """
    if not channels:
        return x
    shape = (len(x), 1, *x.shape[2:])
    if condition_image is None:
        return torch.cat([x, x.new_zeros(len(x), channels + 1, *x.shape[2:])], dim=1)
    condition_image = condition_image.to(x.dtype)
    if condition_given is None:
        return torch.cat([x, condition_image, x.new_ones(shape)], dim=1)
    given = condition_given.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return torch.cat([x, condition_image * given, given.expand(shape)], dim=1)


def embed_level(
    embedding: TimestepEmbedding | None, condition_level: Tensor | None, condition_given: Tensor | None, like: Tensor
) -> Tensor | float:
    """The embedding `(batch, dim)` of the noise level in condition images, to be added to that of the timestep.

    Args:
        embedding: Of the network; `None` for one that is not given the level.
        condition_level: In [0, 1], shape `(batch,)`; `None` for 0.
        condition_given: Which samples have an image: the others have level 0; `None` for all.
        like: A sample, for batch size, device and dtype.
    """
    if embedding is None:
        return 0.0
    level = like.new_zeros(len(like), dtype=torch.float32) if condition_level is None else condition_level.float()
    if condition_given is not None:
        level = level * condition_given
    return embedding(level * LEVEL_SCALE, None, like.dtype)


def check_condition_image(
    config,
    sample: Tensor,
    condition_image: Tensor | None,
    condition_given: Tensor | None,
    condition_level: Tensor | None,
) -> None:
    """Refuses condition images that a denoiser was not built for, and their absence where it needs them.

    Args:
        config: Of the denoiser, with `condition_channels`, `condition_level` and `learned_without_image`.
        sample, condition_image, condition_given, condition_level: As in the denoiser's `forward`.

    Raises:
        ValueError: if one is missing, given without need, or of another shape.
    """
    channels = config.condition_channels
    if condition_image is None:
        if channels and not config.learned_without_image:
            raise ValueError(
                "condition_image must be given: the model was trained with one on each sample (condition_dropout was 0)"
            )
        return
    if not channels:
        raise ValueError(
            "condition_image was given to a model without: it was built with condition_channels=0, so leave it out"
        )
    expected = (len(sample), channels, *sample.shape[2:])
    if condition_image.shape != expected:
        raise ValueError(f"condition_image must have shape {expected}, got {tuple(condition_image.shape)}")
    for name, each in (("condition_given", condition_given), ("condition_level", condition_level)):
        if each is not None and each.shape != sample.shape[:1]:
            raise ValueError(f"{name} must be one for each of the {len(sample)} samples, got {tuple(each.shape)}")
    if condition_level is not None and not config.condition_level:
        raise ValueError(
            "condition_level was given to a model that takes none: it was built with condition_level=False"
        )


def check_condition_options(condition_channels: int, condition_level: bool) -> None:
    """Refuses options of a network that mean nothing.

    Raises:
        ValueError: if so.
    """
    if condition_channels < 0:
        raise ValueError(f"condition_channels must be at least 0, got {condition_channels}")
    if condition_level and not condition_channels:
        raise ValueError("condition_level is the noise level of condition images: give condition_channels too")
