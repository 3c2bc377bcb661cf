"""Time on an accelerator, which works on after the host has gone ahead."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch


def device() -> torch.device:
    """The accelerator, or the CPU without one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Waits for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of_turns(
    runs: dict[str, Callable[[], Any]], *, rounds: int, repeats: int, warmup: int = 2
) -> dict[str, float]:
    """Median seconds of a call of each function; they take turns, and the device is waited for at the end of a turn.

    Args:
        rounds: Turns of each.
        repeats: Calls in a turn, so that waiting once counts for little.
        warmup: Calls of each before the first turn.
    """
    for run in runs.values():
        for _ in range(warmup):
            run()
    synchronize()
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = perf_counter()
            for _ in range(repeats):
                run()
            synchronize()
            seconds[name].append((perf_counter() - start) / repeats)
    return {name: median(values) for name, values in seconds.items()}
