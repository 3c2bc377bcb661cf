"""The time that calibrating a pipeline may take."""

import time


# Of the time of the training that it follows, and what it takes to measure anything.
SHARE_OF_TRAINING = 0.1
LEAST_SECONDS = 30.0

# A run that ends with a calibration by default trains at least so long; for a shorter one it would be a large part.
SHORTEST_TRAINING = 120.0


def budget_of_training(seconds: float) -> float:
    """Seconds for the calibration that follows a training of so many seconds."""
    return max(LEAST_SECONDS, SHARE_OF_TRAINING * seconds)


class Budget:
    """Seconds from now on, or from `start`, a reading of `time.perf_counter`."""

    def __init__(self, seconds: float, start: float | None = None):
        self.seconds = seconds
        self._start = time.perf_counter() if start is None else start

    @property
    def used(self) -> float:
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.used)

    def part(self, share: float) -> "Budget":
        """This share of what is left."""
        return Budget(share * self.left)
