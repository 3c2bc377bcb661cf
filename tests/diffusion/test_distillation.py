"""The targets of students against DDIM itself, and on data whose probability flow is known in closed form."""

import math

import pytest
import torch

from diffusers_ext import ExtDDIMScheduler
from diffusers_ext.diffusion.distillation import (
    angle,
    angle_timesteps,
    consistency_weights,
    ddim_step,
    doublings_until_neighbours,
    noise_ratio,
    partner_noise,
    partner_timesteps,
    pseudo_huber,
    share_of_first_step,
    two_steps_in_one,
)
from diffusers_ext.diffusion.noising import NoiseLevel, add_noise, predict_x0
from diffusers_ext.diffusion.timesteps import make_timesteps
from gaussian_oracle import EPS, VARIANCE, X0, denoise, model_output


def schedule_of(**config):
    return ExtDDIMScheduler(**{"prediction_type": "v_prediction"} | config).schedule


SCHEDULES = {
    "linear": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero terminal snr": {"rescale_betas_zero_snr": True},
}
TRIPLES = [(999, 749, 499), (999, 499, -1), (300, 299, 298), (2, 1, 0), (1, 0, -1)]


def levels(schedule, timesteps, like):
    return [schedule.level(timestep, like) for timestep in timesteps]


@pytest.mark.product
@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("timesteps", TRIPLES)
def test_one_step_with_the_target_ends_where_two_steps_do(config, timesteps):
    torch.manual_seed(0)
    x_t, x0_t, x0_u = torch.randn(3, 5, 2, 3, 3, dtype=torch.float64)
    t, u, s = levels(schedule_of(**config), timesteps, x_t)
    x_s = ddim_step(x0_u, ddim_step(x0_t, x_t, t, u), u, s)
    target = two_steps_in_one(x0_t, x0_u, t, u, s)
    torch.testing.assert_close(ddim_step(target, x_t, t, s), x_s, rtol=1e-11, atol=1e-11)
    # The other form of the same, which has a small difference below the line: what x_0 the step from x_t to x_s means.
    known = (x_s - s.sigma / t.sigma * x_t) / (s.alpha - s.sigma / t.sigma * t.alpha)
    torch.testing.assert_close(target, known, rtol=1e-7, atol=1e-7)
    share = share_of_first_step(t, u, s)
    assert (share >= 0).all() and (share < 1).all() and (timesteps[-1] != -1 or (share == 0).all())


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_the_exact_student_of_a_gaussian_makes_its_teachers_trajectory(num_steps):
    """Sampled by the scheduler itself, with twice the steps by the teacher's exact network."""
    scheduler = ExtDDIMScheduler(clip_sample=False, prediction_type="v_prediction", timestep_spacing="trailing")
    schedule, x = scheduler.schedule, torch.randn(4, 1, 2, 2, dtype=torch.float64)
    student, points = x, [x]
    scheduler.set_timesteps(2 * num_steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model_output(schedule, "v_prediction", x, t), t, x).prev_sample
        points.append(x)
    fine = [*make_timesteps("trailing", 2 * num_steps, 1000), -1]
    scheduler.set_timesteps(num_steps)
    for number, timestep in enumerate(scheduler.timesteps.tolist()):
        t, u, s = levels(schedule, fine[2 * number : 2 * number + 3], student)
        x0_t = denoise(student, t)
        target = two_steps_in_one(x0_t, denoise(ddim_step(x0_t, student, t, u), u), t, u, s)
        v = (t.alpha * student - target) / t.sigma
        student = scheduler.step(v, timestep, student).prev_sample
        torch.testing.assert_close(student, points[2 * number + 2], rtol=1e-9, atol=1e-10)


def test_the_target_stays_between_the_predictions_of_both_steps():
    t, u, s = levels(schedule_of(), (900, 600, 300), torch.zeros(1))
    low, high = torch.full((1, 1), -0.5), torch.full((1, 1), 0.75)
    assert -0.5 < two_steps_in_one(low, high, t, u, s).item() < 0.75
    torch.testing.assert_close(two_steps_in_one(low, low, t, u, s), low)


@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES)
def test_partners_come_from_the_data_to_the_neighbours(config):
    schedule = schedule_of(**config)
    noise, before = noise_ratio(schedule), torch.full((1000,), -2)
    for doublings in range(doublings_until_neighbours(schedule) + 1):
        partners = partner_timesteps(schedule, doublings)
        assert (partners >= before).all() and (partners < torch.arange(1000)).all()
        wanted = partner_noise(noise, doublings)
        assert (torch.cat([noise, noise.new_zeros(1)])[partners] <= wanted.nan_to_num(math.inf)).all()
        assert doublings or (partners[noise < 1.9] == -1).all()  # at first the data themselves: a denoiser's target
        before = partners
    assert torch.equal(partners, torch.arange(1000) - 1)
    assert partner_noise(torch.tensor([10.0]), 0).item() == pytest.approx(5.0, rel=1e-3)
    assert partner_noise(torch.tensor([1.0]), 3).item() == pytest.approx(1 - (1 + 8 / (1 + math.e)) / 16, rel=1e-6)


def test_weights_are_one_over_the_distance_of_the_points_at_either_scale():
    schedule = schedule_of(rescale_betas_zero_snr=True)
    partners = partner_timesteps(schedule, 6)
    of_unit, of_noise = (consistency_weights(schedule, partners, name) for name in ("unit_scale", "noise"))
    torch.testing.assert_close(of_unit[:10], of_noise[:10], rtol=0.01, atol=0)
    assert of_noise[-1] == 0 and of_unit[-1] == pytest.approx(1)
    x0, eps = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    for timestep in (10, 400, 900):
        t, r = levels(schedule, (timestep, int(partners[timestep])), x0)
        x_t, x_r = add_noise(x0, eps, t), add_noise(x0, eps, r)
        assert of_unit[timestep].item() == pytest.approx(1 / (x_t - t.alpha / r.alpha * x_r).item(), rel=1e-9)
        assert of_noise[timestep].item() == pytest.approx(1 / (x_t / t.alpha - x_r / r.alpha).item(), rel=1e-9)
    with pytest.raises(ValueError, match="weighting must be one of unit_scale, noise, got 'snr'"):
        consistency_weights(schedule, partners, "snr")


def exact_x0(x, level):
    """Where the probability flow of the Gaussian ends: its standard deviation follows that of the data and noise."""
    return x * (VARIANCE / (VARIANCE * level.alpha**2 + level.sigma**2)) ** 0.5


def test_the_exact_consistency_function_has_no_loss_in_the_continuous_limit():
    """Along the teacher's DDIM step its weighted distance falls with the length of the step, and so to nothing."""
    losses = []
    for gap in (64, 16, 4, 1):
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
        t, r = levels(schedule_of(), (500, 500 - gap), x)
        x_r = ddim_step(denoise(x, t), x, t, r)
        difference = exact_x0(x, t) - exact_x0(x_r, r)
        losses.append((pseudo_huber(difference, 1e-6).mean() / (angle(t) - angle(r)).squeeze()).item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 2e-3
    assert losses[-1] < 0.3 * losses[-2]


def test_with_the_same_noise_its_gradient_vanishes_in_the_limit():
    """ECT without a teacher: the mean slope of the squared distance at the exact function, over data and noise."""
    slopes = []
    for gap in (64, 16, 4, 1):
        t, r = levels(schedule_of(), (500, 500 - gap), X0)
        x_t, x_r = add_noise(X0, EPS, t), add_noise(X0, EPS, r)
        difference = exact_x0(x_t, t) - exact_x0(x_r, r)
        slopes.append(((difference * x_t).mean() / (angle(t) - angle(r)).squeeze()).abs().item())
    assert slopes == sorted(slopes, reverse=True) and slopes[-1] < 0.3 * slopes[-2]


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow"])
def test_at_the_data_the_prediction_is_what_it_is_given(prediction_type):
    """The boundary condition of consistency models, by the prediction type itself."""
    torch.manual_seed(0)
    x, output = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    clean = schedule_of().level(-1, x)
    assert torch.equal(predict_x0(output, x, clean, prediction_type), x)
    near = NoiseLevel(torch.tensor(1.0).double(), torch.tensor(1e-9).double())
    torch.testing.assert_close(predict_x0(output, x, near, prediction_type), x, rtol=0, atol=1e-7)


def test_pseudo_huber_is_the_distance_far_away_and_its_square_near():
    difference = torch.zeros(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    scaled = difference + torch.tensor([0.0, 1e-5, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    loss = pseudo_huber(scaled, 1e-2)
    expected = [0.0, 0.5 * 1e-10 / 1e-2, math.sqrt(9 + 1e-4) - 1e-2]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=0)
    loss.sum().backward()
    assert difference.grad.isfinite().all() and (difference.grad[0] == 0).all()


@pytest.mark.parametrize("config", SCHEDULES.values(), ids=SCHEDULES)
def test_timesteps_by_the_angle_start_at_noise_and_halve_it(config):
    schedule = schedule_of(**config)
    assert angle_timesteps(schedule, 1) == [999]
    first, second = angle_timesteps(schedule, 2)
    assert first == 999 and noise_ratio(schedule)[second].item() == pytest.approx(1.0, rel=0.02)
    for number in (4, 8, 1000):
        listed = angle_timesteps(schedule, number)
        assert len(listed) == number and listed == sorted(set(listed), reverse=True) and 0 <= listed[-1]
    for number in (0, 1001):
        with pytest.raises(
            ValueError, match=rf"num_inference_steps must be an integer in \[1, 1000\] .*, got {number}"
        ):
            angle_timesteps(schedule, number)
