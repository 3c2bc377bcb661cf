"""The time of a run, and what its processes agree on."""

import time

import torch
from accelerate import Accelerator

from diffusers_ext.machine import widest_float


class RunClock:
    """Seconds of a run, from its first step on and over all its parts."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator, self._start = accelerator, time.perf_counter()

    def start(self, seconds: float = 0.0):
        """Starts the clock of a run that has lasted for `seconds`."""
        self._start = time.perf_counter() - seconds

    def now(self) -> float:
        """By the clock of this process."""
        return time.perf_counter() - self._start

    def agreed(self) -> float:
        """The latest over the processes, the same in all of them; waits for the device."""
        return max_over_processes(self._accelerator, self.now())[0]


def max_over_processes(accelerator: Accelerator, *values: float) -> list[float]:
    """The maximum of each value over the processes, the same in all of them; waits for the device."""
    if accelerator.num_processes == 1:
        return list(values)
    mine = torch.tensor([values], dtype=widest_float(accelerator.device), device=accelerator.device)
    return accelerator.gather(mine).amax(0).tolist()
