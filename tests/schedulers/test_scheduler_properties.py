"""Properties over configs, spacings, dtypes, shapes and timesteps."""

import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from diffusers_ext.diffusion.betas import BETA_SCHEDULES
from diffusers_ext.diffusion.noising import (
    PREDICTION_TYPES,
    NoiseSchedule,
    add_noise,
    output_eps,
    predict_x0,
    training_target,
)
from diffusers_ext.diffusion.timesteps import TIMESTEP_SPACINGS
from diffusers_ext.schedulers import ExtDDIMScheduler, ExtDDPMScheduler


settings.register_profile("schedulers", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("schedulers")

shapes = st.sampled_from([(1, 3, 4, 4), (3, 1, 5), (2, 7), (2, 2, 2, 3, 3)])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
seeds = st.integers(0, 2**31)


@st.composite
def configs(draw):
    """Any config that both classes accept."""
    config = {
        "num_train_timesteps": draw(st.integers(2, 60)),
        "beta_start": draw(st.floats(0, 0.2)),
        "beta_end": draw(st.floats(0.01, 1)),
        "beta_schedule": draw(st.sampled_from(BETA_SCHEDULES)),
        "prediction_type": draw(st.sampled_from(PREDICTION_TYPES)),
        "timestep_spacing": draw(st.sampled_from(TIMESTEP_SPACINGS)),
        "steps_offset": draw(st.integers(0, 3)),
        "clip_sample": draw(st.booleans()),
        "thresholding": draw(st.booleans()),
        "rescale_betas_zero_snr": draw(st.booleans()),
    }
    if draw(st.booleans()):
        config["beta_reference_timesteps"] = draw(st.integers(1, 200))
    return config


def build(cls, config, num_steps):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scheduler = cls(**config)
        except ValueError as error:
            assume("zero terminal SNR" not in str(error) and "add noise after" not in str(error))
            raise
        scheduler.set_timesteps(min(num_steps, config["num_train_timesteps"]))
    return scheduler


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(
    cls=st.sampled_from([ExtDDPMScheduler, ExtDDIMScheduler]),
    config=configs(),
    num_steps=st.integers(1, 60),
    shape=shapes,
    dtype=dtypes,
    seed=seeds,
    eta=st.floats(0, 1),
    data=st.data(),
)
def test_finite_input_gives_finite_output(cls, config, num_steps, shape, dtype, seed, eta, data):
    # With a first beta of 0, the first level has no noise to have a score.
    assume(config["prediction_type"] != "score" or config["beta_start"] > 1e-3)
    scheduler = build(cls, config, num_steps)
    last = config["num_train_timesteps"] - 1
    # Dividing by an alpha that underflows to 0 in the data's precision is no fault of the step.
    usable = scheduler.schedule.alpha[:-1] > (1e-3 if dtype == torch.float16 else 1e-15)
    if config["prediction_type"] in ("epsilon", "score"):
        last = int(usable.nonzero().max())
    timestep = data.draw(st.integers(0, last))
    output, sample, noise = normal(seed, 3, *shape, dtype=dtype)
    if config["prediction_type"] == "score":
        assume(dtype != torch.float16)
    kwargs = {} if cls is ExtDDPMScheduler else {"eta": eta}
    result = scheduler.step(output, timestep, sample, variance_noise=noise, **kwargs)
    for name in ("prev_sample", "pred_original_sample"):
        assert result[name].isfinite().all()
        assert result[name].shape == shape and result[name].dtype == dtype
    if config["clip_sample"] or config["thresholding"]:
        assert result.pred_original_sample.abs().max() <= 1


@given(config=configs(), num_steps=st.integers(1, 60), eta=st.floats(0, 1), seed=seeds, data=st.data())
def test_a_step_with_the_true_noise_keeps_the_marginal(config, num_steps, eta, seed, data):
    """From x_t ~ q(x_t | x_0), mean alpha_s x_0 and variance sigma_s^2, to float64 rounding."""
    assume(config["beta_start"] > 1e-3)
    config |= {"clip_sample": False, "thresholding": False}
    scheduler = build(ExtDDIMScheduler, config, num_steps)
    timestep = data.draw(st.integers(0, config["num_train_timesteps"] - 1))
    schedule, (x0,) = scheduler.schedule, normal(seed, 1, 2, 3)
    t = schedule.level(timestep, x0)
    assume(t.alpha.item() > 1e-4 or config["prediction_type"] in ("sample", "v_prediction"))
    s = schedule.level(scheduler.previous_timestep(timestep), x0)

    def step(eps, noise):
        output = training_target(x0, eps, t, config["prediction_type"]).expand_as(x0)
        x_t = add_noise(x0, eps, t)
        return scheduler.step(output, timestep, x_t, eta, variance_noise=noise).prev_sample

    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    mean = step(zero, zero)
    torch.testing.assert_close(mean, s.alpha * x0, rtol=1e-6, atol=1e-9)
    variance = (step(one, zero) - mean).square() + (step(zero, one) - mean).square()
    torch.testing.assert_close(variance, (s.sigma.square()).expand_as(x0), rtol=1e-6, atol=1e-9)


@given(
    source=st.sampled_from(PREDICTION_TYPES),
    target=st.sampled_from(PREDICTION_TYPES),
    betas=st.lists(st.floats(1e-4, 0.5), min_size=1, max_size=20),
    shape=shapes,
    seed=seeds,
)
def test_prediction_types_convert_into_each_other_and_back(source, target, betas, shape, seed):
    schedule = NoiseSchedule(torch.tensor(betas, dtype=torch.float64))
    output, x_t = normal(seed, 2, *shape)
    level = schedule.level(torch.arange(shape[0]) % len(betas), x_t)

    def convert(output, source, target):
        x0, eps = (predict(output, x_t, level, source) for predict in (predict_x0, output_eps))
        torch.testing.assert_close(add_noise(x0, eps, level), x_t, rtol=1e-6, atol=1e-6)
        return training_target(x0, eps, level, target)

    there_and_back = convert(convert(output, source, target), target, source)
    torch.testing.assert_close(there_and_back, output, rtol=1e-6, atol=1e-6)


@given(
    pair=st.sampled_from([(DDPMScheduler, ExtDDPMScheduler), (DDIMScheduler, ExtDDIMScheduler)]),
    prediction_type=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    beta_schedule=st.sampled_from(["linear", "scaled_linear"]),
    num_steps=st.sampled_from([1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500, 1000]),
    clip=st.booleans(),
    place=st.floats(0, 1),
    shape=st.sampled_from([(1, 3, 4, 4), (3, 1, 5), (2, 7)]),
    seed=seeds,
)
def test_equal_to_diffusers_where_it_is_right(
    pair, prediction_type, beta_schedule, num_steps, clip, place, shape, seed
):
    """Leading timesteps of a number that divides T."""
    config = {"prediction_type": prediction_type, "beta_schedule": beta_schedule, "clip_sample": clip}
    output, sample = normal(seed, 2, *shape, dtype=torch.float32)
    results = []
    for cls in pair:
        scheduler = cls(**config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler.set_timesteps(num_steps)
        timestep = scheduler.timesteps[round(place * (num_steps - 1))]
        generator = torch.Generator().manual_seed(seed)
        results.append(scheduler.step(output, timestep, sample, generator=generator, return_dict=False))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=3e-4, atol=3e-4 * theirs.abs().mean().item())


@given(
    lists=st.lists(st.integers(0, 59), min_size=1, max_size=20, unique=True),
    timestep=st.integers(0, 59),
)
def test_next_timestep_is_the_largest_listed_one_below(lists, timestep):
    scheduler = ExtDDIMScheduler(num_train_timesteps=60, beta_reference_timesteps=1000)
    scheduler.set_timesteps(timesteps=sorted(lists, reverse=True))
    assert scheduler.previous_timestep(timestep).item() == max([t for t in lists if t < timestep], default=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=seeds, timesteps=st.lists(st.integers(0, 999), min_size=1, max_size=8))
def test_add_noise_is_the_exact_sum_rounded(dtype, seed, timesteps):
    x0, eps = normal(seed, 2, len(timesteps), 3, dtype=dtype)
    scheduler = ExtDDPMScheduler()
    x_t = scheduler.add_noise(x0, eps, torch.tensor(timesteps))
    exact = scheduler.add_noise(x0.double(), eps.double(), torch.tensor(timesteps))
    assert x_t.dtype == dtype
    # Both scales, both products and the sum are rounded to float32, relative to the terms, which may cancel; the result
    # is rounded to its own dtype once, and float16 has no steps below 2^-24.
    terms = scheduler.add_noise(x0.double().abs(), eps.double().abs(), torch.tensor(timesteps))
    bound = 2**-22 * terms + torch.finfo(dtype).eps / 2 * exact.abs() + (2**-25 if dtype == torch.float16 else 0)
    assert ((x_t.double() - exact).abs() <= bound).all()
