"""The fit of a picture into the size that the model takes, and the mode in which many pictures are read."""

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
from PIL import Image

from diffusers_ext.pixels import IMAGE_MODES, WIDE


RESIZE_MODES = ("crop", "random_crop", "pad", "stretch")

# What is kept of a picture to crop at random is at most this many times as long as the size.
LONGEST = 4


def common_mode(modes: Iterable[str]) -> str:
    """The mode in which to read pictures of these modes, one for each picture.

    Colour if any has it; an alpha channel, or more than 8 bits, if most have it.
    """
    counts = Counter(modes)
    if 2 * counts[WIDE] > counts.total():
        return WIDE
    colour = any(mode.startswith("RGB") for mode in counts)
    with_alpha = sum(count for mode, count in counts.items() if mode.endswith("A"))
    return ("RGB" if colour else "L") + ("A" if 2 * with_alpha > counts.total() else "")


def fit(array: np.ndarray, size: tuple[int, int], resize_mode: str, pad_value: int = 0) -> np.ndarray:
    """The picture, shape `(height, width, channels)`, at the given (height, width).

    Args:
        array: uint8 or uint16, any number of channels.
        resize_mode: "crop" scales until the picture covers the size, and cuts what stands out, half on either side;
            so does "random_crop", which training does elsewhere each time (`cover` and `crop_at`). "pad" scales
            down, never up, until it fits into the size, and centres it on a border of `pad_value`. "stretch" scales
            height and width each for itself.
    """
    height, width = array.shape[:2]
    if resize_mode in ("crop", "random_crop"):
        array = cover(array, size, longest=1)
    elif resize_mode == "pad":
        scale = min(size[0] / height, size[1] / width, 1.0)
        array = _resize(array, (max(1, round(height * scale)), max(1, round(width * scale))))
    elif resize_mode == "stretch":
        array = _resize(array, size)
    else:
        raise ValueError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}, got {resize_mode!r}")
    for axis in (0, 1):
        array = _centre(array, axis, size[axis], pad_value)
    return np.ascontiguousarray(array)


def cover(array: np.ndarray, size: tuple[int, int], longest: int = LONGEST) -> np.ndarray:
    """The picture, scaled until it just covers the given (height, width).

    What makes it longer than `longest` times the size is cut off before it is scaled, half on either side: a ruled line
    of 1x2000 pixels would else take gigabytes.
    """
    height, width = array.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    covering = max(1, round(height * scale)), max(1, round(width * scale))
    kept = tuple(min(side, longest * target) for side, target in zip(covering, size, strict=True))
    starts = [(whole - part) // 2 for whole, part in zip(covering, kept, strict=True)]
    if covering == (height, width):
        return array[starts[0] : starts[0] + kept[0], starts[1] : starts[1] + kept[1]]
    top, left = (start * side / whole for start, side, whole in zip(starts, (height, width), covering, strict=True))
    bottom, right = (
        (start + part) * side / whole
        for start, part, side, whole in zip(starts, kept, (height, width), covering, strict=True)
    )
    return _resize(array, kept, (left, top, right, bottom))


def crop_at(array: np.ndarray, size: tuple[int, int], start: np.ndarray) -> np.ndarray:
    """A crop of the given (height, width).

    Args:
        start: Top and left in [0, 1), of which uniform ones make each start equally likely.
    """
    top, left = (int(u * (side - cut + 1)) for u, side, cut in zip(start, array.shape, size, strict=False))
    return array[top : top + size[0], left : left + size[1]]


def _resize(
    array: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """The picture, or its part in a box of (left, upper, right, lower) edges, at the given (height, width)."""
    if array.shape[:2] == size:
        return array
    # PIL's filters widen with the scale, so that pictures that shrink are smoothed first.
    if array.dtype == np.uint8 and array.shape[2] in IMAGE_MODES.values():
        picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array, _mode_of(array.shape[2]))
        resized = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, box))
        return resized if resized.ndim == 3 else resized[..., None]
    bands = [Image.fromarray(array[..., band].astype(np.float32)) for band in range(array.shape[2])]
    resized = np.stack([np.asarray(band.resize(size[::-1], Image.Resampling.BICUBIC, box)) for band in bands], axis=-1)
    return resized.round().clip(0, np.iinfo(array.dtype).max).astype(array.dtype)


def _mode_of(channels: int) -> str:
    return next(mode for mode, count in IMAGE_MODES.items() if count == channels)


def _centre(array: np.ndarray, axis: int, length: int, pad_value: int) -> np.ndarray:
    excess = array.shape[axis] - length
    if excess >= 0:
        start = excess // 2
        return array[start : start + length] if axis == 0 else array[:, start : start + length]
    widths = [(0, 0)] * 3
    widths[axis] = (-excess // 2, math.ceil(-excess / 2))
    return np.pad(array, widths, constant_values=pad_value)
