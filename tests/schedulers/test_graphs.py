"""No host sync: steps on devices without values, and as one compiled graph."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_ext.schedulers import (
    AnnealedLangevinScheduler,
    ExtDDIMInverseScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    FlowScheduler,
    ScoreSDEScheduler,
    VPredictionScheduler,
)


CASES = {
    "ddpm": (ExtDDPMScheduler, {}, {}),
    "ddpm, learned": (ExtDDPMScheduler, {"variance_type": "learned_range"}, {}),
    "ddim": (ExtDDIMScheduler, {}, {}),
    "ddim, eta": (ExtDDIMScheduler, {"clip_sample": False}, {"eta": 0.5}),
    "ddim, thresholding": (ExtDDIMScheduler, {"thresholding": True}, {"use_clipped_model_output": True}),
    "ddim, second order": (ExtDDIMScheduler, {"multistep_order": 2}, {}),
    "flow, second order": (FlowScheduler, {"multistep_order": 2}, {}),
    "v": (VPredictionScheduler, {}, {}),
    "flow": (FlowScheduler, {"shift": 2.0}, {}),
    "flow, eta": (FlowScheduler, {"prediction_type": "v_prediction"}, {"eta": 0.5}),
    "inverse": (ExtDDIMInverseScheduler, {}, {}),
    "sde": (ScoreSDEScheduler, {"path": "ve", "prediction_type": "score"}, {}),
    "corrector": (ScoreSDEScheduler, {"path": "subvp", "corrector_steps": 1}, {}),
    "heun": (ScoreSDEScheduler, {"predictor": "heun"}, {}),
    "langevin": (AnnealedLangevinScheduler, {"num_langevin_steps": 2}, {}),
}


def tensors(case, device):
    return torch.zeros(2, 6 if "learned" in case else 3, 8, 8, device=device), torch.zeros(2, 3, 8, 8, device=device)


def make(case, device="cpu"):
    cls, config, kwargs = CASES[case]
    return cls(**config), *tensors(case, device), dict(kwargs)


@pytest.mark.parametrize("case", CASES)
def test_a_loop_on_the_meta_device_reads_no_value(case):
    scheduler, output, sample, kwargs = make(case, "meta")
    scheduler.set_timesteps(5, device="meta")
    dtype = scheduler.timesteps.dtype
    foreign = [torch.tensor(t, device="meta", dtype=dtype) for t in (500, [500, 3])]
    for t in (*scheduler.timesteps, *scheduler.timesteps[2:], *foreign):
        assert scheduler.step(output, t, sample, **kwargs).prev_sample.is_meta
    assert scheduler.add_noise(sample, sample, foreign[1]).is_meta
    assert scheduler.get_velocity(sample, sample, foreign[1]).is_meta


@pytest.mark.skipif(
    torch.backends.cuda.is_built() and not torch.cuda.is_available(), reason="torch's CUDA build looks for a driver"
)
@pytest.mark.parametrize("case", CASES)
def test_a_loop_on_a_fake_accelerator_reads_no_value(case):
    scheduler, _, real, kwargs = make(case)
    scheduler.set_timesteps(5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        output, sample = tensors(case, "cuda")
        for t in (999, 500, 0, [500, 3]):
            timestep = torch.tensor(t, device="cuda", dtype=scheduler.timesteps.dtype)
            assert scheduler.step(output, timestep, sample, **kwargs).prev_sample.device.type == "cuda"
        assert scheduler.add_noise(sample, sample, timestep).device.type == "cuda"
    assert type(scheduler.add_noise(real, real, torch.tensor([3, 4]))) is torch.Tensor  # no fake table was kept


def test_the_last_step_is_recognised_on_any_device():
    """The host knows which element of `timesteps` it passes, so the generator is not touched at the last."""
    scheduler, output, sample, _ = make("ddpm", "meta")
    scheduler.set_timesteps(5, device="meta")
    generator = torch.Generator().manual_seed(0)
    states = [generator.get_state()]
    for t in scheduler.timesteps:
        scheduler.step(output, t, sample, generator=generator)
        states.append(generator.get_state())
    assert [torch.equal(a, b) for a, b in zip(states, states[1:], strict=False)] == [False] * 4 + [True]


@pytest.mark.product
@pytest.mark.skipif(torch.__version__.startswith("2.6"), reason="torch 2.6 cannot trace all of it as one graph")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["tensor", "each", "int"])
def test_step_compiles_to_one_graph(case, form):
    """At most one more graph for a change of shape or constant, however many steps; same result as eagerly."""
    if form == "int" and case.startswith("flow"):
        pytest.skip("a float is a constant of the graph: a timestep that changes goes in a tensor")
    torch._dynamo.reset()
    scheduler, output, sample, kwargs = make(case)
    g = torch.Generator().manual_seed(0)
    output, sample = torch.randn(output.shape, generator=g), torch.randn(sample.shape, generator=g)
    if case != "inverse":
        kwargs["variance_noise"] = torch.randn(sample.shape, generator=g)
    scheduler.set_timesteps(12)
    eager = copy.deepcopy(scheduler)  # some count their calls
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(scheduler.step, fullgraph=True, backend=counter)
    for t in scheduler.timesteps:
        timestep = {"tensor": t, "each": t.repeat(2), "int": t.item()}[form]
        result = compiled(output, timestep, sample, **kwargs, return_dict=False)
        expected = eager.step(output, timestep, sample, **kwargs, return_dict=False)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    scheduler.set_timesteps(6)  # other tables, same graph
    eager.set_timesteps(6)
    t = scheduler.timesteps[1]
    timestep = {"tensor": t, "each": t.repeat(2), "int": t.item()}[form]
    result, expected = (step(output, timestep, sample, **kwargs).prev_sample for step in (compiled, eager.step))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 1 + 2 * scheduler.order  # for each kind of call at a level


def test_compiled_step_draws_its_own_noise():
    torch._dynamo.reset()
    scheduler, output, sample, _ = make("ddpm")
    scheduler.set_timesteps(5)
    compiled = torch.compile(scheduler.step, fullgraph=True, backend="aot_eager")
    spread = compiled(output, scheduler.timesteps[0], sample).prev_sample.std()
    expected = scheduler._get_variance(scheduler.timesteps[0]).sqrt()
    torch.testing.assert_close(spread, expected, rtol=0.15, atol=0)
    last = compiled(output, scheduler.timesteps[-1], sample).prev_sample
    assert torch.equal(last, torch.zeros_like(last))


def test_step_compiles_with_inductor():
    torch._dynamo.reset()
    scheduler, _, _, _ = make("ddim")
    scheduler.set_timesteps(5)
    output, sample = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(scheduler.step, fullgraph=True)
    for t in scheduler.timesteps:
        result, expected = (step(output, t, sample, return_dict=False)[0] for step in (compiled, scheduler.step))
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
