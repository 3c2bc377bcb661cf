"""Reserves time for the work after the training, in a run that ends by time."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers_ext.trainer.clock import max_over_processes


if TYPE_CHECKING:
    from diffusers_ext.trainer.loop import Trainer


MAX_RESERVED_SHARE = 1 / 3  # of the run's time
MARGIN = 1.2  # on what was measured
FINISHING_SECONDS = 2.0  # curves and card
# The last checkpoint has the weights, their average and two moments, which are written, read again for their hashes and
# forced to the disk; then a pipeline is saved and loaded.
COPIES_OF_WEIGHTS, BYTES_PER_SECOND = 10, 3e8


@dataclass(frozen=True)
class EndingCost:
    """Seconds of the work that a script does after the training.

    Attributes:
        fixed: Of the work that is done in any case.
        scalable: Of the work that may be done in part, such as sampling in fewer steps, if it is done in full.
    """

    fixed: float = 0.0
    scalable: float = 0.0


def seconds_of(work: Callable[[], Any]) -> float:
    """How long a call takes, which must end with its result on the host."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Ending:
    """Reserves a part of a run's time for the work after the training, and says how much of that fits.

    Runs without a limit of time keep nothing, and do all of it.

    Args:
        cost: Measures that work by doing a small part of it; called in every process.
    """

    def __init__(self, trainer: "Trainer", cost: Callable[["Trainer"], EndingCost] | None):
        self._trainer, self._measure, self._cost = trainer, cost, None

    def reserve(self) -> list[str]:
        """Measures and reserves the time; every process calls it, before the first step. Gives lines to print."""
        trainer, budget = self._trainer, self._trainer.budget
        if self._measure is None or math.isinf(budget.max_seconds):
            return []
        cost, before = self._measure(trainer), self._seconds_before()
        fixed, scalable, before = max_over_processes(
            trainer.accelerator, cost.fixed + FINISHING_SECONDS, cost.scalable, before
        )
        self._cost = EndingCost(MARGIN * fixed, MARGIN * scalable)
        needed = MARGIN * before + self._cost.fixed
        budget.reserved = min(needed + self._cost.scalable, MAX_RESERVED_SHARE * budget.max_seconds)
        lines = [
            f"{budget.end_seconds:.0f} s of the {budget.max_seconds:.0f} s are for the training, the others for what "
            "follows it: saving and drawing"
        ]
        if needed > budget.reserved:
            lines.append(
                f"--max_train_time {budget.max_seconds:.0f} s is too short for that, which takes {needed:.0f} s at "
                f"least: the run takes about {budget.end_seconds + needed:.0f} s"
            )
        return lines

    def _seconds_before(self) -> float:
        """Of the last checkpoint and the last loss on held-out images, and of saving and loading."""
        trainer, seconds = self._trainer, 0.0
        if trainer.validation:
            trainer.evaluate(max_batches=1)
            share = -(-len(trainer.validation) // trainer.accelerator.num_processes)
            seconds = share * seconds_of(lambda: trainer.evaluate(max_batches=1))
        size = sum(parameter.numel() * parameter.element_size() for parameter in trainer.module.parameters())
        return seconds + COPIES_OF_WEIGHTS * size / BYTES_PER_SECOND

    def share(self) -> float:
        """The share in [0, 1] of the scalable part for which there is time; every process calls it, after the training."""
        if self._cost is None or not self._cost.scalable:
            return 1.0
        trainer, budget = self._trainer, self._trainer.budget
        # A run that was at its end when it was taken up again has its reserve once more.
        left = max(budget.max_seconds - trainer.clock.agreed(), budget.reserved) - self._cost.fixed
        return min(1.0, max(0.0, left / self._cost.scalable))
