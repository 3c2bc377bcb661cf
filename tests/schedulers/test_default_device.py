"""Under a default device of torch's: the tables stay on the host, and steps are those without one."""

import pytest
import torch

from diffusers_ext import (
    AnnealedLangevinScheduler,
    ConsistencyScheduler,
    ExtDDIMInverseScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    FlowScheduler,
    ScoreSDEScheduler,
    VPredictionScheduler,
)
from diffusers_ext.diffusion.betas import BETA_SCHEDULES
from diffusers_ext.diffusion.distillation import angle_timesteps, consistency_weights, partner_timesteps
from diffusers_ext.diffusion.losses import LOSS_WEIGHTINGS, trained_share
from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.diffusion.paths import PathSchedule, VarianceExploding
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.timestep_search import bound_costs, search_grid


MEASURED = {"timesteps": [0, 50, 99], "x0_variance": [0.001, 0.1, 0.3]}
CHOSEN = {"spacing": "trailing", "trajectory": {"3": [99, 50, 10]}}
SHORT = {"num_train_timesteps": 100, "beta_reference_timesteps": 1000}

SCHEDULERS = [
    *[(ExtDDIMScheduler, {"beta_schedule": name}) for name in BETA_SCHEDULES],
    (ExtDDIMScheduler, SHORT | {"variance_type": "analytic", "analytic_variance": MEASURED, "multistep_order": 2}),
    (ExtDDPMScheduler, SHORT | {"variance_type": "analytic", "analytic_variance": MEASURED}),
    (ExtDDPMScheduler, SHORT | {"timestep_spacing": "optimal", "optimal_timesteps": CHOSEN}),
    (ExtDDIMInverseScheduler, {"trained_betas": [0.01] * 1000}),
    (VPredictionScheduler, {}),
    *[(ScoreSDEScheduler, {"path": path, "corrector_steps": 1}) for path in ("vp", "ve", "subvp")],
    (ScoreSDEScheduler, {"path": "cosine", "prediction_type": "v_prediction", "predictor": "heun"}),
    (AnnealedLangevinScheduler, {}),
    (ConsistencyScheduler, {}),
    (FlowScheduler, {"shift": 3.0}),
    (FlowScheduler, {"timestep_spacing": "trailing", "stochastic_sampling": True}),
    (FlowScheduler, {"optimal_timesteps": {"spacing": "linspace", "trajectory": {"3": [1000, 500, 100]}}}),
]


def sampled(cls, config):
    """All that a user may ask of a scheduler, on tensors on the CPU."""
    scheduler = cls(**config)
    generator = torch.Generator("cpu").manual_seed(0)
    sample, output = (torch.randn(2, 1, 4, 4, generator=generator, device="cpu") for _ in range(2))
    scheduler.set_timesteps(3)
    found = [scheduler.timesteps, scheduler.previous_timestep(scheduler.timesteps[0])]
    draws = {} if cls is ExtDDIMInverseScheduler else {"generator": generator}
    for timestep in scheduler.timesteps:
        found += [scheduler.scale_model_input(sample, timestep), *scheduler.level(timestep, sample)]
        found += scheduler.step(output, timestep, sample, **draws, return_dict=False)
        found += [scheduler.add_noise(sample, output, timestep), scheduler.get_velocity(sample, output, timestep)]
    if cls in (ExtDDIMScheduler, ExtDDPMScheduler):
        found += [scheduler._get_variance(50, 20) if cls is ExtDDIMScheduler else scheduler._get_variance(50)]
    scheduler.set_timesteps(timesteps=[70, 30] if cls is not FlowScheduler else [70.0, 30.0])
    each = torch.tensor([70, 30], device="cpu").to(scheduler.timesteps.dtype)
    return [*found, scheduler.step(output, each, sample, **draws).prev_sample, scheduler.previous_timestep(70)]


@pytest.mark.parametrize(("cls", "config"), SCHEDULERS)
@pytest.mark.filterwarnings("ignore:alpha_bar of the last timestep", "ignore:the first of 3")
def test_schedulers_keep_their_tables_on_the_host(cls, config):
    expected = sampled(cls, config)
    with torch.device("meta"):
        found = sampled(cls, config)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)


def tables():
    """Numbers that follow from a path alone."""
    schedule = NoiseSchedule(torch.full((50,), 0.1, device="cpu"))
    yield from (schedule.alpha, schedule.sigma, schedule.betas, PathSchedule(VarianceExploding(), 20).betas)
    partners = partner_timesteps(schedule, 3)
    yield from (partners, consistency_weights(schedule, partners, "unit_scale"), angle_timesteps(schedule, 5))
    yield from (trained_share(schedule, weighting, "v_prediction") for weighting in LOSS_WEIGHTINGS)
    grid = search_grid(schedule, 10)
    yield from (grid, *bound_costs(schedule, grid, [0.1] * len(grid), 1.0))
    yield (
        ReverseChain(schedule, [40, 20, 3])
        .at(torch.tensor([0, 1], device="cpu"), torch.zeros(2, 1, device="cpu"))
        .t.sigma
    )


def test_tables_of_a_path_stay_on_the_host():
    expected = list(tables())
    with torch.device("meta"):
        found = list(tables())
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0)
