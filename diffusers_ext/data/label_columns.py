"""Labels of a data set: their column, the integer of each row or the set of them, and the names of the integers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from diffusers_ext.data.folders import sort_names
from diffusers_ext.data.label_sets import LabelSets, cells_of, find_label_sets, first_names, member_of


_NO_LABELS = "there are names for labels, but the data set has no labels: name their column with --label_column"


def find_label_column(source: datasets.Dataset | datasets.IterableDataset, name: str | None = None) -> str | None:
    """The column that holds the labels, or None if the data set has none.

    Without a name that is the only column of class labels, or else a column called `label`, or the `cls` of WebDataset, or
    else the only column of lists of class labels.

    Raises:
        ValueError: if the named column is not there or holds neither integers nor names nor lists of them; or if several
            columns could be meant.
    """
    features = source.features
    if name is None:
        found = _columns_of_class_labels(features)
        usual = [column for column in ("label", "cls") if column in features]
        sets = [] if found + usual else _columns_of_class_labels(_members(features))
        if len(found + sets) > 1:
            raise ValueError(f"several columns hold labels ({', '.join(found + sets)}): name one with --label_column")
        if not found + usual + sets:
            return None
        name = (found + usual + sets)[0]
    if name not in features:
        raise ValueError(f"label_column {name!r} is not in the data set; its columns are {', '.join(features)}")
    if not isinstance(member_of(features[name]) or features[name], datasets.ClassLabel | datasets.Value):
        raise ValueError(
            f"label_column {name!r} must hold integers or names, or lists of them, got {describe_feature(features[name])}"
        )
    return name


def _members(features: datasets.Features) -> dict[str, Any]:
    return {column: member_of(feature) for column, feature in features.items()}


def _columns_of_class_labels(features: Mapping[str, Any]) -> list[str]:
    return [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]


def read_labels(
    source: datasets.Dataset, name: str | None = None, label_names: Sequence[str] | None = None
) -> tuple[np.ndarray, dict[int, str]] | None:
    """The labels, int64 in 0..n-1, and the name of each; None if the data set has no labels.

    Labels are those that occur, in the order of their names; integers such as years are names too, in the order of their
    values. Of class labels, and where `label_names` says so, there are all that have names, whether or not they occur.
    With several labels an image they are bool, shape `(rows, n)`: see `LabelSets`.

    Args:
        name: Of the column; see `find_label_column`.
        label_names: Names of 0, 1, 2, ...; if all of them are integers, they are those in the column. None for the data
            set's own.

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
    values = _column(source, name)
    if values.null_count:
        raise ValueError(f"label_column {name!r} must hold a label in every row, got {values.null_count} empty ones")
    values = values.to_pylist()
    if member_of(feature) is not None:
        sets = find_label_sets(feature, name, label_names, values)
        return np.stack([sets.read(value) for value in values]), sets.id2label
    is_text = len(values) > 0 and all(isinstance(value, str) for value in values)
    if not is_text and np.asarray(values).dtype.kind not in "iu":
        raise ValueError(f"label_column {name!r} must hold integers or names, got {describe_feature(feature)}")
    if not is_text and min(values) < 0:
        raise ValueError(
            f"label_column {name!r} must hold integers from 0 on, got {min(values)} (rows without label?)"
        )
    if isinstance(feature, datasets.ClassLabel):
        cells = range(len(label_names or feature.names))
        names = label_names or feature.names
    elif label_names is not None:
        cells, names = cells_of(label_names, is_text), label_names
    else:
        cells = sort_names(values) if is_text else sorted(set(values))
        names = cells
    numbers = {cell: label for label, cell in enumerate(cells)}
    unknown = set(values) - numbers.keys()
    if unknown:
        raise ValueError(
            f"label_column {name!r} holds {min(unknown)!r}, which is not in label_names ({first_names(names)})"
        )
    labels = np.fromiter((numbers[value] for value in values), np.int64, len(values))
    return labels, {label: str(text) for label, text in enumerate(names)}


def _column(source: datasets.Dataset, name: str) -> pa.ChunkedArray:
    values = source.with_format("arrow")[name]
    return values if hasattr(values, "to_pylist") else values[:]


def fair_share(source: datasets.Dataset, count: int, label_column: str | None = None) -> np.ndarray:
    """Numbers of `count` rows, in order: of each label its share, to one row, and of its rows those that a draw takes.

    The draw is always the same, so that all runs on a data set take the same rows, and so does what measures them.

    Args:
        label_column: By whose values the rows are shared; None for the data set's labels. Without single labels, or if it
            cannot be known which they are, every row is as likely as the others.
    """
    number = len(source)
    if count >= number:
        return np.arange(number)
    order = np.random.default_rng(0).permutation(number)
    try:
        column = find_label_column(source, label_column)
    except ValueError:
        column = None
    if column is not None and member_of(source.features[column]) is None:
        values = _column(source, column).combine_chunks().dictionary_encode()
        codes = np.asarray(values.indices.fill_null(-1))
        order = order[np.argsort(codes[order], kind="stable")]
    # Evenly spaced in the rows sorted by label, from the middle of the first space on.
    taken = ((np.arange(count) + 0.5) * number / count).astype(np.int64)
    return np.sort(order[taken])


def describe_feature(feature: Any) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


@dataclass(frozen=True)
class StreamLabels:
    """Labels that are read row by row, of which the names must be known beforehand.

    Args:
        column: Where they are.
        names: Of 0, 1, 2, ...
        by_name: Whether the column holds the names and not the integers.
        is_class_label: Whether it holds class labels, whose integers are the numbers of the names whatever these are.
    """

    column: str
    names: tuple[str, ...]
    by_name: bool
    is_class_label: bool = False

    dtype = np.dtype(np.int64)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    @cached_property
    def _numbers(self) -> dict[str | int, int]:
        cells = range(len(self.names)) if self.is_class_label else cells_of(self.names, self.by_name)
        return {cell: label for label, cell in enumerate(cells)}

    def read(self, value: Any) -> int:
        """The label of a cell.

        Raises:
            ValueError: if it is empty or none of the labels that there are.
        """
        label = self._numbers.get(value) if isinstance(value, str if self.by_name else int) else None
        if label is not None:
            return label
        first, last = min(self._numbers), max(self._numbers)
        accepted = f"an integer in [{first}, {last}]"
        if self.by_name or last - first >= len(self._numbers):
            accepted = f"one of {first_names(self._numbers)}" if not self.by_name else "one of the label_names"
        raise ValueError(f"label_column {self.column!r} must hold {accepted} in every row, got {value!r}")


def find_stream_labels(
    source: datasets.IterableDataset, name: str | None = None, label_names: Sequence[str] | None = None
) -> StreamLabels | LabelSets | None:
    """The names and the form of the labels of a stream; None if it has none.

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
    if member_of(feature) is not None:
        return find_label_sets(feature, name, label_names)
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names) if label_names is None else tuple(label_names)
        if len(names) != len(feature.names):
            raise ValueError(
                f"label_column {name!r} has {len(feature.names)} labels, but label_names are {len(names)}"
            )
        return StreamLabels(name, names, by_name=False, is_class_label=True)
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
