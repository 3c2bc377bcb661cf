"""One picture to one array: its mode, and its fit into the size that the model takes."""

import math

import numpy as np
from PIL import Image


RESIZE_MODES = ("crop", "random_crop", "pad", "stretch")
IMAGE_MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}

# What a picture of one of PIL's other modes is read as.
_READ_AS = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "LAB": "RGB", "HSV": "RGB", "La": "LA"}
_READ_AS |= {"RGBa": "RGBA", "RGBX": "RGB"}


def image_mode(image: Image.Image) -> str:
    """The mode in which a picture keeps what it shows: L, LA, RGB, RGBA, or I;16 for grey of 16 bits."""
    if image.mode.startswith("I"):
        return "I;16"
    if image.mode == "P" and "transparency" in image.info:
        return "RGBA"
    mode = _READ_AS.get(image.mode, image.mode)
    if mode not in IMAGE_MODES:
        raise ValueError(f"pictures of PIL's mode {image.mode} are not read; convert them to L, RGB or RGBA")
    return mode


def common_mode(modes: set[str]) -> str:
    """The narrowest mode that loses nothing of pictures of all these modes."""
    if "I;16" in modes:
        if len(modes) > 1:
            raise ValueError(f"pictures of 16 and of 8 bits do not go together, got the modes {sorted(modes)}")
        return "I;16"
    colour, alpha = any(mode.startswith("RGB") for mode in modes), any(mode.endswith("A") for mode in modes)
    return ("RGB" if colour else "L") + ("A" if alpha else "")


def to_array(image: Image.Image, mode: str, background: int = 0) -> np.ndarray:
    """The picture in the given mode, shape `(height, width, channels)`, uint8, or uint16 for I;16.

    Where the mode has no alpha channel, transparent pixels show the background.
    """
    if mode == "I;16":
        return np.asarray(image).clip(0, 65535).astype(np.uint16)[..., None]
    if image_mode(image).endswith("A") and not mode.endswith("A"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (background,) * 3 + (255,)), image)
    array = np.asarray(image.convert(mode))
    return array if array.ndim == 3 else array[..., None]


def fit(array: np.ndarray, size: tuple[int, int], resize_mode: str, pad_value: int = 0) -> np.ndarray:
    """The picture, shape `(height, width, channels)`, at the given (height, width).

    Args:
        array: uint8 or uint16, any number of channels.
        resize_mode: "crop" scales until the picture covers the size, and cuts what stands out, half on either side;
            so does "random_crop", of which training takes another place each time (`cover` and `crop_at`). "pad" scales
            down, never up, until it fits into the size, and centres it on a border of `pad_value`. "stretch" scales
            height and width each for itself.
    """
    height, width = array.shape[:2]
    scales = size[0] / height, size[1] / width
    if resize_mode in ("crop", "random_crop"):
        array = cover(array, size)
    elif resize_mode == "pad":
        scales = (min(*scales, 1.0),) * 2
        array = _resize(array, (max(1, round(height * scales[0])), max(1, round(width * scales[1]))))
    elif resize_mode == "stretch":
        array = _resize(array, size)
    else:
        raise ValueError(f"resize_mode must be one of {', '.join(RESIZE_MODES)}, got {resize_mode!r}")
    for axis in (0, 1):
        array = _centre(array, axis, size[axis], pad_value)
    return np.ascontiguousarray(array)


def cover(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The picture, scaled until it just covers the given (height, width); nothing is cut."""
    height, width = array.shape[:2]
    scale = max(size[0] / height, size[1] / width)
    return _resize(array, (max(1, round(height * scale)), max(1, round(width * scale))))


def crop_at(array: np.ndarray, size: tuple[int, int], place: np.ndarray) -> np.ndarray:
    """The part of the given (height, width) at a place, two numbers in [0, 1): each start is equally likely if they are."""
    top, left = (int(u * (side - cut + 1)) for u, side, cut in zip(place, array.shape, size, strict=False))
    return array[top : top + size[0], left : left + size[1]]


def _resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if array.shape[:2] == size:
        return array
    # PIL's filters widen with the scale, so that pictures that shrink are smoothed first.
    if array.dtype == np.uint8 and array.shape[2] in IMAGE_MODES.values():
        picture = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array, _mode_of(array.shape[2]))
        resized = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))
        return resized if resized.ndim == 3 else resized[..., None]
    bands = [Image.fromarray(array[..., band].astype(np.float32)) for band in range(array.shape[2])]
    resized = np.stack([np.asarray(band.resize(size[::-1], Image.Resampling.BICUBIC)) for band in bands], axis=-1)
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
