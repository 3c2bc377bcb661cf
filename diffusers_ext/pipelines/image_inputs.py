"""Images and masks as a user has them - PIL, NumPy or PyTorch - to tensors as a pipeline computes with them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusers_ext.latents import encode_latents


ImageInput = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def images_to_tensor(image: ImageInput, channels: int, dims: int = 2, name: str = "image") -> Tensor:
    """Images in [-1, 1], float32, shape `(batch, channels, *spatial)`.

    Args:
        image: One or a list of: a PIL image, which is converted to the right number of channels; an array
            `(*spatial, channels)` in [0, 1], or uint8; a tensor `(channels, *spatial)` in [0, 1]. Or an array or tensor
            with a batch of them.
        channels: Channels that the images must have.
        dims: 2 for images, 1 for series.
        name: Of the argument, for the error.

    Raises:
        ValueError: if it is no such image, its values are out of range, or the images differ in size.
    """
    return 2 * _to_unit_range(image, channels, dims, name) - 1


def encode_image(
    image: ImageInput, vae: nn.Module | None, sample_shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images as a denoiser knows them, shape `(batch, *sample_shape)`, and in pixels, in [-1, 1].

    Args:
        vae: Of the denoiser, if it is one of latents.
        sample_shape: (channels, *spatial) of the denoiser's samples.

    Raises:
        ValueError: if the images do not have the size that the denoiser takes.
    """
    channels, *size = sample_shape
    pixels = images_to_tensor(image, channels if vae is None else vae.config.in_channels, len(size)).to(device)
    got = list(pixels.shape[2:])
    if vae is None:
        if got != size:
            raise ValueError(f"image must be of the model's size, {_times(size)}, got {_times(got)}: resize it first")
        return pixels, pixels
    factors = [side // latent_side for side, latent_side in zip(got, size, strict=True)]
    x0 = encode_latents(vae, pixels) if all(factors) else None
    if x0 is None or list(x0.shape[2:]) != size or any(f * s != g for f, s, g in zip(factors, size, got, strict=True)):
        latents = "too few" if x0 is None else _times(x0.shape[2:])
        raise ValueError(
            f"image must be of a size whose latents are the denoiser's {_times(size)}, got {_times(got)}, whose latents "
            f"are {latents}: resize it first"
        )
    return x0, pixels


def mask_to_tensor(mask: ImageInput, dims: int = 2, name: str = "mask_image") -> Tensor:
    """What to make anew as 1 and what to keep as 0, float32, shape `(batch, 1, *spatial)`.

    Args:
        mask: As `images_to_tensor` takes them, with one channel or none; from 0.5 on the pixel is to be made anew.
    """
    if isinstance(mask, list | tuple) and mask:
        return torch.cat([mask_to_tensor(part, dims, name) for part in mask])
    if isinstance(mask, np.ndarray) and mask.ndim in (dims, dims + 1) and mask.shape[-1] != 1:
        mask = mask[..., None]
    elif isinstance(mask, Tensor) and mask.ndim == dims:
        mask = mask[None]
    elif isinstance(mask, Tensor) and mask.ndim == dims + 1 and len(mask) != 1:
        mask = mask[:, None]
    return (_to_unit_range(mask, 1, dims, name) >= 0.5).float()


def _to_unit_range(image: ImageInput, channels: int, dims: int, name: str) -> Tensor:
    if isinstance(image, list | tuple):
        if not image:
            raise ValueError(f"{name} must hold at least one image, got an empty list")
        parts = [_to_unit_range(part, channels, dims, name) for part in image]
        if len({part.shape[1:] for part in parts}) > 1:
            sizes = ", ".join("x".join(map(str, part.shape[2:])) for part in parts)
            raise ValueError(f"{name} must hold images of one size, got {sizes}")
        return torch.cat(parts)
    if isinstance(image, Image.Image):
        if channels not in _MODES:
            raise ValueError(
                f"{name} must be an array or a tensor for a model of {channels} channels, got a PIL image"
            )
        array = np.asarray(image.convert(_MODES[channels]))
        image = array if channels > 1 else array[..., None]
    if isinstance(image, np.ndarray):
        layout = "channels last"
        tensor = torch.from_numpy(np.ascontiguousarray(image))
        tensor = tensor.movedim(-1, -dims - 1) if tensor.ndim > dims else tensor
    elif isinstance(image, Tensor):
        layout, tensor = "channels first", image
    else:
        raise ValueError(
            f"{name} must be a PIL image, a NumPy array, a tensor or a list of one, got {type(image).__name__}"
        )
    tensor = tensor.float() / 255 if tensor.dtype == torch.uint8 else tensor.float()
    if tensor.ndim == dims + 1:
        tensor = tensor[None]
    if tensor.ndim != dims + 2 or tensor.shape[1] != channels:
        raise ValueError(
            f"{name} must have {channels} channels and {dims} dimensions of space, {layout}, got shape {tuple(image.shape)}"
        )
    low, high = tensor.aminmax()
    if not (low >= 0 and high <= 1):  # true for NaN too
        raise ValueError(f"{name} must have finite values in [0, 1], got {low.item():.4g} to {high.item():.4g}")
    return tensor


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
