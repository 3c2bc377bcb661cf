"""Sequences of a data set: numbers over time, in one channel or several, as rows of float32 in a memory-mapped table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np

from diffusers_ext.command_names import name_commands
from diffusers_ext.data.image_table import ImageData, PixelTable, mirror
from diffusers_ext.value_scale import ValueScale


_MEASURED_ROWS = 1024  # at a time


@dataclass(frozen=True)
class SequenceData(ImageData):
    """A prepared data set of sequences.

    Attributes:
        pixels: Takes row numbers, gives `(rows, length, channels)`, float32, in the data's own units.
        resize_mode: "pad", "crop" or "random_crop".
        value_scale: Between own units and what is read.
    """

    value_scale: ValueScale = field(default=None, kw_only=True)

    def read(self, rows: np.ndarray, crops: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """Some rows in about [-1, 1], cut at random if `resize_mode` says so, and turned round in time or not."""
        values = self.pixels.cut(rows, crops[:, 0]) if self.resize_mode == "random_crop" else self.pixels[rows]
        return mirror(self.value_scale.normalized(values), flipped)


class SequenceTable(PixelTable):
    """Rows of at least the length of a shape, which are cut to it when they are read; columns `height` and `pixels`.

    Args:
        table, rows: See `PixelTable`.
        shape: (length, channels) of what is read.
    """

    def __init__(self, table: datasets.Dataset, shape: tuple[int, int], rows: np.ndarray):
        super().__init__(table, shape, np.dtype(np.float32), rows)

    def __getitem__(self, indices: np.ndarray | list[int]) -> np.ndarray:
        """The middle of the rows."""
        length = self.shape[0]
        middles = [row[(len(row) - length) // 2 :][:length] for row in self.whole(indices)]
        return np.stack(middles) if middles else np.empty((0, *self.shape), np.float32)

    def cut(self, indices: np.ndarray | list[int], starts: np.ndarray) -> np.ndarray:
        """A part of each row, from a start in [0, 1) on, of which uniform ones make each part equally likely."""
        length, values = self.shape[0], np.empty((len(indices), *self.shape), np.float32)
        for out, row, start in zip(values, self.whole(indices), starts, strict=True):
            first = int(start * (len(row) - length + 1))
            out[...] = row[first : first + length]
        return values

    def whole(self, indices: np.ndarray | list[int]) -> Iterator[np.ndarray]:
        """The rows as they are, each of shape `(its length, channels)`."""
        if self._chunks is None:
            self._map()
        for row in self._rows[np.asarray(indices)]:
            chunk = np.searchsorted(self._ends, row, side="right")
            (offsets, values), index = self._chunks[chunk], row - self._starts[chunk]
            start, end = offsets[index : index + 2] // 4
            yield values[start:end].reshape(-1, self.shape[1])

    def _view(self, chunk: Any) -> tuple[np.ndarray, np.ndarray]:
        """Where the rows of a chunk start, in bytes, and all of their values."""
        _, offsets, values = chunk.buffers()
        return np.frombuffer(offsets, np.int32)[chunk.offset :], np.frombuffer(values, np.float32)


def measure_scale(table: PixelTable, kind: str) -> ValueScale:
    """The scale of all values of a table.

    Args:
        kind: "min_max", by which the smallest value becomes -1 and the largest 1; or "mean_max", by which the mean
            becomes 0 and the value that is farthest from it -1 or 1.

    Raises:
        ValueError: if all values are the same, or too large beside what differs in them.
    """
    low, high, total, count = np.inf, -np.inf, 0.0, 0
    for start in range(0, len(table), _MEASURED_ROWS):
        rows = np.arange(start, min(start + _MEASURED_ROWS, len(table)))
        parts = table.whole(rows) if isinstance(table, SequenceTable) else [table[rows].reshape(-1, table.shape[1])]
        for values in parts:
            low, high = np.minimum(low, values.min(0)), np.maximum(high, values.max(0))
            total, count = total + values.sum(0, dtype=np.float64), count + len(values)
    return ValueScale.of_range(low, high, total / count if kind == "mean_max" else None)


def refuse_sequences(data: Any, what: str) -> None:
    """Refuses data of sequences where only images are taken.

    Args:
        data: As prepared, for training or for evaluation.
        what: That takes images, for the user.

    Raises:
        ValueError: if so.
    """
    if isinstance(data, SequenceData) or getattr(data, "value_scale", None) is not None:
        raise ValueError(
            name_commands(
                f"{what} takes images, and {data.name} holds sequences, which training/train_ddpm.py, "
                "training/train_vae.py, training/train_features.py, training/cache_latents.py and training/evaluate.py take"
            )
        )


def in_scale_of(config: Mapping[str, Any], data: Any, given: str | None, refusal: str) -> Any:
    """The data, of sequences in the scale that the config of a trained model says, if it says one.

    Args:
        given: A scale that the options ask for.
        refusal: The error of one beside the model's.

    Raises:
        ValueError: if both say one.
    """
    scale = ValueScale.of_config(config.get("value_scale"))
    if scale is None or not isinstance(data, SequenceData):
        return data
    if given is not None:
        raise ValueError(refusal)
    return replace(data, value_scale=scale)
