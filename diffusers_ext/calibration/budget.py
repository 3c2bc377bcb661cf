"""The time that calibrating a pipeline may take."""

import math
import time
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list


T = TypeVar("T")


# Of the time of the training that it follows, and what it takes to measure anything.
SHARE_OF_TRAINING = 0.1
LEAST_SECONDS = 30.0

# A run that ends with a calibration by default trains at least so long; for a shorter one it would be a large part.
SHORTEST_TRAINING = 120.0


def budget_of_training(seconds: float) -> float:
    """Seconds for the calibration that follows a training of so many seconds."""
    return max(LEAST_SECONDS, SHARE_OF_TRAINING * seconds)


def shared(value: T) -> T:
    """What the main process has, in all of them, so that whatever they decide by it they decide alike."""
    return value if PartialState().num_processes == 1 else broadcast_object_list([value])[0]


def number_that_fits(seconds: float, seconds_of_each: float, least: int, most: int) -> int:
    """How many of what takes so long fit into a time, from `least` to `most`."""
    number = seconds / max(seconds_of_each, 1e-9)
    return int(min(max(number if math.isfinite(number) else 0, least), most))


class Budget:
    """Seconds from now on, or from `start`, a reading of `time.perf_counter`, by the clock of the main process."""

    def __init__(self, seconds: float, start: float | None = None):
        self.seconds = seconds
        self._start = time.perf_counter() if start is None else start

    @property
    def used(self) -> float:
        return shared(time.perf_counter() - self._start)

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.used)

    def part(self, share: float) -> "Budget":
        """This share of what is left."""
        return Budget(share * self.left)
