"""Steps of the schedulers on an accelerator: nothing is waited for, CUDA graphs can hold them, stock's results are theirs."""

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler

from devices import assert_near, captured, no_host_sync
from diffusers_ext.schedulers import (
    ExtDDIMInverseScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    VPredictionScheduler,
)
from tiny import tiny_unet


pytestmark = pytest.mark.device

CASES = {
    "ddpm": (ExtDDPMScheduler, {}, {}),
    "ddpm, learned": (ExtDDPMScheduler, {"variance_type": "learned_range"}, {}),
    "ddim": (ExtDDIMScheduler, {}, {}),
    "ddim, eta": (ExtDDIMScheduler, {"clip_sample": False}, {"eta": 0.5}),
    "ddim, thresholding": (ExtDDIMScheduler, {"thresholding": True}, {"use_clipped_model_output": True}),
    "v": (VPredictionScheduler, {}, {}),
    "inverse": (ExtDDIMInverseScheduler, {}, {}),
}
NUM_STEPS = 10


def make(case, device):
    """The scheduler, the model's output, x_t, and the keywords of a step without noise of its own."""
    scheduler_class, config, kwargs = CASES[case]
    scheduler, g = scheduler_class(**config), torch.Generator().manual_seed(0)
    scheduler.set_timesteps(NUM_STEPS, device=device)
    output = torch.randn(2, 6 if "learned" in case else 3, 8, 8, generator=g).to(device)
    sample, noise = (torch.randn(2, 3, 8, 8, generator=g).to(device) for _ in range(2))
    if case.startswith("ddpm") or "eta" in kwargs:
        kwargs = kwargs | {"variance_noise": noise}
    return scheduler, output, sample, kwargs


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case, device):
    scheduler, output, sample, kwargs = make(case, device)
    draws = {name: value for name, value in kwargs.items() if name != "variance_noise"}
    each = torch.tensor([500, 3], device=device)

    def steps():
        for t in (*scheduler.timesteps, 500, each[0].clone(), each):
            scheduler.step(output, t, sample, **kwargs)
            scheduler.step(output, t, sample, **draws)
        scheduler.previous_timestep(each[0].clone())
        scheduler.add_noise(sample, sample, each)
        scheduler.get_velocity(sample, sample, each)

    steps()  # the first use of a table copies it to the device
    with no_host_sync(device):
        steps()


@pytest.mark.parametrize("case", CASES)
def test_a_captured_step_serves_every_timestep(case, device):
    """With a timestep for each sample, in a tensor that is written to between the replays."""
    scheduler, output, sample, kwargs = make(case, device)
    timesteps = torch.zeros(2, dtype=torch.int64, device=device)
    step = captured(lambda: scheduler.step(output, timesteps, sample, **kwargs).prev_sample, device)
    for first, second in zip(scheduler.timesteps.tolist(), reversed(scheduler.timesteps.tolist()), strict=True):
        timesteps.copy_(torch.tensor([first, second]))
        result = step().clone()
        expected = [scheduler.step(output, t, sample, **kwargs).prev_sample[i] for i, t in enumerate((first, second))]
        assert_near(result, torch.stack(expected), 1e-5)


@torch.no_grad()
def test_a_whole_step_of_sampling_can_be_captured(device):
    """The network and the scheduler in one graph, replayed for each timestep, as against a loop without graphs."""
    network, scheduler = tiny_unet().to(device).eval(), ExtDDIMScheduler()
    scheduler.set_timesteps(NUM_STEPS, device=device)
    start = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    expected = start
    for t in scheduler.timesteps:
        expected = scheduler.step(network(expected, t).sample, t, expected).prev_sample

    x, timesteps = start.clone(), torch.zeros(2, dtype=torch.int64, device=device)
    step = captured(lambda: scheduler.step(network(x, timesteps).sample, timesteps, x).prev_sample, device)
    for t in scheduler.timesteps:
        timesteps.fill_(t)
        x.copy_(step())
    assert_near(x, expected, 1e-4)


PAIRS = {
    "ddpm": (DDPMScheduler, ExtDDPMScheduler, {}),
    "ddim": (DDIMScheduler, ExtDDIMScheduler, {}),
    "ddim, eta": (DDIMScheduler, ExtDDIMScheduler, {"eta": 0.5}),
    "inverse": (DDIMInverseScheduler, ExtDDIMInverseScheduler, None),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_stock_s_steps_with_the_same_seeds(pair, device):
    """Within the rounding of stock's float32 tables; as `tests/schedulers/test_against_stock.py` has it for the CPU."""
    stock_class, our_class, kwargs = PAIRS[pair]
    results = []
    for scheduler in (stock_class(), our_class()):
        scheduler.set_timesteps(NUM_STEPS, device=device)
        generator = torch.Generator(device).manual_seed(1)
        options = {} if kwargs is None else kwargs | {"generator": generator}
        g = torch.Generator().manual_seed(0)
        x, output = (torch.randn(2, 3, 8, 8, generator=g).to(device) for _ in range(2))
        states = []
        for t in scheduler.timesteps[:-1] if kwargs is None else scheduler.timesteps:
            x = scheduler.step(output, t, x, **options).prev_sample
            states.append(x)
        results.append(torch.stack(states))
    assert_near(results[1], results[0], 2e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_device_computes_what_the_cpu_does(case, device):
    on_device, on_cpu = make(case, device), make(case, "cpu")
    for i in range(NUM_STEPS):
        results = [
            scheduler.step(output, scheduler.timesteps[i], sample, **kwargs).prev_sample
            for scheduler, output, sample, kwargs in (on_device, on_cpu)
        ]
        assert_near(*results, 1e-5)
