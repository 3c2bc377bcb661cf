"""Reading what others have written: texts with bounds, names that stay in their folder, values of the types that they must have.

A saved pipeline, a run, a data set or a file of options may come from anybody. What it holds is data: its size is looked
at before it is read, a name in it is no path, and an error says what is wrong with it. `docs/safety.md` has the whole list.
"""

import dataclasses
import json
import math
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints


Fields = TypeVar("Fields")

MAX_TEXT_BYTES = 2**24  # of a config or a description; parsed, it may take 20 times as much
INDEX_SUFFIX = ".index.json"  # of the files that say which shard holds which weight

# Of what a config may ask for: widths, timesteps, numbers of labels; numbers in a list, such as betas; layers of a network.
LARGEST_NUMBER, MOST_NUMBERS, MOST_LAYERS = 2**20, 2**20, 2**10

_SIZES = ("dim", "dims", "channels", "size", "heads", "classes")  # end the names of what is counted from 0

# Characters that turn the direction of what is printed after them.
_DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069]")


def read_text(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a file, in UTF-8.

    Raises:
        ValueError: if it is longer than `max_bytes`, or no UTF-8.
        OSError: if it cannot be read.
    """
    with open(path, "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path} must have at most {max_bytes} bytes, got {os.path.getsize(path)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8: {error}") from error


def parse_json(text: str, name: object) -> Any:
    """The value of a JSON text.

    Args:
        name: Of what the text is from, for errors.

    Raises:
        ValueError: if it is none, or nested more deeply than Python follows.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} must be JSON: {error}") from error
    except RecursionError:
        raise ValueError(f"{name} must be JSON that is not nested as deeply") from None


def read_json(path: str | Path, kind: type = dict, max_bytes: int = MAX_TEXT_BYTES) -> Any:
    """The contents of a JSON file.

    Args:
        kind: The type that they must have.

    Raises:
        ValueError: if the file is too long, no JSON, or of another kind.
        OSError: if it cannot be read.
    """
    value = parse_json(read_text(path, max_bytes), path)
    if not isinstance(value, kind):
        raise ValueError(f"{path} must hold a {_JSON_KINDS[kind]}, got a {_JSON_KINDS.get(type(value), 'value')}")
    return value


_JSON_KINDS = {dict: "mapping", list: "list", str: "text"}


def parse_yaml(text: str, name: object) -> Any:
    """The value of a YAML text of plain values: no tags, which would make objects of Python, and no aliases.

    Args:
        name: Of what the text is from, for errors.

    Raises:
        ValueError: if it is none.
    """
    import yaml  # only training needs it

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            # A few lines of aliases of aliases stand for more values than any memory holds.
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("it must have no aliases (*NAME): write out what they stand for")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} cannot be read as YAML of plain values: {error}") from error
    except RecursionError:
        raise ValueError(f"{name} must be YAML that is not nested as deeply") from None


def read_yaml_mapping(path: str | Path, max_bytes: int = MAX_TEXT_BYTES) -> dict:
    """The contents of a YAML file that holds a mapping, or nothing.

    Raises:
        ValueError: if it is too long, or anything else.
        OSError: if it cannot be read.
    """
    value = parse_yaml(read_text(path, max_bytes), path)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping of options to values, got {type(value).__name__}")
    return value


def is_plain_name(name: object) -> bool:
    """Whether it is the name of something in a folder: no path, neither the folder itself nor the one above it."""
    return isinstance(name, str) and name not in ("", ".", "..") and not re.search(r"[/\\\x00-\x1f\x7f]", name)


def is_below(name: object) -> bool:
    """Whether it is a relative path, with `/`, that does not lead out of the folder that it starts in."""
    if not isinstance(name, str) or not name or re.search(r"[\x00-\x1f\x7f]|://", name):
        return False
    path = PurePosixPath(name.replace("\\", "/"))
    return not path.is_absolute() and ".." not in path.parts and not re.match(r"[A-Za-z]:", name)


def inside(folder: Path, name: object, where: object) -> Path:
    """The path of a file or a folder in `folder` that a text names.

    Args:
        where: The text, for errors.

    Raises:
        ValueError: if the name leads out of the folder.
    """
    if not is_below(name):
        raise ValueError(f"{where} must name files in its own folder, got {name!r}")
    return folder / name


def check_shards(folder: str | Path) -> None:
    """Refuses lists of shards (`*.index.json`) that name files of other folders.

    diffusers refuses them from 0.40 on, and transformers of a local folder takes them as they are.

    Raises:
        ValueError: with the list and the name.
    """
    for path in sorted(Path(folder).glob(f"*{INDEX_SUFFIX}")):
        names = read_json(path).get("weight_map")
        if not isinstance(names, dict):
            raise ValueError(f"{path} must have a weight_map from weights to files")
        for name in names.values():
            if not is_plain_name(name):
                raise ValueError(f"{path} must name shards in its own folder, got {name!r}")


def check_component_folder(folder: str | Path) -> None:
    """Refuses a saved model that reads files of other folders, or has code fetched: see `check_shards`, `check_attention`.

    Raises:
        ValueError: with the file and what it says.
    """
    check_shards(folder)
    config = Path(folder, "config.json")
    if config.is_file():
        check_attention(read_json(config), config)


def check_attention(config: Mapping[str, Any], where: object) -> None:
    """Refuses a config of transformers that names a kernel of the Hub, which is code, for its layers.

    transformers asks for no consent before it runs one of an organisation that it trusts.

    Raises:
        ValueError: with the kernel.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_attention(value, where)
        elif name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(f"{where} must name no code of the Hub under {name}, got {value!r}")


def from_mapping(cls: type[Fields], values: Mapping[str, Any], where: object) -> Fields:
    """A dataclass from what a file says of its fields, by their annotations; those with a default may be missing.

    Args:
        where: The file, for errors.

    Raises:
        ValueError: if a field is missing, unknown, or of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must hold a mapping, got {type(values).__name__}")
    fields, hints = {field.name: field for field in dataclasses.fields(cls)}, get_type_hints(cls)
    unknown = [str(name) for name in values if name not in fields]
    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if unknown or missing:
        raise ValueError(
            f"{where} must have {', '.join(missing) or 'no other entries'}, got {', '.join(unknown) or 'none of them'}"
        )
    for name, value in values.items():
        if not fits(value, hints[name]):
            raise ValueError(f"{where}: {name} must be {_in_words(hints[name])}, got {_shortened(value)}")
    return cls(**values)


def check_config(config: Mapping[str, Any], init: Callable, finite: bool = False) -> None:
    """Refuses a config whose values are of other types than an `__init__` has, or numbers out of all proportion.

    Args:
        init: Whose annotations say the types.
        finite: Whether all numbers must be finite; else the caller looks at them.

    Raises:
        ValueError: with the value.
    """
    for name, hint in _hints_of(init).items():
        if name not in config:
            continue
        value = config[name]
        if not fits(value, hint):
            raise ValueError(f"{name} must be {_in_words(hint)}, got {_shortened(value)}")
        numbers = [each for each in (value if isinstance(value, list | tuple) else (value,)) if _is_number(each)]
        if len(numbers) > MOST_NUMBERS:
            raise ValueError(f"{name} must have at most {MOST_NUMBERS} numbers, got {len(numbers)}")
        largest = MOST_LAYERS if "layers" in name else LARGEST_NUMBER
        for number in numbers:
            if isinstance(number, Integral) and not -largest <= number <= largest:
                raise ValueError(f"{name} must be an integer of at most {largest}, got {_shortened(number)}")
            if name.endswith(_SIZES) and number < 0:
                raise ValueError(f"{name} must be at least 0, got {number}")
            if finite and not -math.inf < number < math.inf:
                raise ValueError(f"{name} must be a finite number, got {number}")


@cache
def _hints_of(init: Callable) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(init).items() if name != "return"}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type. Lists are tuples, integers are floats, and those of NumPy are both."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return any(fits(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str | int) and value in parts
    if hint in (int, float):
        return _is_number(value) and isinstance(value, Integral if hint is int else Real)
    if (kind or hint) in (tuple, list, Sequence):
        # How many there must be follows from other options, such as the number of axes.
        return isinstance(value, list | tuple) and (not parts or all(fits(each, parts[0]) for each in value))
    kind = type(None) if hint is None else kind or hint
    if getattr(kind, "__name__", "") == "ndarray":
        return hasattr(value, "__array__")  # a tensor does as well
    return not isinstance(kind, type) or isinstance(value, kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _in_words(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(map(_in_words, parts))
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if kind in (tuple, list, Sequence):
        return "a list" + (f" of {_in_words(parts[0])}" if parts else "")
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "None"}
    return names.get(hint) or getattr(kind or hint, "__name__", str(hint))


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def one_line(text: object) -> str:
    """A text without what breaks a line or hides a part of it: a name, in a card or on the screen."""
    text = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in str(text))
    return " ".join(_DIRECTIONS.sub("", text).split(" "))
