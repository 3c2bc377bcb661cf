import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_ext.diffusion.betas import BETA_SCHEDULES, make_betas, rescale_zero_terminal_snr, respace_betas
from diffusers_ext.diffusion.noising import NoiseSchedule


def test_linear_schedule_has_the_published_levels():
    schedule = NoiseSchedule(make_betas("linear", 1000))
    places = [0, 99, 249, 499, 749, 999]
    levels = [0.9999, 0.897018, 0.524085, 0.0785872, 0.00335055, 4.0358298e-5]
    torch.testing.assert_close(schedule.alpha_bar[places].tolist(), levels, rtol=1e-6, atol=0)
    snr = schedule.alpha_bar[:-1] / schedule.sigma[:-1].square()
    assert snr[0].item() == pytest.approx(9999, rel=1e-9)
    assert snr.log().abs().argmin().item() == 258
    assert (snr < 5).nonzero()[0].item() == 130
    assert schedule.alpha_bar[-1].item() == 1


def test_cosine_schedule_has_the_published_levels():
    betas = make_betas("cosine", 1000)
    alpha_bar = NoiseSchedule(betas).alpha_bar
    assert betas[0].item() == pytest.approx(4.128422e-5, rel=1e-6)
    assert betas[-1].item() == 0.999
    assert alpha_bar[999].item() == pytest.approx(2.4288e-9, rel=1e-4)
    assert alpha_bar[499].item() == pytest.approx(0.493844, rel=1e-6)
    assert torch.equal(betas, make_betas("squaredcos_cap_v2", 1000))


def test_stable_diffusion_schedule_ends_at_the_published_level():
    betas = make_betas("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012)
    assert NoiseSchedule(betas).alpha_bar[999].item() == pytest.approx(4.660099e-3, rel=1e-6)


def test_sigmoid_alpha_bar_is_the_papers_function():
    """gamma(u) = (sigmoid(3) - sigmoid(6u - 3)) / (sigmoid(3) - sigmoid(-3)), up to the cap on the last beta."""
    alpha_bar = NoiseSchedule(make_betas("sigmoid_alpha_bar", 1000)).alpha_bar
    u = torch.arange(1, 1000, dtype=torch.float64) / 1000
    end = torch.tensor(3.0, dtype=torch.float64).sigmoid()
    torch.testing.assert_close(alpha_bar[:999], (end - (6 * u - 3).sigmoid()) / (2 * end - 1))
    assert alpha_bar[499].item() == pytest.approx(0.5)


@pytest.mark.parametrize("name", sorted(set(BETA_SCHEDULES) - {"cosine", "sigmoid_alpha_bar"}))
@pytest.mark.parametrize("num_train_timesteps", [10, 1000])
def test_betas_are_those_of_diffusers(name, num_train_timesteps):
    kwargs = {"beta_start": 0.00085, "beta_end": 0.012}
    try:
        stock = DDPMScheduler(num_train_timesteps=num_train_timesteps, beta_schedule=name, **kwargs).betas
    except NotImplementedError:
        pytest.skip(f"this version of diffusers has no {name!r}")
    torch.testing.assert_close(make_betas(name, num_train_timesteps, **kwargs).float(), stock, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("num_train_timesteps", [1, 2, 37, 4000])
def test_betas_are_variances(name, num_train_timesteps):
    betas = make_betas(name, num_train_timesteps)
    assert betas.shape == (num_train_timesteps,) and betas.dtype == torch.float64
    assert (betas > 0).all() and (betas < 1).all()


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "sigmoid"])
@pytest.mark.parametrize("num_train_timesteps", [8, 100, 1000, 4000])
def test_reference_timesteps_keep_the_range_of_levels(name, num_train_timesteps):
    """Whatever the length, the path ends where that of 1000 steps does; a divisor takes every k-th level of it."""
    full = NoiseSchedule(make_betas(name, 1000)).alpha_bar[:-1]
    short = NoiseSchedule(make_betas(name, num_train_timesteps, reference_timesteps=1000)).alpha_bar[:-1]
    torch.testing.assert_close(short[-1], full[-1])
    if 1000 % num_train_timesteps == 0:
        stride = 1000 // num_train_timesteps
        torch.testing.assert_close(short, full[stride - 1 :: stride])


def test_unscaled_short_paths_keep_signal():
    """What `reference_timesteps` is for."""
    levels = [NoiseSchedule(make_betas("linear", n)).alpha_bar[n - 1].item() for n in (200, 100)]
    assert levels == pytest.approx([0.132, 0.364], abs=5e-4)


def test_respacing_there_and_back_is_the_identity():
    betas = make_betas("linear", 100)
    torch.testing.assert_close(respace_betas(respace_betas(betas, 400), 100), betas)


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_zero_terminal_snr_ends_without_signal_and_keeps_the_start(name):
    betas = make_betas(name, 1000)
    before, after = NoiseSchedule(betas), NoiseSchedule(rescale_zero_terminal_snr(betas))
    assert after.alpha[999].item() == 0 and after.sigma[999].item() == 1
    assert after.alpha[0].item() == before.alpha[0].item()
    # Linear in alpha, so ratios of differences stay.
    a, b = (schedule.alpha[:-1].diff()[:-1] for schedule in (before, after))
    torch.testing.assert_close(a / a.sum(), b / b.sum(), rtol=1e-7, atol=1e-10)


def test_zero_terminal_snr_agrees_with_diffusers_to_its_precision():
    stock = DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod
    ours = NoiseSchedule(rescale_zero_terminal_snr(make_betas("linear", 1000))).alpha_bar[:-1].float()
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("num_train_timesteps", [2, 3, 8, 13])
def test_paths_that_end_without_signal_are_respaced_and_rescaled(num_train_timesteps):
    ends = torch.tensor([0.1, 0.5, 1.0, 1.0], dtype=torch.float64)
    for betas in (respace_betas(ends, num_train_timesteps), rescale_zero_terminal_snr(ends)):
        alpha_bar = NoiseSchedule(betas).alpha_bar[:-1]
        assert alpha_bar[-1] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_betas("lienar", 10), "beta_schedule must be one of linear, .*, got 'lienar'"),
        (lambda: make_betas("linear", 0), "num_train_timesteps must be an integer of at least 1, got 0"),
        (lambda: make_betas("linear", 10.0), "num_train_timesteps must be an integer of at least 1, got 10.0"),
        (lambda: make_betas("linear", 10, beta_end=1.2), r"beta_end must be in \[0, 1\], got 1.2"),
        (lambda: make_betas("linear", 10, beta_start=float("nan")), r"beta_start must be in \[0, 1\], got nan"),
        (lambda: make_betas("linear", 10, reference_timesteps=0), "reference_timesteps must be an integer"),
        (lambda: rescale_zero_terminal_snr(torch.tensor([0.1])), "at least 2 timesteps, got 1"),
        (lambda: rescale_zero_terminal_snr(torch.tensor([0.1, 0.0])), "after the first step"),
    ],
)
def test_bad_schedules_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
