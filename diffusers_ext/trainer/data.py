"""Images and labels of a data set: found, decoded and resized once, kept as bytes in a memory-mapped table.

Training then makes a batch by copying rows, and a run that goes on from a checkpoint decodes nothing that it skips.
"""

import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import ExifTags, Image, ImageOps

from diffusers_ext.trainer.images import common_mode, cover, crop_at, fit, image_mode, to_array
from diffusers_ext.trainer.labels import describe_feature


PROBED_ROWS = 64
_CACHE_VERSION = 2  # part of the cache's key: raise it whenever the stored pixels change
_SIZE = {"height": datasets.Value("int32"), "width": datasets.Value("int32")}
_DECODED = {"pixels": datasets.Value("binary"), **_SIZE, "fault": datasets.Value("string")}


@dataclass(frozen=True)
class ImageData:
    """A prepared data set.

    Attributes:
        pixels: Takes row numbers, gives `(rows, height, width, channels)`, uint8 or uint16.
        labels: int64, shape `(rows,)`; or bool, shape `(rows, labels)`, with several labels an image; or None.
        id2label: Name of each label, or None.
        name: What the user called the data set.
        notes: One line for each decision that a user may want to know of.
        resize_mode: How pictures of another size were brought to this one, one of `RESIZE_MODES`. With "random_crop"
            rows of `pixels` are cut in the middle, and `pixels.crop` cuts them elsewhere.
        texts: Where labels are captions, what puts them into a batch (see `diffusers_ext.trainer.captions`).
    """

    pixels: "PixelTable"
    labels: np.ndarray | None
    id2label: dict[int, str] | None
    name: str
    notes: tuple[str, ...] = ()
    resize_mode: str = "crop"
    texts: Any = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, rows: np.ndarray, places: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """The pixels of some rows, cut at places in [0, 1) where they are cropped at random, and mirrored or not.

        Args:
            rows, places, flipped: int64 of shape `(rows,)`, float of shape `(rows, 2)` and bool of shape `(rows,)`.
        """
        pixels = self.pixels.crop(rows, places) if self.resize_mode == "random_crop" else self.pixels[rows]
        return mirror(pixels, flipped)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.pixels.shape[:2]

    @property
    def channels(self) -> int:
        return self.pixels.shape[2]

    @property
    def dtype(self) -> np.dtype:
        return self.pixels.dtype

    def with_condition(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with what its labels are to a network, where that is not their numbers."""
        return batch if self.texts is None else self.texts.put_into(batch)

    @property
    def num_images(self) -> int:
        return len(self)

    @property
    def num_classes(self) -> int | None:
        return None if self.id2label is None else len(self.id2label)

    @property
    def has_label_sets(self) -> bool:
        """Whether an image can have several labels."""
        return self.labels is not None and self.labels.ndim == 2

    @property
    def has_unlabelled(self) -> bool:
        """Whether there is an image whose set of labels is empty."""
        return self.has_label_sets and not self.labels.any(axis=1).all()


def mirror(pixels: np.ndarray, flipped: np.ndarray) -> np.ndarray:
    """Mirrors some of the rows left to right, in place."""
    pixels[flipped] = pixels[flipped, :, ::-1]
    return pixels


class PixelTable:
    """Rows of pixels of one shape, read where `datasets` keeps them: nothing is copied until a row is asked for.

    Args:
        table: A dataset with the binary column `pixels`, whose rows are all of the same length.
        shape: (height, width, channels) of a row.
        dtype: uint8 or uint16.
        rows: Row numbers of the table that count, in order.
    """

    def __init__(self, table: datasets.Dataset, shape: tuple[int, int, int], dtype: np.dtype, rows: np.ndarray):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._table, self._rows, self._chunks = table, rows, None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: np.ndarray | list[int]) -> np.ndarray:
        if self._chunks is None:
            self._map()
        pixels = np.empty((len(indices), *self.shape), self.dtype)
        rows = self._rows[np.asarray(indices)]
        chunks = np.searchsorted(self._ends, rows, side="right")
        for out, row, chunk in zip(pixels, rows, chunks, strict=True):
            out[...] = self._chunks[chunk][row - self._starts[chunk]]
        return pixels

    def _map(self):
        chunks = self._table.data.column("pixels").chunks
        self._chunks = [self._view(chunk) for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in chunks])
        self._starts = self._ends - [len(chunk) for chunk in chunks]

    def _view(self, chunk: pa.BinaryArray) -> np.ndarray:
        """The rows of a chunk, where they are."""
        _, offsets, values = chunk.buffers()
        count = int(np.prod(self.shape))
        start = np.frombuffer(offsets, np.int32)[chunk.offset] // self.dtype.itemsize
        view = np.frombuffer(values, self.dtype, count=start + len(chunk) * count)[start:]
        return view.reshape(len(chunk), *self.shape)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_chunks": None}  # a spawned worker maps the file itself


class UncroppedTable(PixelTable):
    """Rows of pictures that cover a shape and are kept whole, with the columns `height` and `width` besides `pixels`."""

    def __getitem__(self, indices: np.ndarray | list[int]) -> np.ndarray:
        """The rows, cut in the middle."""
        size = self.shape[:2]
        return np.stack([fit(picture, size, "crop") for picture in self._pictures(indices)])

    def crop(self, indices: np.ndarray | list[int], places: np.ndarray) -> np.ndarray:
        """The rows, cut at places in [0, 1) of shape `(rows, 2)`; see `crop_at`."""
        pictures, size = self._pictures(indices), self.shape[:2]
        return np.stack([crop_at(picture, size, place) for picture, place in zip(pictures, places, strict=True)])

    def _pictures(self, indices: np.ndarray | list[int]) -> Iterator[np.ndarray]:
        if self._chunks is None:
            self._map()
            sizes = [self._table.data.column(name).to_numpy() for name in ("height", "width")]
            self._sizes = np.stack(sizes, axis=1)
        for row in self._rows[np.asarray(indices)]:
            chunk = np.searchsorted(self._ends, row, side="right")
            (offsets, values), place = self._chunks[chunk], row - self._starts[chunk]
            start, end = offsets[place : place + 2] // self.dtype.itemsize
            yield values[start:end].reshape(*self._sizes[row], self.shape[2])

    def _view(self, chunk: pa.BinaryArray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of a chunk start, in bytes, and all of their values."""
        _, offsets, values = chunk.buffers()
        return np.frombuffer(offsets, np.int32)[chunk.offset :], np.frombuffer(values, self.dtype)


def is_local(name: str) -> bool:
    """Whether a data set is not looked for on the Hub."""
    return name == "digits" or Path(name).exists()


def load_source(
    name: str, config_name: str | None = None, split: str = "train", **kwargs
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows of `digits`, of a data set on the Hub, or of a local folder that `datasets.load_dataset` reads.

    With `streaming=True` they are read as they are asked for, in order.

    Raises:
        ValueError: if there is no such data set, configuration or split, or it cannot be read.
    """
    if name == "digits" and not Path(name).exists():
        digits = load_digits(split)
        return digits.to_iterable_dataset(num_shards=16) if kwargs.get("streaming") else digits
    try:
        return datasets.load_dataset(name, config_name, split=split, **kwargs)
    except Exception as error:  # what a reader of files or of the Hub raises, which is of many kinds
        where = "" if is_local(name) else "; it is no local folder, so it was looked for on the Hub"
        raise ValueError(f"the split {split!r} of the data set {name!r} cannot be loaded{where}: {error}") from error


def load_digits(split: str = "train") -> datasets.Dataset:
    """scikit-learn's 1797 handwritten digits, 8x8 grey: `train` is a draw of 1500, `test` the other 297.

    Drawn by label and not taken in file order, where the last rows differ: a classifier (SVC) of the first 1500 reads
    95 % of them, one of a draw 98 % of the others.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(np.arange(1797), test_size=297, stratify=digits.target, random_state=0)
    splits = {"train": np.sort(train), "test": np.sort(test), "train+test": np.arange(1797)}
    if split not in splits:
        raise ValueError(f"the split of digits must be one of {', '.join(splits)}, got {split!r}")
    rows = splits[split]
    pixels = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    columns = {"image": [Image.fromarray(picture) for picture in pixels], "label": digits.target[rows]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def find_image_column(source: datasets.Dataset | datasets.IterableDataset, name: str | None = None) -> str:
    """The column that holds the images.

    Raises:
        ValueError: if there is none, if there are several and none is named, or if the named one holds no images.
    """
    found = [column for column, feature in source.features.items() if _holds_images(feature)]
    columns = ", ".join(f"{column} ({describe_feature(feature)})" for column, feature in source.features.items())
    if name is not None and name not in found:
        reason = "holds no images" if name in source.features else "is not in the data set"
        raise ValueError(f"image_column {name!r} {reason}; its columns are: {columns}")
    if not found:
        raise ValueError(f"the data set has no column of images; its columns are: {columns}")
    if name is None and len(found) > 1:
        raise ValueError(f"several columns hold images ({', '.join(found)}): name one with --image_column")
    return name or found[0]


@dataclass(frozen=True)
class Fit:
    """How every picture is brought to one shape: (height, width), PIL mode or number of bands, and the way there.

    If the mode was found on the first pictures, and not asked for, one that holds more than it is a fault.
    """

    size: tuple[int, int]
    mode: str | None
    channels: int
    dtype: str
    resize_mode: str
    pad_value: int
    mode_was_found: bool = False


def decode(
    source: datasets.Dataset, column: str, how: Fit, *, max_bad_share: float = 0.01, num_proc: int | None = None
):
    """Decodes and fits every row once, with a bar; `datasets` keeps the result where it keeps the data set.

    A row that cannot be decoded is named on stderr and left out.

    Args:
        max_bad_share: Share of the rows that may fail.

    Returns:
        The pixels (`PixelTable`), the numbers of the rows that they come from, and the number of rows that fail.

    Raises:
        ValueError: if more than `max_bad_share` of the rows fail, or all of them.
    """
    bytes_per_row = int(np.prod(how.size)) * how.channels * np.dtype(how.dtype).itemsize
    rows_per_chunk = int(np.clip(2**26 // bytes_per_row, 1, 1000))
    table = undecoded(source.select_columns([column]), column).map(
        _decode_rows,
        batched=True,
        batch_size=rows_per_chunk,
        writer_batch_size=rows_per_chunk,
        remove_columns=[column],
        features=datasets.Features(_DECODED),
        fn_kwargs={"column": column, "how": how, "version": _CACHE_VERSION},
        num_proc=num_proc if num_proc and num_proc > 1 else None,
        desc="decoding images",
    )
    faults = table.data.column("fault").to_pylist()
    bad = [row for row, fault in enumerate(faults) if fault]
    for row in bad[:10]:
        print(f"image of row {row} left out: {faults[row]}", file=sys.stderr)
    if len(bad) > max_bad_share * len(table):
        raise ValueError(
            f"{len(bad)} of {len(table)} images cannot be decoded, the first in row {bad[0]} ({faults[bad[0]]}); "
            f"at most a share of {max_bad_share:g} may fail (--max_bad_share)"
        )
    good = np.flatnonzero([not fault for fault in faults])
    kind = UncroppedTable if how.resize_mode == "random_crop" else PixelTable
    return kind(table, (*how.size, how.channels), np.dtype(how.dtype), good), good, len(bad)


def probe(rows: Iterable[dict], feature: Any, column: str) -> tuple[list[tuple[int, int]], set[str], np.ndarray]:
    """Sizes (height, width) and modes of the rows that can be decoded, and the first of them as an array.

    Columns of arrays have no PIL mode: the set is empty.

    Args:
        rows: The first rows, undecoded.
        feature: What `datasets` knows of the column.
    """
    dtype = "uint8" if getattr(feature, "dtype", None) == "uint8" else "uint16"
    sizes, modes, first, count, fault = [], set(), None, 0, "the data set is empty"
    for row in rows:
        count += 1
        try:
            picture = _read(row[column], dtype)
        except Exception as error:
            fault = error
            continue
        if isinstance(picture, Image.Image):
            modes.add(image_mode(picture))
            sizes.append(picture.size[::-1])
        else:
            sizes.append(picture.shape[:2])
        first = picture if first is None else first
    if first is None:
        raise ValueError(f"none of the first {count} images can be decoded; the last one: {fault}")
    mode = common_mode(modes) if modes else None
    return sizes, modes, to_array(first, mode) if mode else first


def undecoded(
    rows: datasets.Dataset | datasets.IterableDataset, column: str
) -> datasets.Dataset | datasets.IterableDataset:
    """The rows with the bytes or the paths of the images in place of the images."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.decode(False)  # also what fetches and decodes in threads, as folders on the Hub do
    if isinstance(rows.features[column], datasets.Image):
        return rows.cast_column(column, datasets.Image(decode=False))
    return rows


def decode_one(value: Any, how: Fit) -> np.ndarray:
    """The picture of an undecoded cell, brought to its shape; to one that covers it with "random_crop".

    Raises:
        Exception: whatever a decoder raises on a damaged file.
    """
    picture = _read(value, how.dtype)
    if isinstance(picture, Image.Image):
        if how.mode_was_found and common_mode({how.mode, image_mode(picture)}) != how.mode:
            raise ValueError(
                f"a picture of mode {image_mode(picture)}, where the first ones are all {how.mode}: give --image_mode to "
                "read all of them alike"
            )
        picture = to_array(picture, how.mode, how.pad_value)
    if picture.shape[2] != how.channels:
        raise ValueError(f"{picture.shape[2]} channels where the first row has {how.channels}")
    if how.resize_mode == "random_crop":
        return cover(picture, how.size)
    return fit(picture, how.size, how.resize_mode, how.pad_value)


def _decode_rows(rows: dict[str, list], column: str, how: Fit, version: int) -> dict[str, list]:
    done = {name: [] for name in _DECODED}
    for value in rows[column]:
        try:
            picture, fault = decode_one(value, how), ""
        except Exception as error:  # a decoder raises what it likes on a damaged file
            # A blank keeps the rows of one length, where they are.
            picture, fault = np.zeros((*how.size, how.channels), how.dtype), describe_fault(error)
        cells = (picture.tobytes(), *picture.shape[:2], fault)
        for name, cell in zip(_DECODED, cells, strict=True):
            done[name].append(cell)
    return done


def describe_fault(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _read(value: Any, dtype: str) -> Image.Image | np.ndarray:
    """A decoded picture from a cell of an image column, or an array (height, width, channels) from one of arrays."""
    if value is None:
        raise ValueError("the cell is empty")
    if not isinstance(value, dict):
        array, limit = np.asarray(value), np.iinfo(dtype).max
        if array.min() < 0 or array.max() > limit:
            raise ValueError(f"values must be in [0, {limit}], got [{array.min()}, {array.max()}]")
        array = array.astype(dtype)
        return array if array.ndim == 3 else array[..., None]
    if value["bytes"] is None and "://" in value["path"]:  # in an archive, or on the Hub
        return datasets.Image().decode_example(value)
    picture = Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])
    picture.load()
    if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # a camera that was held upright, or on its head
        picture = ImageOps.exif_transpose(picture)
    return picture


def _holds_images(feature: Any) -> bool:
    integers = ("uint8", "uint16", "int32", "int64")
    arrays = datasets.Array2D | datasets.Array3D
    return isinstance(feature, datasets.Image) or (isinstance(feature, arrays) and feature.dtype in integers)
