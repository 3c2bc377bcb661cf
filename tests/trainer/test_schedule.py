import pytest
import torch
from diffusers.optimization import get_scheduler

from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.schedule import LR_SCHEDULERS, Budget, LearningRate, parse_duration


@pytest.mark.parametrize(
    "text, seconds", [("600", 600), ("1.5", 1.5), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1h2m3s", 3723)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "ten", "10 minutes", "m", "-5", "1m1h"])
def test_other_durations_are_refused(text):
    with pytest.raises(ValueError, match="a duration must look like 600"):
        parse_duration(text)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_decay_matches_diffusers_step_by_step(name):
    """After the warm-up; in it diffusers' first step has a learning rate of 0, ours moves."""
    peak, warmup, total = 0.02, 5, 40
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    cycles = 3 if name == "cosine_with_restarts" else 1
    stock = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, num_cycles=cycles, power=2.0
    )
    ours = LearningRate(name, peak, Budget(total), warmup_steps=warmup, num_cycles=cycles, power=2.0)
    for step in range(total):
        expected = peak * (step + 1) / warmup if step < warmup else optimizer.param_groups[0]["lr"]
        assert ours.at(step, 0.0) == pytest.approx(expected, rel=1e-6, abs=1e-12), step
        optimizer.step()
        stock.step()


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_by_time_is_complete_when_the_time_is_up(name):
    rate = LearningRate(name, 1.0, Budget(max_seconds=100.0), warmup_steps=10)
    assert rate.at(4, 3.0) == 0.5
    assert rate.at(10, 20.0, (10, 20.0)) == 1.0
    assert rate.at(1000, 60.0, (10, 20.0)) == pytest.approx(0.5)
    assert rate.at(9000, 100.0, (10, 20.0)) == pytest.approx(0.0, abs=1e-12)


def test_a_warm_up_that_is_left_open_is_a_tenth_of_a_short_run():
    """At most 100 steps; whichever of steps and time comes first."""
    for steps, expected in ((4, 0), (40, 4), (999, 99), (1200, 100), (10**6, 100)):
        rate = LearningRate("constant", 1.0, Budget(steps), warmup_steps=None)
        assert rate.warmup_steps == expected == sum(not rate.is_warm(step, 0.0) for step in range(min(steps, 200)))
    rate = LearningRate("cosine", 1.0, Budget(max_seconds=100.0), warmup_steps=None)
    assert rate.at(0, 0.0) == 0.01 and rate.at(3, 5.0) == 0.5 and rate.at(79, 5.0) == 0.8
    assert not rate.is_warm(99, 9.9) and rate.is_warm(100, 1.0) and rate.is_warm(5, 10.0)
    assert rate.at(5, 10.0, (5, 10.0)) == 1.0 and rate.at(9, 55.0, (5, 10.0)) == pytest.approx(0.5)
    given = LearningRate("cosine", 1.0, Budget(max_seconds=100.0), warmup_steps=100)
    assert given.at(49, 90.0) == 0.5 and not given.is_warm(99, 99.0)


def test_time_that_is_reserved_ends_the_training_and_its_decay_earlier():
    budget = Budget(max_seconds=100.0)
    budget.reserved = 25.0
    assert budget.end_seconds == 75.0 and budget.is_over(1, 75.0) and not budget.is_over(1, 74.9)
    assert LearningRate("linear", 1.0, budget).at(9, 60.0) == pytest.approx(0.2)


def test_whichever_end_is_nearer_decides():
    budget = Budget(100, 50.0)
    assert budget.progress(10, 25.0) == 0.5
    assert budget.progress(80, 25.0) == 0.8
    assert budget.is_over(100, 0.0) and budget.is_over(0, 50.0) and not budget.is_over(99, 49.9)
    assert Budget(100).progress(50, 1e9) == 0.5


@pytest.mark.parametrize("steps, seconds, message", [(0, None, "max_train_steps"), (None, 0.0, "max_train_time")])
def test_empty_budgets_are_refused(steps, seconds, message):
    with pytest.raises(ValueError, match=f"{message} must be positive, got 0"):
        Budget(steps, seconds)
    with pytest.raises(ValueError, match="a run needs an end"):
        Budget()


def test_unknown_scheduler_names_the_choices():
    with pytest.raises(ValueError, match=f"lr_scheduler must be one of {', '.join(LR_SCHEDULERS)}, got 'step'"):
        LearningRate("step", 1.0, Budget(1))


def test_warmup_stable_decay_stays_at_its_peak_and_falls_at_the_end():
    """By steps and by time: after the warm-up, 0.8 of what is left at the peak, then 1 - sqrt(x)."""
    options = {"warmup_share": 0.1, "decay_share": 0.2}
    by_steps = LearningRate("warmup_stable_decay", 2.0, Budget(110), **options)
    assert by_steps.warmup_steps == 11 and by_steps.at(0, 0.0) == pytest.approx(2 / 11)
    assert by_steps.at(10, 0.0) == by_steps.at(11, 0.0) == by_steps.at(90, 0.0) == 2.0
    left = LearningRate("warmup_stable_decay", 2.0, Budget(100), warmup_steps=0, decay_share=0.2)
    expected = {80: 2.0, 85: 2 * (1 - 0.25**0.5), 90: 2 * (1 - 0.5**0.5), 100: 0.0}
    assert {step: left.at(step, 0.0) for step in expected} == pytest.approx(expected)
    by_time = LearningRate("warmup_stable_decay", 2.0, Budget(max_seconds=100.0), **options)
    assert by_time.at(7, 5.0) == 1.0 and not by_time.is_warm(10**6, 9.9) and by_time.is_warm(3, 10.0)
    assert by_time.at(50, 81.9, (3, 10.0)) == 2.0
    assert by_time.at(60, 91.0, (3, 10.0)) == pytest.approx(2 * (1 - 0.5**0.5))
    assert by_time.at(70, 100.0, (3, 10.0)) == pytest.approx(0.0, abs=1e-7)


def test_a_share_of_the_run_without_warm_up_begins_at_the_peak():
    for budget in (Budget(40), Budget(max_seconds=10.0)):
        assert LearningRate("constant", 1.0, budget, warmup_share=0.0).at(0, 0.0) == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lr_warmup_share": 1.0}, r"lr_warmup_share must be in \[0, 1\), got 1"),
        ({"lr_warmup_share": 0.1, "lr_warmup_steps": 5}, "are two lengths of the warm-up: give one of them"),
        ({"lr_decay_share": 0.5}, "lr_decay_share has no meaning without lr_scheduler warmup_stable_decay"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_decay_share": 0.0},
            r"lr_decay_share must be in \(0, 1\], got 0",
        ),
    ],
)
def test_shares_that_fit_no_run_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**options)
