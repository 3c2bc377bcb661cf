"""Labels of a data set: their column, the integer of each row or the set of them, and the names of the integers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np


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
    if not isinstance(_member(features[name]) or features[name], datasets.ClassLabel | datasets.Value):
        raise ValueError(
            f"label_column {name!r} must hold integers or names, or lists of them, got {describe_feature(features[name])}"
        )
    return name


def _member(feature: Any) -> Any:
    """What the lists of a column hold; None for a column of something else."""
    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else None


def _members(features: datasets.Features) -> dict[str, Any]:
    return {column: _member(feature) for column, feature in features.items()}


def _columns_of_class_labels(features: Mapping[str, Any]) -> list[str]:
    return [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]


def read_labels(
    source: datasets.Dataset, name: str | None = None, label_names: Sequence[str] | None = None
) -> tuple[np.ndarray, dict[int, str]] | None:
    """The labels, int64 in 0..n-1, and the name of each; None if the data set has no labels.

    With several labels an image they are bool, shape `(rows, n)`: see `LabelSets`.

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
    if _member(feature) is not None:
        sets = find_label_sets(feature, name, label_names, values.to_pylist())
        return np.stack([sets.read(value) for value in values.to_pylist()]), sets.id2label
    values = values.to_pylist()
    if values and all(isinstance(value, str) for value in values):
        # Not as an array of texts, in which each takes the room of the longest.
        names = dict(enumerate(sorted(set(values))))
        numbers = {text: label for label, text in names.items()}
        labels = np.array([numbers[text] for text in values])
        if label_names is None:
            return labels.astype(np.int64), names
        unknown = set(names.values()) - set(label_names)
        if unknown:
            raise ValueError(f"label_column {name!r} holds {sorted(unknown)[0]!r}, which is not in label_names")
        places = np.array([label_names.index(text) for text in names.values()], np.int64)
        return places[labels], dict(enumerate(label_names))
    values = np.asarray(values)
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
class LabelSets:
    """Several labels an image: how a cell tells them, and the names of all that there are.

    Args:
        column: Where they are.
        names: Of 0, 1, 2, ...
        form: What a cell is a list of: the labels' integers; their names; or a zero or a one for each of all labels.
    """

    column: str
    names: tuple[str, ...]
    form: Literal["integers", "names", "zeros and ones"]

    dtype = np.dtype(bool)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    def read(self, value: Any) -> np.ndarray:
        """Which labels a cell has, bool, shape `(labels,)`; an empty list has none, which is the null label.

        Raises:
            ValueError: if it is no list of the labels that there are, or has one of them twice.
        """
        number, row = len(self.names), np.zeros(len(self.names), bool)
        if value is None:
            raise ValueError(f"label_column {self.column!r} must hold a list in every row, got none; [] is no label")
        if self.form == "zeros and ones":
            if len(value) != number or any(each not in (0, 1) for each in value):
                raise ValueError(
                    f"label_column {self.column!r} must hold {number} zeros and ones in every row, got {value!r}"
                )
            row[:] = value
            return row
        by_name = self.form == "names"
        ids = [self.names.index(each) if each in self.names else -1 for each in value] if by_name else value
        if any(each is None or not 0 <= each < number for each in ids):
            accepted = "the label_names" if by_name else f"integers in [0, {number - 1}]"
            raise ValueError(f"label_column {self.column!r} must hold lists of {accepted}, got {value!r}")
        if len(set(ids)) < len(ids):
            raise ValueError(
                f"label_column {self.column!r} must hold each label once, got {value!r}; zeros and ones that stand for all "
                "labels are told from integers by a type of bool or float"
            )
        row[ids] = True
        return row


def find_label_sets(
    feature: Any, column: str, label_names: Sequence[str] | None = None, values: Iterable[list] | None = None
) -> LabelSets:
    """How to read a column of lists of labels.

    Lists of bool or float are zeros and ones; so are those of integers if all are of one length of at least 3 and hold
    nothing else, since one of them has a number twice. Other integers are the labels'.

    Args:
        label_names: Of 0, 1, 2, ...; None for the data set's own.
        values: All of the column, in which labels without known names are looked for; None for a stream.

    Raises:
        ValueError: if it cannot be known how many labels there are.
    """
    member, length = _member(feature), getattr(feature, "length", -1)
    known, values = values is not None, list(values or ())
    if isinstance(member, datasets.ClassLabel):
        return LabelSets(column, tuple(label_names or member.names), "integers")
    kind = member.dtype
    integers = kind.startswith(("int", "uint"))
    lengths = {length} if length > 0 else {len(value) for value in values if value is not None}
    one_length = next(iter(lengths)) if len(lengths) == 1 else 0
    if "string" in kind:
        form = "names"
    elif kind == "bool" or kind.startswith("float"):
        form = "zeros and ones"
    elif integers and one_length > 2 and all(set(value) <= {0, 1} for value in values if value is not None) and known:
        form = "zeros and ones"
    elif integers:
        form = "integers"
    else:
        raise ValueError(f"label_column {column!r} must hold lists of integers or names, got lists of {kind}")
    if label_names is not None:
        return LabelSets(column, tuple(label_names), form)
    if form == "zeros and ones" and one_length:
        return LabelSets(column, tuple(map(str, range(one_length))), form)
    if not known:
        give = "--label_names, all of them in order," if form == "names" else "--num_classes, the number of labels,"
        raise ValueError(
            f"label_column {column!r} holds lists of {form}, and a stream is not read ahead to find all labels: give {give} "
            "or --unconditional"
        )
    if form == "zeros and ones":
        raise ValueError(f"label_column {column!r} must hold lists of one length, got {sorted(lengths)[:5]}")
    found = {each for value in values if value is not None for each in value if each is not None}
    if not found:
        raise ValueError(f"label_column {column!r} holds no label in any row; see --unconditional")
    names = sorted(found) if form == "names" else map(str, range(max(found) + 1))
    return LabelSets(column, tuple(names), form)


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

    dtype = np.dtype(np.int64)

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
) -> StreamLabels | LabelSets | None:
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
    if _member(feature) is not None:
        return find_label_sets(feature, name, label_names)
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
