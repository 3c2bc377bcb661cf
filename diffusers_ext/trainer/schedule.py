"""How far a run is, in optimizer steps or in time, and the learning rate that follows from it."""

import math
import re
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler


# The default warm-up: this number of steps, and no more than this share of the run.
DEFAULT_WARMUP_STEPS, WARMUP_SHARE = 100, 0.1

LR_SCHEDULERS = (
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    "warmup_stable_decay",
)


def parse_duration(text: str) -> float:
    """Seconds in a duration such as `600`, `90s`, `10m` or `1h30m`."""
    text = text.strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text)
    if not text or match is None:
        raise ValueError(f"a duration must look like 600 (seconds), 10m or 1h30m, got {text!r}")
    return sum(float(part or 0) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True))


class Budget:
    """The end of a run: a number of optimizer steps, a number of seconds, or whichever comes first.

    Attributes:
        max_steps, max_seconds: As given; infinite, where not.
        reserved: Seconds of `max_seconds` that are kept for what follows the training; see `end_seconds`.

    Raises:
        ValueError: if neither is given, or if one is not positive.
    """

    def __init__(self, max_steps: int | None = None, max_seconds: float | None = None):
        if max_steps is None and max_seconds is None:
            raise ValueError("a run needs an end: give max_train_steps, max_train_time or both")
        for name, value in {"max_train_steps": max_steps, "max_train_time": max_seconds}.items():
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value:g}")
        self.max_steps = math.inf if max_steps is None else max_steps
        self.max_seconds = math.inf if max_seconds is None else max_seconds
        self.reserved = 0.0

    @property
    def end_seconds(self) -> float:
        """When the training ends."""
        return self.max_seconds - self.reserved

    def progress(self, steps: int, seconds: float, start_steps: int = 0, start_seconds: float = 0.0) -> float:
        """The share in [0, 1] of the way from a start to the end that is behind a run after these steps and seconds."""
        by_steps = _share(steps, start_steps, self.max_steps)
        return min(1.0, max(by_steps, _share(seconds, start_seconds, self.end_seconds)))

    def seconds_left(self, steps: int, seconds: float, steps_per_second: float) -> float:
        """Until the training ends, after these steps and seconds, if the speed stays what it is."""
        by_steps = (self.max_steps - steps) / max(steps_per_second, 1e-9)
        return max(0.0, min(by_steps, self.end_seconds - seconds))

    def is_over(self, steps: int, seconds: float) -> bool:
        return steps >= self.max_steps or seconds >= self.end_seconds


def _share(now: float, start: float, end: float) -> float:
    if math.isinf(end):
        return 0.0
    return (now - start) / (end - start) if end > start else 1.0


class LearningRate:
    """The learning rate of each optimizer step: a linear warm-up, then a decay over what is left of the budget.

    Counted in optimizer steps, whatever the gradient accumulation and the number of processes. Where the run ends by
    time, the decay follows the time used, so that it is complete when the time is.

    Args:
        name: One of `LR_SCHEDULERS`, with diffusers' curves; "warmup_stable_decay" stays at the peak, and falls to 0 by
            1 - sqrt(x) in the last part x in [0, 1] (Hägele et al. 2024, arXiv 2405.18392).
        peak: Learning rate after the warm-up.
        warmup_steps: Optimizer steps of the warm-up; step k (from 0) has (k + 1) / warmup_steps of the peak. None for
            100 of them, or a tenth of the budget's steps or time if that is less.
        num_cycles, power: Of "cosine_with_restarts" and "polynomial".
        warmup_share: Share of the budget that the warm-up takes, by steps or time, whichever comes first; instead of
            `warmup_steps`.
        decay_share: Of what follows the warm-up, the share that "warmup_stable_decay" decays in.
    """

    def __init__(
        self,
        name: str,
        peak: float,
        budget: Budget,
        *,
        warmup_steps: int | None = 0,
        num_cycles: int = 1,
        power: float = 1.0,
        warmup_share: float | None = None,
        decay_share: float = 0.2,
    ):
        if name not in LR_SCHEDULERS:
            raise ValueError(f"lr_scheduler must be one of {', '.join(LR_SCHEDULERS)}, got {name!r}")
        self.peak, self.budget = peak, budget
        if warmup_share is not None:
            self.warmup_share = warmup_share
            self.warmup_steps = (
                math.inf if math.isinf(budget.max_steps) else math.floor(warmup_share * budget.max_steps)
            )
        else:
            self.warmup_share = WARMUP_SHARE if warmup_steps is None else math.inf
            self.warmup_steps = default_warmup_steps(budget.max_steps) if warmup_steps is None else warmup_steps
        self._multiplier = _decay(name, peak, num_cycles, power, decay_share)

    def is_warm(self, step: int, seconds: float) -> bool:
        """Whether the warm-up is over when optimizer step `step` (from 0) begins, `seconds` after the start."""
        return step >= self.warmup_steps or seconds >= self._warmup_seconds

    @property
    def _warmup_seconds(self) -> float:
        return self.warmup_share * self.budget.end_seconds

    def at(self, step: int, seconds: float, warmup_end: tuple[int, float] | None = None) -> float:
        """The learning rate of optimizer step `step` (from 0), which begins `seconds` after the start.

        Args:
            warmup_end: The step and the seconds with which the warm-up ended, from which the decay goes on; None while it
                lasts, or if it ended with its last step, at 0 seconds.
        """
        if warmup_end is None and not self.is_warm(step, seconds):
            return self.peak * min(1.0, max((step + 1) / self.warmup_steps, seconds / self._warmup_seconds))
        start_steps, start_seconds = warmup_end or (self.warmup_steps, 0.0)
        return self.peak * self._multiplier(self.budget.progress(step, seconds, start_steps, start_seconds))


def _decay(name: str, peak: float, num_cycles: int, power: float, decay_share: float) -> Callable[[float], float]:
    """The learning rate relative to its peak, as a function of the progress in [0, 1] after the warm-up."""
    if name == "warmup_stable_decay":
        return lambda progress: 1 - math.sqrt(max(0.0, 1 - (1 - progress) / decay_share))
    # With one step in all, diffusers' multiplier is a function of the progress.
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=peak)
    curve = get_scheduler(name, stand_in, num_warmup_steps=0, num_training_steps=1, num_cycles=num_cycles, power=power)
    return curve.lr_lambdas[0]


def default_warmup_steps(max_steps: float) -> int:
    """Optimizer steps of the default warm-up of a run of `max_steps`."""
    return math.floor(min(DEFAULT_WARMUP_STEPS, WARMUP_SHARE * max_steps))
