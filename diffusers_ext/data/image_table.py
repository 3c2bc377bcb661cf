"""Images and labels of a data set: found, decoded and resized once, kept as bytes in a memory-mapped table.

Training then makes a batch by copying rows, and a run that goes on from a checkpoint decodes nothing that it skips.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.utils.file_utils import xopen
from PIL import Image

from diffusers_ext.data.identity import DIGEST_BYTES, hash_cell
from diffusers_ext.data.image_columns import with_image_columns
from diffusers_ext.data.images import cover, crop_at, fit
from diffusers_ext.data.label_columns import describe_feature
from diffusers_ext.data.sources import LocalFolder, Source
from diffusers_ext.pixels import DEFAULT_WHITES, Whites, image_mode, open_picture, to_array, to_range


PROBED_ROWS = 64
_CACHE_VERSION = 3  # part of the cache's key: raise it whenever the stored pixels change
_SIZE = {"height": datasets.Value("int32"), "width": datasets.Value("int32")}
_DECODED = {
    "pixels": datasets.Value("binary"),
    **_SIZE,
    "fault": datasets.Value("string"),
    "file": datasets.Value("string"),
    "digest": datasets.Value("binary"),  # of the picture's file
}


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
        whites: Which values of the images are white, where that was to be found or said.
        white: What is white in the images' own range, which `pad_value` is in.
        texts: Where labels are captions, what puts them into a batch (see `diffusers_ext.data.captions`).
        rows: Number of each image's row in the split, where some are left out; None if that is not known.
    """

    pixels: "PixelTable"
    labels: np.ndarray | None
    id2label: dict[int, str] | None
    name: str
    notes: tuple[str, ...] = ()
    resize_mode: str = "crop"
    whites: Whites = field(default=DEFAULT_WHITES, kw_only=True)
    white: int = field(default=255, kw_only=True)
    texts: Any = field(default=None, kw_only=True)
    rows: np.ndarray | None = field(default=None, kw_only=True)

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

    def digests(self) -> np.ndarray | str:
        """A digest of each image, uint8, shape `(rows, 16)`; or one of all of them."""
        return self.pixels.digests()

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
    def used_labels(self) -> list[int] | None:
        """The labels that images have, which are not all if some names stand for none; None without labels."""
        if self.labels is None:
            return None
        return (
            np.flatnonzero(self.labels.any(axis=0)).tolist()
            if self.has_label_sets
            else np.unique(self.labels).tolist()
        )

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

    def digests(self) -> np.ndarray:
        """A digest of each picture as it was before it was decoded, if the table has them, or of its pixels.

        uint8, shape `(rows, 16)`.
        """
        if "digest" in self._table.column_names:
            cells = self._table.data.column("digest").to_pylist()
            digests = np.frombuffer(b"".join(cells), np.uint8).reshape(-1, DIGEST_BYTES)[self._rows]
        else:
            cells = (hash_cell(self[[row]][0]) for row in range(len(self)))
            digests = np.frombuffer(b"".join(cells), np.uint8).reshape(-1, DIGEST_BYTES)
        return np.ascontiguousarray(digests)

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
    """The rows of `digits`, of a data set on the Hub, or of a local folder; see `open_source`."""
    return open_source(name, config_name, split, **kwargs).rows


def open_source(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    *,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> Source:
    """The rows of a split, a line on each decision about which they are, and the local files that they are from.

    Args:
        name: `digits`, a data set on the Hub, or a local folder or file (see `LocalFolder`).
        streaming: Read the rows as they are asked for, in order.

    Raises:
        ValueError: if there is no such data set, configuration or split, or it cannot be read.
    """
    if name == "digits" and not Path(name).exists():
        digits = load_digits(split)
        return Source(digits.to_iterable_dataset(num_shards=16) if streaming else digits)
    try:
        if is_local(name):
            source = LocalFolder.read(name).open(config_name, split, streaming, cache_dir)
        else:
            options = {"split": split, "streaming": streaming, "cache_dir": cache_dir}
            source = Source(datasets.load_dataset(name, config_name, **options))
    except Exception as error:  # what a reader of files or of the Hub raises, which is of many kinds
        where = "" if is_local(name) else "; it is no local folder, so it was looked for on the Hub"
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise ValueError(
            f"the split {split!r} of the data set {name!r} cannot be loaded{where}: {cause or error}"
        ) from error
    return source._replace(rows=with_image_columns(source.rows, Path(name) if is_local(name) else None))


def split_names(name: str, config_name: str | None = None) -> list[str]:
    """The splits of a data set."""
    if name == "digits" and not Path(name).exists():
        return ["train", "test"]
    if is_local(name):
        return LocalFolder.read(name).split_names(config_name)
    return datasets.get_dataset_split_names(name, config_name)


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
    # As the files of a format without compression, which are the same bytes with every PIL.
    files = [{"bytes": b"P5\n8 8\n255\n" + picture.tobytes(), "path": None} for picture in pixels]
    columns = {"image": files, "label": digits.target[rows]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def find_image_column(source: datasets.Dataset | datasets.IterableDataset, name: str | None = None) -> str:
    """The column that holds the images.

    Raises:
        ValueError: if there is none, if there are several and none is named, or if the named one holds no images.
    """
    found = {column: feature for column, feature in source.features.items() if _holds_images(feature)}
    columns = ", ".join(f"{column} ({describe_feature(feature)})" for column, feature in source.features.items())
    if name is not None and name not in found:
        reason = "holds no images" if name in source.features else "is not in the data set"
        raise ValueError(f"image_column {name!r} {reason}; its columns are: {columns}")
    if not found:
        raise ValueError(f"the data set has no column of images; its columns are: {columns}")
    # Arrays of floats can be anything, so that they are images only where nothing else is.
    likely = [column for column, feature in found.items() if not _is_float(feature)] or list(found)
    if name is None and len(likely) > 1:
        raise ValueError(f"several columns hold images ({', '.join(likely)}): name one with --image_column")
    return name or likely[0]


@dataclass(frozen=True)
class Fit:
    """How every picture is read and brought to one shape.

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

    @property
    def border(self) -> int:
        """The pad value as `dtype` has it."""
        return round(self.pad_value * int(np.iinfo(self.dtype).max) / self.white)


def decode(
    source: datasets.Dataset, column: str, how: Fit, *, max_bad_share: float = 0.01, num_proc: int | None = None
):
    """Decodes and fits every row once, with a bar; `datasets` keeps the result where it keeps the data set.

    A row that cannot be decoded is named on stderr and left out.

    Args:
        max_bad_share: Share of the rows that may fail, rounded up to a whole row.

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
    files = table.select(bad)["file"]
    for row, file in list(zip(bad, files, strict=True))[:10]:
        print(f"image {file or f'of row {row}'} left out: {faults[row]}", file=sys.stderr)
    if len(bad) > allowed_faults(len(table), max_bad_share) or len(bad) == len(table):
        raise ValueError(
            f"{len(bad)} of {len(table)} images cannot be decoded, the first in {files[0] or f'row {bad[0]}'} "
            f"({faults[bad[0]]}); at most a share of {max_bad_share:g} may fail (--max_bad_share)"
        )
    good = np.flatnonzero([not fault for fault in faults])
    kind = UncroppedTable if how.resize_mode == "random_crop" else PixelTable
    return kind(table, (*how.size, how.channels), np.dtype(how.dtype), good), good, len(bad)


def allowed_faults(count: int, max_bad_share: float) -> int:
    """How many of so many images may fail: the share, rounded up, so that a single odd file does not end a run."""
    return math.ceil(max_bad_share * count - 1e-9)  # 0.1 * 30 is above 3


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
    if how.resize_mode == "random_crop":
        return np.ascontiguousarray(cover(picture, how.size))
    return fit(picture, how.size, how.resize_mode, how.border)


def _decode_rows(rows: dict[str, list], column: str, how: Fit, version: int) -> dict[str, list]:
    done = {name: [] for name in _DECODED}
    for value in rows[column]:
        try:
            picture, fault, file = decode_one(value, how), "", ""
        except Exception as error:  # a decoder raises what it likes on a damaged file
            # A blank keeps the rows of one length, where they are.
            picture, fault = np.zeros((*how.size, how.channels), how.dtype), describe_fault(error)
            file = name_of_cell(value) or ""
        cells = (picture.tobytes(), *picture.shape[:2], fault, file, hash_cell(value))
        for name, cell in zip(_DECODED, cells, strict=True):
            done[name].append(cell)
    return done


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


def _holds_images(feature: Any) -> bool:
    arrays = datasets.Array2D | datasets.Array3D
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, arrays) and np.dtype(feature.dtype).kind in "buif"
    )


def _is_float(feature: Any) -> bool:
    return not isinstance(feature, datasets.Image) and np.dtype(feature.dtype).kind == "f"
