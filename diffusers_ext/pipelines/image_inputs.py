"""Images and masks as a user has them - PIL, NumPy or PyTorch - to tensors as a pipeline computes with them."""

import warnings
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusers_ext.latents import encode_latents
from diffusers_ext.pixels import (
    IMAGE_MODES,
    WIDE,
    Whites,
    image_mode,
    looks_dark,
    lowest_white,
    to_array,
    upright,
    wide_values,
)
from diffusers_ext.value_scale import ValueScale


ImageInput: TypeAlias = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]

_MODES = {channels: mode for mode, channels in IMAGE_MODES.items()}


def images_to_tensor(image: ImageInput, channels: int, dims: int = 2, name: str = "image") -> Tensor:
    """Images in [-1, 1], float32, shape `(batch, channels, *spatial)`.

    Args:
        image: One or a list of: a PIL image, which is read as in training (turned upright, transparent pixels shown on
            black) with the right number of channels; an array `(*spatial, channels)`; a tensor `(channels, *spatial)`.
            Or an array or tensor with a batch of them. Floats are in [0, 1]; of integers what is white follows from
            their type, or else from the largest value of all that are given: see `diffusers_ext.pixels.Whites`.
        channels: Channels that the images must have.
        dims: 2 for images, 1 for series.
        name: Of the argument, for the error.

    Raises:
        ValueError: if it is no such image, its values are out of range, or the images differ in size.
    """
    return 2 * _to_unit_range(image, channels, dims, name) - 1


def sequences_to_tensor(sequence: ImageInput, scale: ValueScale, name: str = "image") -> Tensor:
    """Sequences in own units to those that a network sees, float32, shape `(batch, channels, length)`.

    Args:
        sequence: One or a list of: an array `(length, channels)`; a tensor `(channels, length)`; or either with a batch of
            them.
        scale: Between the two.
        name: Of the argument, for the error.

    Raises:
        ValueError: if it is none, has other channels, NaN or infinity, or the sequences differ in length.
    """
    parts = [_to_tensor(part, scale.channels, 1, name, False, Whites()).double() for part in _parts(sequence, name)]
    if len(lengths := {part.shape[2] for part in parts}) > 1:
        raise ValueError(f"{name} must hold sequences of one length, got {', '.join(map(str, sorted(lengths)))}")
    values = torch.cat(parts)
    if not values.isfinite().all():
        raise ValueError(f"{name} must have finite values, got NaN or infinity")
    return scale.to_model(values)


def encode_pixels(
    pixels: Tensor,
    vae: nn.Module | None,
    sample_shape: tuple[int, ...],
    statistics: nn.Module | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Images as a denoiser knows them, shape `(batch, *sample_shape)`; `decode_samples` backwards.

    Args:
        pixels: From `images_to_tensor`.
        vae: Of the denoiser, if it is one of latents.
        sample_shape: (channels, *spatial) of the denoiser's samples.
        statistics: `DataStatisticsModel` of the denoiser, if it has one.
        labels: Of the images, or one of all, as for `statistics`.

    Raises:
        ValueError: if the images do not have the size that the denoiser takes.
    """
    x0 = _encode(pixels, vae, sample_shape)
    return x0 if statistics is None else statistics.normalise(x0, labels)


def _encode(pixels: Tensor, vae: nn.Module | None, sample_shape: tuple[int, ...]) -> Tensor:
    size, got = list(sample_shape[1:]), list(pixels.shape[2:])
    if vae is None:
        if got != size:
            raise ValueError(f"image must be of the model's size, {_times(size)}, got {_times(got)}: resize it first")
        return pixels
    factors = [side // latent_side for side, latent_side in zip(got, size, strict=True)]
    x0 = encode_latents(vae, pixels) if all(factors) else None
    if x0 is None or list(x0.shape[2:]) != size or any(f * s != g for f, s, g in zip(factors, size, got, strict=True)):
        latents = "too few" if x0 is None else _times(x0.shape[2:])
        raise ValueError(
            f"image must be of a size whose latents are the denoiser's {_times(size)}, got {_times(got)}, whose latents "
            f"are {latents}: resize it first"
        )
    return x0


def mask_to_tensor(mask: ImageInput, dims: int = 2, name: str = "mask_image") -> Tensor:
    """A mask, 1 where to make the image anew and 0 where to keep it, float32, shape `(batch, 1, *spatial)`.

    Args:
        mask: As `images_to_tensor` takes them, with one channel or none, or bool; from half of white on the pixel is to be
            made anew. Where no integer is larger than 1, 1 is white, whatever the type.
    """
    return (soft_mask_to_tensor(mask, dims, name) >= 0.5).float()


def soft_mask_to_tensor(mask: ImageInput, dims: int = 2, name: str = "mask") -> Tensor:
    """A mask with all of its values, float32 in [0, 1], shape `(batch, 1, *spatial)`; read as by `mask_to_tensor`."""
    return _to_unit_range(mask, 1, dims, name, is_mask=True)


def _to_unit_range(image: ImageInput, channels: int, dims: int, name: str, is_mask: bool = False) -> Tensor:
    """Images as float32 in [0, 1], shape `(batch, channels, *spatial)`."""
    parts = list(_parts(image, name))
    largest = _largest_integers(parts)
    whites = Whites.found(largest)  # the same for all of them
    for dtype, value in largest.items():
        if looks_dark(dtype, value) and not is_mask:
            warnings.warn(
                f"65535 is white in {name} of 16 bits, but its largest value is {value:g}, so that it is dark: if "
                f"{lowest_white(value)} is white, divide by that and give floats",
                stacklevel=4,
            )
    tensors = []
    for part in parts:
        values = _to_tensor(part, channels, dims, name, is_mask, whites)
        tensor, white = values.float(), 1.0
        low, high = tensor.aminmax()
        if not values.is_floating_point() and not (is_mask and high <= 1):
            white = whites.of(_dtype(values), high.item()) if not isinstance(part, Image.Image) else _full(values)
        if not (low >= 0 and high <= white):  # true for NaN too
            raise ValueError(
                f"{name} must have finite values in [0, {white:g}], got {low.item():.4g} to {high.item():.4g}"
            )
        tensors.append(tensor / white)
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        sizes = ", ".join("x".join(map(str, tensor.shape[2:])) for tensor in tensors)
        raise ValueError(f"{name} must hold images of one size, got {sizes}")
    return torch.cat(tensors)


def _largest_integers(parts: list[Image.Image | np.ndarray | Tensor]) -> dict[np.dtype, float]:
    """The largest value of each type of integers that occurs, but for pictures of 8 bits."""
    largest: dict[np.dtype, float] = {}
    for part in parts:
        if isinstance(part, Image.Image) and image_mode(part) == WIDE:
            part = wide_values(part)
        elif isinstance(part, Tensor) and not part.is_floating_point():
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray) and part.dtype.kind in "iu" and part.size:
            dtype = part.dtype.newbyteorder("=")
            largest[dtype] = max(float(part.max()), largest.get(dtype, 0))
    return largest


def _parts(image: ImageInput, name: str) -> Iterator[Image.Image | np.ndarray | Tensor]:
    if not isinstance(image, list | tuple):
        yield image
        return
    if not image:
        raise ValueError(f"{name} must hold at least one image, got an empty list")
    for part in image:
        yield from _parts(part, name)


def _to_tensor(
    image: Image.Image | np.ndarray | Tensor, channels: int, dims: int, name: str, is_mask: bool, whites: Whites
) -> Tensor:
    """An image, or a batch of them, shape `(batch, channels, *spatial)`, in the type that it has."""
    if isinstance(image, Image.Image):
        if channels not in _MODES or dims != 2:
            raise ValueError(
                f"{name} must be an array or a tensor for a model of {channels} channels and {dims} dimensions of space, "
                "got a PIL image"
            )
        mode = WIDE if channels == 1 and image_mode(image) == WIDE else _MODES[channels]
        image = to_array(upright(image), mode, whites=whites)
    if isinstance(image, np.ndarray):
        layout = "channels last"
        array = np.array(image, image.dtype.newbyteorder("="))  # a copy, since that of a PIL image is read-only
        if is_mask and array.ndim in (dims, dims + 1) and array.shape[-1] != 1:
            array = array[..., None]
        tensor = torch.from_numpy(array)
        tensor = tensor.movedim(-1, -dims - 1) if tensor.ndim > dims else tensor
    elif isinstance(image, Tensor):
        layout, tensor = "channels first", image
        if is_mask and tensor.ndim == dims:
            tensor = tensor[None]
        elif is_mask and tensor.ndim == dims + 1 and len(tensor) != 1:
            tensor = tensor[:, None]
    else:
        raise ValueError(
            f"{name} must be a PIL image, a NumPy array, a tensor or a list of one, got {type(image).__name__}"
        )
    if tensor.ndim == dims + 1:
        tensor = tensor[None]
    if tensor.ndim != dims + 2 or tensor.shape[1] != channels:
        raise ValueError(
            f"{name} must have {channels} channels and {dims} dimensions of space, {layout}, got shape {tuple(image.shape)}"
        )
    return tensor


def _full(values: Tensor) -> float:
    """White of what `to_array` gives."""
    return float(torch.iinfo(values.dtype).max)


def _dtype(tensor: Tensor) -> np.dtype:
    return np.dtype(str(tensor.dtype).removeprefix("torch."))


def _times(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
