"""Configs: round trips through diffusers' classes and disk, and values that are refused."""

import inspect
import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from diffusers_ext.diffusion.betas import BETA_SCHEDULES
from diffusers_ext.schedulers import (
    AnnealedLangevinScheduler,
    ConsistencyScheduler,
    ExtDDIMInverseScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    ScoreSDEScheduler,
    VPredictionScheduler,
)


ALL = (
    ExtDDPMScheduler,
    ExtDDIMScheduler,
    VPredictionScheduler,
    ExtDDIMInverseScheduler,
    ScoreSDEScheduler,
    AnnealedLangevinScheduler,
    ConsistencyScheduler,
)
STOCK = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler)
FULL_CONFIG = {
    "num_train_timesteps": 40,
    "beta_start": 0.001,
    "beta_end": 0.3,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "clip_sample_range": 2.0,
    "timestep_spacing": "linspace",
    "steps_offset": 1,
    "rescale_betas_zero_snr": True,
    "thresholding": True,
    "dynamic_thresholding_ratio": 0.9,
    "sample_max_value": 1.5,
}


def visible(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.product
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("stock", STOCK)
@pytest.mark.parametrize(
    "config",
    [
        {},
        FULL_CONFIG,
        {"beta_schedule": "sigmoid_alpha_bar"},
        {"num_train_timesteps": 100, "beta_reference_timesteps": 1000},
        {"timestep_spacing": "quadratic"},
    ],
)
def test_config_goes_to_diffusers_and_back_without_loss(cls, stock, config):
    ours = cls(**config)
    back = cls.from_config(stock.from_config(ours.config).config)
    assert visible(ours).items() <= visible(back).items()
    assert torch.equal(back.schedule.alpha, ours.schedule.alpha)


@pytest.mark.parametrize(("stock", "ours"), [(DDPMScheduler, ExtDDPMScheduler), (DDIMScheduler, ExtDDIMScheduler)])
@pytest.mark.parametrize("config", [{}, FULL_CONFIG])
def test_config_of_diffusers_survives_our_class(stock, ours, config):
    theirs = stock(**config)
    assert visible(theirs) == {
        key: value
        for key, value in visible(stock.from_config(ours.from_config(theirs.config).config)).items()
        if key != "beta_reference_timesteps"
    }


def test_keys_of_another_class_are_kept():
    ddpm = ExtDDPMScheduler(variance_type="learned_range", beta_reference_timesteps=500)
    ddim = ExtDDIMScheduler.from_config(DDIMScheduler.from_config(ddpm.config).config)
    assert ExtDDPMScheduler.from_config(ddim.config).config.variance_type == "learned_range"
    assert ddim.config.beta_reference_timesteps == 500


@pytest.mark.parametrize("cls", ALL)
def test_config_survives_the_disk(cls, tmp_path):
    trained_betas = np.linspace(0.01, 0.6, 30)
    ours = cls(num_train_timesteps=30, trained_betas=trained_betas)
    ours.save_pretrained(tmp_path)
    back = cls.from_pretrained(tmp_path)
    assert torch.equal(back.schedule.alpha, ours.schedule.alpha)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["trained_betas"] == trained_betas.tolist()


@pytest.mark.parametrize("cls", ALL)
def test_what_is_loaded_counts_as_set(cls, tmp_path):
    """The list of keys left at their default is not saved, so a loaded scheduler has none; else the configs agree."""
    made = cls()
    made.save_pretrained(tmp_path)
    assert made.config["_use_default_values"]
    loaded = cls.from_pretrained(tmp_path).config
    assert loaded == {key: value for key, value in made.config.items() if key != "_use_default_values"}


@pytest.mark.parametrize("cls", ALL)
def test_no_key_is_handed_to_init_that_it_does_not_take(cls):
    """`from_config` passes what a class calls deprecated on to its `__init__`."""
    assert set(cls._deprecated_kwargs) <= set(inspect.signature(cls.__init__).parameters)


@pytest.mark.product
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.filterwarnings("ignore:alpha_bar of the last timestep")
def test_diffusers_builds_the_same_path_from_our_config(cls, name):
    """Schedules beyond diffusers' reach its classes as `trained_betas`."""
    ours = cls(beta_schedule=name, rescale_betas_zero_snr=False)
    stock = DDPMScheduler if cls is ExtDDPMScheduler else DDIMScheduler
    theirs = stock.from_config(ours.config)
    torch.testing.assert_close(theirs.alphas_cumprod, ours.alphas_cumprod, rtol=1e-3, atol=1e-7)
    if name != "sigmoid" or cls is not ExtDDPMScheduler:
        multistep = DPMSolverMultistepScheduler.from_config(ours.config)
        torch.testing.assert_close(multistep.alphas_cumprod, ours.alphas_cumprod, rtol=1e-3, atol=1e-7)


OVERRIDES = [
    ({"beta_schedule": "cosine"}, {"beta_schedule": "linear"}),
    ({"beta_schedule": "cosine"}, {"num_train_timesteps": 500}),
    ({"beta_schedule": "sigmoid"}, {"beta_end": 0.03}),
    ({"beta_schedule": "sigmoid"}, {"beta_start": 0.001, "beta_end": 0.03}),
    ({"beta_schedule": "laplace"}, {"beta_schedule": "sigmoid_alpha_bar"}),
    ({"num_train_timesteps": 500, "beta_reference_timesteps": 1000}, {"beta_reference_timesteps": None}),
    ({"num_train_timesteps": 500, "beta_reference_timesteps": 1000}, {"num_train_timesteps": 250}),
]


@pytest.mark.parametrize("cls", [ExtDDIMScheduler, ExtDDPMScheduler, ScoreSDEScheduler, ConsistencyScheduler])
@pytest.mark.parametrize(("config", "given"), OVERRIDES)
@pytest.mark.filterwarnings("ignore:alpha_bar of the last timestep")
def test_an_option_changes_a_schedule_that_stands_in_the_config_as_betas(cls, config, given, tmp_path):
    """In memory, from the disk, and through a class of diffusers, whose betas are those of `trained_betas`."""
    made, expected = cls(**config), cls(**config | given)
    made.save_pretrained(tmp_path)
    results = [cls.from_config(made.config, **given), cls.from_pretrained(tmp_path, **given)]
    if config.get("beta_schedule") != "sigmoid":  # of stock DDPM alone, for which ours writes no betas
        results.append(cls.from_config(DDIMScheduler.from_config(made.config).config, **given))
    for result in results:
        assert torch.equal(result.schedule.alpha, expected.schedule.alpha)


def test_betas_that_were_given_stay_whatever_else_is_asked():
    betas = np.linspace(0.01, 0.6, 1000).tolist()
    made = ExtDDIMScheduler(trained_betas=betas, beta_schedule="cosine")
    back = ExtDDIMScheduler.from_config(made.config, beta_end=0.01)
    assert torch.equal(back.schedule.alpha, made.schedule.alpha)
    cosine = ExtDDIMScheduler(beta_schedule="cosine").config
    both = ExtDDIMScheduler.from_config(cosine, beta_schedule="linear", trained_betas=betas)
    assert torch.equal(both.schedule.alpha, made.schedule.alpha)
    assert ExtDDIMScheduler.from_config(cosine, clip_sample=False).config.trained_betas == cosine.trained_betas


def test_the_default_path_reaches_samplers_with_other_defaults():
    """Heun's default betas are Stable Diffusion's: stock's config, at its own defaults, silently turns into those."""
    assert HeunDiscreteScheduler.from_config(DDPMScheduler().config).config.beta_end == 0.012
    for cls in ALL:
        theirs = HeunDiscreteScheduler.from_config(cls().config)
        assert (theirs.config.beta_start, theirs.config.beta_end) == (0.0001, 0.02)


def test_our_defaults_reach_other_classes():
    """Keys whose default differs from diffusers' would be dropped by `from_config` as "not set"."""
    ours = VPredictionScheduler()
    for cls in (*STOCK, ExtDDIMScheduler, DDIMInverseScheduler, ExtDDIMInverseScheduler):
        config = cls.from_config(ours.config).config
        assert config["prediction_type"] == "v_prediction"
        assert config["rescale_betas_zero_snr"] is True
        assert config["timestep_spacing"] == "trailing"


def test_v_prediction_takes_a_stable_diffusion_config():
    """2.1-v sets prediction_type alone; of the choices of sampling, what a config leaves at its default becomes ours."""
    stock = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=False,
        timestep_spacing="leading",
    )
    ours = VPredictionScheduler.from_config(stock.config)
    more = ("beta_reference_timesteps", "variance_type", "analytic_variance", "optimal_timesteps")
    assert visible(ours) == visible(stock) | dict.fromkeys(more) | {"multistep_order": 1}
    unset = VPredictionScheduler.from_config(DDIMScheduler(prediction_type="v_prediction").config)
    assert unset.config.timestep_spacing == "trailing"  # a choice of sampling
    assert unset.config.rescale_betas_zero_snr is False  # of the model


def test_stock_keys_and_defaults_are_all_there():
    for stock, ours in (
        (DDPMScheduler, ExtDDPMScheduler),
        (DDIMScheduler, ExtDDIMScheduler),
        (DDIMInverseScheduler, ExtDDIMInverseScheduler),
    ):
        assert visible(stock()).items() <= visible(ours()).items()


@pytest.mark.product
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "lin"}, "beta_schedule must be one of linear, scaled_linear, .*got 'lin'"),
        ({"timestep_spacing": "even"}, "timestep_spacing must be one of leading, trailing, linspace, quadratic, got"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer of at least 1, got 0"),
        ({"steps_offset": -1}, "steps_offset must be an integer of at least 0, got -1"),
        ({"clip_sample_range": 0}, "clip_sample_range must be above 0, got 0"),
        ({"dynamic_thresholding_ratio": 1.5}, r"dynamic_thresholding_ratio must be in \[0, 1\], got 1.5"),
        ({"sample_max_value": 0.5}, "sample_max_value must be at least 1, got 0.5"),
        (
            {"clip_sample_range": 1e308},
            r"clip_sample_range must be at most 3.4e\+38, the largest .* float32, got 1e\+308",
        ),
        (
            {"sample_max_value": 1e308},
            r"sample_max_value must be at most 3.4e\+38, the largest .* float32, got 1e\+308",
        ),
        ({"beta_end": 1.5}, r"beta_end must be in \[0, 1\], got 1.5"),
        ({"beta_start": float("nan")}, r"beta_start must be in \[0, 1\], got nan"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas must have shape \(1000,\).*got \(2,\)"),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, float("nan")]}, "betas must be finite and in .*got nan"),
        ({"num_train_timesteps": 2, "trained_betas": [0.1, 1.1]}, "betas must be finite and in .*got 1.1 at index 1"),
    ],
)
def test_bad_values_are_refused(cls, config, message):
    with pytest.raises(ValueError, match=message):
        cls(**config)


@pytest.mark.parametrize(
    "cls", [ExtDDPMScheduler, ExtDDIMScheduler, ExtDDIMInverseScheduler, ScoreSDEScheduler, AnnealedLangevinScheduler]
)
def test_unknown_prediction_type_is_refused(cls):
    names = "epsilon, sample, v_prediction, score, flow"
    with pytest.raises(ValueError, match=f"prediction_type must be one of {names}, got 'flow_prediction'"):
        cls(prediction_type="flow_prediction")


def test_unknown_variance_type_is_refused():
    with pytest.raises(ValueError, match="variance_type must be one of fixed_small, .*, learned_range, got 'fixed'"):
        ExtDDPMScheduler(variance_type="fixed")


def test_v_prediction_refuses_other_predictions():
    with pytest.raises(ValueError, match="must be 'v_prediction', got 'epsilon'; use ExtDDIMScheduler"):
        VPredictionScheduler(prediction_type="epsilon")


@pytest.mark.parametrize("cls", ALL)
def test_defaults_do_not_warn(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = cls()
        for n in (10, 50, 1000):
            scheduler.set_timesteps(n)


def test_a_density_without_noise_has_no_score():
    with pytest.raises(ValueError, match="the first beta must be above 0 for prediction_type 'score'"):
        ExtDDIMScheduler(prediction_type="score", beta_start=0.0)
    assert ExtDDIMScheduler(prediction_type="epsilon", beta_start=0.0).schedule.sigma[0] == 0
