"""Several labels an image: columns of lists of labels, and the set of labels that each row has."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import datasets
import numpy as np

from diffusers_ext.data.folders import sort_names


def member_of(feature: Any) -> Any:
    """The feature of the members of a column of lists; None for another column."""
    return feature.feature if isinstance(feature, datasets.List | datasets.LargeList) else None


@dataclass(frozen=True)
class LabelSets:
    """Several labels an image: how a cell names them, and the names of all that there are.

    Args:
        column: Where they are.
        names: Of 0, 1, 2, ...
        form: What a cell is a list of: the labels' integers; their names; or a zero or a one for each of all labels.
        ids: What stands for each label in a cell, if these are not its number or its name.
    """

    column: str
    names: tuple[str, ...]
    form: Literal["integers", "names", "zeros and ones"]
    ids: tuple[int, ...] | None = None

    dtype = np.dtype(bool)

    @property
    def id2label(self) -> dict[int, str]:
        return dict(enumerate(self.names))

    @cached_property
    def _numbers(self) -> dict[str | int, int]:
        """The label that each possible member of a cell is."""
        cells = self.ids or (self.names if self.form == "names" else range(len(self.names)))
        return {cell: label for label, cell in enumerate(cells)}

    def read(self, value: Any) -> np.ndarray:
        """The labels of a cell as a mask, bool, shape `(labels,)`; all False, the null label, for an empty list.

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
        labels = [self._numbers.get(each, -1) for each in value]
        if -1 in labels:
            accepted = f"integers in [0, {number - 1}]" if self.form == "integers" else "the label_names"
            accepted = accepted if self.ids is None else f"the integers {first_names(self.ids)}"
            raise ValueError(f"label_column {self.column!r} must hold lists of {accepted}, got {value!r}")
        if len(set(labels)) < len(labels):
            raise ValueError(
                f"label_column {self.column!r} must hold each label once, got {value!r}; zeros and ones that stand for all "
                "labels must be of type bool or float, not integers"
            )
        row[labels] = True
        return row


def find_label_sets(
    feature: Any, column: str, label_names: Sequence[str] | None = None, values: Iterable[list] | None = None
) -> LabelSets:
    """The form and the names of a column of lists of labels.

    Lists of bool or float are zeros and ones; so are those of integers if all are of one length of at least 3 and hold
    nothing else, since one of them has a number twice. Other integers are the labels'.

    Args:
        label_names: Of 0, 1, 2, ...; None for the data set's own.
        values: All of the column, in which labels without known names are looked for; None for a stream.

    Raises:
        ValueError: if it cannot be known how many labels there are.
    """
    member, length = member_of(feature), getattr(feature, "length", -1)
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
        cells = cells_of(label_names, by_name=form != "integers")
        ids = cells if form == "integers" and cells != tuple(range(len(cells))) else None
        return LabelSets(column, tuple(label_names), form, ids)
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
    return _sets_that_occur(column, form, {each for value in values if value is not None for each in value} - {None})


def _sets_that_occur(column: str, form: str, found: set) -> LabelSets:
    if not found:
        raise ValueError(f"label_column {column!r} holds no label in any row; see --unconditional")
    if form == "names":
        return LabelSets(column, tuple(sort_names(found)), form)
    if min(found) < 0:
        raise ValueError(f"label_column {column!r} must hold lists of integers from 0 on, got {min(found)}")
    ids = tuple(sorted(found))
    return LabelSets(column, tuple(map(str, ids)), form, None if ids == tuple(range(len(ids))) else ids)


def cells_of(label_names: Sequence[str], by_name: bool) -> tuple[str | int, ...]:
    """The value in a cell that stands for each of the labels with these names.

    Integers are the numbers of the names, or the names themselves where these are integers: `2018 2019`.

    Args:
        by_name: Whether the column holds names, and not integers.
    """
    if by_name:
        return tuple(label_names)
    if all(re.fullmatch(r"\d+", text, re.ASCII) for text in label_names):
        return tuple(map(int, label_names))
    return tuple(range(len(label_names)))


def first_names(names: Iterable) -> str:
    """The first six names, for a message."""
    names = list(map(str, names))
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
