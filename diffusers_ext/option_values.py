"""Values of options: from what YAML and Python give to the types of the fields."""

import dataclasses
import os
import types
import typing
from functools import cache
from typing import Any, Literal


@cache
def hints_of(cls: type) -> dict[str, Any]:
    """The types of the fields of a dataclass by their names, those of its bases too."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if name in names}


def without_path(value: Any) -> Any:
    """The text of a path, and any other value as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def without_none(hint: Any) -> Any:
    """`X` for `X | None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # `Literal[...] | None` is the second
        (hint,) = [part for part in typing.get_args(hint) if part is not type(None)]
    return hint


def convert(name: str, value: Any, hint: Any) -> Any:
    """A value as an option of this type has it, such as a number for its text, or a tuple for one of its values.

    Args:
        name: Of the option, for errors.
        hint: One of the types that options have: bool, int, float, str, a `Literal`, a tuple of these, or any of them or None.

    Raises:
        ValueError: if it is of another type.
    """
    kind = without_none(hint)
    if value is None:
        if kind is not hint:
            return None
        raise ValueError(f"{name} must have a value, got null")
    origin = typing.get_origin(kind)
    if origin is Literal:
        if value is False and "no" in typing.get_args(kind):
            return "no"  # YAML 1.1 reads a bare `no` as false
        if value not in typing.get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(typing.get_args(kind))}, got {value!r}")
        return value
    if origin is tuple:
        return tuple(convert(name, part, typing.get_args(kind)[0]) for part in _listed(value))
    if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bool) == (kind is bool) and isinstance(value, bool | int | float | str):
        try:
            converted = kind(value)
        except ValueError:
            converted = None
        if converted is not None and (isinstance(value, str) or converted == value):
            return converted
    raise ValueError(f"{name} must be {_described(kind)}, got {value!r}")


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _described(kind: type) -> str:
    return {bool: "true or false", int: "an integer", float: "a number", str: "a text"}[kind]
