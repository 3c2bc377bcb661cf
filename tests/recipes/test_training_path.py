"""Options of the noising path, and the scheduler that they make."""

import dataclasses
import shlex

import pytest
import torch

from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, FlowScheduler, ScoreSDEScheduler
from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.diffusion.paths import PATHS, Linear, PathSchedule, SubVariancePreserving, VarianceExploding
from diffusers_ext.options import parse_config, to_command
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.recipes.denoising_parts import build_objective
from diffusers_ext.recipes.training_path import build_scheduler
from diffusers_ext.schedulers.levels import (
    describe_path,
    model_schedule,
    noise_level,
    path_difference,
    prediction_type_of,
    schedule_of,
)


def scheduler_of(**options):
    return build_scheduler(DenoisingConfig(**options))


def test_without_a_path_the_discrete_tables_are_as_they_were():
    config = DenoisingConfig()
    assert (config.path, config.beta_schedule, config.prediction_type, config.scheduler) == (
        *(None, "cosine", "v_prediction", "ddim"),
    )
    scheduler = build_scheduler(config)
    before = {"beta_schedule": "cosine", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    assert type(scheduler) is ExtDDIMScheduler
    assert {**scheduler.config, "_use_default_values": 0} == {
        **ExtDDIMScheduler(**before).config,
        "_use_default_values": 0,
    }
    assert DenoisingConfig(**dataclasses.asdict(config)) == config  # resolved options are options


def test_vp_is_the_linear_table_whatever_its_length_and_cosine_the_other_one():
    assert torch.equal(scheduler_of(path="vp").betas, ExtDDPMScheduler().betas)
    short, alpha_bar = scheduler_of(path="vp", num_train_timesteps=100), scheduler_of(path="vp").alphas_cumprod
    torch.testing.assert_close(short.alphas_cumprod[-1], alpha_bar[-1], rtol=1e-5, atol=0)
    assert torch.equal(scheduler_of(path="cosine").betas, scheduler_of().betas)
    sigmoid = scheduler_of(path="vp", beta_schedule="sigmoid", beta_start=1e-3)
    assert torch.equal(sigmoid.betas, ExtDDIMScheduler(beta_schedule="sigmoid", beta_start=1e-3).betas)


@pytest.mark.parametrize(
    "options, path",
    [
        ({"path": "ve", "sigma_max": 20.0}, VarianceExploding(0.01, 20.0)),
        ({"path": "subvp", "beta_min": 0.2}, SubVariancePreserving(0.2, 20.0)),
    ],
)
def test_ve_and_subvp_are_trained_at_unit_scale_and_saved_as_what_they_are(options, path):
    expected = PathSchedule(path, 200)
    for name in ("score_sde", "ddpm", "ddim"):
        config = DenoisingConfig(**options, num_train_timesteps=200, scheduler=name)
        scheduler, objective = build_scheduler(config), build_objective(config, build_scheduler(config))
        for schedule in (objective.schedule, model_schedule(scheduler), schedule_of(describe_path(scheduler))):
            assert schedule.preserves_variance
            torch.testing.assert_close(schedule.alpha_bar, expected.alpha_bar, rtol=1e-9, atol=1e-12)
    scheduler = scheduler_of(**options, num_train_timesteps=200)
    assert type(scheduler) is ScoreSDEScheduler and DenoisingConfig(**options).scheduler == "score_sde"
    again = ScoreSDEScheduler.from_config(scheduler.config)
    torch.testing.assert_close(again.schedule.sigma, expected.sigma)
    # What the network sees at a timestep is at unit scale, and so the level that guidance reckons with.
    level = noise_level(scheduler, 50, torch.zeros(1, 1, dtype=torch.float64))
    torch.testing.assert_close(level.alpha.square().flatten(), expected.alpha_bar[50:51], rtol=1e-9, atol=0)
    assert level.scale.item() == pytest.approx(1)
    ddim = ExtDDIMScheduler.from_config(scheduler.config)
    torch.testing.assert_close(ddim.schedule.alpha_bar, expected.alpha_bar, rtol=1e-9, atol=1e-12)


def test_linear_is_trained_as_it_is_with_its_velocity():
    config = DenoisingConfig(path="linear", num_train_timesteps=50)
    assert (config.prediction_type, config.scheduler, config.loss_weighting) == ("flow", "flow", "uniform")
    scheduler = build_scheduler(config)
    assert type(scheduler) is FlowScheduler and prediction_type_of(scheduler) == "flow"
    schedule = build_objective(config, scheduler).schedule
    assert isinstance(schedule.path, Linear) and schedule.labels(torch.tensor([0, 49])).tolist() == [1, 50]
    assert prediction_type_of(scheduler_of(path="linear", prediction_type="v_prediction")) == "v_prediction"


@pytest.mark.parametrize("name", PATHS)
def test_a_path_of_any_kind_is_described_so_that_it_can_be_made_again(name):
    scheduler = scheduler_of(path=name, num_train_timesteps=60)
    path = describe_path(scheduler)
    assert path_difference(path, scheduler) < 1e-9
    others = [scheduler_of(path=other, num_train_timesteps=60) for other in PATHS if other != name]
    assert min(path_difference(path, other) for other in others) > 1e-3
    assert path_difference(path, scheduler_of(path=name, num_train_timesteps=61)) == float("inf")


def test_networks_that_see_another_scale_are_of_another_path():
    """Also where the signal-to-noise ratios are equal."""
    raw = ScoreSDEScheduler(path="ve", num_train_timesteps=60)
    assert describe_path(raw) == {"path": "ve", "num_train_timesteps": 60, "sigma_min": 0.01, "sigma_max": 50.0}
    assert path_difference(describe_path(raw), raw) == 0
    unit = scheduler_of(path="ve", num_train_timesteps=60)
    assert path_difference(describe_path(raw), unit) == float("inf")
    assert path_difference(describe_path(unit), raw) == float("inf")


def test_a_table_that_ends_in_noise_is_trained_to_the_data():
    scheduler = ExtDDIMScheduler(beta_schedule="cosine", set_alpha_to_one=False)
    assert scheduler.schedule.sigma[-1] > 0 and model_schedule(scheduler).sigma[-1] == 0
    again = NoiseSchedule(scheduler.schedule.betas)
    assert torch.equal(model_schedule(scheduler).alpha, again.alpha)


@pytest.mark.parametrize("name", [None, *PATHS, "learned"])
def test_the_command_of_a_resolved_config_is_the_same_run(name):
    config = DenoisingConfig(path=name)
    words = shlex.split(to_command(config, "train.py", launcher="python"))[2:]
    assert parse_config(DenoisingConfig, words) == config


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"path": "linear", "prediction_type": "epsilon"},
            "whose last level holds no signal to divide by, got epsilon",
        ),
        ({"path": "linear", "prediction_type": "score"}, "whose last level holds no signal"),
        ({"path": "linear", "objective": "hybrid"}, "objective must be simple with path linear"),
        ({"path": "linear", "scheduler": "ddpm"}, "got scheduler ddpm with path linear: leave scheduler out"),
        ({"scheduler": "flow"}, "got scheduler flow with path None"),
        ({"path": "linear", "timestep_spacing": "leading"}, "must be trailing or linspace with path linear"),
        ({"path": "linear", "rescale_betas_zero_snr": True}, "which path linear is not: leave it out"),
        ({"path": "ve", "rescale_betas_zero_snr": True}, "which path ve is not"),
        ({"path": "ve", "beta_schedule": "cosine"}, "path ve and beta_schedule cosine both say which noise levels"),
        ({"path": "cosine", "beta_schedule": "linear"}, "path cosine and beta_schedule linear both say"),
        ({"path": "cosine", "beta_start": 1e-3}, "beta_start has no meaning without beta_schedule linear"),
        ({"sigma_max": 20.0}, "sigma_max has no meaning without path ve: give both or neither"),
        ({"path": "ve", "beta_max": 10.0}, "beta_max has no meaning without path subvp"),
        ({"path": "ve", "sigma_max": 0.001}, "sigma_min must be above 0 and less than sigma_max"),
        ({"path": "subvp", "beta_max": 0.01}, "beta_min must be at least 0 and less than beta_max"),
        ({"path": "learned", "loss_weighting": "simple"}, "the schedule itself says how often a noise level is seen"),
        (
            {"path": "learned", "timestep_sampling": "importance"},
            "leave loss_weighting, timestep_sampling and timestep_shift out",
        ),
        ({"path": "learned", "timestep_shift": 2.0}, "leave loss_weighting, timestep_sampling and timestep_shift out"),
        ({"timestep_shift": 0.0}, "timestep_shift must be positive, got 0"),
        (
            {"timestep_sampling": "logit_normal", "timestep_shift": 2.0},
            "timestep_shift has no meaning without timestep_sampling uniform or stratified",
        ),
        (
            {"path": "learned", "model": "dit", "internal_guidance_layer": 1},
            "internal_guidance_layer has no loss with path learned",
        ),
        ({"internal_guidance_loss_weight": 0.1}, "has no meaning without internal_guidance_layer"),
        (
            {"model": "dit", "internal_guidance_layer": 1, "internal_guidance_loss_weight": -0.1},
            "internal_guidance_loss_weight must be finite and at least 0, got -0.1",
        ),
        ({"path": "learned", "objective": "vlb"}, "objective bound is for path learned alone"),
        ({"objective": "bound"}, "with path None; on another path it is loss_weighting likelihood"),
        ({"path": "learned", "log_snr_max": -6.0}, "log_snr_min must be less than log_snr_max, got -5 and -6"),
        ({"schedule_features": 0}, "schedule_features has no meaning without path learned"),
        ({"logit_mean": 1.0}, "logit_mean has no meaning without timestep_sampling logit_normal"),
        ({"timestep_sampling": "logit_normal", "logit_std": 0.0}, "logit_std must be positive, got 0.0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DenoisingConfig(**options)
