"""A picture to an array: how it is opened, what channels it has, and which of its values is white.

Training, evaluation and pipelines read pictures by these functions, so that one picture is the same to all of them.

An image has one name at each stage of its way:

    pixels   as it is stored: uint8 or uint16, black is 0 and white the largest value of the type
    images   as a network takes it: floating point in [-1, 1]; `to_images`
    x0       the same in a formula, beside the noise eps and the noised x_t
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor


IMAGE_MODES = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
WIDE = "I;16"  # one channel of more than 8 bits

# Environment variable: pixels that a picture may have. Without it Pillow's own limit holds.
MAX_PIXELS = "DIFFUSERS_EXT_MAX_IMAGE_PIXELS"

# The largest values of 1, 8, 10, 12, 14 and 16 bits.
_RUNGS = (1, 255, 1023, 4095, 16383, 65535)

# What a picture of one of PIL's other modes is read as.
_READ_AS = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "HSV": "RGB", "La": "LA"}
_READ_AS |= {"RGBa": "RGBA", "RGBX": "RGB", "I": WIDE, "I;16": WIDE, "I;16B": WIDE, "I;16L": WIDE, "I;16N": WIDE}
_READ_AS |= {"F": WIDE}
_BY_WAY_OF = {"La": "LA", "RGBX": "RGB"}  # what Pillow cannot convert otherwise, or to a false alpha

_PNG, _PNG_TEXTS = b"\x89PNG\r\n\x1a\n", (b"tEXt", b"zTXt", b"iTXt")


@dataclass(frozen=True)
class Whites:
    """Which value is white for pixels of each type; black is 0. It is 255 for uint8, and 1 for bool.

    Attributes:
        sixteen: For uint16, and pictures of 16 bits.
        integers: For integers whose type says nothing of it: NumPy's int32 and int64, PIL's mode I. None: the largest
            value of 1, 8, 10, 12, 14 or 16 bits, whichever is the first that no pixel exceeds.
        floats: For floats, and pictures of PIL's mode F.
    """

    sixteen: int = 65535
    integers: int | None = None
    floats: float = 1.0

    @classmethod
    def found(cls, largest: dict[np.dtype, float], white_value: int | None = None) -> "Whites":
        """Those of a set of pictures, so that each of them is read alike.

        Args:
            largest: The largest value of each type of pixels that occurs.
            white_value: What a user says is white, in all types of more than 8 bits; None if nothing is said.
        """
        if white_value is not None:
            return cls(white_value, white_value, white_value)
        unsaid = [
            value for dtype, value in largest.items() if dtype.kind in "iu" and dtype not in (np.uint8, np.uint16)
        ]
        return cls(integers=lowest_white(max(unsaid))) if unsaid else cls()

    def of(self, dtype: np.dtype, largest: float) -> float:
        """The value that is white in pixels of a type, of which this is the largest."""
        if dtype == np.bool_:
            return 1
        if dtype == np.uint8:
            return 255
        if dtype == np.uint16:
            return self.sixteen
        if dtype.kind == "f":
            return self.floats
        return self.integers or lowest_white(largest)


DEFAULT_WHITES = Whites()


def lowest_white(largest: float) -> int:
    """The largest value of 1, 8, 10, 12, 14 or 16 bits, whichever is the first to hold a value."""
    return next((rung for rung in _RUNGS if largest <= rung), _RUNGS[-1])


def looks_dark(dtype: np.dtype, largest: float) -> bool:
    """Whether pixels of 16 bits do not use the two highest of them, so that their white may be another than 65535."""
    return dtype == np.uint16 and 0 < largest <= _RUNGS[-2]


def to_range(values: np.ndarray, dtype: np.dtype, whites: Whites = DEFAULT_WHITES) -> np.ndarray:
    """Pixels of any type as uint8 or uint16, whose largest value is white.

    Raises:
        ValueError: if a value is below 0, above white, or none.
    """
    if values.dtype == dtype == np.uint8:
        return values
    low, high, top = values.min(), values.max(), np.iinfo(dtype).max
    white = whites.of(values.dtype, high)
    if not (low >= 0 and high <= white):  # true for NaN too
        raise ValueError(
            f"{values.dtype} values must be in [0, {white:g}], got [{low:g}, {high:g}]: divide them, or say which "
            "value is white (--white_value of the scripts)"
        )
    if white == top:
        return values.astype(dtype)
    if values.dtype.kind == "f":
        return (values * (top / white)).round().astype(dtype)
    return ((values.astype(np.int64) * (2 * top) + white) // (2 * white)).astype(dtype)


def to_images(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels, uint8 or uint16 of any shape, to images in [-1, 1]."""
    return pixels.to(dtype).mul_(2 / torch.iinfo(pixels.dtype).max).sub_(1)


def open_picture(source: bytes | str | Path) -> Image.Image:
    """A picture from a file or its bytes, decoded, the right way up.

    Texts in a PNG that are too large for Pillow are passed over.

    Raises:
        ValueError: if it has more pixels than Pillow, or the environment variable `DIFFUSERS_EXT_MAX_IMAGE_PIXELS`,
            allows.
        Exception: whatever a decoder raises on a damaged file.
    """
    try:
        return _load(source)
    except ValueError:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        bare = _without_texts(data) if data.startswith(_PNG) else data
        if len(bare) == len(data):
            raise
        return _load(bare)


def upright(image: Image.Image) -> Image.Image:
    """The picture as its camera was held, by its EXIF orientation."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
        return image
    turned = ImageOps.exif_transpose(image)
    turned.format = image.format  # which says what the values of mode I mean
    return turned


def image_mode(image: Image.Image) -> str:
    """The mode in which a picture keeps what it shows: L, LA, RGB, RGBA, or I;16 for grey of more than 8 bits."""
    mode = _READ_AS.get(image.mode, image.mode)
    if mode == WIDE:
        return mode
    if mode not in IMAGE_MODES:
        raise ValueError(f"pictures of PIL's mode {image.mode} are not read; convert them to L, RGB or RGBA")
    return mode if mode.endswith("A") or "transparency" not in image.info else mode + "A"


def wide_values(image: Image.Image) -> np.ndarray:
    """The pixels of a picture of more than 8 bits: uint16, int32 or float32, shape `(height, width)`."""
    values = np.asarray(image)
    # Pillow gives 16 bits of PNG (up to 11) and of PPM as mode I.
    said = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    return values.astype(np.uint16 if said else values.dtype.newbyteorder("="), copy=False)


def to_array(image: Image.Image, mode: str, background: int = 0, whites: Whites = DEFAULT_WHITES) -> np.ndarray:
    """The picture in the given mode, shape `(height, width, channels)`, uint8, or uint16 for I;16.

    Args:
        mode: L, LA, RGB, RGBA or I;16.
        background: Shown by transparent pixels where the mode has no alpha channel, in the range of the result.
        whites: Of pictures of more than 8 bits.
    """
    if image_mode(image) == WIDE:
        values, clear = wide_values(image), image.info.get("transparency")
        array = to_range(values, np.uint16 if mode == WIDE else np.uint8, whites)
        if isinstance(clear, int):
            array = np.where(values == clear, background, array).astype(array.dtype)
        if mode == WIDE:
            return array[..., None]
        image = Image.fromarray(array)
    elif mode == WIDE:
        return to_range(to_array(image, "L", round(background / 257)), np.uint16)
    if image.mode in _BY_WAY_OF:
        image = image.convert(_BY_WAY_OF[image.mode])
    if image_mode(image).endswith("A") and not mode.endswith("A"):
        image = _with_alpha(image)
        image = Image.alpha_composite(Image.new("RGBA", image.size, (background,) * 3 + (255,)), image)
    elif mode.endswith("A"):
        image = _with_alpha(image)
    array = np.asarray(image.convert(mode))
    return array if array.ndim == 3 else array[..., None]


def _with_alpha(image: Image.Image) -> Image.Image:
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # of a PNG of 16 bits, of which Pillow keeps the upper 8
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image.convert("RGBA")


def _load(source: bytes | str | Path) -> Image.Image:
    with _limit_of_pixels() as limit, Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if limit is not None and image.width * image.height > limit:
            raise ValueError(f"{image.width}x{image.height} pixels, where {MAX_PIXELS} allows {limit}")
        image.load()
        return upright(image)


def limits_of_pixels() -> tuple[str | None, int | None]:
    """What `open_picture` holds pictures to: the limit that the environment sets, and Pillow's in the place of none."""
    return os.environ.get(MAX_PIXELS), Image.MAX_IMAGE_PIXELS


@contextmanager
def _limit_of_pixels() -> Iterator[int | None]:
    """The limit that the environment sets, in the place of Pillow's; None if it sets none."""
    given, pillows = limits_of_pixels()
    if given is not None and not given.isdecimal():
        raise ValueError(f"{MAX_PIXELS} must be a number of pixels, got {given!r}")
    try:
        if given is not None:
            Image.MAX_IMAGE_PIXELS = None
        yield None if given is None else int(given)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{error} To read it, set the environment variable {MAX_PIXELS} to as many") from error
    finally:
        Image.MAX_IMAGE_PIXELS = pillows


def _without_texts(data: bytes) -> bytes:
    """A PNG without its chunks of text."""
    kept, start = [_PNG], len(_PNG)
    while start + 12 <= len(data):  # length, type, content, checksum
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in _PNG_TEXTS:
            kept.append(data[start:end])
        start = end
    return b"".join(kept)
