"""The commands of this package: `diffusers-ext NAME ...`, or `python -m diffusers_ext NAME ...`.

In several processes: `accelerate launch -m diffusers_ext NAME ...`. Commands of `diffusers-cli` are among them, since that
imports diffusers alone, and cannot name the class of a pipeline that is not diffusers' own.
"""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import diffusers_ext
from diffusers_ext.command_names import PROGRAM, command_of


class Command(NamedTuple):
    """A command of the table.

    Args:
        help: What it does, in a few words.
        module: Its `run(arguments, program=...)` reads the command line. None for a command of diffusers.
    """

    help: str
    module: str | None = None


# A line for each command; those of a group stand together.
COMMANDS: dict[str, dict[str, Command]] = {
    "train": {
        "train": Command(
            "a diffusion model of images or sequences, by label if there are labels", "commands.train_ddpm"
        ),
        "train-text-to-image": Command(
            "a diffusion model of images and their captions", "commands.train_text_to_image"
        ),
        "train-vae": Command("an autoencoder", "commands.train_vae"),
        "train-classifier": Command("a classifier of noisy images, for guidance", "commands.train_classifier"),
        "train-features": Command("the network in whose features images are measured", "commands.train_features"),
        "distill": Command("a pipeline into a student of few steps", "commands.distill"),
        "cache-latents": Command("encode a data set once, for training on its latents", "commands.cache_latents"),
    },
    "after the training": {
        "calibrate": Command("choose what a pipeline's calls do by default", "commands.calibrate"),
        "fit-prior": Command("start below the noisiest level", "commands.fit_prior"),
        "reconstruct-ema": Command("make an average of the weights of another width", "commands.reconstruct_ema"),
        "convert": Command(
            "make a pipeline of a checkpoint of guided-diffusion or lucidrains' package", "commands.convert_checkpoint"
        ),
    },
    "measure": {
        "evaluate": Command("a pipeline, or a folder of images, beside real images", "commands.evaluate"),
        "evaluate-vae": Command("an autoencoder on held-out images", "commands.evaluate_vae"),
        "compare-guidance": Command("ways to guide a pipeline", "commands.compare_guidance"),
        "study": Command("answer a question about trained models", "commands.study"),
    },
    "use": {
        "sample": Command("images into a folder: grids, GIF or MP4 of denoising and interpolation", "commands.sample"),
        "sample-prompts": Command("draw texts at several guidance scales, as one picture", "commands.sample_prompts"),
        "demo": Command("try out a pipeline on a page in the browser, or write the page as a Space", "demo.command"),
        "push": Command("upload a saved pipeline or model to the Hub", "hub.__main__"),
        "doctor": Command("what this machine is, what is fast on it, what is wrong", "commands.doctor"),
        "schema": Command("the arguments of a saved pipeline's call, by diffusers: --model FOLDER"),
        "env": Command("versions for a report of a fault, by diffusers"),
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command that stands first, with the words that follow.

    Raises:
        SystemExit: with code 2 if there is no such command, with code 1 if what it needs is not installed, and as the
            command itself ends.
    """
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(_help())
        return
    if name == "--version":
        print(f"{PROGRAM} {diffusers_ext.__version__}")
        return
    commands = {name: command for group in COMMANDS.values() for name, command in group.items()}
    command = commands.get(name := _name_of(name, commands))
    if command is None:
        near = difflib.get_close_matches(name, commands, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "--help lists the commands"
        raise SystemExit(_complain(f"there is no command {name}; {hint}", 2))
    if command.module is None:
        _run_of_diffusers([name, *rest])
        return
    try:
        module = import_module(f"diffusers_ext.{command.module}")
    except ModuleNotFoundError as missing:
        if (missing.name or "").startswith("diffusers_ext"):
            raise
        needs = f"{name} needs {missing.name}, which is not installed: pip install 'diffusers_ext[train]'"
        raise SystemExit(_complain(needs, 1)) from None
    module.run(rest, program=f"{PROGRAM} {name}")


def _name_of(word: str, commands: dict[str, Command]) -> str:
    """The command that a word means: its name, or the script of it, such as `training/train_ddpm.py`."""
    name = command_of(word.removeprefix("training/").removesuffix(".py"))
    return name if name in commands else word


def _run_of_diffusers(arguments: list[str]) -> None:
    from diffusers.commands.diffusers_cli import main

    given = sys.argv
    sys.argv = [PROGRAM, *arguments]
    try:
        main()
    finally:
        sys.argv = given


def _complain(message: str, code: int) -> int:
    print(f"{PROGRAM}: error: {message}", file=sys.stderr)
    return code


def _help() -> str:
    lines = [f"usage: {PROGRAM} COMMAND [--OPTION VALUE ...]", "", diffusers_ext.__doc__.partition("\n")[0]]
    for group, commands in COMMANDS.items():
        lines += ["", f"{group}:", *(f"  {name:<20} {command.help}" for name, command in commands.items())]
    return "\n".join([*lines, "", f"{PROGRAM} COMMAND --help says what a command takes; --version, which this is"])


if __name__ == "__main__":
    main()
