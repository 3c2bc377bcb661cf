"""Labels of a data set: their column, the integer of each row, and the names of the integers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np


_NO_LABELS = "there are names for labels, but the data set has no labels: name their column with --label_column"


def find_label_column(source: datasets.Dataset | datasets.IterableDataset, name: str | None = None) -> str | None:
    """The column that holds the labels, or None if the data set has none.

    Without a name that is the only column of class labels, or else a column called `label`, or the `cls` of WebDataset.

    Raises:
        ValueError: if the named column is not there or holds neither integers nor names; or if several columns could be
            meant.
    """
    features = source.features
    if name is None:
        found = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        if len(found) > 1:
            raise ValueError(f"several columns hold labels ({', '.join(found)}): name one with --label_column")
        usual = [column for column in ("label", "cls") if column in features]
        if not found + usual:
            return None
        name = (found + usual)[0]
    if name not in features:
        raise ValueError(f"label_column {name!r} is not in the data set; its columns are {', '.join(features)}")
    if not isinstance(features[name], datasets.ClassLabel | datasets.Value):
        raise ValueError(f"label_column {name!r} must hold integers or names, got {describe_feature(features[name])}")
    return name


def read_labels(
    source: datasets.Dataset, name: str | None = None, label_names: Sequence[str] | None = None
) -> tuple[np.ndarray, dict[int, str]] | None:
    """The labels, int64 in 0..n-1, and the name of each; None if the data set has no labels.

    Args:
        name: Of the column; see `find_label_column`.
        label_names: Names of 0, 1, 2, ...; None for the data set's own.

    Raises:
        ValueError: if the column is not there, or holds neither integers from 0 on nor names; or if several columns
            could be meant.
    """
    name = find_label_column(source, name)
    if name is None:
        if label_names is not None:
            raise ValueError(_NO_LABELS)
        return None
    feature = source.features[name]
    values = source.with_format("arrow")[name]
    values = values[:] if not hasattr(values, "to_pylist") else values
    if values.null_count:
        raise ValueError(f"label_column {name!r} must hold a label in every row, got {values.null_count} empty ones")
    values = np.asarray(values.to_pylist())
    if values.dtype.kind in "US":
        names, labels = np.unique(values, return_inverse=True)
        names = {label: str(text) for label, text in enumerate(names)}
        if label_names is None:
            return labels.astype(np.int64), names
        unknown = set(names.values()) - set(label_names)
        if unknown:
            raise ValueError(f"label_column {name!r} holds {sorted(unknown)[0]!r}, which is not in label_names")
        places = np.array([label_names.index(text) for text in names.values()], np.int64)
        return places[labels], dict(enumerate(label_names))
    if values.dtype.kind not in "iu":
        raise ValueError(f"label_column {name!r} must hold integers or names, got {describe_feature(feature)}")
    labels = values.astype(np.int64)
    if labels.min() < 0:
        raise ValueError(
            f"label_column {name!r} must hold integers from 0 on, got {labels.min()} (rows without label?)"
        )
    if label_names is None:
        label_names = feature.names if isinstance(feature, datasets.ClassLabel) else range(labels.max() + 1)
    if labels.max() >= len(label_names):
        raise ValueError(f"label_column {name!r} holds {labels.max()}, but label_names are {len(label_names)}")
    return labels, {label: str(text) for label, text in enumerate(label_names)}


def describe_feature(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


@dataclass(frozen=True)
class StreamLabels:
    """Labels that are read row by row, of which the names must be known beforehand.

    Args:
        column: Where they are.
        names: Of 0, 1, 2, ...
        by_name: Whether the column holds the names and not the integers.
    """

    column: str
    names: tuple[str, ...]
    by_name: bool

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    def read(self, value: Any) -> int:
        """The label of a cell.

        Raises:
            ValueError: if it is empty or none of the labels that there are.
        """
        if self.by_name and value in self.names:
            return self.names.index(value)
        if not self.by_name and isinstance(value, int) and 0 <= value < len(self.names):
            return value
        accepted = "one of the label_names" if self.by_name else f"an integer in [0, {len(self.names) - 1}]"
        raise ValueError(f"label_column {self.column!r} must hold {accepted} in every row, got {value!r}")


def find_stream_labels(
    source: datasets.IterableDataset, name: str | None = None, label_names: Sequence[str] | None = None
) -> StreamLabels | None:
    """How to read the labels of a stream; None if it has none.

    Args:
        name, label_names: See `read_labels`.

    Raises:
        ValueError: see `find_label_column`; and if the names are neither given nor known to the data set.
    """
    name = find_label_column(source, name)
    if name is None:
        if label_names is not None:
            raise ValueError(_NO_LABELS)
        return None
    feature = source.features[name]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names) if label_names is None else tuple(label_names)
        if len(names) != len(feature.names):
            raise ValueError(
                f"label_column {name!r} has {len(feature.names)} labels, but label_names are {len(names)}"
            )
        return StreamLabels(name, names, by_name=False)
    kind = feature.dtype
    if kind not in ("string", "large_string") and not kind.startswith(("int", "uint")):
        raise ValueError(f"label_column {name!r} must hold integers or names, got {kind}")
    by_name = "string" in kind
    if label_names is None:
        give = "--label_names, all of them in order," if by_name else "--num_classes, the number of labels,"
        raise ValueError(
            f"label_column {name!r} holds {'names' if by_name else 'integers'}, and a stream is not read ahead to find all "
            f"of them: give {give} or --unconditional"
        )
    return StreamLabels(name, tuple(label_names), by_name)
