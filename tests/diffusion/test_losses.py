import pytest
import torch

from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.losses import (
    DEFAULT_WEIGHTINGS,
    LOSS_WEIGHTINGS,
    bound_loss,
    denoising_loss,
    level_weights,
    likelihood_weights,
    loss_weight,
    trained_share,
)
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, NoiseSchedule, add_noise, predict_eps, training_target
from diffusers_ext.diffusion.paths import PATHS, PathSchedule
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.variational_bound import optimal_variances, variational_bound
from gaussian_oracle import VARIANCE, model_output, optimal_variance


TYPES = ("epsilon", "sample", "v_prediction", "score")


@pytest.fixture
def schedule():
    return NoiseSchedule(make_betas("linear", 1000))


@pytest.fixture
def batch():
    """Clean samples, noise, a guess of the clean samples, and timesteps, in float64."""
    generator = torch.Generator().manual_seed(0)
    x0, eps, guess = torch.randn(3, 6, 2, 4, 4, generator=generator, dtype=torch.float64)
    return x0, eps, guess, torch.tensor([0, 10, 129, 258, 500, 999])


@pytest.mark.parametrize("weighting", [name for name in LOSS_WEIGHTINGS if name != "uniform"])
def test_weighted_loss_is_the_same_for_every_prediction_type(schedule, batch, weighting):
    """The weight is of the error of x_0, so that a model which means the same x_0 has the same loss."""
    x0, eps, guess, timesteps = batch
    level = schedule.level(timesteps, x0)
    x_t = add_noise(x0, eps, level)
    losses, weights = [], likelihood_weights(schedule)[timesteps].view(-1, 1, 1, 1)
    for prediction_type in TYPES:
        output = training_target(guess, predict_eps(guess, x_t, level), level, prediction_type)
        losses.append(denoising_loss(output, x0, eps, level, prediction_type, weighting=weighting, x0_weight=weights))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-8, atol=0)
    torch.testing.assert_close(losses[3], losses[1], rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    "weighting, expected",
    [
        ("simple", lambda snr: snr),
        ("min_snr", lambda snr: torch.minimum(snr, torch.tensor(5.0))),
        ("truncated_snr", lambda snr: torch.maximum(snr, torch.tensor(1.0))),
        ("snr_plus_one", lambda snr: snr + 1),
        ("p2", lambda snr: snr / (1 + snr)),
        ("velocity", lambda snr: (snr + 1).clamp(max=400)),
        ("sample", torch.ones_like),
    ],
)
def test_weight_of_the_error_of_x0(schedule, weighting, expected):
    alpha_bar = torch.cumprod(1 - make_betas("linear", 1000), 0)
    like = torch.zeros(1000, 1, dtype=torch.float64)
    weight = loss_weight(schedule.level(torch.arange(1000), like), weighting, "sample").flatten()
    torch.testing.assert_close(weight, expected(alpha_bar / (1 - alpha_bar)), rtol=1e-9, atol=0)


def test_the_velocity_weighting_is_the_loss_in_v_of_a_network_that_outputs_x0(batch):
    """Li & He 2025: |v - v_hat|^2 with v = (x - z) / max(1 - t, 0.05), where t is 1 at the data."""
    x0, _, guess, _ = batch
    schedule, timesteps = PathSchedule(PATHS["linear"](), 1000), torch.tensor([0, 30, 49, 60, 500, 999])
    level = schedule.level(timesteps, x0)
    x_t, divisor = level.alpha * x0 + level.sigma * guess, (1 - level.alpha).clamp(min=0.05)
    output = (x0 + guess).tanh()
    velocity, predicted = (x0 - x_t) / divisor, (output - x_t) / divisor
    expected = (velocity - predicted).square().flatten(1).mean(1)
    loss = denoising_loss(output, x0, guess, level, "sample", weighting="velocity")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    # Away from the data it is what a network that outputs the flow has.
    weight = loss_weight(level, "velocity", "flow").flatten()
    torch.testing.assert_close(weight[3:], torch.ones(3, dtype=torch.float64), rtol=1e-9, atol=0)
    assert (weight[:2] < 1).all()


@pytest.mark.parametrize("prediction_type, divisor", [("epsilon", lambda s: s), ("v_prediction", lambda s: s + 1)])
def test_min_snr_matches_the_papers_weights_of_the_models_own_error(schedule, prediction_type, divisor):
    """min(snr, 5) / snr for eps and min(snr, 5) / (snr + 1) for v (Hang et al. 2023)."""
    timesteps = torch.tensor([0, 129, 131, 600, 999])
    level = schedule.level(timesteps, torch.zeros(5, 1, dtype=torch.float64))
    snr = level.snr
    weight = loss_weight(level, "min_snr", prediction_type)
    torch.testing.assert_close(weight, snr.clamp(max=5) / divisor(snr), rtol=1e-9, atol=0)
    # The clip falls between the indices 129 and 130 of this schedule.
    assert weight[1] < 1 or prediction_type == "v_prediction"
    assert weight[2] == pytest.approx(1) or prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "weighting, prediction_type, expected",
    [
        ("simple", "epsilon", lambda a: a**0),
        ("simple", "v_prediction", lambda a: a),
        ("simple", "score", lambda a: 1 - a),
        ("min_snr", "epsilon", lambda a: (3 * (1 - a) / a).clamp(max=1)),
        ("min_snr", "v_prediction", lambda a: torch.minimum(a, 3 * (1 - a))),
        ("min_snr", "score", lambda a: (1 - a) * (3 * (1 - a) / a).clamp(max=1)),
        ("truncated_snr", "epsilon", lambda a: ((1 - a) / a).clamp(min=1)),
        ("truncated_snr", "v_prediction", lambda a: torch.maximum(a, 1 - a)),
        ("snr_plus_one", "epsilon", lambda a: 1 / a),
        ("snr_plus_one", "v_prediction", lambda a: a**0),
        ("p2", "epsilon", lambda a: (1 - a) ** 0.5),
        ("p2", "v_prediction", lambda a: a * (1 - a) ** 0.5),
        ("sample", "epsilon", lambda a: (1 - a) / a),
        ("sample", "v_prediction", lambda a: 1 - a),
        ("uniform", "score", lambda a: a**0),
    ],
)
def test_weight_of_the_models_own_error_in_terms_of_alpha_bar(schedule, weighting, prediction_type, expected):
    """Worked out by hand from snr = a / (1 - a), for gamma = 3 in min-SNR and 1/2 in P2."""
    alpha_bar = torch.cumprod(1 - make_betas("linear", 1000), 0)
    level = schedule.level(torch.arange(1000), torch.zeros(1000, 1, dtype=torch.float64))
    weight = loss_weight(level, weighting, prediction_type, snr_gamma=3.0, p2_gamma=0.5).flatten()
    torch.testing.assert_close(weight, expected(alpha_bar), rtol=1e-8, atol=0)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_uniform_loss_is_the_mean_squared_error_of_the_output(schedule, batch, prediction_type):
    x0, eps, guess, timesteps = batch
    level = schedule.level(timesteps, x0)
    target = training_target(x0, eps, level, prediction_type)
    expected = torch.nn.functional.mse_loss(guess, target, reduction="none").mean((1, 2, 3))
    loss = denoising_loss(guess, x0, eps, level, prediction_type, weighting="uniform")
    torch.testing.assert_close(loss, expected)


def test_loss_of_a_bf16_output_is_computed_in_float32(schedule, batch):
    x0, eps, guess, timesteps = (value.float() if value.is_floating_point() else value for value in batch)
    level = schedule.level(timesteps, x0)
    loss = denoising_loss(guess.bfloat16(), x0, eps, level, "epsilon")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (guess.bfloat16().float() - eps).square().mean((1, 2, 3)))


@pytest.mark.parametrize("path", [*PATHS, "table"])
def test_the_likelihood_weighting_is_the_gradient_of_the_bound(path, batch):
    """Of the whole chain with the variances beta tilde, at each timestep but that of the last transition."""
    x0, eps, guess, _ = batch
    x0, eps, guess = x0[:5], eps[:5], guess[:5]
    schedule = NoiseSchedule(make_betas("cosine", 5)) if path == "table" else PathSchedule(PATHS[path](), 5)
    timesteps, chain = torch.arange(5), ReverseChain(schedule)
    level = schedule.level(timesteps, x0)
    x_t = add_noise(x0, eps, level)
    output = training_target(guess, eps, level, "v_prediction").requires_grad_()
    weights = likelihood_weights(schedule).view(-1, 1, 1, 1)
    options = {"weighting": "likelihood", "x0_weight": weights}
    loss = denoising_loss(output, x0, eps, level, "v_prediction", **options)
    bound = bound_loss(output, x0, x_t, chain, timesteps, "v_prediction", "fixed_small", num_bins=None)
    (ours,), (expected,) = (torch.autograd.grad(each.sum(), output) for each in (loss, bound))
    torch.testing.assert_close(ours[1:], expected[1:], rtol=1e-8, atol=1e-10)
    assert (expected.flatten(1).abs().amax(1) > 0).all()
    snr = (schedule.alpha / schedule.sigma).square().tolist()
    assert weights[0].item() == pytest.approx(2.5 * snr[0] * (snr[0] / snr[1] - 1), rel=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_with_many_levels_the_likelihood_weighting_is_g_squared_of_the_scores_error(name):
    """Song et al. 2021, Theorem 1: g(t)^2 / 2 of the error of the score, which is alpha / sigma^2 that of x_0."""
    path = PATHS[name]()
    weights = likelihood_weights(PathSchedule(path, 20_000))[4000:18000]
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5)[4000:18000] / 20_000  # the middle of each transition
    alpha, sigma = path.level(t)
    torch.testing.assert_close(weights, 0.5 * (path.diffusion(t) * alpha / sigma**2) ** 2, rtol=1e-4, atol=0)


def test_the_likelihood_weighting_needs_its_weights(schedule):
    with pytest.raises(ValueError, match="needs x0_weight: likelihood_weights"):
        loss_weight(schedule.level(3, torch.zeros(1, 1)), "likelihood", "epsilon")


def test_unknown_weighting_names_the_choices(schedule):
    level = schedule.level(3, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="loss_weighting must be one of uniform, simple, min_snr, .*got 'snr'"):
        loss_weight(level, "snr", "epsilon")


@pytest.mark.parametrize("prediction_type", TYPES)
def test_gradient_of_the_hybrids_bound_reaches_the_variance_alone(schedule, batch, prediction_type):
    x0, eps, guess, timesteps = batch
    x0 = ((x0 * 127.5).round().clamp(-127, 127) * 2 + 1) / 255  # at the centres of 256 bins
    x_t = add_noise(x0, eps, schedule.level(timesteps, x0))
    chain = ReverseChain(schedule)
    gradients = {}
    for detach_mean in (True, False):
        output = torch.cat([guess, guess.flip(0)], 1).requires_grad_()
        loss = bound_loss(output, x0, x_t, chain, timesteps, prediction_type, detach_mean=detach_mean)
        loss.sum().backward()
        gradients[detach_mean] = output.grad.chunk(2, dim=1)
    assert gradients[True][0].abs().max() == 0
    assert (gradients[False][0].flatten(1).abs().amax(1) > 0).all()
    torch.testing.assert_close(gradients[True][1], gradients[False][1], rtol=0, atol=0)
    assert (gradients[True][1].flatten(1).abs().amax(1) > 0).all()


@pytest.mark.product
@pytest.mark.parametrize("prediction_type", TYPES)
@pytest.mark.parametrize("variance", ["learned_range", "learned", "fixed_large"])
def test_mean_over_all_timesteps_is_the_bound_without_its_prior(prediction_type, variance):
    schedule = NoiseSchedule(make_betas("cosine", 30))
    generator = torch.Generator().manual_seed(0)
    x0 = 2 * torch.randint(256, (1, 1, 4, 4), generator=generator).double() / 255 - 1
    eps = torch.randn(30, 1, 4, 4, generator=generator, dtype=torch.float64)
    timesteps, chain = torch.arange(30), ReverseChain(schedule)
    halves = 1 if variance.startswith("fixed") else 2

    def model(x_t, timesteps):
        return torch.cat([x_t.sin(), -x_t.abs()][:halves], 1)

    x_t = add_noise(x0, eps, schedule.level(timesteps, eps))
    losses = bound_loss(*(model(x_t, timesteps), x0.expand_as(eps), x_t, chain, timesteps, prediction_type, variance))
    terms = variational_bound(model, x0, chain, prediction_type, variance, noise=lambda i: eps[i : i + 1])
    expected = (terms.total - terms.prior) / x0.numel()
    torch.testing.assert_close(losses.mean(0, keepdim=True), expected, rtol=1e-10, atol=0)


def test_learned_variances_converge_to_the_optimal_ones():
    """On Gaussian data with a perfect mean, one number for each timestep, trained by the hybrid's bound."""
    schedule = NoiseSchedule(make_betas("linear", 20, reference_timesteps=1000))
    chain, timesteps = ReverseChain(schedule), torch.arange(20).repeat_interleave(4)
    # Pairs whose means are the expectations of quadratic forms of the data and the noise.
    x0 = VARIANCE**0.5 * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(20).view(-1, 1, 1, 1)
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).repeat(20).view(-1, 1, 1, 1)
    x_t = add_noise(x0, eps, schedule.level(timesteps, x0))
    mean = model_output(schedule, "v_prediction", x_t, timesteps)
    outputs = torch.zeros(20, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([outputs], lr=0.1)
    for _ in range(300):
        output = torch.cat([mean, outputs[timesteps].view(-1, 1, 1, 1)], 1)
        loss = bound_loss(*(output, x0, x_t, chain, timesteps, "v_prediction"), num_bins=None, detach_mean=True).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    step = chain.at(torch.arange(20), torch.zeros(1, dtype=torch.float64))
    small, large = 2 * step.log_std_small, 2 * step.log_std_large
    learned = (0.5 * (large - small) * outputs.detach() + 0.5 * (large + small)).exp()
    best = torch.tensor([optimal_variance(schedule, t, t - 1) for t in range(20)], dtype=torch.float64)
    torch.testing.assert_close(learned, best, rtol=1e-4, atol=0)
    measured = optimal_variances(
        lambda x_t, timesteps: model_output(schedule, "v_prediction", x_t, timesteps),
        *([x0[:4]], chain, "v_prediction"),
        noise=lambda i: eps[:4],
    )
    torch.testing.assert_close(measured, best, rtol=1e-9, atol=0)


def test_every_prediction_type_has_a_default_weighting_that_trains_all_levels(schedule):
    assert tuple(DEFAULT_WEIGHTINGS) == PREDICTION_TYPES
    for prediction_type, weighting in DEFAULT_WEIGHTINGS.items():
        assert trained_share(schedule, weighting, prediction_type) > 0.9


def test_the_default_loss_of_a_score_is_that_of_its_noise(schedule, batch):
    x0, eps, _, timesteps = batch
    level, guess = schedule.level(timesteps, x0), torch.zeros_like(x0)
    torch.testing.assert_close(
        denoising_loss(guess, x0, eps, level, "score"), denoising_loss(guess, x0, eps, level, "epsilon")
    )


@pytest.mark.parametrize(
    "weighting, prediction_type, share",
    [
        ("uniform", "epsilon", 1.0),
        ("simple", "score", 1.0),
        ("uniform", "v_prediction", 1.0),
        ("uniform", "score", 0.007),
        ("simple", "sample", 0.007),
    ],
)
def test_the_share_of_levels_that_a_loss_trains(schedule, weighting, prediction_type, share):
    """By hand for the score, whose squared size is 1 / sigma^2: (mean sigma^-2)^2 / mean sigma^-4."""
    found = trained_share(schedule, weighting, prediction_type)
    assert found == pytest.approx(share, rel=0.1)
    if (weighting, prediction_type) == ("uniform", "score"):
        size = schedule.sigma[:-1] ** -2
        assert found == pytest.approx((size.mean() ** 2 / (size**2).mean()).item(), rel=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("weighting", LOSS_WEIGHTINGS)
def test_a_weight_at_a_level_without_noise_is_a_number_or_refused(weighting, prediction_type):
    """The weight of x_0 is infinite there and its error 0: their product is taken for no share of the loss."""
    clean_first = NoiseSchedule(make_betas("linear", 50, beta_start=0.0))
    message = f"loss_weighting {weighting} with prediction_type {prediction_type} must have a weight .* at timestep 0"
    level = clean_first.level(torch.tensor([0]), torch.zeros(1, dtype=torch.float64))
    options = {"x0_weight": likelihood_weights(clean_first)[:1]} if weighting == "likelihood" else {}
    if loss_weight(level, weighting, prediction_type, **options).isnan():
        for use in (level_weights, trained_share):
            with pytest.raises(ValueError, match=message):
                use(clean_first, weighting, prediction_type)
    else:
        assert level_weights(clean_first, weighting, prediction_type).isfinite().all()
    with_noise = NoiseSchedule(make_betas("linear", 50))
    assert level_weights(with_noise, weighting, prediction_type).isfinite().all()
