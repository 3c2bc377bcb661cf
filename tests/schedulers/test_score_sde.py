"""Predictor-corrector sampling of the reverse SDE on every path, beside closed forms and the schedulers of betas."""

import math

import pytest
import torch

from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, ScoreSDEScheduler
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, NoiseLevel
from diffusers_ext.diffusion.paths import ContinuousTime
from diffusers_ext.diffusion.reverse_sde import PREDICTORS
from diffusers_ext.schedulers.sources import SCHEDULER_PATHS
from gaussian_oracle import VARIANCE, model_output
from gaussian_oracle import denoise as denoise_gaussian
from mixture_oracle import MEANS, STDS, WEIGHTS, MixtureDenoiser


def std_ratio(scheduler, num_steps):
    """std(x_0) / sqrt(VARIANCE) of exact samples of the Gaussian, which are linear in the start and the noises."""
    scheduler.set_timesteps(num_steps)
    units = torch.eye(len(scheduler.timesteps) + 1, dtype=torch.float64)[..., None]
    x = units[0] * scheduler.init_noise_sigma
    for unit, timestep in zip(units[1:], scheduler.timesteps, strict=True):
        seen = scheduler.scale_model_input(x, timestep)
        output = model_output(scheduler.schedule, scheduler.config.prediction_type, x, timestep)
        if scheduler.config.unit_scale_input and scheduler.config.prediction_type == "score":
            output = output * x / seen  # h times the score of x is the score of x / h
            output = torch.where(x == 0, 0.0, output)
        x = scheduler.step(output, timestep, x, variance_noise=unit).prev_sample
    return (x.square().sum() / VARIANCE).sqrt().item()


def make(path="ve", prediction_type="v_prediction", **options):
    return ScoreSDEScheduler(path=path, prediction_type=prediction_type, **options)


@pytest.mark.product
@pytest.mark.parametrize("path", SCHEDULER_PATHS)
@pytest.mark.parametrize("num_steps", [1, 7, 60])
@pytest.mark.parametrize(("predictor", "stock"), [("ancestral", ExtDDPMScheduler), ("ode", ExtDDIMScheduler)])
def test_ancestral_and_ode_are_ddpm_and_ddim_of_the_path_at_unit_scale(path, num_steps, predictor, stock):
    """Exactly those of x_t / h on the betas of the path, at every number of steps."""
    ours = make(path, predictor=predictor)
    theirs = stock(
        trained_betas=ours.schedule.betas,
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(num_steps)
    g = torch.Generator().manual_seed(0)
    x, output, noise = torch.randn(3, 2, 3, 4, generator=g, dtype=torch.float64)
    for t in ours.timesteps:
        s = ours.previous_timestep(t)
        h_t, h_s = (ours.level(timestep, x).scale for timestep in (t, s))
        kwargs = {} if stock is ExtDDIMScheduler else {"variance_noise": noise}
        expected = theirs.step(output, t, x, **kwargs).prev_sample
        result = ours.step(output, t, x * h_t, variance_noise=noise).prev_sample / h_s
        torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.product
@pytest.mark.parametrize("path", SCHEDULER_PATHS)
@pytest.mark.parametrize("predictor", ["ancestral", "ode", "heun"])
def test_data_of_one_point_keep_their_marginals_at_every_level(path, predictor):
    """With the true x_0, the noise of x_s has the variance of the level, in steps of any size."""
    scheduler = make(path, "sample", predictor=predictor)
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps[:: scheduler.order]:
        one = torch.ones(1, 1, dtype=torch.float64)
        level_t, level_s = (scheduler.level(at, one) for at in (t, scheduler.previous_timestep(t)))
        mean = scheduler.step(one, t, level_t.alpha * one, variance_noise=0 * one).prev_sample
        scheduler.set_timesteps(5)
        zero = 0 * one
        parts = []
        for x_t, noise in ((level_t.sigma * one, zero), (zero, one)):
            parts.append(scheduler.step(zero, t, x_t, variance_noise=noise).prev_sample)
            scheduler.set_timesteps(5)
        torch.testing.assert_close(mean, level_s.alpha * one)
        torch.testing.assert_close(parts[0].square() + parts[1].square(), level_s.sigma.square() * one)


@pytest.mark.product
@pytest.mark.parametrize("path", ["vp", "ve", "subvp"])
@pytest.mark.parametrize("predictor", PREDICTORS)
def test_the_error_falls_with_the_order_of_the_predictor(path, predictor):
    """Of the Gaussian's std, with the exact score: halved by twice the steps, or nearly quartered by Heun."""
    scheduler = make(path, "score", predictor=predictor)
    coarse, fine = (abs(1 - std_ratio(scheduler, n)) for n in (80, 160))
    low, high = (2.3, 5) if predictor == "heun" else (1.5, 7)
    assert fine < (0.005 if predictor == "heun" else 0.05)
    assert low < coarse / fine < high


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("unit_scale_input", [False, True])
def test_every_prediction_type_samples_the_same(prediction_type, unit_scale_input):
    scheduler = make("subvp", prediction_type, unit_scale_input=unit_scale_input, corrector_steps=1)
    assert std_ratio(scheduler, 20) == pytest.approx(std_ratio(make("subvp", corrector_steps=1), 20), rel=1e-6)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "euler_maruyama"])
@pytest.mark.parametrize("path", ["vp", "ve"])
def test_one_step_is_the_papers(path, predictor):
    """Algorithms 2 and 3 and the Euler-Maruyama rule, in numbers of Python, between neighbours of 1000 levels."""
    scheduler = make(path, "score", predictor=predictor)
    x, score, z, i = 0.7, -1.3, 0.4, 500
    if path == "ve":
        sigma, previous = (0.01 * 5000 ** ((k + 1) / 1000) for k in (i, i - 1))
        variance = sigma**2 - previous**2 if predictor == "reverse_diffusion" else sigma**2 * 2 * math.log(5000) / 1000
        expected = x + variance * score + math.sqrt(variance) * z
    else:
        beta = 1e-4 + (0.02 - 1e-4) * i / 999
        growth = 2 - math.sqrt(1 - beta) if predictor == "reverse_diffusion" else 1 + beta / 2
        expected = growth * x + beta * score + math.sqrt(beta) * z
    x, score, z = (torch.tensor([[value]], dtype=torch.float64) for value in (x, score, z))
    assert scheduler.step(score, i, x, variance_noise=z).prev_sample.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("path", ["vp", "ve"])
def test_the_corrector_is_the_papers(path):
    """Algorithms 4 and 5, with the root of the number of values for |z|."""
    scheduler = make(path, "score", corrector_steps=2, snr=0.2)
    scheduler.set_timesteps(1000)
    x, score, z = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = score / scheduler.level(scheduler.timesteps[1], score).sigma
    scheduler.step(score, scheduler.timesteps[0], x, variance_noise=z)
    alpha = 1 - scheduler.betas[998].item() if path == "vp" else 1
    step_size = 2 * alpha * (0.2 * math.sqrt(192) / score.flatten(1).norm(dim=1)).square().view(2, 1, 1, 1)
    expected = x + step_size * score + (2 * step_size).sqrt() * z
    for t in scheduler.timesteps[1:3]:
        torch.testing.assert_close(scheduler.step(score, t, x, variance_noise=z).prev_sample, expected)
    assert not torch.allclose(scheduler.step(score, scheduler.timesteps[3], x, variance_noise=z).prev_sample, expected)


def test_levels_are_listed_once_for_each_call():
    scheduler = make(corrector_steps=2)
    scheduler.set_timesteps(timesteps=[900, 500, 20])
    assert scheduler.timesteps.tolist() == [900, 500, 500, 500, 20, 20, 20]
    assert (scheduler.order, scheduler.num_inference_steps) == (3, 3)
    assert scheduler.previous_timestep(500) == 20 and scheduler.previous_timestep(20) == -1
    scheduler = make(predictor="heun", corrector_steps=1)
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 499, 499, 499]


def test_the_start_has_the_scale_of_the_first_level():
    assert ScoreSDEScheduler().init_noise_sigma == 1.0
    scheduler = make()
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(1 + 50**2))
    scheduler.set_timesteps(timesteps=[499, 10])
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(1 + 0.01**2 * 5000))


@pytest.mark.parametrize("unit_scale_input", [False, True])
@pytest.mark.parametrize("path", ["vp", "ve", "subvp"])
def test_the_adaptive_solver_ends_where_the_flow_does(path, unit_scale_input):
    """The flow of Gaussian data is linear: x over its std stays the same."""
    scheduler = make(path, "score", unit_scale_input=unit_scale_input)
    times = ContinuousTime(scheduler.schedule)
    calls = []

    def level_at(timestep):
        angle, scale = times.angle(timestep[:1]), times.scale(timestep[:1])
        return NoiseLevel(scale * angle.cos(), scale * angle.sin())

    def denoise(x, timesteps):
        calls.append(timesteps)
        level = level_at(timesteps)
        if unit_scale_input:
            level = NoiseLevel(level.alpha / level.scale, level.sigma / level.scale)
        return -x / (VARIANCE * level.alpha**2 + level.sigma**2)

    start = torch.tensor([[0.7], [-1.2]], dtype=torch.float64) * scheduler.init_noise_sigma
    x, num_calls = scheduler.solve_ode(denoise, start, rtol=1e-7, atol=1e-7)
    first, last = (level_at(torch.tensor([t], dtype=torch.float64)) for t in (0.0, 999.0))
    marginal = [(VARIANCE * level.alpha**2 + level.sigma**2).sqrt() for level in (first, last)]
    at_first = start * marginal[0] / marginal[1]
    expected = denoise_gaussian(at_first, first)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)
    assert num_calls == len(calls) < 400
    _, rough = scheduler.solve_ode(denoise, start, rtol=1e-3, atol=1e-3)
    assert rough < num_calls / 2


def test_the_adaptive_solver_takes_networks_of_a_learned_variance():
    """As `step` does; for other shapes it has the same words."""
    scheduler, start = make("vp", "v_prediction"), torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    x, num_calls = scheduler.solve_ode(lambda x, t: 0.3 * x, start)
    doubled, same_calls = scheduler.solve_ode(lambda x, t: torch.cat([0.3 * x, x / 0], dim=1), start)
    assert torch.equal(doubled, x) and same_calls == num_calls
    with pytest.raises(ValueError, match=r"model_output must have shape \(2, 3, 2, 2\) or \(2, 6, 2, 2\), got"):
        scheduler.solve_ode(lambda x, t: x[:, :2], start)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_the_adaptive_solver_says_when_it_fails():
    with pytest.raises(RuntimeError, match="the flow could not be solved with rtol=1e-05 and atol=1e-05"):
        make().solve_ode(lambda x, t: x / 0, torch.ones(1, 1))


# On a mixture of two Gaussians in the plane.


def sample_mixture(num_samples=4000, num_steps=10, **options):
    scheduler = make(prediction_type="score", **options)
    scheduler.set_timesteps(num_steps)
    generator, network = torch.Generator().manual_seed(0), MixtureDenoiser.make(scheduler)
    x = torch.randn(num_samples, 2, 1, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t)[0], t, x, generator=generator).prev_sample
    return x[..., 0], len(scheduler.timesteps)


def draw_mixture(num_samples=4000):
    g = torch.Generator().manual_seed(1)
    labels = (torch.rand(num_samples, generator=g) < WEIGHTS[1]).long()
    noise = torch.randn(num_samples, 2, generator=g, dtype=torch.float64)
    return torch.tensor(MEANS, dtype=torch.float64)[labels] + torch.tensor(STDS)[labels][:, None] * noise


def sliced_distance(a, b):
    """The mean over directions of the Wasserstein distance of the projections."""
    angles = torch.arange(16, dtype=torch.float64) * math.pi / 16
    directions = torch.stack([angles.cos(), angles.sin()])
    return ((a @ directions).sort(0).values - (b @ directions).sort(0).values).abs().mean().item()


@pytest.mark.parametrize("path", ["vp", "ve", "subvp"])
def test_a_corrector_is_worth_more_than_as_many_calls_of_the_predictor(path):
    """With the exact score, at 19 calls of the network each. A step of 0.7 is near the largest that does not oscillate."""
    data = draw_mixture()
    alone, calls_alone = sample_mixture(path=path, predictor="ancestral", num_steps=19)
    options = {"corrector_steps": 1, "corrector": "annealed_langevin", "snr": 0.7}
    corrected, calls = sample_mixture(path=path, predictor="ancestral", num_steps=10, **options)
    assert calls == calls_alone == 19
    assert sliced_distance(corrected, data) < 0.8 * sliced_distance(alone, data)


def test_a_level_can_be_corrected_for_each_sample_at_its_own():
    scheduler = make(corrector_steps=1)
    scheduler.set_timesteps(10)
    g = torch.Generator().manual_seed(0)
    x, output, noise = torch.randn(3, 2, 3, 4, 4, generator=g)
    timesteps = [torch.tensor([999, 299]), torch.tensor([899, 199]), torch.tensor([899, 199])]
    together = [scheduler.step(output, t, x, variance_noise=noise).prev_sample for t in timesteps]
    for i in range(2):
        scheduler.set_timesteps(10)
        one = slice(i, i + 1)
        for t, expected in zip(timesteps, together, strict=True):
            alone = scheduler.step(output[one], int(t[i]), x[one], variance_noise=noise[one]).prev_sample
            torch.testing.assert_close(alone, expected[one], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"corrector_steps": 1},
        {"corrector_steps": 1, "corrector": "annealed_langevin", "predictor": "ancestral"},
        {"predictor": "heun", "corrector_steps": 1, "path": "subvp"},
    ],
)
def test_an_image_is_the_same_alone_and_in_a_batch(options):
    """Over a whole loop, each image with a generator of its own; the step of the corrector is its own too."""
    scheduler = make(**{"prediction_type": "epsilon"} | options)
    start = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def sample(x, seeds):
        scheduler.set_timesteps(5)
        each = [torch.Generator().manual_seed(seed) for seed in seeds]
        for t in scheduler.timesteps:
            x = scheduler.step(x.sin(), t, x, generator=each).prev_sample
        return x

    together = sample(start, range(3))
    for i in range(3):
        torch.testing.assert_close(sample(start[i : i + 1], [i])[0], together[i], rtol=1e-5, atol=1e-5)


def test_a_path_that_ends_with_little_noise_is_warned_of_by_its_own_option():
    with pytest.warns(UserWarning, match="x_T keeps signal.*Use a larger sigma_max"):
        make(sigma_max=2.0)
    with pytest.warns(UserWarning, match="x_T keeps signal.*Use a larger beta_max"):
        make("subvp", beta_max=3.0)
