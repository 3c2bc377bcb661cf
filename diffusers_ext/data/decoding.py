"""From the cells of an image column to pixels of one shape: of one cell, or of all rows, once, into a table.

A cell is undecoded: the bytes or the path of a picture's file, or an array. Its `pixels` are uint8 or uint16.
"""

import hashlib
import math
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils.file_utils import xopen
from PIL import Image

from diffusers_ext.data.identity import hash_cell
from diffusers_ext.data.image_columns import undecoded
from diffusers_ext.data.image_table import PixelTable, RandomCropTable
from diffusers_ext.data.images import cover, fit
from diffusers_ext.pixels import DEFAULT_WHITES, Whites, image_mode, limits_of_pixels, open_picture, to_array, to_range


if TYPE_CHECKING:
    from diffusers_ext.data.sequence_columns import SequenceFit


_CACHE_VERSION = 3  # part of the cache's key: raise it whenever the stored pixels change
_DECODED = {
    "pixels": datasets.Value("binary"),
    "height": datasets.Value("int32"),
    "width": datasets.Value("int32"),
    "fault": datasets.Value("string"),
    "file": datasets.Value("string"),
    "digest": datasets.Value("binary"),  # of the picture's file
}


@dataclass(frozen=True)
class Fit:
    """The reading and resizing that bring every picture to one shape.

    Attributes:
        size: (height, width)
        mode: PIL mode to read pictures in; None for arrays.
        channels: Of a picture.
        dtype: uint8 or uint16; its largest value is white.
        resize_mode, pad_value: See `fit`; the latter in the images' own range, in which `white` is white.
        mode_was_found: The mode was found on the first pictures, and not asked for: one that has colour, where they have
            none, is a fault.
        whites: Which values are white.
        array_dtype: Of a column of arrays.
        channels_first: Whether its arrays are (channels, height, width).
        own_size: (height, width) that all of the first pictures have, where nobody gave a size: another one is a fault.
    """

    size: tuple[int, int]
    mode: str | None
    channels: int
    dtype: str
    resize_mode: str
    pad_value: int
    mode_was_found: bool = False
    whites: Whites = DEFAULT_WHITES
    white: int = 255
    array_dtype: str | None = None
    channels_first: bool = False
    own_size: tuple[int, int] | None = None

    noun: ClassVar[str] = "image"

    @property
    def bytes_per_row(self) -> int:
        return math.prod(self.size) * self.channels * np.dtype(self.dtype).itemsize

    def decode(self, value: Any) -> np.ndarray:
        return decode_cell(value, self)

    def table(self, table: datasets.Dataset, rows: np.ndarray) -> PixelTable:
        """The decoded rows, as they are read."""
        kind = RandomCropTable if self.resize_mode == "random_crop" else PixelTable
        return kind(table, (*self.size, self.channels), np.dtype(self.dtype), rows)

    @property
    def border(self) -> int:
        """The pad value as `dtype` has it."""
        return round(self.pad_value * int(np.iinfo(self.dtype).max) / self.white)


def decode_cell(value: Any, how: Fit) -> np.ndarray:
    """The picture of an undecoded cell, brought to its shape; to one that covers it with "random_crop".

    Raises:
        Exception: whatever a decoder raises on a damaged file.
    """
    picture = read_cell(value, how.array_dtype)
    if isinstance(picture, Image.Image):
        mode = image_mode(picture)
        if how.mode_was_found and mode.startswith("RGB") and not how.mode.startswith("RGB"):
            raise ValueError(
                f"a picture of mode {mode}, where the first ones are all {how.mode}: give --image_mode to read all of them "
                "alike"
            )
        picture = to_array(picture, how.mode, how.border, how.whites)
    else:
        picture = to_range(picture, np.dtype(how.dtype), how.whites)
        picture = np.moveaxis(picture, 0, -1) if how.channels_first else picture
        picture = picture if picture.ndim == 3 else picture[..., None]
    if picture.shape[2] != how.channels:
        raise ValueError(f"{picture.shape[2]} channels where the first row has {how.channels}")
    if how.own_size not in (None, picture.shape[:2]):
        got, expected = ("x".join(map(str, size)) for size in (picture.shape[:2], how.own_size))
        raise ValueError(
            f"a size of {got} where the first images are all {expected}: give --resolution to bring all of them to one size"
        )
    if how.resize_mode == "random_crop":
        return np.ascontiguousarray(cover(picture, how.size))
    return fit(picture, how.size, how.resize_mode, how.border)


def describe_fault(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def name_of_cell(value: Any) -> str | None:
    """The file of an undecoded cell, if it is known."""
    return value.get("path") if isinstance(value, dict) else None


def read_cell(value: Any, array_dtype: str | None = None) -> Image.Image | np.ndarray:
    """The decoded picture of an undecoded cell of an image column, or the array of one of arrays, as it is stored.

    Args:
        array_dtype: Of a column of arrays.
    """
    if value is None:
        raise ValueError("the cell is empty")
    if not isinstance(value, dict):
        return np.asarray(value, array_dtype)
    if value["bytes"] is not None:
        return open_picture(value["bytes"])
    if value["path"] is None:
        raise ValueError("the cell has neither bytes nor a path")
    if "://" not in value["path"]:
        return open_picture(value["path"])
    with xopen(value["path"], "rb") as file:  # in an archive, or on the Hub
        return open_picture(file.read())


def decode_rows(
    source: datasets.Dataset,
    column: str,
    how: "Fit | SequenceFit",
    *,
    max_bad_share: float = 0.01,
    num_proc: int | None = None,
    like: str | None = None,
):
    """Decodes and fits every row once, with a bar; `datasets` keeps the result where it keeps the data set.

    Files that rows name are read anew when their sizes or times have changed, and all when a picture may have more or fewer
    pixels than then, since those that were left out are kept as such. A row that cannot be decoded is named on stderr and left out.

    Args:
        max_bad_share: Share of the rows that may fail, rounded up to a whole row.
        like: Another column of images: a row whose two pictures differ in size fails.

    Returns:
        The pixels (`PixelTable`), the numbers of the rows that they come from, and the number of rows that fail.

    Raises:
        ValueError: if more than `max_bad_share` of the rows fail, or all of them.
    """
    rows_per_chunk = int(np.clip(2**26 // how.bytes_per_row, 1, 1000))
    columns = [column] if like is None else [column, like]
    rows = source.select_columns(columns)
    for each in columns:
        rows = undecoded(rows, each)
    key = (_CACHE_VERSION, limits_of_pixels(), _state_of_files(rows, columns))
    table = rows.map(
        _decode_batch,
        batched=True,
        batch_size=rows_per_chunk,
        writer_batch_size=rows_per_chunk,
        remove_columns=columns,
        features=datasets.Features(_DECODED),
        fn_kwargs={"column": column, "how": how, "key": key} | ({} if like is None else {"like": like}),
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        desc=f"decoding {how.noun}s",
    )
    faults = table.data.column("fault").to_pylist()
    bad = [row for row, fault in enumerate(faults) if fault]
    files = table.select(bad)["file"]
    for row, file in list(zip(bad, files, strict=True))[:10]:
        print(f"{how.noun} {file or f'of row {row}'} left out: {faults[row]}", file=sys.stderr)
    if len(bad) > allowed_faults(len(table), max_bad_share) or len(bad) == len(table):
        raise ValueError(
            f"{len(bad)} of {len(table)} {how.noun}s cannot be decoded, the first in {files[0] or f'row {bad[0]}'} "
            f"({faults[bad[0]]}); at most a share of {max_bad_share:g} may fail (--max_bad_share)"
        )
    good = np.flatnonzero([not fault for fault in faults])
    return how.table(table, good), good, len(bad)


def _decode_batch(
    rows: dict[str, list], column: str, how: "Fit | SequenceFit", key: tuple, like: str | None = None
) -> dict[str, list]:
    """The decoded cells of some rows.

    Args:
        key: What the result depends on beside the arguments, by which `datasets` finds it again.
    """
    done = {name: [] for name in _DECODED}
    for row, value in enumerate(rows[column]):
        try:
            if like is not None:
                check_same_size(value, rows[like][row])
            picture, fault, file = how.decode(value), "", ""
        except Exception as error:  # a decoder raises what it likes on a damaged file
            # A blank keeps the rows of one length, where they are.
            picture, fault = np.zeros((*how.size, how.channels), how.dtype), describe_fault(error)
            file = name_of_cell(value) or ""
        cells = (picture.tobytes(), *picture.shape[:2], fault, file, hash_cell(value))
        for name, cell in zip(_DECODED, cells, strict=True):
            done[name].append(cell)
    return done


def _state_of_files(rows: datasets.Dataset, columns: list[str]) -> str | None:
    """A digest of paths, sizes and times of the local files that cells name instead of holding their bytes.

    Rows of a table stay the same when such a file changes. None if there are no such files.
    """
    types = {name: rows.data.column(name) for name in columns}
    named = [name for name in columns if pa.types.is_struct(types[name].type) and _bytes_of(types[name]).null_count]
    if not named:
        return None
    digest = hashlib.sha256()
    for batch in rows.select_columns(named).with_format("arrow").iter(1000):
        for name in named:
            cells = batch.column(name)
            for path in pc.struct_field(cells, "path").filter(_bytes_of(cells).is_null()).to_pylist():
                if path is not None and "://" not in path:
                    digest.update(repr((path, *_size_and_time(path))).encode())
    return digest.hexdigest()


def _bytes_of(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.struct_field(cells, "bytes")


def _size_and_time(path: str) -> tuple[int, ...]:
    try:
        state = os.stat(path)
    except OSError:  # what is missing is said when it is decoded
        return ()
    return state.st_size, state.st_mtime_ns


def check_same_size(condition: Any, image: Any) -> None:
    """Refuses an undecoded condition image of another size than its image.

    Raises:
        ValueError: with both sizes.
    """
    sizes = [_size_of(read_cell(cell)) for cell in (condition, image)]
    if sizes[0] != sizes[1]:
        got, expected = ("x".join(map(str, size)) for size in sizes)
        raise ValueError(f"a condition image must have the size of its image, {expected}, got {got}")


def _size_of(picture: Image.Image | np.ndarray) -> tuple[int, ...]:
    """(height, width) of a picture; of an array of channels first or last, its two longer axes."""
    if isinstance(picture, Image.Image):
        return picture.size[::-1]
    shape = list(picture.shape)
    if len(shape) == 3:
        shape.pop(0 if shape[0] < shape[2] else 2)
    return tuple(shape)


def allowed_faults(count: int, max_bad_share: float) -> int:
    """The number of `count` images that may fail: the share, rounded up, so that one damaged file does not end a run."""
    return math.ceil(max_bad_share * count - 1e-9)  # 0.1 * 30 is above 3
