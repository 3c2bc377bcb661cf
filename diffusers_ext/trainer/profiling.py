"""Where the time of a run goes, part by part, and a trace of a few of its steps."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProfileKwargs

from diffusers_ext.trainer.progress import TimeShares


PROFILE_FOLDER = "profile"
WARMUP_STEPS, TRACED_STEPS = 5, 3


class StepProfile(TimeShares):
    """Times each part of the loop, and traces three steps after five of warm-up with torch's profiler.

    On an accelerator a part's work goes on after the host has left it, so the device is waited for at both ends of each
    part: the times are the device's, and the steps somewhat slower than without a profile. In the traced steps nothing
    is waited for, and they are left out of the times of the parts: the trace, one Chrome JSON file a process, has them as
    they run, with the device's own clock.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path):
        super().__init__()
        self._accelerator, self._folder = accelerator, output_dir / PROFILE_FOLDER
        # By name: of parts of a step, and of what comes between steps.
        self._within: dict[str, float] = {}
        self._between: dict[str, float] = {}
        self._times = self._between
        self._num_steps, self._num_timed, self._is_traced, self._traced_seconds = 0, 0, False, 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as self._stack:
            yield
            if self._is_traced:  # the run ends among the steps to trace
                self._end_trace()

    @contextmanager
    def step(self) -> Iterator[None]:
        if self._num_steps == WARMUP_STEPS:
            self._begin_trace()
        self._times = self._within
        with self._timed("step"):
            yield
        self._times = self._between
        self._num_steps += 1
        self._num_timed += not self._is_traced
        if self._num_steps == WARMUP_STEPS + TRACED_STEPS:
            self._end_trace()

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        with super().of(name), self._timed(name):
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        with self._timed(name):
            yield

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if self._is_traced:
            with torch.profiler.record_function(name):
                yield
            return
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self._times[name] = self._times.get(name, 0.0) + time.perf_counter() - start

    def _wait(self):
        if self._accelerator.device.type != "cpu":
            torch.accelerator.synchronize()

    def _begin_trace(self):
        with self.of("tracing"):
            handler = ProfileKwargs(output_trace_dir=str(self._folder))
            self._stack.enter_context(self._accelerator.profile(handler))
        self._is_traced, self._traced_seconds = True, -time.perf_counter()

    def _end_trace(self):
        self._wait()
        self._is_traced, self._traced_seconds = False, self._traced_seconds + time.perf_counter()
        with self.of("tracing"):
            self._stack.close()  # writes the trace

    def summary(self, total: float) -> str:
        """Each activity's share of a total, as without a profile, and a table of the parts."""
        return "\n".join([super().summary(total), "", *self._table(total), self._about_trace()])

    def _table(self, total: float) -> list[str]:
        parts = {name: seconds for name, seconds in self._within.items() if name != "step"}
        total_of_steps = self._within.get("step", 0.0)
        rows = [(name, seconds, self._num_timed) for name, seconds in parts.items()]
        rows.append(("rest of the step", total_of_steps - sum(parts.values()), self._num_timed))
        rows += [(name, seconds, 0) for name, seconds in self._between.items()]
        if self._traced_seconds > 0:
            rows.append(("traced steps", self._traced_seconds, 0))
        rest = total - sum(seconds for _, seconds, _ in rows)
        rows += [("between steps, such as the log", rest, 0), ("total", total, 0)]
        lines = [f"{'':32}{'seconds':>10}{'ms a step':>11}{'share':>8}"]
        for name, seconds, steps in rows:
            a_step = f"{1000 * seconds / steps:.2f}" if steps else ""
            lines.append(f"{name:32}{seconds:10.3f}{a_step:>11}{seconds / max(total, 1e-9):8.1%}")
        return lines

    def _about_trace(self) -> str:
        if self._num_steps <= WARMUP_STEPS:
            return f"no step was traced: tracing begins after {WARMUP_STEPS} steps"
        waits = ""
        if self._accelerator.device.type != "cpu":
            waits = "; the parts were timed with the device waited for at both ends, the traced steps run without that"
        return f"trace of {min(self._num_steps - WARMUP_STEPS, TRACED_STEPS)} steps in {self._folder}{waits}"
