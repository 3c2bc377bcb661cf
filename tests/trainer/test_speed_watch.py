"""The line that a run prints when it has become far slower than it was."""

import os
import re
import time

import pytest

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer.progress import WAITING, SpeedWatch, TimeShares
from runs import squared_error, trainer


class Run:
    """Steps by the clock that the watch is given."""

    def __init__(self, device_type="cpu"):
        self.watch, self.shares, self.steps, self.seconds = SpeedWatch(device_type), TimeShares(), 0, 0.0
        self.lines = [self.watch.note(0, 0.0, self.shares)]

    def go(self, steps, seconds_a_step, waiting=0.0, beside=0.0):
        """Reports once, after so many steps, of which each waits so long for data, and something that is no step."""
        self.steps += steps
        self.seconds += steps * seconds_a_step + beside
        for name, spent in ((WAITING, steps * waiting), ("validating", beside)):
            self.shares.seconds[name] = self.shares.seconds.get(name, 0.0) + spent
        self.lines.append(self.watch.note(self.steps, self.seconds, self.shares))
        return self.lines[-1]


@pytest.fixture(params=[1.0, 50.0])
def steady(request, monkeypatch):
    """One of 0.5 s a step, reported every 1 s or every 50 s."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    run = Run()
    run.interval = max(1, int(request.param / 0.5))
    for _ in range(60):
        assert run.go(run.interval, 0.5) is None
    return run


def test_a_third_of_the_median_is_the_limit(steady):
    for _ in range(20):
        assert steady.go(steady.interval, 1.49) is None


def test_it_is_said_once_with_both_times(steady):
    lines = [steady.go(steady.interval, 2.0) for _ in range(20)]
    (line,) = filter(None, lines)
    assert "steps took 2 s each, the run's median is 0.5 s; heat may have lowered the clock" in line
    for _ in range(20):
        steady.go(steady.interval, 0.5)
    assert [steady.go(steady.interval, 5.0) for _ in range(20)] == [None] * 20


def test_validation_between_steps_is_no_slow_step(steady):
    for _ in range(20):
        assert steady.go(steady.interval, 0.5, beside=1000.0) is None


def test_one_long_step_within_a_window_is_no_slow_run():
    run = Run()
    for _ in range(3000):
        assert run.go(1, 0.01) is None
    assert run.go(1, 2.0) is None


def test_a_warm_up_is_not_the_run():
    """Compiling, before the first report; and a beginning that is too short to have a median."""
    run = Run()
    for seconds in (300.0, 6.0, 6.0, 6.0, 30.0):
        assert run.go(1, seconds) is None


@pytest.mark.parametrize(
    "device, load, waiting, cause",
    [
        ("cpu", 0.5, 2.0, "66% of it was waiting for data: its disk, its network or too few --dataloader_num_workers"),
        ("cpu", 1000.0, 0.0, "the load is 1000.0 on .* cores, so other processes are busy there"),
        ("cpu", 0.5, 0.0, "heat may have lowered the clock of the cores"),
        ("cuda", 1000.0, 0.0, "another process may use the device"),
    ],
)
def test_the_likely_cause_is_named(monkeypatch, device, load, waiting, cause):
    monkeypatch.setattr(os, "getloadavg", lambda: (load,) * 3)
    run = Run(device)
    for _ in range(6):
        run.go(10, 1.0)
    line = run.go(10, 3.5 if not waiting else 3.01, waiting and 2.0)
    assert line is not None and re.search(cause, line)


def test_a_run_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(SpeedWatch, "WINDOW_SECONDS", 1e-6)
    start, steps = time.perf_counter(), []

    def loss(model, batch):
        steps.append(time.perf_counter())
        if len(steps) > 10:  # ten times as long as the mean of those before
            time.sleep(steps[9] - start)
        return squared_error(model, batch)

    trainer(prepare_images("digits", max_samples=20), tmp_path, loss, logging_steps=1, max_train_steps=14).train()
    assert capsys.readouterr().out.count("the run's median is") == 1
