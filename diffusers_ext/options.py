"""Options of a training script from one dataclass: names, types, defaults and help stand once.

The command line wins over the YAML file given by `--config`, which wins over the defaults. Values of both go through
the same conversion, so that `learning_rate: 1e-4`, which YAML reads as a string, means what it says.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import shlex
import signal
import sys
import time
import traceback
import types
import typing
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from diffusers_ext.command_names import launched_command, name_commands, started_as
from diffusers_ext.foreign_options import explain_foreign
from diffusers_ext.option_values import convert, hints_of, without_none, without_path
from diffusers_ext.untrusted import parse_yaml, read_yaml_mapping


Config = TypeVar("Config")

_SECTION = re.compile(r"\n\s*(?:Args|Attributes|Returns|Raises):")  # of a docstring
OTHERS_WAIT_SECONDS = 10.0
_PACKAGE = Path(__file__).resolve().parent


def option(
    default: Any,
    help: str,
    group: str | None = None,
    alias: str | None = None,
    *,
    at_least: float | None = None,
    needs: str | dict[str, tuple[str, ...]] | None = None,
    fixed_on_resume: bool = False,
) -> Any:
    """A dataclass field for `parse_config`, with the rules that `check_options` holds it to.

    Args:
        help: One line.
        group: The heading under which `--help` lists it; by default that of the field above it.
        alias: A second name, such as that of a diffusers script.
        at_least: The smallest value, of each of several. None is no value and always allowed.
        needs: Another option that must be on for this one to have an effect; or that option with the values that it must
            have, such as `{"lr_scheduler": ("polynomial",)}`; of an option with several values, at least one of these.
        fixed_on_resume: Whether a run that goes on from a checkpoint must have the same value as before.
    """
    rules = {"at_least": at_least, "needs": needs, "fixed_on_resume": fixed_on_resume}
    return dataclasses.field(default=default, metadata={"help": help, "group": group, "alias": alias} | rules)


# An option that belongs to a run from its first step to its last.
fixed_option = partial(option, fixed_on_resume=True)


def check_options(config: Any) -> None:
    """Holds the options of a config to their rules. The first `__post_init__` of each config calls it.

    Raises:
        ValueError: if an option is below its minimum or no number that is finite, or differs from its default where it has no effect.
    """
    for field in dataclasses.fields(config):
        value, lowest, needs = getattr(config, field.name), field.metadata["at_least"], field.metadata["needs"]
        parts = value if isinstance(value, tuple) else (value,)
        if lowest is not None and any(part is not None and not part >= lowest for part in parts):
            raise ValueError(f"{field.name} must be at least {lowest}, got {' '.join(map(str, parts))}")
        if any(part != part for part in parts):
            raise ValueError(f"{field.name} must be a number, got {' '.join(map(str, parts))}")
        # Of several, such as the ends of an interval, one may be infinite.
        if isinstance(value, float) and math.isinf(value):
            raise ValueError(f"{field.name} must be finite, got {value}")
        if needs is not None and value != field.default and (missing := _missing(config, needs)):
            raise ValueError(f"{field.name} has no meaning without {missing}: give both or neither")


def _missing(config: Any, needs: str | dict[str, tuple[str, ...]]) -> str | None:
    """The need in words, or None if the config meets it."""
    if isinstance(needs, str):
        return None if getattr(config, needs) else needs
    ((name, accepted),) = needs.items()
    value = getattr(config, name)
    if any(each in accepted for each in (value if isinstance(value, tuple) else (value,))):
        return None
    *others, last = accepted
    return f"{name} {', '.join(others)} or {last}" if others else f"{name} {last}"


def fixed_on_resume(cls: type) -> frozenset[str]:
    """The options that a run must share with the run that it goes on with."""
    return frozenset(field.name for field in dataclasses.fields(cls) if field.metadata["fixed_on_resume"])


def parse_config(
    cls: type[Config],
    arguments: list[str] | None = None,
    first: str | None = None,
    *,
    program: str | None = None,
) -> Config | None:
    """Reads the command line, and the YAML file that `--config` names, into the dataclass `cls`.

    Args:
        cls: A dataclass whose fields are made by `option`.
        arguments: The command line, `sys.argv[1:]` if None.
        first: The option that may stand first on it without its name.
        program: Its name in errors and in the help; by default that of the script that was started.

    Returns:
        The config; or None after `--dry_run`, which prints it as YAML instead.

    Raises:
        SystemExit: with code 2 and a line on stderr, if an option is unknown or a value does not fit. An unknown name
            is answered with the near ones, and one of another trainer with what it is called here.
    """
    parser = _parser(cls, program)
    arguments = sys.argv[1:] if arguments is None else arguments
    if first is not None and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{first}", *arguments]
    given, unknown = parser.parse_known_args(arguments)
    given = vars(given)
    if unknown:
        names = [name.split("=")[0].lstrip("-") for name in unknown if name.startswith("--")]
        parser.error(_unknown(names, cls, "--") if names else f"arguments without an option: {' '.join(unknown)}")
    config_file, dry_run = given.pop("config", None), given.pop("dry_run", False)
    try:
        values = read_yaml(cls, config_file) if config_file else {}
        config = cls(**(values | given))
        object.__setattr__(config, "_given", frozenset(values | given))
        check_options(config)  # which not every one does by itself
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if dry_run:
        print(to_yaml(config), end="")
        return None
    return config


def given_names(config: Any) -> frozenset[str]:
    """Names of the options that the command line or its file gave; of a config that was made in Python, those that differ from
    their defaults."""
    differ = (field.name for field in dataclasses.fields(config) if getattr(config, field.name) != field.default)
    return getattr(config, "_given", None) or frozenset(differ)


def run_script(
    cls: type[Config],
    main: Callable[[Config], Any],
    arguments: list[str] | None = None,
    first: str | None = None,
    *,
    program: str | None = None,
) -> None:
    """Reads the options, as `parse_config` does, and calls `main` with them.

    An error that this package or the script itself raises is meant for the user: it ends the script with its message as
    a line on stderr. Any other error keeps its traceback.

    Args:
        program: The command that was started, such as "diffusers-ext train"; by default the script in which `main` is.

    Raises:
        SystemExit: with code 1 after such an error; after an interrupt, which ends with a line too, with 128 and the number
            of the signal.
    """
    script = sys.modules[main.__module__].__file__
    name = program or Path(script).name
    config = parse_config(cls, arguments, first, program=program)
    if config is None:
        return
    try:
        with started_as(program):
            main(config)
    except KeyboardInterrupt as interrupt:
        if _is_first_process():
            print(f"\n{name}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(128 + getattr(interrupt, "signal_number", signal.SIGINT)) from None
    except Exception as error:
        _let_the_first_process_speak()
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        raised_in = Path(frame.f_code.co_filename).resolve()
        is_ours = _PACKAGE in raised_in.parents or raised_in == Path(script).resolve()
        if not is_ours or not isinstance(error, ValueError | OSError | FloatingPointError):
            raise
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _let_the_first_process_speak() -> None:
    """Holds an error back in all processes but the first.

    Mostly that has the same error, or it has one that this is the consequence of, a lost connection; and when a process
    fails, the launcher ends the others.
    """
    if not _is_first_process():
        time.sleep(OTHERS_WAIT_SECONDS)


def read_yaml(cls: type, path: str | Path) -> dict[str, Any]:
    """The options of a YAML file, converted to the types of the dataclass `cls`.

    Raises:
        ValueError: if the file is no mapping, if a key is no option (the near ones are named), or if a value is not of
            the option's type.
    """
    return _options_of(cls, read_yaml_mapping(path), path)


def read_yaml_text(cls: type, text: str, name: str) -> dict[str, Any]:
    """As `read_yaml`, of a text; `name` says in errors where it is from."""
    return _options_of(cls, parse_yaml(text, name) or {}, name)


def _options_of(cls: type, content: dict, path: object) -> dict[str, Any]:
    aliases = {field.metadata["alias"]: field.name for field in dataclasses.fields(cls)}
    content = {aliases.get(key, key): value for key, value in content.items()}
    hints = hints_of(cls)
    unknown = [str(key) for key in content if key not in hints]
    if unknown:
        raise ValueError(f"{path}: {_unknown(unknown, cls)}")
    try:
        return {key: convert(key, value, hints[key]) for key, value in content.items()}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def takes_keywords(cls: type[Config]) -> type[Config]:
    """A decorator of a config that is made in Python too: its keywords are those of a YAML file.

    Other names of options are taken, a value is converted to the option's type, a path is a text, and one value stands for
    several. A `preset` of the class's `PRESETS`, the one that is named or that its `preset_for` takes, gives what is not given, as
    far as it has an effect beside what is.

    Raises, as the config:
        TypeError: for a keyword that is no option; near ones are named, and the counterpart of another trainer's.
        ValueError: for a value that is not of the option's type.
    """
    init = cls.__init__

    @wraps(init)
    def __init__(self, **values):
        cls = type(self)
        aliases = {field.metadata["alias"]: field.name for field in dataclasses.fields(cls)}
        values = {aliases.get(name, name): value for name, value in values.items()}
        hints = hints_of(cls)
        if unknown := [name for name in values if name not in hints]:
            raise TypeError(f"{cls.__name__}: {_unknown(unknown, cls)}")
        values = {name: convert(name, without_path(value), hints[name]) for name, value in values.items()}
        init(self, **values | preset_of(cls, values))

    cls.__init__ = __init__
    return cls


def preset_of(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    """What the preset that `values` name gives beside them, or the one that is taken where they name none, with its name.

    Nothing that has no effect with them: an option that another one stands in for (`REPLACED_BY` of the class: the option, if it
    is not off, or "option=value", and what it leaves no room for) is left to that.
    """
    preset = values.get("preset")
    if values.keys() >= hints_of(cls).keys():  # of a config that is replaced, where one was taken when it was made
        return {}
    if preset is None and hasattr(cls, "preset_for"):
        preset = cls.preset_for(values)
    if preset not in getattr(cls, "PRESETS", {}):
        return {}
    given = {name for name, value in values.items() if value is not None and value is not False}
    given |= {f"{name}={values[name]}" for name in given}
    replaced = {name for other in given for name in cls.REPLACED_BY.get(other, ())}
    given = {name: value for name, value in cls.PRESETS[preset].items() if name not in {*values, *replaced}}
    needs = {field.name: field.metadata["needs"] for field in dataclasses.fields(cls)}
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    config = types.SimpleNamespace(**(defaults | given | values))
    given = {name: value for name, value in given.items() if not (needs[name] and _missing(config, needs[name]))}
    return given | {"preset": preset}


def describe_preset(config: Any) -> str | None:
    """A line that says what the preset of a config means, and what the config has in its place; None without a preset."""
    if getattr(config, "preset", None) not in getattr(config, "PRESETS", {}):
        return None
    needs = {field.name: field.metadata["needs"] for field in dataclasses.fields(config)}
    parts = []
    for name, value in config.PRESETS[config.preset].items():
        if needs[name] and _missing(config, needs[name]):
            continue
        here = getattr(config, name)
        parts.append(f"{name} {_in_words(value)}" + ("" if here == value else f" (here {_in_words(here)})"))
    return f"preset {config.preset}: {', '.join(parts)}"


def _in_words(value: Any) -> str:
    return "left out" if value is None else " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def to_yaml(config: Any) -> str:
    """The config as the YAML that `--config` reads back. Secrets (fields named `*_token`) are left out."""
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
        if not name.endswith("_token")
    }
    return yaml.dump(values, Dumper=_DUMPER, sort_keys=False, default_flow_style=None, width=1000)


def written_options(config: Any) -> dict[str, Any]:
    """The options by name, as they are read back from `to_yaml`: lists for tuples."""
    return yaml.load(to_yaml(config), _LOADER)


# By libyaml where PyYAML has it, which takes a tenth of the time and writes the same text.
_DUMPER, _LOADER = (getattr(yaml, f"C{name}", getattr(yaml, name)) for name in ("SafeDumper", "SafeLoader"))


# How a run was started, not what it is. What a preset gave is among the other options.
_OF_ONE_START = ("overwrite_output_dir", "resume_from_checkpoint", "preset")


def to_command(config: Any, script: str, launcher: str = "accelerate launch", *, first: str | None = None) -> str:
    """The command line that makes the same run; secrets are left out.

    Args:
        script: By its path. For a user of commands, its command stands in its place.
        first: An option that stands without its name before the others, as for `parse_config`.
    """
    words = launched_command(script, launcher).split()
    if first is not None and getattr(config, first) is not None:
        words.append(str(getattr(config, first)))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or value is None or field.name in _OF_ONE_START or field.name.endswith("_token"):
            continue
        if field.name == first:
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no-{field.name}")
        else:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)


def _parser(cls: type, program: str | None = None, everything: bool = False) -> argparse.ArgumentParser:
    """
    Args:
        everything: Whether its help lists all options, and not those of `ESSENTIAL` alone, if the config has such a list.
    """
    fields = dataclasses.fields(cls)
    essential = {field.name for field in fields}
    if not everything:
        essential &= set(getattr(cls, "ESSENTIAL", essential))
    more = f"--help-all lists all {len(fields)} options" if len(essential) < len(fields) else None
    parser = _Parser(
        prog=program,
        usage="%(prog)s [--OPTION VALUE ...]",  # the list of all of them would hide the message of an error
        description=_description(cls),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_HelpFormatter,
        add_help=False,
        epilog=more,
    )
    parser.add_argument(
        "-h",
        "--help",
        action="help",
        help="list the options that matter most and end" if more else "list the options and end",
    )
    parser.add_argument(
        "--help-all", action=_HelpAll, make=partial(_parser, cls, program, True), help="list all options and end"
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="read options from a YAML file; the command line wins")
    parser.add_argument("--dry_run", action="store_true", help="print the options as resolved, as YAML, and end")
    group, groups, hints = parser, {}, typing.get_type_hints(cls)
    for field in fields:
        if title := field.metadata["group"]:
            group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        shown = field.default
        if isinstance(shown, tuple):
            shown = " ".join(map(str, shown))
        default = "" if shown is None else f" (default: {shown})"
        help = name_commands(field.metadata["help"]).replace("%", "%%") + default.replace("%", "%%")
        help = help if field.name in essential else argparse.SUPPRESS
        alias = [f"--{field.metadata['alias']}"] if field.metadata["alias"] else []
        keywords = _argument(field.name, hints[field.name])
        group.add_argument(f"--{field.name}", *alias, dest=field.name, help=help, **keywords)
    return parser


def _description(cls: type) -> str:
    """What a config is for, by its docstring without the sections for those who call it from Python."""
    return name_commands(_SECTION.split(cls.__doc__ or "", maxsplit=1)[0].strip())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        _let_the_first_process_speak()
        super().error(message)


class _HelpAll(argparse.Action):
    """Prints the help of another parser and ends."""

    def __init__(self, option_strings, dest, make, **keywords):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **keywords)
        self._make = make

    def __call__(self, parser, namespace, values, option_string=None):
        self._make().print_help()
        parser.exit()


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34)


def _argument(name: str, hint: Any) -> dict[str, Any]:
    kind = without_none(hint)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}  # type=bool would read "False" as True
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        return {"type": typing.get_args(kind)[0], "nargs": "+", "action": _StoreTuple}
    return {"type": kind}


class _StoreTuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _unknown(names: list[str], cls: type, prefix: str = "") -> str:
    known = [field.name for field in dataclasses.fields(cls)]
    parts = []
    for name in names:
        if explained := explain_foreign(name, known, prefix):
            parts.append(f"unknown option {prefix}{name}; {name_commands(explained)}")
            continue
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        near = near or [other for other in known if name in other or other in name][:3]
        hint = f"did you mean {' or '.join(prefix + other for other in near)}?" if near else "--help lists the options"
        parts.append(f"unknown option {prefix}{name}; {hint}")
    return "; ".join(parts)
