"""Commands by the name that the user has for them: a script of a checkout, or `diffusers-ext NAME` of an installed package.

Texts of the package name a command by its script, such as `training/train_vae.py`, and are handed through `name_commands` where
they are shown.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path


PROGRAM = "diffusers-ext"

# Scripts whose command is not their name with hyphens.
_OTHERWISE = {"train_ddpm": "train", "convert_checkpoint": "convert"}
_SCRIPT = re.compile(r"(?:(?:python|accelerate launch) )?\btraining/(\w+)\.py")

_started_as: ContextVar[str | None] = ContextVar("started_as", default=None)


@contextmanager
def started_as(program: str | None) -> Iterator[None]:
    """While it lasts, a program such as "diffusers-ext train" is running; None for a script, or a call from Python."""
    token = _started_as.set(program)
    try:
        yield
    finally:
        _started_as.reset(token)


def name_commands(text: str) -> str:
    """A text with scripts of `training/`, and what launches them, in the words that start the same command for this user."""
    if not _has_commands():
        return text
    return _SCRIPT.sub(lambda match: f"{PROGRAM} {command_of(match[1])}", text)


def launched_command(script: str, launcher: str) -> str:
    """What starts the run that is under way: the program, in several processes by accelerate, or a script and its launcher."""
    program = _started_as.get()
    if program is None:
        return name_commands(f"{launcher} {script}")
    in_several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return program.replace(PROGRAM, "accelerate launch -m diffusers_ext", 1) if in_several else program


def command_of(script: str) -> str:
    """The command that a script starts, such as "train-vae" for "train_vae"."""
    return _OTHERWISE.get(script, script.replace("_", "-"))


def _has_commands() -> bool:
    """Whether the user is to type commands: one was started, or there is no checkout with scripts around the package."""
    return _started_as.get() is not None or not _in_checkout()


@cache
def _in_checkout() -> bool:
    return (Path(__file__).resolve().parents[1] / "training" / "train_ddpm.py").is_file()
