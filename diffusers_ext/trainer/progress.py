"""The progress bar of a run, and where its time went."""

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import TypeVar

from tqdm.auto import tqdm

from diffusers_ext.trainer.schedule import Budget


Part = TypeVar("Part")


class ProgressBar:
    """A bar over the run that shows step, loss, images a second and the time left.

    Args:
        budget: The run's end, in steps or in time.
        images_per_step: Over all processes.
        steps, seconds: What is behind a run that goes on.
    """

    def __init__(
        self, budget: Budget, images_per_step: int, *, steps: int = 0, seconds: float = 0.0, enabled: bool = True
    ):
        self._budget, self._images_per_step = budget, images_per_step
        self._last, self._loss, self._speed = (steps, seconds), None, 0.0
        self._bar = tqdm(
            total=1.0,
            initial=budget.progress(steps, seconds),
            bar_format="{percentage:3.0f}%|{bar:24}|{postfix}",
            disable=not enabled,
        )

    def advance(self, steps: int, seconds: float):
        """Moves the bar; it is drawn a few times a second at most."""
        self._bar.set_postfix_str(self._text(steps, seconds), refresh=False)
        self._bar.update(self._budget.progress(steps, seconds) - self._bar.n)

    def report(self, steps: int, seconds: float, loss: float) -> float:
        """Takes note of the loss, and of the speed since the last report, which it returns in images a second."""
        last_steps, last_seconds = self._last
        self._last, self._loss = (steps, seconds), loss
        self._speed = (steps - last_steps) / max(seconds - last_seconds, 1e-9)
        self._bar.set_postfix_str(self._text(steps, seconds))
        return self._speed * self._images_per_step

    def _text(self, steps: int, seconds: float) -> str:
        end = "" if math.isinf(self._budget.max_steps) else f"/{self._budget.max_steps}"
        speed = self._speed or (steps - self._last[0]) / max(seconds - self._last[1], 1e-9)
        left = self._budget.seconds_left(steps, seconds, speed)
        loss = "" if self._loss is None else f", loss {self._loss:.4f}"
        return (
            f"step {steps}{end}{loss}, {speed * self._images_per_step:.0f} images/s, {tqdm.format_interval(left)} left"
        )

    def close(self):
        self._bar.close()


def counting_bar(total: int, unit: str, *, enabled: bool = True) -> tqdm:
    """A bar over work of which the amount is known; `update()` moves it on by one unit."""
    return tqdm(
        total=total,
        desc=unit,
        bar_format="{percentage:3.0f}%|{bar:24}| {desc} {n_fmt}/{total_fmt}, {remaining} left",
        disable=not enabled,
    )


def counted(bar: tqdm, parts: Iterable[Part]) -> Iterator[Part]:
    """The parts, with the bar moved on after each."""
    for part in parts:
        yield part
        bar.update()


_NOTHING = nullcontext()
WAITING = "waiting for data"


class TimeShares:
    """Seconds spent on named activities beside the model, as the host sees them.

    The methods `watching`, `step` and `part` mark a run, its steps and their parts for `StepProfile`; here they do
    nothing.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def watching(self) -> AbstractContextManager:
        return _NOTHING

    def step(self) -> AbstractContextManager:
        return _NOTHING

    def part(self, name: str) -> AbstractContextManager:
        return _NOTHING

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def summary(self, total: float) -> str:
        """Each activity's share of a total, and the rest, which is the model's."""
        shares = {name: seconds / max(total, 1e-9) for name, seconds in self.seconds.items()}
        parts = [f"{share:.1%} {name}" for name, share in shares.items()]
        return ", ".join([f"{1 - sum(shares.values()):.1%} in the model", *parts])


class SpeedWatch:
    """Notices, once, that a run has become far slower than it was.

    Steps are timed in windows of some seconds, without what is done beside them; a window is slow if its speed is below
    a third of the median over the windows before it.

    Args:
        device_type: Where the model is: what is likely to slow it down follows from that.
    """

    WINDOW_SECONDS, MIN_WINDOWS, SLOW = 5.0, 5, 1 / 3

    def __init__(self, device_type: str):
        self._device_type = device_type
        self._speeds: list[float] = []  # steps a second
        self._last: tuple[int, float, float] | None = None
        self._is_done = False

    def note(self, steps: int, seconds: float, shares: TimeShares) -> str | None:
        """Takes the steps and seconds of the run until now; gives a line to print, in a run at most once."""
        waited = shares.seconds.get(WAITING, 0.0)
        now = (steps, seconds - sum(shares.seconds.values()) + waited, waited)
        if self._last is None:  # what comes before has a warm-up in it
            self._last = now
        steps, seconds, waited = (value - last for value, last in zip(now, self._last, strict=True))
        if self._is_done or steps == 0 or seconds < self.WINDOW_SECONDS:
            return None
        self._last = now
        typical = median(self._speeds) if len(self._speeds) >= self.MIN_WINDOWS else 0.0
        self._speeds.append(steps / seconds)
        if self._speeds[-1] >= self.SLOW * typical:
            return None
        self._is_done = True
        return (
            f"slow: the last {steps} steps took {seconds / steps:.3g} s each, the run's median is {1 / typical:.3g} s; "
            f"{self._likely_cause(waited / seconds)}"
        )

    def _likely_cause(self, waiting_share: float) -> str:
        if waiting_share > 0.5:
            return f"{waiting_share:.0%} of it was waiting for data: its disk, its network or too few --dataloader_num_workers"
        if self._device_type != "cpu":
            return "another process may use the device, or heat may have lowered its clock"
        if not hasattr(os, "getloadavg") or os.getloadavg()[0] <= 1.25 * os.cpu_count():
            return "heat may have lowered the clock of the cores, or memory may have run short"
        return (
            f"the load is {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, so other processes are busy there, and the threads "
            "of a step wait for the one that is held up"
        )
