import pytest
import torch

from diffusers_ext.betas import make_betas
from diffusers_ext.losses import LOSS_WEIGHTINGS, denoising_loss, loss_weight
from diffusers_ext.noising import NoiseSchedule, add_noise, predict_eps, training_target


TYPES = ("epsilon", "sample", "v_prediction")


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
    losses = []
    for prediction_type in TYPES:
        output = training_target(guess, predict_eps(guess, x_t, level), level, prediction_type)
        losses.append(denoising_loss(output, x0, eps, level, prediction_type, weighting=weighting))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=0)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    "weighting, expected",
    [
        ("simple", lambda snr: snr),
        ("min_snr", lambda snr: torch.minimum(snr, torch.tensor(5.0))),
        ("truncated_snr", lambda snr: torch.maximum(snr, torch.tensor(1.0))),
        ("snr_plus_one", lambda snr: snr + 1),
        ("p2", lambda snr: snr / (1 + snr)),
        ("sample", torch.ones_like),
    ],
)
def test_weight_of_the_error_of_x0(schedule, weighting, expected):
    alpha_bar = torch.cumprod(1 - make_betas("linear", 1000), 0)
    like = torch.zeros(1000, 1, dtype=torch.float64)
    weight = loss_weight(schedule.level(torch.arange(1000), like), weighting, "sample").flatten()
    torch.testing.assert_close(weight, expected(alpha_bar / (1 - alpha_bar)), rtol=1e-9, atol=0)


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


@pytest.mark.parametrize("prediction_type", TYPES)
def test_uniform_loss_is_the_mean_squared_error_of_the_output(schedule, batch, prediction_type):
    x0, eps, guess, timesteps = batch
    level = schedule.level(timesteps, x0)
    target = training_target(x0, eps, level, prediction_type)
    expected = torch.nn.functional.mse_loss(guess, target, reduction="none").mean((1, 2, 3))
    torch.testing.assert_close(denoising_loss(guess, x0, eps, level, prediction_type), expected)


def test_loss_of_a_bf16_output_is_computed_in_float32(schedule, batch):
    x0, eps, guess, timesteps = (value.float() if value.is_floating_point() else value for value in batch)
    level = schedule.level(timesteps, x0)
    loss = denoising_loss(guess.bfloat16(), x0, eps, level, "epsilon")
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, (guess.bfloat16().float() - eps).square().mean((1, 2, 3)))


def test_unknown_weighting_names_the_choices(schedule):
    level = schedule.level(3, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="loss_weighting must be one of uniform, simple, min_snr, .*got 'snr'"):
        loss_weight(level, "snr", "epsilon")
