import numpy as np
import pytest
import torch
from torch import nn

from diffusers_ext.trainer.ema import WeightAverage, power_function_exponent


def run(average, model, values):
    for value in values:
        with torch.no_grad():
            model.weight.fill_(value)
        average.update(model)


@pytest.mark.parametrize("std, gamma", [(0.05, 16.9722), (0.10, 6.9372)])
def test_exponent_of_the_power_function(std, gamma):
    """The figures of Karras et al. 2023."""
    assert power_function_exponent(std) == pytest.approx(gamma, abs=1e-4)


@pytest.mark.parametrize("std", [0.05, 0.2])
def test_power_function_average_weights_step_tau_by_tau_to_the_gamma(std):
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, std=std)
    values = np.random.default_rng(0).normal(size=4000)
    run(average, model, values)
    # The weights integrate tau^gamma over (tau - 1, tau].
    ends = np.arange(4001.0) ** (power_function_exponent(std) + 1)
    expected = np.sum(np.diff(ends) / ends[-1] * values)
    assert average.state_dict()["weight"].item() == pytest.approx(expected, abs=1e-5)
    places = (np.arange(4000) + 0.5) / 4000
    weights = np.diff(ends) / ends[-1]
    assert np.sqrt(np.sum(weights * places**2) - np.sum(weights * places) ** 2) == pytest.approx(std, rel=1e-3)


def test_warmup_off_is_off():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = WeightAverage(model, decay=0.9)
    run(average, model, [0.0, 0.0])
    assert average.state_dict()["weight"].item() == pytest.approx(0.81)


def test_warmup_forgets_the_start_sooner():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = WeightAverage(model, decay=0.25, warmup=True)
    run(average, model, [0.0, 0.0, 0.0])
    assert average.state_dict()["weight"].item() == pytest.approx(2 / 11 * 3 / 12 * 0.25)


def test_average_of_a_bf16_model_is_float32():
    model = nn.Linear(4, 4, dtype=torch.bfloat16)
    average = WeightAverage(model, decay=0.999)
    start = model.weight.detach().float()
    run(average, model, [1.0])
    assert average.state_dict()["weight"].dtype == torch.float32
    torch.testing.assert_close(average.state_dict()["weight"], 0.999 * start + 0.001)


def test_applied_average_leaves_the_models_own_weights_as_they_were():
    model = nn.Linear(3, 3)
    average = WeightAverage(model, std=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average.update(model)
    with torch.no_grad():
        model.weight.mul_(2)
    with pytest.raises(RuntimeError, match="in the middle"), average.applied_to(model):
        torch.testing.assert_close(model.weight.data, before["weight"], rtol=0, atol=0)
        raise RuntimeError("in the middle")
    torch.testing.assert_close(model.weight.data, 2 * before["weight"], rtol=0, atol=0)


def test_state_round_trip_and_another_models_state():
    model = nn.Linear(3, 3)
    average, again = WeightAverage(model, std=0.1), WeightAverage(model, std=0.1)
    run(average, model, [1.0, 2.0, 5.0])
    again.load_state_dict(average.state_dict())
    run(average, model, [3.0])
    run(again, model, [3.0])
    torch.testing.assert_close(again.state_dict(), average.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match="the saved average is of another model"):
        WeightAverage(nn.Linear(3, 3, bias=False), std=0.1).load_state_dict(average.state_dict())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "exactly one of ema_std and ema_decay"),
        ({"std": 0.1, "decay": 0.9}, "exactly one of ema_std and ema_decay"),
        ({"std": 0.3}, r"ema_std must be in \(0, 0.28\], got 0.3"),
        ({"decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        WeightAverage(nn.Linear(1, 1), **settings)
