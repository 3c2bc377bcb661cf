"""The bound of a network with its schedule, its gradients, and what learning the schedule does."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusers_ext.diffusion.noising import NoiseLevel, kl_weight, predict_x0, training_target
from diffusers_ext.models.learned_schedule import LearnedSchedule, level_of
from diffusers_ext.recipes.variational_objective import VariationalModel, VariationalObjective


STD = 0.6  # of the data


class ExactDenoiser(nn.Module):
    """The best prediction on data N(0, STD^2), from the timestep alone that it is given."""

    def __init__(self, schedule, prediction_type, num_timesteps=1000):
        super().__init__()
        self.endpoints = lambda: schedule.endpoints.detach()
        self.prediction_type, self.num_timesteps = prediction_type, num_timesteps

    def forward(self, x_t, tau, class_labels=None):
        gamma_0, gamma_1 = self.endpoints()
        level = level_of(gamma_0 + (gamma_1 - gamma_0) * tau / (self.num_timesteps - 1), x_t)
        x0 = level.alpha * STD**2 * x_t / (level.alpha**2 * STD**2 + level.sigma**2)
        eps = (x_t - level.alpha * x0) / level.sigma
        return SimpleNamespace(sample=training_target(x0, eps, level, self.prediction_type))


def model_of(seed=None, prediction_type="epsilon", num_features=64, ends=(-9.0, 4.0), **options):
    schedule = LearnedSchedule(*ends, num_features).double()
    if seed is not None:
        with torch.no_grad():
            schedule.offsets.normal_(std=0.08, generator=torch.Generator().manual_seed(seed))
            schedule.offsets[2] += torch.linspace(-0.3, 0.3, num_features) * (-1) ** seed
    return VariationalModel(
        ExactDenoiser(schedule, prediction_type), schedule, prediction_type, num_bins=None, **options
    )


def quadrature(number):
    """Data, noise and times whose means are the expectations of quadratic forms and of the time."""
    signs = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    time = ((torch.arange(number, dtype=torch.float64) + 0.5) / number).repeat_interleave(4)
    x0, eps = signs.repeat(number, 1).unbind(1)
    return STD * x0.view(-1, 1, 1, 1), eps.view(-1, 1, 1, 1), time


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow"])
def test_the_bound_in_continuous_time_depends_on_the_endpoints_alone(prediction_type):
    """For Gaussian data it is known: half of the integral of the error of eps over gamma, which is a logarithm."""
    expected = 0.5 * math.log((1 + STD**2 * math.exp(9.0)) / (1 + STD**2 * math.exp(-4.0)))
    spread = []
    for seed in (None, 1, 2):
        with torch.no_grad():
            diffusion = model_of(seed, prediction_type)(*quadrature(1000)).diffusion
        assert diffusion.mean().item() == pytest.approx(expected, abs=1e-5)  # of the midpoint rule, 2e-6
        spread.append(diffusion.std().item())
    assert max(spread) > 1.1 * min(spread)  # the interior changes the variance


def test_bound_and_entropy_of_the_data_differ_by_what_the_endpoints_cost():
    """All terms together are at least the entropy of the data, and nearly it with ends far apart."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2)
    bounds = []
    for ends in ((-9.0, 4.0), (-14.0, 12.0)):
        with torch.no_grad():
            bounds.append(model_of(1, ends=ends)(*quadrature(1000)).total.mean().item() - entropy)
    assert bounds[0] > bounds[1] > 0 and bounds[1] < 1e-5


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_with_a_number_of_steps_it_is_the_kl_of_each_transition(prediction_type):
    model, (x0, eps, time) = model_of(3, prediction_type, num_steps=5), quadrature(50)
    with torch.no_grad():
        terms = model(x0, eps, time)
        t = ((5 * time).floor() + 1) / 5
        level, before = (level_of(model.noise_schedule(each), x0) for each in (t, t - 0.2))
        x_t = level.alpha * x0 + level.sigma * eps
        x0_hat = predict_x0(model.denoiser(x_t, terms.tau).sample, x_t, level, prediction_type)
    expected = 5 * (kl_weight(level, before) * (x0 - x0_hat).square()).flatten()
    torch.testing.assert_close(terms.diffusion, expected, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("num_steps", [None, 4])
def test_endpoints_follow_the_bound_and_the_interior_its_square(num_steps):
    """The gradients beside differences of the bound, and of the mean squared diffusion loss in units of the mean."""
    model, batch = model_of(5, "v_prediction", num_steps=num_steps), quadrature(50)
    # A denoiser that looks at the endpoints as they were leaves the gradients through them to the bound.
    ends = model.noise_schedule.endpoints.detach().clone()
    model.denoiser.endpoints = lambda: ends
    model(*batch).total.mean().backward()
    schedule, mean = model.noise_schedule, model(*batch).diffusion.mean().item()

    def difference(parameter, index, function, width=1e-5):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * width
                values.append(function().item())
                parameter[index] -= sign * width
        return (values[0] - values[1]) / (2 * width)

    for index in (0, 1):
        expected = difference(schedule.endpoint_offsets, index, lambda: model(*batch).total.mean())
        assert schedule.endpoint_offsets.grad[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)
    for index in ((0, 7), (1, 20), (2, 40)):
        expected = difference(schedule.offsets, index, lambda: model(*batch).diffusion.square().mean()) / mean
        assert schedule.offsets.grad[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_learning_the_interior_takes_variance_away_and_leaves_the_mean():
    """Data whose error is unevenly spread over log snr: with all numbers but the interior's held, the variance halves."""
    torch.manual_seed(0)
    model = model_of(prediction_type="epsilon", num_features=64, ends=(-9.0, 9.0)).float()
    x0, eps, time = (value.float() for value in quadrature(100))
    optimizer = torch.optim.Adam([model.noise_schedule.offsets], lr=0.01)

    def moments():
        with torch.no_grad():
            loss = model(*(value.float() for value in quadrature(1000))).diffusion.view(-1, 4).mean(1)
        return loss.mean().item(), loss.var().item()

    before = moments()
    for step in range(150):
        order = (time + 0.618 * step) % 1
        optimizer.zero_grad()
        model(x0, eps, order).total.mean().backward()
        optimizer.step()
    after = moments()
    assert after[0] == pytest.approx(before[0], rel=2e-3)
    assert after[1] < 0.5 * before[1]


def test_the_objective_logs_what_the_schedule_has_come_to():
    model = model_of(num_features=16).float()
    objective = VariationalObjective(model.noise_schedule, 1000)
    x0, eps, time = (value.float() for value in quadrature(50))
    batch = {"images": x0, "noise": eps, "time": time.double()}
    loss = objective(model, batch)
    terms = model(x0, eps, time)
    torch.testing.assert_close(loss, terms.total.mean())
    metrics = objective.metrics()
    assert metrics["diffusion_loss"] == pytest.approx(terms.diffusion.mean().item(), rel=1e-5)
    assert metrics["diffusion_loss_std"] == pytest.approx(terms.diffusion.std(unbiased=False).item(), rel=1e-4)
    assert metrics["vlb_bits_per_dim"] == pytest.approx(loss.item() / math.log(2), rel=1e-5)
    assert metrics["log_snr_max"] == pytest.approx(9) and metrics["log_snr_min"] == pytest.approx(-4)
    assert not list(objective.parameters()) and objective.metrics().keys() == {"log_snr_max", "log_snr_min"}
    objective.eval()
    objective(model, batch)
    assert "diffusion_loss" not in objective.metrics()
    level = objective.schedule.level(torch.tensor([0, 999]), torch.zeros(2, dtype=torch.float64))
    assert isinstance(level, NoiseLevel) and level.snr.log().tolist() == pytest.approx([9, -4], rel=1e-6)
