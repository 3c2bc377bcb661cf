"""The learned noise schedule by itself, and the table of betas that it becomes."""

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_ext import ExtDDIMScheduler
from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.models.learned_schedule import LearnedSchedule, learned_betas, level_of
from diffusers_ext.schedulers.levels import learned_timesteps


def bent(seed=0, std=0.05, **options):
    """One whose interior is far from linear."""
    schedule = LearnedSchedule(**options).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        schedule.offsets.normal_(std=std, generator=generator)
        schedule.offsets[2] += torch.linspace(-0.3, 0.3, schedule.num_features)  # steep at the noise
        schedule.endpoint_offsets.copy_(torch.tensor([0.05, -0.02]))
    return schedule


@pytest.mark.parametrize("make", [LearnedSchedule, bent, lambda: LearnedSchedule(num_features=0)])
def test_gamma_rises_from_end_to_end_with_the_slope_that_it_says(make):
    schedule = make().double()
    t = torch.linspace(0, 1, 401, dtype=torch.float64, requires_grad=True)
    gamma, interior = schedule(t), schedule.interior(t)
    assert (gamma.diff() > 0).all()
    torch.testing.assert_close(gamma[[0, -1]], schedule.endpoints, rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(interior.share.sum(), t)
    torch.testing.assert_close(interior.slope, slope, rtol=1e-9, atol=0)


def test_no_level_is_drawn_less_than_a_tenth_as_often_as_by_a_linear_interior():
    """However far the numbers run: where the density is least, 1 / slope is its floor, and t(s) is still inverted."""
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    for seed in range(3):
        schedule = bent(seed, std=0.2)
        with torch.no_grad():
            schedule.offsets[0].abs_()  # steps that are steep
            schedule.offsets[2] += torch.linspace(0, 1, schedule.num_features)  # nearly all at the noise
        share, slope = schedule.interior(t)
        assert 6 < slope.max() < 10
        assert (share.diff() > 0).all() and share[0] == 0 and share[-1].item() == pytest.approx(1, abs=1e-12)
        torch.testing.assert_close(schedule._time(share)[0], t, rtol=0, atol=1e-5)


def test_its_gradients_are_those_of_the_inverse_function():
    schedule, t = bent(num_features=8), torch.tensor([0.1, 0.45, 0.8], dtype=torch.float64)

    def interior(offsets):
        schedule.offsets = offsets
        return torch.stack(schedule.interior(t))

    offsets = schedule.offsets.detach().clone().requires_grad_()
    del schedule.offsets  # a parameter, in the place of which plain tensors are put
    assert torch.autograd.gradcheck(interior, (offsets,))


def test_it_starts_next_to_linear_and_can_bend():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    share = LearnedSchedule().double().interior(t).share
    assert (share - t).abs().max() < 0.06
    assert (bent().interior(t).share - t).abs().max() > 2 * (share - t).abs().max()


def test_levels_have_the_log_snr():
    gamma = torch.tensor([-13.0, 0.0, 5.0], dtype=torch.float64)
    level = level_of(gamma, torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(level.snr.log().flatten(), -gamma)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(3, 1, dtype=torch.float64))


def test_its_timesteps_are_even_in_log_snr_whatever_the_interior():
    for seed in (0, 1):
        entries = learned_betas(bent(seed), 50)
        schedule = NoiseSchedule(torch.tensor(entries["trained_betas"], dtype=torch.float64))
        log_snr = 2 * (schedule.alpha[:-1] / schedule.sigma[:-1]).log()
        gamma_0, gamma_1 = bent(seed).endpoints.tolist()
        torch.testing.assert_close(
            log_snr, -torch.linspace(gamma_0, gamma_1, 50, dtype=torch.float64), rtol=1e-6, atol=0
        )
        assert entries["_learned_timesteps"][0] == 0 and entries["_learned_timesteps"][-1] == 49


def test_the_interior_is_kept_by_schedulers_of_ours_and_of_diffusers(tmp_path, caplog):
    schedule = bent()
    entries = learned_betas(schedule, 50)
    table = entries.pop("_learned_timesteps")
    scheduler = ExtDDIMScheduler(50, **entries, prediction_type="v_prediction")
    scheduler.register_to_config(_learned_timesteps=table)
    scheduler.save_pretrained(tmp_path)
    loaded = ExtDDIMScheduler.from_pretrained(tmp_path)
    stock = DDIMScheduler.from_config(loaded.config)
    again = ExtDDIMScheduler.from_config(stock.config)
    assert not caplog.records  # nothing is said of a key that is not known
    for each in (loaded, stock, again):
        assert each.config["_learned_timesteps"] == table
        torch.testing.assert_close(each.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_the_steps_of_a_sampler_can_be_those_of_the_schedule():
    schedule = bent(std=0.1)
    scheduler = ExtDDIMScheduler(1000, trained_betas=learned_betas(schedule, 1000)["trained_betas"])
    with pytest.raises(ValueError, match="whose schedule was learned"):
        learned_timesteps(scheduler, 10)
    scheduler.register_to_config(_learned_timesteps=learned_betas(schedule, 1000)["_learned_timesteps"])
    listed = learned_timesteps(scheduler, 10)
    times = torch.tensor([i / 10 for i in range(10, 0, -1)], dtype=torch.float64)
    expected = 999 * schedule.interior(times).share
    assert (torch.tensor(listed) - expected).abs().max() <= 0.51
    scheduler.set_timesteps(timesteps=listed)
    every = learned_timesteps(scheduler, 1000)
    assert every == list(range(999, -1, -1))
    assert len(set(learned_timesteps(scheduler, 600))) == 600
    with pytest.raises(ValueError, match=r"num_inference_steps must be in \[1, 1000\], got 1001"):
        learned_timesteps(scheduler, 1001)


def test_endpoints_out_of_order_are_refused():
    with pytest.raises(ValueError, match="gamma_0 must be less than gamma_1, got 5 and 5"):
        LearnedSchedule(5, 5)
    with pytest.raises(ValueError, match="num_features must be at least 0, got -1"):
        LearnedSchedule(num_features=-1)
