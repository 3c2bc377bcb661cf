"""The time of training steps, measured by turns: what the benchmarks of networks share.

A step is forward, backward, clipping, AdamW and averaging of the weights. diffusers' networks run as
`train_unconditional.py` runs them; ours as `train_ddpm.py` does, in a process that keeps its memory
(`diffusers_ext/runtime.py`). Each setting is a process of its own. They take turns of a step, so that a machine that slows
down slows all of them, and the medians are compared.
"""

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from diffusers.training_utils import EMAModel

from diffusers_ext.runtime import keep_memory
from diffusers_ext.trainer.ema import WeightAverage


class StockStep:
    """A network with the optimizer and average of `train_unconditional.py`."""

    def __init__(self, model: torch.nn.Module, mixed_precision: bool, compiled: bool = False):
        self.model, self.mixed_precision = model, mixed_precision
        if compiled:
            model.compile()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-6)
        ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
        self.average = lambda: ema.step(model.parameters())

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, target: torch.Tensor, **conditions: torch.Tensor):
        with torch.autocast(x_t.device.type, torch.bfloat16, enabled=self.mixed_precision):
            output = self.model(x_t, timesteps, **conditions).sample
        (output.float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()


class OurStep(StockStep):
    """A network with the memory layout, optimizer and average of `diffusers_ext.trainer`."""

    def __init__(self, model: torch.nn.Module, mixed_precision: bool, compiled: bool = False):
        self.model, self.mixed_precision = model.to(memory_format=torch.channels_last), mixed_precision
        if compiled:
            model.compile()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        average = WeightAverage(model, std=0.1)
        self.average = lambda: average.update(model)


@dataclass
class Setting:
    """What makes a step, in a process of its own; `keeps_memory` says whether that process does."""

    make: Callable[[], StockStep]
    keeps_memory: bool


@dataclass
class Measured:
    """Seconds a step (median), pages that a step touched for the first time (median), MiB of memory at its most."""

    seconds: float
    pages: float
    peak_memory: float
    num_parameters: int


def steps_on_request(pipe, setting: Setting, threads: int, num_timesteps: int, shape: tuple[int, ...], num_classes):
    """A process that takes a step whenever it is asked to, and says how long that took."""
    if setting.keeps_memory:
        assert keep_memory(), "the allocator of this machine is not glibc's"
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = setting.make()
    generator = torch.Generator().manual_seed(0)
    x_t, target = torch.randn(2, *shape, generator=generator)
    timesteps = torch.randint(num_timesteps, shape[:1], generator=generator)
    conditions = {}
    if num_classes is not None:
        conditions["class_labels"] = torch.randint(num_classes, shape[:1], generator=generator)
    for _ in range(2):
        step(x_t, timesteps, target, **conditions)
    pipe.send(sum(p.numel() for p in step.model.parameters()))
    while pipe.recv():
        pages, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        step(x_t, timesteps, target, **conditions)
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((seconds, after.ru_minflt - pages, after.ru_maxrss / 1024))


def measure(
    settings: dict[str, Setting], rounds: int, threads: int, shape: tuple[int, ...], num_classes: int | None = None
) -> dict[str, Measured]:
    """Steps of each setting by turns.

    Args:
        settings: By name.
        rounds: Steps of each setting that are timed.
        shape: Of a batch, `(batch, channels, height, width)`.
        num_classes: Of the labels; `None` for none.
    """
    context, pipes, parameters = multiprocessing.get_context("fork"), {}, {}
    for name, setting in settings.items():
        pipes[name], theirs = context.Pipe()
        arguments = (theirs, setting, threads, 1000, shape, num_classes)
        context.Process(target=steps_on_request, args=arguments, daemon=True).start()
        theirs.close()
        parameters[name] = pipes[name].recv()
    rows = {name: [] for name in settings}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            rows[name].append(pipe.recv())
    for pipe in pipes.values():
        pipe.send(False)
    measured = {}
    for name, values in rows.items():
        seconds, pages, peaks = zip(*values, strict=True)
        measured[name] = Measured(median(seconds), median(pages), max(peaks), parameters[name])
    return measured


def compare(
    settings: dict[str, Callable[[], StockStep]],
    rounds: int,
    threads: int,
    shape: tuple[int, ...],
    num_classes: int | None = None,
):
    """Times steps of each setting by turns and prints the medians, beside those of diffusers' in either precision.

    Args:
        settings: Makers of steps by name, ours beginning with "diffusers_ext"; "diffusers, fp32" and "diffusers, bf16
            autocast" are among them.
        rounds, shape, num_classes: As of `measure`.
    """
    prepared = {name: Setting(make, name.startswith("diffusers_ext")) for name, make in settings.items()}
    measured = measure(prepared, rounds, threads, shape, num_classes)
    print(f"median of {rounds} steps, batch {shape[0]}, {threads} threads, torch {torch.__version__}")
    print(f"{'':40}{'parameters':>12}{'s/step':>9}{'of fp32':>9}{'of bf16':>9}")
    for name, row in measured.items():
        ratios = [row.seconds / measured[f"diffusers, {stock}"].seconds for stock in ("fp32", "bf16 autocast")]
        print(f"{name:40}{row.num_parameters / 1e6:11.2f}M{row.seconds:9.3f}{ratios[0]:9.3f}{ratios[1]:9.3f}")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that the benchmarks of steps share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each setting that are timed")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser
