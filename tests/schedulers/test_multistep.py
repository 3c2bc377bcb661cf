"""Steps of second order: diffusers' DPM-Solver++(2M) is one oracle, the exact flow of a Gaussian another."""

import copy

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from diffusers_ext.diffusion.noising import predict_eps, training_target
from diffusers_ext.schedulers import ExtDDIMScheduler, FlowScheduler, VPredictionScheduler
from gaussian_oracle import VARIANCE, denoise


COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
CONFIGS = {
    "v, cosine": COSINE,
    "epsilon": {"timestep_spacing": "leading"},
    "x_0": {"beta_schedule": "scaled_linear", "timestep_spacing": "linspace", "prediction_type": "sample"},
    "thresholding": COSINE | {"thresholding": True},
}


def network(x, t):
    """Neither linear nor the same at two timesteps."""
    weight = torch.tensor([[0.5, -0.3, 0.1], [0.2, 0.4, -0.6], [-0.1, 0.3, 0.2]])
    return torch.einsum("bchw,cd->bdhw", x, weight).tanh() * (1 + t / 2000)


def start(batch=2):
    return torch.randn(batch, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def steps(scheduler, x, timesteps, **options):
    for t in timesteps:
        x = scheduler.step(network(x, t), t, x, **options).prev_sample
    return x


def made(order=2, number=6, **config):
    scheduler = ExtDDIMScheduler(multistep_order=order, **(COSINE | config))
    scheduler.set_timesteps(number)
    return scheduler


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("num_steps", [2, 5, 20])
def test_steps_are_those_of_dpm_solver(name, num_steps):
    """With an x_0 that is clipped, DPM-Solver++ takes the noise that it leaves."""
    config = CONFIGS[name]
    theirs = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **config)
    theirs.set_timesteps(num_steps)
    ours = ExtDDIMScheduler(multistep_order=2, clip_sample=False, **config)
    ours.set_timesteps(timesteps=theirs.timesteps)
    options = {"use_clipped_model_output": "thresholding" in config}
    expected = steps(theirs, start(), theirs.timesteps)
    torch.testing.assert_close(
        steps(ours, start(), ours.timesteps, **options) / expected.std(), expected / expected.std(), rtol=0, atol=1e-5
    )
    first_order = ExtDDIMScheduler.from_config(ours.config, multistep_order=1)
    first_order.set_timesteps(timesteps=theirs.timesteps)
    difference = steps(first_order, start(), ours.timesteps, **options) - expected
    assert num_steps == 2 or difference.abs().max() > 1e-3 * expected.std()


def test_steps_on_the_linear_path_are_those_of_dpm_solver():
    theirs = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    for num_steps in (2, 5, 20):
        theirs.set_timesteps(num_steps)
        ours = FlowScheduler(multistep_order=2)
        ours.set_timesteps(timesteps=theirs.sigmas[:-1] * 1000)
        expected = start()
        for t, rounded in zip(ours.timesteps, theirs.timesteps, strict=True):
            expected = theirs.step(network(expected, t), rounded, expected).prev_sample
        torch.testing.assert_close(steps(ours, start(), ours.timesteps), expected, rtol=0, atol=1e-5)


def error_at_the_end(scheduler, stride):
    """Of the standard deviation after steps of the exact network from timestep 900 to 100, relative to the exact flow's."""
    scheduler.set_timesteps(timesteps=list(range(900, 99, -stride)))
    x = torch.ones(1, 1, dtype=torch.float64)
    before, after = (scheduler.level(t, x) for t in scheduler.timesteps[[0, -1]])
    exact = ((VARIANCE * after.alpha**2 + after.sigma**2) / (VARIANCE * before.alpha**2 + before.sigma**2)).sqrt()
    for t in scheduler.timesteps[:-1]:
        level = scheduler.level(t, x)
        x0 = denoise(x, level)
        prediction_type = "flow" if isinstance(scheduler, FlowScheduler) else scheduler.config.prediction_type
        output = training_target(x0, predict_eps(x0, x, level), level, prediction_type)
        x = scheduler.step(output, t, x).prev_sample
    return abs(x / exact - 1).item()


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowScheduler(multistep_order=2),
        ExtDDIMScheduler(clip_sample=False, multistep_order=2),
        VPredictionScheduler(clip_sample=False, multistep_order=2, beta_schedule="squaredcos_cap_v2"),
    ],
    ids=["linear path", "epsilon", "zero terminal SNR"],
)
def test_the_error_falls_with_the_square_of_the_steps(scheduler):
    errors = [error_at_the_end(scheduler, stride) for stride in (40, 20, 10)]
    first = type(scheduler).from_config(scheduler.config, multistep_order=1)
    assert errors[-1] < 0.1 * error_at_the_end(first, 10)
    for error, finer in zip(errors, errors[1:], strict=False):
        assert error / finer > 3.3


def test_a_step_that_does_not_go_on_from_the_last_one_is_of_first_order():
    first, second = made(1), made()
    t = second.timesteps
    x = steps(second, start(), t[:2])
    for visited in (t[1], t[3], torch.tensor([t[2], t[4]])):  # made again, jumped to, one sample of two
        output = network(x, t[1])
        again, expected = copy.deepcopy(second).step(output, visited, x), first.step(output, visited, x)
        goes_on = visited.eq(t[2]).expand(2)
        assert torch.equal(again.prev_sample[~goes_on], expected.prev_sample[~goes_on])
        assert not goes_on.any() or not torch.allclose(again.prev_sample[goes_on], expected.prev_sample[goes_on])


@pytest.mark.parametrize("cls", [ExtDDIMScheduler, FlowScheduler])
def test_what_is_remembered_does_not_outlive_its_run(cls):
    """Another batch, another list, the start of another run, one that was left in the middle: all as of a new scheduler."""
    scheduler, fresh = cls(multistep_order=2), cls(multistep_order=2)
    scheduler.set_timesteps(6)
    fresh.set_timesteps(6)
    t = scheduler.timesteps
    expected = steps(fresh, start(3), t[2:])
    steps(scheduler, start(2), t[:2])
    assert torch.equal(steps(scheduler, start(3), t[2:]), expected)
    assert torch.equal(steps(scheduler, start(3), t[2:]), expected)
    steps(scheduler, start(3), t[:2])
    scheduler.set_timesteps(6)
    assert torch.equal(steps(scheduler, start(3), t[2:]), expected)


def test_each_sample_of_a_batch_steps_as_it_does_alone():
    scheduler = made()
    rows = torch.stack([scheduler.timesteps[1:5], scheduler.timesteps[2:]])
    x, alone = start(), [start()[:1], start()[1:]]
    for t in rows.T:
        x = scheduler.step(network(x, 0), t, x).prev_sample
    for row, each, result in zip(rows, alone, x, strict=True):
        scheduler = made()
        for t in row:
            each = scheduler.step(network(each, 0), t, each).prev_sample
        torch.testing.assert_close(result, each[0], rtol=0, atol=1e-5)


def test_a_copy_in_the_middle_goes_on_alike_also_under_gradients():
    scheduler = made(prediction_type="sample")
    x = start().requires_grad_()
    middle = steps(scheduler, x, scheduler.timesteps[:2])
    duplicate = copy.deepcopy(scheduler)
    ends = [steps(each, middle, scheduler.timesteps[2:]) for each in (scheduler, duplicate)]
    assert torch.equal(*ends)
    ends[0].sum().backward()
    assert x.grad.isfinite().all()


def test_what_a_step_returned_may_be_written_to():
    written, left = made(prediction_type="sample"), made(prediction_type="sample")
    x = start()
    for t in left.timesteps:
        output = network(x, t)
        expected = left.step(output.clone(), t, x).prev_sample
        result = written.step(output, t, x)
        assert torch.equal(result.prev_sample, expected)
        x = expected
        output.zero_(), result.pred_original_sample.zero_()


def test_steps_with_noise_are_of_first_order():
    ends = []
    for scheduler in (made(1), made(2)):
        generator = torch.Generator().manual_seed(1)
        ends.append(steps(scheduler, start(), scheduler.timesteps, eta=0.5, generator=generator))
    assert torch.equal(*ends)


def test_orders_are_refused_where_they_mean_nothing_and_no_config_of_diffusers_turns_them_on():
    for cls in (ExtDDIMScheduler, VPredictionScheduler, FlowScheduler):
        with pytest.raises(ValueError, match="multistep_order must be 1 or 2, got 3"):
            cls(multistep_order=3)
    with pytest.raises(ValueError, match="multistep_order must be 1 with stochastic_sampling"):
        FlowScheduler(multistep_order=2, stochastic_sampling=True)
    solver = DPMSolverMultistepScheduler(solver_order=2)
    assert ExtDDIMScheduler.from_config(solver.config).config.multistep_order == 1
    kept = DPMSolverMultistepScheduler.from_config(made().config)
    assert ExtDDIMScheduler.from_config(kept.config).config.multistep_order == 2
