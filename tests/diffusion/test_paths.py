import math

import pytest
import torch
from torch.distributions import Normal as TorchNormal

from diffusers_ext.diffusion.noising import (
    PREDICTION_TYPES,
    NoiseLevel,
    NoiseSchedule,
    add_noise,
    output_coefficients,
    output_eps,
    posterior,
    predict_x0,
    training_target,
    transition,
)
from diffusers_ext.diffusion.paths import PATHS, ContinuousTime, PathSchedule
from diffusers_ext.diffusion.probability_flow import flow_log_density


EVERY = {name: path() for name, path in PATHS.items()}
INNER = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)  # where all of them are finite

# alpha and sigma as the papers print them, in numbers of Python.
CLOSED_FORMS = {
    "vp": lambda t: (math.exp(-0.05 * t - 4.975 * t * t), math.sqrt(1 - math.exp(-0.1 * t - 9.95 * t * t))),
    "subvp": lambda t: (math.exp(-0.05 * t - 4.975 * t * t), 1 - math.exp(-0.1 * t - 9.95 * t * t)),
    "ve": lambda t: (1.0, 0.01 * 5000**t),
    "cosine": lambda t: (
        math.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2),
        math.sqrt(1 - (math.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2),
    ),
    "linear": lambda t: (1 - t, t),
}


def each_path(function):
    return pytest.mark.parametrize("name", PATHS)(function)


@each_path
def test_levels_are_the_papers(name):
    alpha, sigma = EVERY[name].level(INNER)
    expected = torch.tensor([CLOSED_FORMS[name](t) for t in INNER.tolist()], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([alpha, sigma], 1), expected, rtol=1e-10, atol=0)


@each_path
def test_drift_and_diffusion_make_the_marginals(name):
    """Mean and variance of dx = f x dt + g dw follow from f and g alone: m' = f m and V' = 2 f V + g^2."""
    t = INNER.clone().requires_grad_()
    alpha, sigma = EVERY[name].level(t)
    (mean_slope,) = torch.autograd.grad((alpha + 0 * t).sum(), t, retain_graph=True)
    (variance_slope,) = torch.autograd.grad(sigma.square().sum(), t)
    f, g = EVERY[name].drift(INNER), EVERY[name].diffusion(INNER)
    alpha, sigma = alpha.detach(), sigma.detach()
    torch.testing.assert_close(mean_slope, f * alpha, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(variance_slope, 2 * f * sigma.square() + g.square(), rtol=1e-8, atol=1e-10)


@each_path
def test_time_is_the_inverse_of_the_log_snr(name):
    path = EVERY[name]
    torch.testing.assert_close(path.time(path.log_snr(INNER)), INNER, rtol=1e-9, atol=1e-11)
    assert (path.log_snr(INNER).diff() < 0).all()


@each_path
def test_a_transition_leads_from_marginal_to_marginal(name):
    """q(x_t | x_0) is that of s carried on by q(x_t | x_s), and its posterior leads back."""
    path, times = EVERY[name], INNER[::12]
    for s, t in zip(times[:-1], times[1:], strict=True):
        s, t = path.level(s), path.level(t)
        step = transition(s.alpha, t, s)
        torch.testing.assert_close(step.mean, t.alpha, rtol=1e-12, atol=0)
        carried = (t.alpha / s.alpha * s.sigma).square() + step.std.square()
        torch.testing.assert_close(carried, t.sigma.square(), rtol=1e-10, atol=0)
        # The posterior by Bayes' rule: precisions add.
        x0, x_t = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)
        ratio = t.alpha / s.alpha
        precision = 1 / s.sigma**2 + ratio**2 / step.std**2
        mean = (s.alpha * x0 / s.sigma**2 + ratio * x_t / step.std**2) / precision
        q = posterior(x0, x_t, t, s)
        torch.testing.assert_close(q.mean, mean, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(q.std, precision**-0.5, rtol=1e-9, atol=0)


@each_path
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predictions_invert_the_training_target(name, prediction_type):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, len(INNER), 3, generator=g, dtype=torch.float64)
    level = NoiseLevel(*[factor.view(-1, 1) for factor in EVERY[name].level(INNER)])
    x_t = add_noise(x0, eps, level)
    target = training_target(x0, eps, level, prediction_type)
    torch.testing.assert_close(predict_x0(target, x_t, level, prediction_type), x0, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(output_eps(target, x_t, level, prediction_type), eps, rtol=1e-6, atol=1e-8)


def test_flow_is_the_time_derivative_of_the_linear_path():
    x0, eps, t = torch.tensor(0.3), torch.tensor(-1.1), torch.tensor(0.4, requires_grad=True)
    level = EVERY["linear"].level(t)
    (velocity,) = torch.autograd.grad(add_noise(x0, eps, NoiseLevel(*[x.clone() for x in level])), t)
    assert velocity.item() == pytest.approx(training_target(x0, eps, level, "flow").item(), abs=1e-6)


@each_path
def test_v_is_that_of_the_path_at_unit_scale(name):
    level = EVERY[name].level(INNER)
    unit = NoiseLevel(level.alpha / level.scale, level.sigma / level.scale)
    for ours, expected in zip(output_coefficients(level, "v_prediction"), (-unit.sigma, unit.alpha), strict=True):
        torch.testing.assert_close(ours, expected)


@each_path
def test_a_schedule_has_the_levels_of_its_path_and_betas_of_the_path_at_unit_scale(name):
    schedule = PathSchedule(EVERY[name], 100)
    assert len(schedule) == 100 and schedule.sigma[-1] == 0 and schedule.alpha[-1] == 1
    alpha, sigma = EVERY[name].level(torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64))
    at = schedule.level(torch.tensor([0, 49, 99]), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(torch.stack(at), torch.stack([alpha, sigma]))
    again = NoiseSchedule(schedule.betas)
    torch.testing.assert_close(again.alpha, schedule.alpha / schedule.scale, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again.sigma, schedule.sigma / schedule.scale, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again.alpha_bar, schedule.alpha_bar, rtol=1e-9, atol=1e-12)


def test_labels_count_from_what_the_schedule_says():
    timesteps = torch.tensor([0, 7])
    assert PathSchedule(EVERY["linear"], 10, first_label=1).labels(timesteps).tolist() == [1, 8]
    assert PathSchedule(EVERY["ve"], 10).labels(timesteps).tolist() == [0, 7]


@each_path
def test_continuous_time_goes_through_the_timesteps(name):
    schedule = PathSchedule(EVERY[name], 50)
    time, timesteps = ContinuousTime(schedule), torch.arange(50.0, dtype=torch.float64)
    angle = time.angle(timesteps)
    torch.testing.assert_close(time.timestep(angle), timesteps, rtol=1e-8, atol=1e-6)
    torch.testing.assert_close(angle, torch.atan2(schedule.sigma[:-1], schedule.alpha[:-1]))
    torch.testing.assert_close(time.scale(timesteps), schedule.scale[:-1])


@pytest.mark.product
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "score", "flow"])
@pytest.mark.parametrize("name", ["vp", "ve", "subvp", "linear"])
def test_the_flow_of_a_gaussian_has_its_density(name, prediction_type):
    """Data N(0, 0.5^2) have the density N(0, alpha^2 0.5^2 + sigma^2) at each level, and an exact denoiser."""
    std, schedule = 0.5, PathSchedule(EVERY[name], 1000, first_label=3)

    def denoise(x, label):
        level = NoiseLevel(*[f.view(-1, 1) for f in EVERY[name].level((label - 2) / 1000)])
        x0 = level.alpha * std**2 * x / (level.alpha**2 * std**2 + level.sigma**2)
        return training_target(x0, (x - level.alpha * x0) / level.sigma, level, prediction_type)

    x = torch.tensor([[0.3, -0.8], [0.0, 0.4]], dtype=torch.float64)
    # The last level, of which these paths keep too little signal to matter, is left out: score and eps say nothing there.
    log_p = flow_log_density(
        denoise, x, ContinuousTime(schedule), (0, 998), prediction_type, num_steps=100, divergence="exact"
    )
    alpha, sigma = EVERY[name].level(torch.tensor([0.001, 0.999], dtype=torch.float64))
    marginal = (alpha.square() * std**2 + sigma.square()).sqrt()
    # The flow ends in N(0, h^2) and the data in N(0, alpha^2 std^2 + sigma^2): the map between the ends is linear.
    end = torch.hypot(alpha[1], sigma[1])
    expected = TorchNormal(0.0, end).log_prob(x / marginal[0] * marginal[1]) + (marginal[1] / marginal[0]).log()
    torch.testing.assert_close(log_p, expected.sum(1), rtol=0, atol=1e-5)
    truth = TorchNormal(0.0, marginal[0]).log_prob(x).sum(1)
    assert (log_p - truth).abs().max() < 1e-3  # what the signal at the noisiest level leaves


def test_levels_that_are_no_path_are_refused():
    good = torch.tensor([1.0, 0.5]), torch.tensor([0.1, 0.5])
    assert len(NoiseSchedule.from_levels(*good)) == 2
    with pytest.raises(ValueError, match=r"must have shape \(T,\) with T >= 1, got \(2,\) and \(1,\)"):
        NoiseSchedule.from_levels(good[0], good[1][:1])
    with pytest.raises(ValueError, match="alpha / sigma must fall"):
        NoiseSchedule.from_levels(good[0].flip(0), good[1].flip(0))
    with pytest.raises(ValueError, match="sigma finite and above 0"):
        NoiseSchedule.from_levels(good[0], torch.tensor([0.0, 0.5]))
    with pytest.raises(ValueError, match="give a PathSchedule"):
        ContinuousTime(NoiseSchedule.from_levels(*good))
    for name, options in (
        ("vp", {"beta_min": 3, "beta_max": 2}),
        ("ve", {"sigma_min": 0}),
        ("cosine", {"offset": -1}),
    ):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            PATHS[name](**options)
    with pytest.raises(ValueError, match="num_train_timesteps must be an integer of at least 1, got 0"):
        PathSchedule(EVERY["ve"], 0)
