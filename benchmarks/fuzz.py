"""Random configs of schedulers and random options of scripts: each works with finite numbers, or is refused in a sentence.

    python benchmarks/fuzz.py --num_schedulers 100000 --num_options 10000

A config that is taken is sampled with: its samples must be finite. What is refused must be so by a ValueError or TypeError
that this package or diffusers itself raises, and not by whatever a wrong value comes upon in PyTorch. Options that are taken
must come through YAML and through a command line as they are. Nothing may take longer than `--seconds_each`. What fails is
printed with the seed by which it comes again alone; `tests/test_fuzz.py` runs a small share. `--max_seconds` of computing ends it
sooner, in proportion, and how many were tried is said: with `--first_seed` another run goes on from there.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import math
import pkgutil
import random
import shlex
import signal
import sys
import time
import traceback
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import UnionType

import diffusers
import huggingface_hub
import torch

import diffusers_ext.commands
from diffusers_ext.options import parse_config, read_yaml_text, to_command, to_yaml


ROOT = Path(diffusers_ext.__file__).resolve().parent
OURS = (str(ROOT), str(ROOT.parent / "training"), str(Path(diffusers.__file__).resolve().parent))

SCHEDULERS = (
    "ExtDDPMScheduler",
    "ExtDDIMScheduler",
    "ExtDDIMInverseScheduler",
    "VPredictionScheduler",
    "FlowScheduler",
    "ScoreSDEScheduler",
    "AnnealedLangevinScheduler",
)

# By name, what is usual; each is mixed with what is odd for its type.
USUAL = {
    "num_train_timesteps": (1, 2, 3, 10, 50, 100),
    "beta_schedule": (*diffusers_ext.diffusion.betas.BETA_SCHEDULES,),
    "prediction_type": (*diffusers_ext.diffusion.noising.PREDICTION_TYPES, "flow_prediction"),
    "timestep_spacing": (*diffusers_ext.diffusion.timesteps.TIMESTEP_SPACINGS,),
    "variance_type": ("fixed_small", "fixed_large", "learned", "learned_range", "fixed_small_log", "analytic"),
    "path": ("vp", "cosine", "ve", "subvp", "linear", "learned"),
    "predictor": ("ode", "euler_maruyama", "reverse_diffusion", "ancestral", "none"),
    "beta_start": (1e-4, 1e-3, 0.01),
    "beta_end": (0.02, 0.1, 0.999),
    "trained_betas": (None, [0.1, 0.2], [0.5] * 10),
}
ODD = {
    int: (0, -1, 1, 2, 7, 2**31, 10**12, 10**30),
    float: (0.0, -0.0, -1.0, 1e-30, 1e-8, 0.5, 1.0, 1.5, 1e8, 1e30, 1e308, math.inf, -math.inf, math.nan),
    bool: (True, False),
    str: ("", "exec", "__class__", "None", "é", "a b", "x" * 1000),
}
WRONG = (None, True, 1.5, -1, math.nan, "a", "", [], [1, 2], [[1]], {}, {"a": 1}, 10**40, b"x", object)


class TooSlow(Exception):
    pass


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises `TooSlow` in what takes longer; where there are no alarms, nothing."""

    def stop(number, frame):
        raise TooSlow(f"it took longer than {seconds:g} s")

    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def kinds_of(hint) -> list[type]:
    """The plain types that an annotation is made of."""
    if typing.get_origin(hint) in (UnionType, typing.Union):
        return [kind for part in typing.get_args(hint) for kind in kinds_of(part)]
    return [hint] if hint in ODD else []


def draw_value(name: str, hint, default, generator: random.Random):
    """A value for an argument: mostly usual or its default, now and then of the type but odd, or of another type."""
    choice = generator.random()
    if choice < 0.6:
        return generator.choice(USUAL.get(name, (default,)))
    kinds = kinds_of(hint)
    if choice < 0.9 and kinds:
        return generator.choice(ODD[generator.choice(kinds)])
    return generator.choice(WRONG)


def draw_scheduler(seed: int) -> tuple[type, dict]:
    """A class and a config for it."""
    generator = random.Random(seed)
    cls = getattr(diffusers_ext, generator.choice(SCHEDULERS))
    parameters = typing.get_type_hints(cls.__init__)
    defaults = cls.__init__.__wrapped__.__kwdefaults__ or {}
    names = [name for name in parameters if name not in ("self", "return")]
    count = len(cls.__init__.__wrapped__.__defaults__ or ())
    defaults |= dict(zip(names[:count], cls.__init__.__wrapped__.__defaults__ or (), strict=False))
    config = {"num_train_timesteps": generator.choice(USUAL["num_train_timesteps"])}
    for name in generator.sample(names, min(len(names), generator.randrange(5))):
        config[name] = draw_value(name, parameters[name], defaults.get(name), generator)
    return cls, config


def try_scheduler(seed: int) -> str:
    """Makes a scheduler and samples with it; "works", or "refused"."""
    cls, config = draw_scheduler(seed)
    generator = random.Random(-1 - seed)
    scheduler = cls(**config)
    if cls.__name__ == "FlowScheduler" and scheduler.config.use_dynamic_shifting:
        options = {"mu": generator.choice((0.0, 0.5, 1.15))}
    else:
        options = {}
    scheduler.set_timesteps(generator.choice((1, 2, 5, 0, -1, 1000, 1.5, "a")), **options)
    torch.manual_seed(seed % 2**32)
    channels = 2 if str(scheduler.config.get("variance_type")).startswith("learned") else 1
    sample = torch.randn(1, 1, 2, 2) * float(scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps[:2]:
        output = torch.randn(1, channels, 2, 2)
        scheduler.scale_model_input(sample, timestep)
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]
        if not torch.isfinite(sample).all():
            raise FloatingPointError(f"a sample at timestep {timestep} is not finite")
    return "works"


def is_ours(error: BaseException) -> bool:
    """Whether an error was raised on purpose, with a sentence."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    by_us = frame.f_code.co_filename.startswith(OURS)
    return by_us and isinstance(error, ValueError | TypeError) and len(str(error).split()) >= 4


def try_options(seed: int, classes) -> str:
    """Parses a command line, and takes it through YAML and back."""
    generator = random.Random(seed)
    cls = generator.choice(classes)
    arguments = draw_arguments(cls, generator)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            config = parse_config(cls, arguments)
    except SystemExit as end:
        if end.code != 2 or len(errors.getvalue().split()) < 4:
            raise ValueError(f"it ends with {end.code} and says {errors.getvalue()!r}") from end
        return "refused"
    for name, value in dataclasses.asdict(config).items():
        if any(part != part for part in (value if isinstance(value, tuple) else (value,))):
            raise FloatingPointError(f"{name} is {value}")
    again = cls(**read_yaml_text(cls, to_yaml(config), "options"))
    words = shlex.split(to_command(config, "script.py"))[3:]
    for other in (again, parse_config(cls, words)):
        changed = [
            field.name
            for field in dataclasses.fields(cls)
            if getattr(config, field.name) != getattr(other, field.name) and field.name not in NOT_KEPT
        ]
        if changed:
            name = changed[0]
            raise AssertionError(f"{name} comes back as {getattr(other, name)!r}, was {getattr(config, name)!r}")
    return "works"


NOT_KEPT = ("hub_token", "overwrite_output_dir", "resume_from_checkpoint")


def draw_arguments(cls: type, generator: random.Random) -> list[str]:
    """A command line: a few options, mostly with values that fit."""
    hints, words = typing.get_type_hints(cls), []
    required = {"vae": "runs/vae", "pipeline": "runs/digits", "run": "runs/digits", "model": "runs/vae"}
    required |= {"dataset_name": "digits", "ema_std": "0.1"}
    fields = dataclasses.fields(cls)
    for name, value in required.items():
        if generator.random() < 0.7 and any(field.name == name and field.default is None for field in fields):
            words += [f"--{name}", value]
    for field in generator.sample(fields, min(len(fields), generator.randrange(1, 7))):
        kind, wide = hints[field.name], generator.random()
        plain = [part for part in typing.get_args(kind) or [kind] if part is not type(None)][0]
        if plain is bool:
            words.append(generator.choice(("--", "--no-")) + field.name)
            continue
        values = [generator.choice(ODD[each]) for each in kinds_of(plain)] or ["a", "1", "0.5"]
        if wide < 0.5 and field.default is not None:
            values = list(field.default) if isinstance(field.default, tuple) else [field.default]
        if wide > 0.9:
            values = [generator.choice(WRONG)]
        words += [f"--{field.name}", *map(str, values[: generator.randrange(1, 4)])]
    return words


def option_classes() -> list[type]:
    """The options of all commands."""
    found = []
    for module in pkgutil.iter_modules(diffusers_ext.commands.__path__, "diffusers_ext.commands."):
        main = getattr(importlib.import_module(module.name), "main", None)
        hints = {} if main is None else typing.get_type_hints(main)
        found += [hints["config"]] if "config" in hints else []
    return found


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Without the Hub, since a random word may be the name of a repository there."""
    constants = huggingface_hub.constants
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fuzz(
    what: str,
    attempt: Callable[[int], str],
    seeds: range,
    seconds_each: float = 10.0,
    show: bool = False,
    max_seconds: float = math.inf,
) -> list:
    """Tries all seeds; gives a line for each that fails.

    Args:
        what: A word for them.
        attempt: Of a seed: "works", or "refused", or an error, which is no failure if `is_ours`.
        max_seconds: Of this process's computing, after which no further seed is tried.
    """
    counts, failures, start = Counter(), [], time.process_time()
    with warnings.catch_warnings(), offline():
        warnings.simplefilter("ignore")
        for seed in seeds:
            if time.process_time() - start > max_seconds:
                break
            try:
                with within(seconds_each):
                    counts[attempt(seed)] += 1
            except Exception as error:
                if is_ours(error):
                    counts["refused"] += 1
                    continue
                *_, (frame, line) = traceback.walk_tb(error.__traceback__)
                where = f"{Path(frame.f_code.co_filename).name}:{line}"
                failures.append(f"{what} {seed}: {type(error).__name__} in {where}: {error}")
    if show:
        counted = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        tried = f"{sum(counts.values()) + len(failures)} from {seeds.start} on"
        seconds = time.process_time() - start
        print(f"{what}: {tried}: {counted}, {len(failures)} fail; {seconds:.0f} s of computing", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_schedulers", type=int, default=100_000)
    parser.add_argument("--num_options", type=int, default=10_000)
    parser.add_argument("--first_seed", type=int, default=0, help="of the first config and command line")
    parser.add_argument("--seconds_each", type=float, default=10.0)
    parser.add_argument(
        "--max_seconds", type=float, default=math.inf, help="of computing, three quarters for schedulers"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    classes = option_classes()
    seeds = [
        range(given.first_seed, given.first_seed + number) for number in (given.num_schedulers, given.num_options)
    ]
    options = {"seconds_each": given.seconds_each, "show": True}
    longest = given.max_seconds
    failures = fuzz("scheduler", try_scheduler, seeds[0], max_seconds=0.75 * longest, **options)
    failures += fuzz("options", partial(try_options, classes=classes), seeds[1], max_seconds=0.25 * longest, **options)
    for line in failures[:50]:
        print(line)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
