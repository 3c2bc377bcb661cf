import math

import pytest
import torch
from torch import distributions
from torch.distributions import kl_divergence

from diffusers_ext.diffusion.betas import make_betas, rescale_zero_terminal_snr
from diffusers_ext.diffusion.noising import (
    PREDICTION_TYPES,
    NoiseLevel,
    NoiseSchedule,
    Normal,
    add_noise,
    dynamic_threshold,
    interpolated_log_std,
    kl_weight,
    normal_kl,
    normal_log_prob,
    output_eps,
    posterior,
    predict_eps,
    predict_x0,
    training_target,
    transition_std,
    tweedie,
    x0_error_scale,
)


@pytest.fixture
def schedule():
    return NoiseSchedule(make_betas("linear", 1000))


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 8, 8, generator=g, dtype=torch.float64)
    return x0, eps, torch.tensor([0, 10, 500, 999])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_predictions_invert_the_training_target(schedule, batch, prediction_type):
    x0, eps, timesteps = batch
    level = schedule.level(timesteps, x0)
    x_t = add_noise(x0, eps, level)
    target = training_target(x0, eps, level, prediction_type)
    torch.testing.assert_close(predict_x0(target, x_t, level, prediction_type), x0)
    torch.testing.assert_close(output_eps(target, x_t, level, prediction_type), eps)
    torch.testing.assert_close(predict_eps(x0, x_t, level), eps)


def test_score_is_the_gradient_of_the_log_density(schedule, batch):
    x0, eps, timesteps = batch
    level = schedule.level(timesteps, x0)
    x_t = add_noise(x0, eps, level).requires_grad_()
    log_density = distributions.Normal(level.alpha * x0, level.sigma.expand_as(x0)).log_prob(x_t).sum()
    (gradient,) = torch.autograd.grad(log_density, x_t)
    torch.testing.assert_close(training_target(x0, eps, level, "score"), gradient)


def test_first_level_is_exact(schedule, batch):
    """After one step the variance is the first beta, to the last digits: float32 tables lose four of them here."""
    level = schedule.level(0, batch[0])
    torch.testing.assert_close(level.sigma.square().item(), 1e-4, rtol=1e-12, atol=0)


def test_level_minus_one_is_the_clean_end(schedule, batch):
    x0, eps, _ = batch
    assert [part.item() for part in schedule.level(-1, x0)] == [1, 0]
    level = schedule.level(torch.tensor([-1, 0, -1, 5]), x0)
    assert torch.equal(add_noise(x0, eps, level)[[0, 2]], x0[[0, 2]])
    assert NoiseSchedule(torch.tensor([0.5]), final_alpha_bar=0.9).level(-1, x0).alpha.item() ** 2 == pytest.approx(
        0.9
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_levels_are_float32_or_wider_and_broadcast(schedule, dtype):
    like = torch.zeros(2, 3, 4, 4, dtype=dtype)
    level = schedule.level(torch.tensor([3, 7]), like)
    assert level.alpha.shape == (2, 1, 1, 1)
    assert level.alpha.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert schedule.level(torch.tensor(3, dtype=torch.int32), like).alpha.item() == level.alpha[0].item()
    assert schedule.level(3, like).sigma.item() == level.sigma[0].item()


def test_level_makes_a_table_once_for_each_device_and_dtype(schedule):
    like = torch.zeros(2, 3)
    first = schedule.level(0, like).alpha.untyped_storage().data_ptr()
    assert schedule.level(5, like).alpha.untyped_storage().data_ptr() == first
    assert schedule.level(torch.tensor([1], device="meta"), like.to("meta")).alpha.device.type == "meta"


@pytest.mark.parametrize("timesteps", [1000, -2, torch.tensor([3, 1000]), torch.tensor([-2, 0])])
def test_level_refuses_timesteps_out_of_range(schedule, timesteps):
    with pytest.raises(ValueError, match=r"timesteps must be in \[-1, 999\], got"):
        schedule.level(timesteps, torch.zeros(2, 3))


def test_level_takes_whole_floats_only(schedule):
    like = torch.zeros(1, 3)
    assert schedule.level(torch.tensor([3.0]), like).alpha.item() == schedule.level(3, like).alpha.item()
    with pytest.raises(TypeError, match="timesteps must be integers, got a tensor of torch.float32"):
        schedule.level(torch.tensor([3.5]), like)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, math.nan], "betas must be finite and in .0, 1., got nan at index 1"),
        ([0.1, math.inf], "got inf at index 1"),
        ([-0.1, 0.1], "got -0.1 at index 0"),
        ([0.1, 1.5], "got 1.5 at index 1"),
        ([], "shape"),
        ([[0.1]], r"shape \(T,\) with T >= 1, got \(1, 1\)"),
    ],
)
def test_betas_that_are_no_variances_are_refused(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(torch.tensor(betas, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_noise_in_half_precision_is_the_exact_result_rounded(schedule, dtype):
    """Within 1 % in the scale of the noise at every timestep; tables cast first lose all of it at some."""
    g = torch.Generator().manual_seed(0)
    eps = torch.randn(1000, 64, generator=g).to(dtype)
    level = schedule.level(torch.arange(1000), eps)
    x_t = add_noise(torch.zeros_like(eps), eps, level)
    exact = schedule.sigma[:-1, None] * eps.double()
    torch.testing.assert_close(
        x_t.to(dtype).double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-7
    )


def test_add_noise_broadcasts_and_keeps_its_arguments(schedule):
    x0, eps = torch.ones(1, 2, 2), torch.ones(3, 2, 2)
    level = schedule.level(torch.tensor([0, 500, 999]), eps)
    x_t = add_noise(x0, eps, level)
    torch.testing.assert_close(x_t[:, 0, 0], (level.alpha + level.sigma).flatten())
    assert torch.equal(x0, torch.ones(1, 2, 2)) and torch.equal(eps, torch.ones(3, 2, 2))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_posterior_keeps_the_marginal(schedule, batch, eta):
    """If x_t ~ q(x_t | x_0), then a draw of q(x_s | x_t, x_0) has mean alpha_s x_0 and variance sigma_s^2."""
    x0, eps, timesteps = batch
    t, s = schedule.level(timesteps, x0), schedule.level(timesteps - 1, x0)
    step = posterior(x0, add_noise(x0, eps, t), t, s, eta)
    gain = posterior(x0, add_noise(x0, eps + 1, t), t, s, eta).mean - step.mean  # d mean / d eps
    torch.testing.assert_close(posterior(x0, add_noise(x0, 0 * eps, t), t, s, eta).mean, s.alpha * x0)
    torch.testing.assert_close(gain.square() + step.std.square(), s.sigma.square().expand_as(x0))


def test_posterior_is_bayes_rule(schedule, batch):
    """Product of N(x_s; alpha_s x_0, sigma_s^2) and N(x_t; alpha_ts x_s, sigma_ts^2), completed to a square."""
    x0, eps, _ = batch
    t, s = schedule.level(500, x0), schedule.level(300, x0)
    x_t = add_noise(x0, eps, t)
    alpha_ts = t.alpha / s.alpha
    var_ts = t.sigma**2 - alpha_ts**2 * s.sigma**2
    precision = 1 / s.sigma**2 + alpha_ts**2 / var_ts
    mean = (s.alpha * x0 / s.sigma**2 + alpha_ts * x_t / var_ts) / precision
    step = posterior(x0, x_t, t, s)
    torch.testing.assert_close(step.mean, mean)
    torch.testing.assert_close(step.std, precision.rsqrt())
    torch.testing.assert_close(transition_std(t, s).square(), var_ts)


def test_posterior_takes_the_noise_it_is_given(schedule, batch):
    x0, eps, _ = batch
    t, s = schedule.level(500, x0), schedule.level(300, x0)
    step = posterior(x0, add_noise(x0, eps, t), t, s, 0.0, eps=2 * eps)
    torch.testing.assert_close(step.mean, add_noise(x0, 2 * eps, s))


@pytest.mark.parametrize("betas", [[0.0, 0.0, 0.5], [0.1, 1.0, 1.0], [0.1, 0.0, 0.2], [1.0]])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_posterior_is_finite_where_a_scale_is_zero(betas, eta):
    schedule = NoiseSchedule(torch.tensor(betas, dtype=torch.float64))
    timesteps = torch.arange(len(betas))
    x0 = torch.ones(len(betas), 1, dtype=torch.float64)
    t, s = schedule.level(timesteps, x0), schedule.level(timesteps - 1, x0)
    step = posterior(x0, add_noise(x0, x0, t), t, s, eta)
    assert step.mean.isfinite().all() and step.std.isfinite().all()
    torch.testing.assert_close(transition_std(t, s).square().flatten(), torch.tensor(betas, dtype=torch.float64))


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_deterministic_step_of_a_v_prediction_is_a_rotation(batch, zero_snr):
    """By the angle between the levels (Salimans & Ho 2022, Appendix D), and finite where x_t holds no signal."""
    x0, eps, timesteps = batch
    betas = make_betas("linear", 1000)
    schedule = NoiseSchedule(rescale_zero_terminal_snr(betas) if zero_snr else betas)
    t, s = schedule.level(timesteps, x0), schedule.level(timesteps - 1, x0)
    v = training_target(x0, eps, t, "v_prediction")
    x_t = add_noise(x0, eps, t)
    cos, sin = t.alpha * s.alpha + t.sigma * s.sigma, t.sigma * s.alpha - t.alpha * s.sigma
    predicted = [predict(v, x_t, t, "v_prediction") for predict in (predict_x0, output_eps)]
    step = posterior(predicted[0], x_t, t, s, 0.0, eps=predicted[1])
    torch.testing.assert_close(step.mean, cos * x_t - sin * v)
    torch.testing.assert_close(step.mean, add_noise(x0, eps, s))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_x0_error_scale_converts_output_error(schedule, batch, prediction_type):
    x0, eps, timesteps = batch
    level = schedule.level(timesteps, x0)
    x_t, target = add_noise(x0, eps, level), training_target(x0, eps, level, prediction_type)
    output = target + 0.1
    x0_error = (predict_x0(output, x_t, level, prediction_type) - x0).square()
    torch.testing.assert_close(x0_error, x0_error_scale(level, prediction_type) * (output - target).square())


def test_x0_error_scales_are_those_of_the_papers(schedule, batch):
    level = schedule.level(batch[2], batch[0])
    scales = [x0_error_scale(level, name) for name in ("epsilon", "sample", "v_prediction")]
    for scale, expected in zip(scales, (1 / level.snr, torch.ones_like(level.snr), 1 / (level.snr + 1)), strict=True):
        torch.testing.assert_close(scale, expected)


def test_kl_weight_is_the_kl(schedule, batch):
    x0, eps, _ = batch
    t, s = schedule.level(500, x0), schedule.level(499, x0)
    x_t, x0_hat = add_noise(x0, eps, t), x0 + 0.1 * eps
    q, p = posterior(x0, x_t, t, s), posterior(x0_hat, x_t, t, s)
    kl = kl_divergence(*[distributions.Normal(mean, std.expand_as(mean)) for mean, std in (q, p)])
    torch.testing.assert_close(kl, kl_weight(t, s) * (x0 - x0_hat) ** 2)


def test_interpolated_variance_reaches_both_bounds():
    output = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    small, large = torch.tensor([0.01, 0.04], dtype=torch.float64)
    var = (2 * interpolated_log_std(output, small.sqrt().log(), large.sqrt().log())).exp()
    torch.testing.assert_close(var, torch.tensor([0.01, 0.02, 0.04], dtype=torch.float64))  # geometric mean between


def test_dynamic_threshold_treats_each_sample_alone():
    x0 = torch.tensor([[0.5, -0.5, 0.25], [4.0, -2.0, 1.0]])
    torch.testing.assert_close(dynamic_threshold(x0, 1.0, 10.0), torch.tensor([[0.5, -0.5, 0.25], [1.0, -0.5, 0.25]]))
    torch.testing.assert_close(dynamic_threshold(x0, 0.5, 10.0)[1], torch.tensor([1.0, -1.0, 0.5]))
    torch.testing.assert_close(dynamic_threshold(x0, 1.0, 1.0)[1], torch.tensor([1.0, -1.0, 1.0]))
    assert dynamic_threshold(x0.view(2, 3, 1, 1), 1.0, 10.0).shape == (2, 3, 1, 1)


def kl_sum_gap(num_steps, variance=0.25):
    """Bound minus exact value, in nats, for x_0 ~ N(0, variance), whose best denoiser is known."""
    u = torch.linspace(1e-3, 1, num_steps + 1, dtype=torch.float64)
    log_alpha_bar = -(0.1 * u + 9.95 * u**2)
    betas = -torch.expm1(torch.cat([log_alpha_bar[:1], log_alpha_bar.diff()]))
    schedule = NoiseSchedule(betas)
    level = schedule.level(torch.arange(num_steps + 1), torch.zeros(num_steps + 1, 1, dtype=torch.float64))
    t, s = [type(level)(*[v[part] for v in level]) for part in (slice(1, None), slice(None, -1))]
    error = variance / (1 + variance * t.snr)  # Var(x_0 | x_t)
    information = 0.5 * torch.log1p(variance * level.snr)  # I(x_0; x_t)
    return (kl_weight(t, s) * error).sum() - (information[0] - information[-1]).sum()


def test_kl_sum_with_the_exact_denoiser_converges_at_first_order():
    coarse, fine = kl_sum_gap(4000), kl_sum_gap(16000)
    assert 0 < fine < coarse
    assert coarse / fine == pytest.approx(4, rel=0.1)


def test_prediction_type_error_names_the_choices(schedule, batch):
    x0, eps, timesteps = batch
    with pytest.raises(ValueError, match="'v_prediction', 'score' or 'flow', got 'noise'"):
        training_target(x0, eps, schedule.level(timesteps, x0), "noise")


def test_normal_log_prob_is_that_of_torch():
    x, mean, log_std = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = distributions.Normal(mean, log_std.exp()).log_prob(x)
    torch.testing.assert_close(normal_log_prob(x, mean, log_std), expected)
    torch.testing.assert_close(normal_log_prob(x), distributions.Normal(0.0, 1.0).log_prob(x))


def test_normal_kl_is_that_of_torch_and_keeps_its_digits_for_nearly_equal_normals():
    generator = torch.Generator().manual_seed(0)
    means, stds = torch.randn(2, 1000, generator=generator).double(), torch.rand(2, 1000, generator=generator).double()
    normals = [Normal(mean, std + 0.01) for mean, std in zip(means, stds, strict=True)]
    expected = kl_divergence(*[distributions.Normal(*normal) for normal in normals])
    torch.testing.assert_close(normal_kl(*normals), expected)
    # KL(N(0, (1 + d)^2) || N(0, 1)) = d^2 to first order, far below the rounding of the terms that cancel.
    zero = torch.zeros((), dtype=torch.float64)
    for difference in (1e-6, -1e-6):
        assert normal_kl(Normal(zero, 1 + difference + zero), Normal(zero, 1 + zero)).item() == pytest.approx(
            1e-12, rel=1e-3
        )


@pytest.mark.parametrize(("alpha", "sigma"), [(0.9, 0.3), (1.0, 4.0), (0.3, 0.7)])
def test_tweedie_is_the_posterior_mean_on_a_mixture(alpha, sigma):
    """E[x_0 | x_t] by quadrature over x_0, and the score by autograd of the density of x_t."""
    means, stds, weights = (torch.tensor(v, dtype=torch.float64) for v in ((-1.0, 0.5), (0.3, 0.2), (0.2, 0.8)))
    level = NoiseLevel(alpha, sigma)
    x_t = torch.linspace(-3, 3, 13, dtype=torch.float64).requires_grad_()
    marginal = distributions.Normal(alpha * means, (alpha**2 * stds**2 + sigma**2).sqrt())
    log_density = (marginal.log_prob(x_t[:, None]).exp() * weights).sum(1).log()
    (score,) = torch.autograd.grad(log_density.sum(), x_t)
    x0 = torch.linspace(-5, 5, 20001, dtype=torch.float64)
    prior = (distributions.Normal(means, stds).log_prob(x0[:, None]).exp() * weights).sum(1)
    joint = prior * distributions.Normal(alpha * x0, sigma).log_prob(x_t.detach()[:, None]).exp()
    expected = (joint * x0).sum(1) / joint.sum(1)
    torch.testing.assert_close(tweedie(x_t.detach(), score, level), expected, rtol=1e-8, atol=1e-8)
