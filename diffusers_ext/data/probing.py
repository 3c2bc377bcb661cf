"""The first pictures of a data set, from which it is decided how all of them are read and get to their shape."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image

from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.decoding import Fit, describe_fault, name_of_cell, read_cell
from diffusers_ext.data.images import LONGEST, common_mode
from diffusers_ext.pixels import IMAGE_MODES, WIDE, Whites, image_mode, looks_dark, lowest_white, wide_values


PROBED_ROWS = 64
# Pictures of one size get a border, rather than being enlarged, if that leaves them at least this share of a side.
PAD_FROM = 0.75


@dataclass(frozen=True)
class Probed:
    """Statistics of the first pictures that can be decoded.

    Attributes:
        sizes: (height, width) of each.
        modes: How many there are of each mode (see `image_mode`); empty for a column of arrays.
        largest: The largest value of each type of pixels but those of pictures of 8 bits.
        array_dtype: Of a column of arrays, or None.
        shape: Of the first array, as it is stored.
    """

    sizes: list[tuple[int, int]]
    modes: Counter[str]
    largest: dict[np.dtype, float]
    array_dtype: str | None = None
    shape: tuple[int, ...] = ()

    @property
    def channels_first(self) -> bool:
        return is_channels_first(self.shape)


@dataclass(frozen=True)
class Reading:
    """Mode, type and range in which the pixels of a data set are read.

    Attributes:
        mode: PIL's mode, or None for arrays.
        channels: Of a picture.
        dtype: uint8 or uint16, in which they are kept.
        whites: Which values are white.
        white: That of most pictures, in their own range, which `pad_value` is in.
        notes: One line for each decision that the user has not made.
    """

    mode: str | None
    channels: int
    dtype: str
    whites: Whites
    white: int
    notes: tuple[str, ...]


def probe(rows: Iterable[dict], feature: Any, column: str) -> Probed:
    """Statistics of the first rows.

    Args:
        rows: The first rows, undecoded.
        feature: What `datasets` knows of the column.

    Raises:
        ValueError: if none of them can be decoded.
    """
    array_dtype = None if isinstance(feature, datasets.Image) else feature.dtype
    seen = Probed([], Counter(), {}, array_dtype)
    shape, count, fault = (), 0, "the data set is empty"
    for row in rows:
        count += 1
        try:
            picture = read_cell(row[column], array_dtype)
            mode = image_mode(picture) if isinstance(picture, Image.Image) else None
        except Exception as error:  # a decoder raises what it likes on a damaged file
            fault = f"{name_of_cell(row[column]) or f'row {count - 1}'}, {describe_fault(error)}"
            continue
        if mode is None:
            shape = shape or picture.shape
            picture = np.moveaxis(picture, 0, -1) if is_channels_first(picture.shape) else picture
            seen.sizes.append(picture.shape[:2])
        else:
            seen.modes[mode] += 1
            seen.sizes.append(picture.size[::-1])
        if mode in (None, WIDE):
            values = picture if mode is None else wide_values(picture)
            largest = float(values.max())
            if np.isfinite(largest):
                seen.largest[values.dtype] = max(largest, seen.largest.get(values.dtype, 0))
    if not seen.sizes:
        raise ValueError(f"none of the first {count} images can be decoded; the last one: {fault}")
    return Probed(seen.sizes, seen.modes, seen.largest, array_dtype, shape)


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether an array of three dimensions is (channels, height, width), by its shape.

    It is if the first has the number of channels of a picture and the last has not; 2 and 4 are sides of a picture too,
    if the others are as small.
    """
    if len(shape) != 3 or shape[2] <= max(IMAGE_MODES.values()):
        return False
    return shape[0] in (1, 3) or (shape[0] in (2, 4) and min(shape[1:]) >= 8)


def decide_reading(seen: Probed, column: str, mode: str | None, white_value: int | None, pad_value: int) -> Reading:
    """Mode, type and range in which all pictures of the data set are read.

    Args:
        mode: That the user asks for, or None.
        white_value: See `Whites.found`.

    Raises:
        ValueError: if a mode is asked for where there are no pictures.
    """
    if mode is not None and not seen.modes:
        raise ValueError(f"image_mode {mode} needs pictures, column {column!r} holds arrays")
    whites = Whites.found(seen.largest, white_value)
    own = {dtype: whites.of(dtype, largest) for dtype, largest in seen.largest.items()}
    white = max(own.values(), default=255)
    deep = any(dtype.kind == "f" for dtype in own) or white > 255
    notes = _notes_on_range(seen, whites, white_value)
    if not seen.modes:
        shape = (*seen.shape[1:], seen.shape[0]) if seen.channels_first else seen.shape
        if len(shape) == 3 and seen.shape[0] in IMAGE_MODES.values():
            layout = "channels, height, width" if seen.channels_first else "height, width, channels"
            notes.append(f"arrays of shape {seen.shape} are read as ({layout})")
        channels = shape[2] if len(shape) == 3 else 1
        return Reading(None, channels, "uint16" if deep else "uint8", whites, int(white), tuple(notes))
    modes = seen.modes if deep else Counter("L" if name == WIDE else name for name in seen.modes.elements())
    found = common_mode(modes.elements())
    notes += _notes_on_mode(modes, found, mode, pad_value)
    mode = mode or found
    wide = mode == WIDE
    return Reading(
        mode,
        IMAGE_MODES.get(mode, 1),
        "uint16" if wide else "uint8",
        whites,
        int(white) if wide else 255,
        tuple(notes),
    )


def _notes_on_range(seen: Probed, whites: Whites, white_value: int | None) -> list[str]:
    if white_value is not None and not set(seen.largest) - {np.dtype(np.uint8), np.dtype(bool)}:
        return [f"white_value {white_value} has no effect on pixels of 8 bits, as those of the first images are"]
    notes, first = [], f"of the first {len(seen.sizes)} images"
    for dtype, largest in seen.largest.items():
        white, says = whites.of(dtype, largest), "--white_value says another"
        if dtype in (np.uint8, bool):
            continue
        if white_value is not None:
            notes.append(f"{white_value} is white in {dtype} pixels; the largest {first} is {largest:g}")
        elif dtype.kind == "f":
            notes.append(f"1 is white in {dtype} pixels, which are kept in 16 bits; {says}")
        elif looks_dark(dtype, largest):
            notes.append(
                f"65535 is white in pixels of 16 bits, but the largest {first} is {largest:g}: they are dark, unless "
                f"--white_value {lowest_white(largest)} says what is white"
            )
        elif dtype != np.uint16:
            notes.append(f"{white} is white in {dtype} pixels, of which the largest {first} is {largest:g}; {says}")
    return notes


def _notes_on_mode(modes: Counter[str], found: str, asked: str | None, pad_value: int) -> list[str]:
    total, mode = modes.total(), asked or found
    with_alpha = sum(count for name, count in modes.items() if name.endswith("A"))
    colour = any(name.startswith("RGB") for name in modes)
    notes = []
    if modes[WIDE] and mode != WIDE:
        notes.append(f"{modes[WIDE]} of the first {total} images have more than 8 bits, and are read in 8")
    elif mode == WIDE and modes[WIDE] < total:
        notes.append(f"{total - modes[WIDE]} of the first {total} images have 8 bits, and are read as grey of 16")
    lossless = ("RGB" if colour else "L") + ("A" if with_alpha else "")
    if asked and asked != lossless and not modes[WIDE]:
        notes.append(f"images are read as {asked}; the narrowest mode that loses nothing is {lossless}")
    elif with_alpha and not mode.endswith("A"):
        notes.append(
            f"{with_alpha} of the first {total} images have an alpha channel: what is transparent shows {pad_value} "
            f"(--pad_value); --image_mode {'RGBA' if colour else 'LA'} keeps it"
        )
    elif asked is None and 0 < with_alpha < total:
        notes.append(
            f"images are read with the alpha channel that {with_alpha} of the first {total} have; --image_mode "
            f"{mode[:-1]} leaves it out"
        )
    return notes


def decide_fit(
    first_rows: Iterable[dict], feature: Any, column: str, config: DataConfig, multiple_of: int
) -> tuple[Fit, list[str]]:
    """The reading and resizing of all images, with a note for each decision that the user has not made.

    Args:
        first_rows: Undecoded.
        feature: What `datasets` knows of the column.
        multiple_of: See `prepare_images`.

    Raises:
        ValueError: if none of the first images can be decoded, or if it must be said which mode, size or value is meant.
    """
    pad_value = config.pad_value
    seen = probe(first_rows, feature, column)
    reading = decide_reading(seen, column, config.image_mode, config.white_value, pad_value)
    if not 0 <= pad_value <= reading.white:
        raise ValueError(
            f"pad_value must be in the range of the images, [0, {reading.white}], of which {reading.white} is white, got "
            f"{pad_value}"
        )
    size, resize_mode, note = _decide_size(seen.sizes, config.resolution, multiple_of, config.resize_mode, pad_value)
    if resize_mode == "random_crop" and any(_is_longer(of_one, size) for of_one in seen.sizes):
        note += f", of the middle where they are longer than {LONGEST} times that"
    how = Fit(
        size,
        reading.mode,
        reading.channels,
        reading.dtype,
        resize_mode,
        pad_value,
        mode_was_found=config.image_mode is None,
        whites=reading.whites,
        white=reading.white,
        array_dtype=seen.array_dtype,
        channels_first=seen.channels_first,
        own_size=seen.sizes[0] if config.resolution is None else None,
    )
    return how, [*reading.notes, *([note] if note else [])]


def _decide_size(
    sizes: list[tuple[int, int]],
    resolution: tuple[int, ...] | None,
    multiple_of: int,
    resize_mode: str,
    pad_value: int,
) -> tuple[tuple[int, int], str, str | None]:
    counts = Counter(sizes)
    own, one_size = sizes[0], len(counts) == 1
    if resolution is None:
        if not one_size:
            some = ", ".join(_text(size) for size in list(counts)[:4])
            raise ValueError(f"the images are of several sizes ({some}, ...): give --resolution, one side or H W")
        resolution = tuple(-(-side // multiple_of) * multiple_of for side in own)
        resize_mode = "pad" if resize_mode == "auto" else resize_mode
    size = (resolution[0], resolution[-1])
    if resize_mode == "auto":
        fills = all(PAD_FROM * target <= side <= target for side, target in zip(own, size, strict=True))
        resize_mode = "pad" if one_size and fills else "crop"
    if one_size and own == size:
        return size, resize_mode, None
    seen = f"{_text(own)} images" if one_size else f"images of several sizes ({_text(own)}, ...)"
    done = {
        "pad": f"centred on {_text(size)} with a border of {pad_value}",
        "crop": f"scaled to cover {_text(size)} and cropped to it",
        "random_crop": f"scaled to cover {_text(size)} and cropped to it at random places",
        "stretch": f"stretched to {_text(size)}",
    }
    return size, resize_mode, f"{seen} are {done[resize_mode]} (--resize_mode {resize_mode})"


def _is_longer(own: tuple[int, int], size: tuple[int, int]) -> bool:
    ratio = own[0] * size[1] / (own[1] * size[0])
    return max(ratio, 1 / ratio) > LONGEST


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
