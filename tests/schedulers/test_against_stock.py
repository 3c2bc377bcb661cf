"""Equal to diffusers where it is right; where it is not, one test a fault, which shows stock failing and ours not."""

import warnings

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler

from diffusers_ext.diffusion.noising import add_noise
from diffusers_ext.schedulers import (
    ExtDDIMInverseScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    VPredictionScheduler,
)


PAIRS = [(DDPMScheduler, ExtDDPMScheduler), (DDIMScheduler, ExtDDIMScheduler)]
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def seeded():
    return torch.Generator().manual_seed(1)


def batch(channels=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, c, 8, 8, generator=g).to(dtype) for c in (channels, 3)]


def assert_steps_agree(stock, ours, num_steps, kwargs=None, channels=3, make_kwargs=None, tolerance=2e-4):
    """Same timesteps, and the same results at a tenth of them, within stock's float32 tables."""
    output, sample = batch(channels)
    stock.set_timesteps(num_steps)
    ours.set_timesteps(num_steps)
    assert torch.equal(stock.timesteps, ours.timesteps) and ours.timesteps.dtype == torch.int64
    for t in stock.timesteps[:: max(1, num_steps // 10)].tolist() + stock.timesteps[-1:].tolist():
        make = make_kwargs or (lambda: {"generator": seeded()})
        a = stock.step(output, t, sample, **(kwargs or {}), **make())
        b = ours.step(output, t, sample, **(kwargs or {}), **make())
        for name in ("prev_sample", "pred_original_sample"):
            torch.testing.assert_close(b[name], a[name], rtol=tolerance, atol=tolerance * a[name].abs().mean().item())
        assert type(a).__name__ == type(b).__name__


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clipping", [{}, {"clip_sample": False}, {"clip_sample_range": 2.5}, {"thresholding": True}])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_steps_agree(prediction_type, clipping, variance_type):
    config = {"prediction_type": prediction_type, "variance_type": variance_type, **clipping}
    for num_steps in (10, 1000):
        assert_steps_agree(DDPMScheduler(**config), ExtDDPMScheduler(**config), num_steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clipping", [{}, {"clip_sample": False}, {"thresholding": True, "sample_max_value": 3.0}])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("use_clipped", [False, True])
def test_ddim_steps_agree(prediction_type, clipping, eta, use_clipped):
    config = {"prediction_type": prediction_type, **clipping}
    kwargs = {"eta": eta, "use_clipped_model_output": use_clipped}
    for num_steps in (10, 1000):
        assert_steps_agree(DDIMScheduler(**config), ExtDDIMScheduler(**config), num_steps, kwargs)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
@pytest.mark.filterwarnings("ignore:alpha_bar of the last timestep")
def test_every_beta_schedule_agrees(schedule):
    try:
        stock = DDPMScheduler(beta_schedule=schedule)
    except NotImplementedError:
        pytest.skip(f"this version of diffusers has no {schedule!r}")
    assert_steps_agree(stock, ExtDDPMScheduler(beta_schedule=schedule), 50)


@pytest.mark.parametrize(
    "config",
    [{"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {"trained_betas": [0.1, 0.5, 0.7, 0.9]}],
)
@pytest.mark.parametrize(("stock", "ours"), PAIRS)
def test_rescaled_and_given_betas_agree(config, stock, ours):
    length = {"num_train_timesteps": len(config["trained_betas"])} if "trained_betas" in config else {}
    num_steps = length.get("num_train_timesteps", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Stock's float32 loses three digits of alpha_bar near its zero.
        assert_steps_agree(stock(**config, **length), ours(**config, **length), num_steps, tolerance=5e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [10, 50, 500])
def test_stable_diffusion_config_agrees(eta, num_steps):
    assert_steps_agree(
        DDIMScheduler(**STABLE_DIFFUSION), ExtDDIMScheduler(**STABLE_DIFFUSION), num_steps, {"eta": eta}
    )


def test_learned_range_agrees():
    config = {"variance_type": "learned_range"}
    assert_steps_agree(DDPMScheduler(**config), ExtDDPMScheduler(**config), 50, channels=6)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [10, 13, 50])
def test_ddpm_agrees_at_other_spacings(spacing, num_steps):
    config = {"timestep_spacing": spacing}
    assert_steps_agree(DDPMScheduler(**config), ExtDDPMScheduler(**config), num_steps)


def test_variance_noise_agrees():
    noise = torch.randn(2, 3, 8, 8)
    make = lambda: {"variance_noise": noise}  # noqa: E731
    assert_steps_agree(DDIMScheduler(), ExtDDIMScheduler(), 20, {"eta": 1.0}, make_kwargs=make)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inverse_steps_agree(spacing):
    config = {"timestep_spacing": spacing, "clip_sample": False}
    assert_steps_agree(DDIMInverseScheduler(**config), ExtDDIMInverseScheduler(**config), 50, make_kwargs=dict)


@pytest.mark.parametrize(("stock", "ours"), PAIRS)
def test_add_noise_and_velocity_agree(stock, ours):
    noise, sample = batch()
    timesteps = torch.tensor([20, 999])
    for method in ("add_noise", "get_velocity"):
        a, b = (getattr(scheduler(), method)(sample, noise, timesteps) for scheduler in (stock, ours))
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stock", "ours"), PAIRS)
def test_gradients_agree(stock, ours):
    """Guidance by gradients differentiates through the step."""
    gradients = []
    for scheduler in (stock(), ours()):
        scheduler.set_timesteps(10)
        output, sample = (x.requires_grad_() for x in batch())
        result = scheduler.step(output, 500, sample, generator=seeded())
        loss = result.prev_sample.square().sum() + result.pred_original_sample.sum()
        gradients.append(torch.autograd.grad(loss, [output, sample]))
    torch.testing.assert_close(*gradients[::-1], rtol=1e-4, atol=1e-4)


# What stock gets wrong.


def wrong_steps(scheduler, num_steps):
    """Steps after which the exact noise and x_0 are no longer found at the next timestep of the list."""
    scheduler.set_timesteps(num_steps)
    schedule = ExtDDIMScheduler().schedule
    eps, x0 = batch(dtype=torch.float64)
    wrong = 0
    for t, s in zip(scheduler.timesteps.tolist(), [*scheduler.timesteps[1:].tolist(), -1], strict=True):
        x_t, x_s = (add_noise(x0, eps, schedule.level(timestep, x0)) for timestep in (t, s))
        wrong += not torch.allclose(scheduler.step(eps, t, x_t).prev_sample, x_s, rtol=1e-3, atol=1e-3)
    return wrong


@pytest.mark.parametrize(("spacing", "num_steps", "num_wrong"), [("linspace", 10, 9), ("trailing", 13, 12)])
def test_ddim_reads_the_next_timestep_from_the_list(spacing, num_steps, num_wrong):
    config = {"timestep_spacing": spacing, "clip_sample": False}
    stock = DDIMScheduler(**config)
    assert wrong_steps(stock, num_steps) > num_wrong // 2  # where the levels differ enough to see
    implied = stock.timesteps - 1000 // num_steps
    listed = torch.cat([stock.timesteps[1:], torch.tensor([-1])])
    assert ((implied != listed) & ((implied >= 0) | (listed >= 0))).sum() == num_wrong
    assert wrong_steps(ExtDDIMScheduler(**config), num_steps) == 0


def test_leading_that_starts_late_warns():
    stock, ours = DDIMScheduler(), ExtDDIMScheduler()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock.set_timesteps(501)
        ours.set_timesteps(30)
    assert stock.alphas_cumprod[stock.timesteps[0]] > 0.07
    with pytest.warns(UserWarning, match="first of 501 'leading' timesteps is 500, where alpha_bar is 0.0778"):
        ours.set_timesteps(501)
    assert torch.equal(stock.timesteps, ours.timesteps)


@pytest.mark.parametrize("variance_type", ["fixed_large", "learned_range"])
def test_ddpm_adds_no_noise_to_the_final_image(variance_type):
    def final_spread(scheduler):
        scheduler.set_timesteps(50)
        output, sample = batch(6 if variance_type == "learned_range" else 3)
        output[:, 3:] = 1  # the upper bound
        last = scheduler.timesteps[-1]
        images = [
            scheduler.step(output, last, sample, torch.Generator().manual_seed(seed)).prev_sample for seed in (0, 1)
        ]
        return (images[0] - images[1]).std().item() / 2**0.5

    config = {"variance_type": variance_type, "timestep_spacing": "trailing"}
    assert final_spread(DDPMScheduler(**config)) == pytest.approx(0.076, abs=0.005)
    assert final_spread(ExtDDPMScheduler(**config)) == 0


def test_fixed_large_log_is_the_variance_beta():
    output, sample = batch()
    stock, ours, plain = (
        cls(variance_type=name).step(output, 500, sample, generator=seeded()).prev_sample
        for cls, name in (
            (DDPMScheduler, "fixed_large_log"),
            (ExtDDPMScheduler, "fixed_large_log"),
            (ExtDDPMScheduler, "fixed_large"),
        )
    )
    assert stock.isnan().any()
    assert torch.equal(ours, plain)


def test_learned_reads_log_variances():
    output, sample = batch(6)
    output[:, 3:] = torch.tensor(0.01).log()
    stock, ours = (
        cls(variance_type="learned").step(output, 500, sample, generator=seeded()).prev_sample
        for cls in (DDPMScheduler, ExtDDPMScheduler)
    )
    mean = (
        ExtDDPMScheduler(variance_type="learned")
        .step(output, 500, sample, variance_noise=torch.zeros_like(sample))
        .prev_sample
    )
    noise = torch.randn(sample.shape, generator=seeded())
    assert stock.isnan().any()
    torch.testing.assert_close(ours, mean + 0.1 * noise)


@pytest.mark.parametrize(("dtype", "num_silent", "num_off"), [(torch.bfloat16, 10, 19), (torch.float16, 2, 4)])
def test_add_noise_in_half_precision_adds_the_right_noise(dtype, num_silent, num_off):
    exact = ExtDDPMScheduler().schedule.sigma[:-1]
    ones = torch.ones(1000, 1, dtype=dtype)

    def added(scheduler):
        return scheduler.add_noise(torch.zeros_like(ones), ones, torch.arange(1000)).flatten().double()

    stock, ours = added(DDPMScheduler()), added(ExtDDPMScheduler())
    assert (stock == 0).sum() == num_silent
    assert ((stock / exact - 1).abs() > 0.1).sum() == num_off
    torch.testing.assert_close(ours, exact, rtol=2**-8 if dtype == torch.bfloat16 else 2**-11, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_velocity_in_half_precision_is_rounded_once(dtype):
    noise, sample = batch(dtype=dtype)
    timesteps = torch.tensor([1, 999])
    ours = ExtDDPMScheduler().get_velocity(sample, noise, timesteps)
    exact = ExtDDPMScheduler().get_velocity(sample.double(), noise.double(), timesteps)
    assert ours.dtype == dtype and torch.equal(ours, exact.to(dtype))
    stock = DDPMScheduler().get_velocity(sample, noise, timesteps)
    assert not torch.equal(stock, exact.to(dtype))


def test_tables_are_exact():
    exact = 1e-4  # 1 - alpha_bar of timestep 0 is the first beta
    stock, ours = (1 - DDPMScheduler().alphas_cumprod[0]).item(), ExtDDPMScheduler().schedule.sigma[0].item() ** 2
    assert abs(stock / exact - 1) > 1e-4
    assert ours == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize(("stock", "ours"), PAIRS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "score"])
def test_epsilon_at_zero_terminal_snr_is_refused(stock, ours, prediction_type):
    output, sample = batch()
    silent = stock(rescale_betas_zero_snr=True, clip_sample=False)
    silent.set_timesteps(1000)
    assert silent.step(output, 999, sample).pred_original_sample.isinf().all()
    with pytest.raises(ValueError, match=f"'v_prediction' or 'sample' at zero terminal SNR.*got '{prediction_type}'"):
        ours(rescale_betas_zero_snr=True, prediction_type=prediction_type)


@pytest.mark.parametrize(("stock", "ours"), PAIRS)
def test_a_timestep_for_each_sample(stock, ours):
    output, sample = batch()
    timesteps = torch.tensor([980, 20])
    with pytest.raises((RuntimeError, ValueError)):
        scheduler = stock()
        scheduler.set_timesteps(50)
        scheduler.step(output, timesteps, sample)
    scheduler = ours()
    scheduler.set_timesteps(50)
    noise = torch.randn(2, 3, 8, 8)
    together = scheduler.step(output, timesteps, sample, variance_noise=noise).prev_sample
    for i, t in enumerate(timesteps):
        one = slice(i, i + 1)
        alone = scheduler.step(output[one], t, sample[one], variance_noise=noise[one]).prev_sample
        torch.testing.assert_close(together[one], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stock", "ours"), PAIRS)
def test_offset_with_every_timestep(stock, ours):
    output, sample = batch()
    broken, works = stock(steps_offset=1), ours(steps_offset=1)
    broken.set_timesteps(1000)
    works.set_timesteps(1000)
    with pytest.raises(IndexError):
        broken.step(output, broken.timesteps[0], sample)
    assert works.step(output, works.timesteps[0], sample).prev_sample.isfinite().all()
    assert works.timesteps.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize(("stock", "ours"), PAIRS)
def test_step_never_waits_for_the_device(stock, ours):
    """On the meta device there is no value to read, so a host sync or a table on the wrong device raises."""
    x = torch.empty(2, 3, 8, 8, device="meta")
    scheduler = stock()
    scheduler.set_timesteps(10, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler = ours()
    scheduler.set_timesteps(10, device="meta")
    for t in scheduler.timesteps:
        assert scheduler.step(x, t, x).prev_sample.device.type == "meta"


def test_short_paths_with_the_default_betas_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert DDPMScheduler(num_train_timesteps=100).alphas_cumprod[-1] > 0.36
    with pytest.warns(UserWarning, match="alpha_bar of the last timestep is 0.364"):
        ExtDDPMScheduler(num_train_timesteps=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = ExtDDPMScheduler(num_train_timesteps=100, beta_reference_timesteps=1000)
    assert scheduler.alphas_cumprod[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)


def test_ddim_samples_a_learned_variance_model():
    output, sample = batch(6)
    stock = DDIMScheduler()
    stock.set_timesteps(10)
    with pytest.raises(RuntimeError):
        stock.step(output, 500, sample)
    for eta in (0.0, 1.0):
        scheduler = ExtDDIMScheduler.from_config(ExtDDPMScheduler(variance_type="learned_range").config)
        scheduler.set_timesteps(10)
        both = scheduler.step(output, 500, sample, eta, generator=seeded()).prev_sample
        half = scheduler.step(output[:, :3], 500, sample, eta, generator=seeded()).prev_sample
        assert torch.equal(both, half)


def test_trailing_never_steps_from_below_the_path():
    stock, ours = DDPMScheduler(timestep_spacing="trailing"), ExtDDPMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(61)
    ours.set_timesteps(61)
    assert len(stock.timesteps) == 62 and stock.timesteps[-1] == -1
    assert len(ours.timesteps) == 61 and ours.timesteps[-1] == 15


def test_v_prediction_inverse_reads_the_output_where_the_model_gave_it():
    """The true v at (x_t, t) takes x_s back to x_t exactly; stock mixes it with the angle of s."""
    eps, x0 = batch(dtype=torch.float64)
    ours = ExtDDIMInverseScheduler(prediction_type="v_prediction", clip_sample=False)
    stock = DDIMInverseScheduler(prediction_type="v_prediction", clip_sample=False)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(10)
    s, t = (add_noise(x0, eps, ours.schedule.level(timestep, x0)) for timestep in (500, 600))
    v = ours.get_velocity(x0, eps, 600)
    exact = ours.reverse_step(v, 600, s, model_input=t).prev_sample
    torch.testing.assert_close(exact, t)
    assert (stock.step(v, 600, s).prev_sample - t).abs().max() > 0.05


def test_v_prediction_scheduler_is_ddim_with_other_defaults():
    output, sample = batch()
    config = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    for clip in (True, False):
        a, b = ExtDDIMScheduler(clip_sample=clip, **config), VPredictionScheduler(clip_sample=clip)
        a.set_timesteps(7)
        b.set_timesteps(7)
        for t in a.timesteps:
            torch.testing.assert_close(a.step(output, t, sample), b.step(output, t, sample))
