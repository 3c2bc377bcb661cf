"""The time of training steps, measured by turns: what the benchmarks of networks share.

A step is forward, backward, clipping, AdamW and averaging of the weights. diffusers' networks run as
`train_unconditional.py` runs them; ours as `train_ddpm.py` does, without compiling. The settings take turns, so that a
machine that slows down slows all of them, and the medians are compared.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from diffusers.training_utils import EMAModel

from diffusers_ext.trainer.ema import WeightAverage


class StockStep:
    """A network with the optimizer and average of `train_unconditional.py`."""

    def __init__(self, model: torch.nn.Module, mixed_precision: bool):
        self.model, self.mixed_precision = model, mixed_precision
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

    def __init__(self, model: torch.nn.Module, mixed_precision: bool):
        self.model, self.mixed_precision = model.to(memory_format=torch.channels_last), mixed_precision
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        average = WeightAverage(model, std=0.1)
        self.average = lambda: average.update(model)


def compare(settings: dict[str, Callable[[], StockStep]], rounds: int, threads: int, *batch, **conditions):
    """Times steps of each setting by turns and prints the medians, beside those of diffusers' in either precision.

    Args:
        settings: Makers of steps by name; "diffusers, fp32" and "diffusers, bf16 autocast" are among them.
        rounds: Steps of each setting that are timed.
        batch: x_t, timesteps and target.
        conditions: Further arguments of the networks.
    """
    torch.set_num_threads(threads)
    steps = {}
    for name, make in settings.items():
        torch.manual_seed(0)
        steps[name] = make()
    seconds = {name: [] for name in steps}
    for round in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(*batch, **conditions)
            if round:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)

    medians = {name: median(values) for name, values in seconds.items()}
    print(f"median of {rounds} steps, batch {len(batch[0])}, {threads} threads, torch {torch.__version__}")
    print(f"{'':40}{'parameters':>12}{'s/step':>9}{'of fp32':>9}{'of bf16':>9}")
    for name, value in medians.items():
        parameters = sum(p.numel() for p in steps[name].model.parameters())
        ratios = [value / medians[f"diffusers, {stock}"] for stock in ("fp32", "bf16 autocast")]
        print(f"{name:40}{parameters / 1e6:11.2f}M{value:9.3f}{ratios[0]:9.3f}{ratios[1]:9.3f}")


def parser(description: str) -> argparse.ArgumentParser:
    """The options that the benchmarks of steps share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each setting that are timed")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser
