"""Images and labels of a data set, decoded: bytes in a memory-mapped table.

Training then makes a batch by copying rows, and a run that resumes from a checkpoint decodes nothing that it skips.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from diffusers_ext.data.identity import DIGEST_BYTES, hash_bytes, hash_cell
from diffusers_ext.data.images import crop_at, fit
from diffusers_ext.pixels import DEFAULT_WHITES, Whites


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
        conditions: The condition image of each, like `pixels`, where they are a column of the data set.
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
    conditions: "PixelTable | None" = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, rows: np.ndarray, crops: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """The pixels of some rows, randomly cropped if `resize_mode` says so, and mirrored or not.

        Args:
            rows: int64, shape `(rows,)`.
            crops: Top and left of each crop, in [0, 1), shape `(rows, 2)`; see `crop_at`.
            flipped: bool, shape `(rows,)`.
        """
        return self._read(self.pixels, rows, crops, flipped)

    def read_conditions(self, rows: np.ndarray, crops: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """The condition images of some rows, cropped and mirrored as the images are; see `read`."""
        return self._read(self.conditions, rows, crops, flipped)

    def _read(self, table: "PixelTable", rows: np.ndarray, crops: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        pixels = table.crop(rows, crops) if self.resize_mode == "random_crop" else table[rows]
        return mirror(pixels, flipped)

    @property
    def size(self) -> tuple[int, ...]:
        """(height, width), or (length,) of sequences"""
        return self.pixels.shape[:-1]

    @property
    def resolution(self) -> tuple[int, ...]:
        """That which the option of this name gives: of latents that of their images."""
        return self.size

    @property
    def channels(self) -> int:
        return self.pixels.shape[-1]

    @property
    def dtype(self) -> np.dtype:
        return self.pixels.dtype

    def digests(self) -> np.ndarray | str:
        """A digest of each image, with its condition image, uint8, shape `(rows, 16)`; or one of all of them."""
        digests = self.pixels.digests()
        if self.conditions is None:
            return digests
        return np.stack([hash_bytes(*pair) for pair in zip(digests, self.conditions.digests(), strict=True)])

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
    """Mirrors some of the rows along their last axis but that of the channels, in place."""
    pixels[flipped] = pixels[flipped][..., ::-1, :]
    return pixels


class PixelTable:
    """Rows of pixels of one shape, read where `datasets` keeps them: nothing is copied until a row is asked for.

    Args:
        table: A dataset with the binary column `pixels`, whose rows are all of the same length.
        shape: (height, width, channels) of a row, or (length, channels).
        dtype: uint8 or uint16; float32 for sequences.
        rows: Row numbers of the table that count, in order.
    """

    def __init__(self, table: datasets.Dataset, shape: tuple[int, int, int], dtype: np.dtype, rows: np.ndarray):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._table, self._rows, self._chunks = table, rows, None

    def __len__(self) -> int:
        return len(self._rows)

    def of_rows(self, rows: np.ndarray) -> "PixelTable":
        """The same table with other row numbers that count."""
        return type(self)(self._table, self.shape, self.dtype, rows)

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


class RandomCropTable(PixelTable):
    """Rows of pictures that cover a shape and are cropped when they are read; columns `height`, `width` and `pixels`."""

    def __getitem__(self, indices: np.ndarray | list[int]) -> np.ndarray:
        """The rows, cut in the middle."""
        size = self.shape[:2]
        return np.stack([fit(picture, size, "crop") for picture in self._pictures(indices)])

    def crop(self, indices: np.ndarray | list[int], crops: np.ndarray) -> np.ndarray:
        """The rows, cropped at a top and left in [0, 1), shape `(rows, 2)`; see `crop_at`."""
        pictures, size = self._pictures(indices), self.shape[:2]
        return np.stack([crop_at(picture, size, crop) for picture, crop in zip(pictures, crops, strict=True)])

    def _pictures(self, indices: np.ndarray | list[int]) -> Iterator[np.ndarray]:
        if self._chunks is None:
            self._map()
            sizes = [self._table.data.column(name).to_numpy() for name in ("height", "width")]
            self._sizes = np.stack(sizes, axis=1)
        for row in self._rows[np.asarray(indices)]:
            chunk = np.searchsorted(self._ends, row, side="right")
            (offsets, values), index = self._chunks[chunk], row - self._starts[chunk]
            start, end = offsets[index : index + 2] // self.dtype.itemsize
            yield values[start:end].reshape(*self._sizes[row], self.shape[2])

    def _view(self, chunk: pa.BinaryArray) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of a chunk start, in bytes, and all of their values."""
        _, offsets, values = chunk.buffers()
        return np.frombuffer(offsets, np.int32)[chunk.offset :], np.frombuffer(values, self.dtype)
