"""Tables by timestep: empty batches, and inference mode."""

import pytest
import torch

from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, FlowScheduler
from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.diffusion.tables import DeviceTable


def test_no_rows_are_columns_without_entries():
    """As the last batch of a rank or of a filtered set may be."""
    table = DeviceTable(torch.rand(5, 3))
    columns = table.gather(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, 4))
    assert [column.shape for column in columns] == [(0, 1, 1)] * 3
    level = NoiseSchedule(torch.full((5,), 0.1)).level(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, 4))
    assert level.alpha.shape == (0, 1, 1)


@pytest.mark.parametrize("cls", [ExtDDIMScheduler, ExtDDPMScheduler, FlowScheduler])
def test_schedulers_take_empty_batches(cls):
    scheduler, none = cls(), torch.zeros(0, 3, 4, 4)
    scheduler.set_timesteps(4)
    for timesteps in (scheduler.timesteps[0], scheduler.timesteps[:0]):
        assert scheduler.step(none, timesteps, none).prev_sample.shape == none.shape
        assert scheduler.add_noise(none, none, timesteps).shape == none.shape


@pytest.mark.parametrize("cls", [ExtDDIMScheduler, ExtDDPMScheduler, FlowScheduler])
def test_what_is_read_in_inference_mode_serves_autograd_later(cls):
    """Tables made there, and copies of tables of before, are kept by the scheduler."""
    before = cls()
    x = torch.ones(2, 3, 4, 4)
    with torch.inference_mode():
        made_there = cls()
        for scheduler in (before, made_there):
            scheduler.set_timesteps(4)
            for timesteps in (scheduler.timesteps[1], scheduler.timesteps[1:3]):
                scheduler.step(x, timesteps, x)
                scheduler.add_noise(x, x, timesteps)
    for scheduler in (before, made_there):
        for timesteps in (scheduler.timesteps[1].item(), torch.tensor(scheduler.timesteps[1:3].tolist())):
            leaf = torch.ones(2, 3, 4, 4, requires_grad=True)
            noisy = scheduler.add_noise(leaf, torch.zeros_like(leaf), timesteps)
            noisy = noisy + scheduler.step(leaf, timesteps, leaf).pred_original_sample
            noisy.sum().backward()
            assert leaf.grad.isfinite().all()
