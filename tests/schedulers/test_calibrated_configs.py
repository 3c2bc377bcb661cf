"""What is chosen for a model travels in the scheduler's config: through disk, and through classes that know nothing of it."""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import diffusers_ext
from diffusers_ext.schedulers import (
    ExtDDIMInverseScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    FlowScheduler,
    VPredictionScheduler,
)


TABLE = {"timesteps": [0, 100, 999], "x0_variance": [1e-4, 0.01, 0.25]}
LISTS = {"spacing": "trailing", "trajectory": {"3": [990, 500, 20]}, "bound": {"3": [999, 100, 3]}}
CONFIG = {
    "variance_type": "analytic",
    "analytic_variance": TABLE,
    "timestep_spacing": "optimal",
    "optimal_timesteps": LISTS,
}
ALL = (ExtDDPMScheduler, ExtDDIMScheduler, VPredictionScheduler, ExtDDIMInverseScheduler)
STOCK = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler)


def listed(scheduler, number=3):
    scheduler.set_timesteps(number)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("cls", ALL)
def test_chosen_timesteps_are_visited(cls):
    expected = LISTS["trajectory"]["3"]
    assert cls(**CONFIG).list_timesteps(3, "bound").tolist() == LISTS["bound"]["3"]
    assert listed(cls(**CONFIG)) == (expected[::-1] if cls is ExtDDIMInverseScheduler else expected)


@pytest.mark.parametrize("cls", ALL)
def test_config_survives_the_disk(cls, tmp_path):
    made = cls(**CONFIG)
    made.save_pretrained(tmp_path)
    text = (tmp_path / "scheduler_config.json").read_text()
    assert json.loads(text)["timestep_spacing"] == "trailing"  # which every class of diffusers knows
    back = cls.from_pretrained(tmp_path)
    assert listed(back) == listed(made) and back.config.analytic_variance == TABLE


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_what_was_measured_may_be_arrays_and_is_saved_as_lists(array, tmp_path):
    betas = [0.01] * 1000
    config = CONFIG | {
        "analytic_variance": {key: array(values) for key, values in TABLE.items()} | {"last_noise": np.float32(0.5)},
        "optimal_timesteps": LISTS | {"trajectory": {np.int64(3): array(LISTS["trajectory"]["3"])}},
        "trained_betas": array(betas),
    }
    for cls in ALL:
        made = cls(**config)
        made.save_pretrained(tmp_path / cls.__name__)
        back = cls.from_pretrained(tmp_path / cls.__name__)
        assert listed(back) == listed(made) and torch.equal(back.schedule.alpha, made.schedule.alpha)
        assert back.config.analytic_variance == made.config.analytic_variance
        for key, value in (TABLE | {"last_noise": 0.5}).items():
            assert back.config.analytic_variance[key] == pytest.approx(value)
        assert made.config.trained_betas == back.config.trained_betas == pytest.approx(betas)
    lists = {"spacing": "trailing", "trajectory": {3: array([1000, 500, 1])}}
    flow = FlowScheduler(timestep_spacing="optimal", optimal_timesteps=lists)
    flow.save_pretrained(tmp_path)
    assert listed(FlowScheduler.from_pretrained(tmp_path)) == listed(flow) == [1000, 500, 1]


@pytest.mark.product
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("stock", STOCK)
def test_classes_of_diffusers_fall_back_and_keep_what_was_chosen(cls, stock):
    ours = cls(**CONFIG)
    theirs = stock.from_config(ours.config)
    plain = stock.from_config(cls(timestep_spacing="trailing").config)
    assert listed(theirs) == listed(plain)
    x, output = (torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(2))
    t = theirs.timesteps[0]
    steps = [
        each.step(output, t, each.scale_model_input(x, t), generator=torch.Generator().manual_seed(2)).prev_sample
        if stock in (DDPMScheduler, DDIMScheduler)
        else each.step(output, t, each.scale_model_input(x, t)).prev_sample
        for each in (theirs, plain)
    ]
    torch.testing.assert_close(*steps)  # DDPM takes a type that it does not know for "fixed_small"
    back = cls.from_config(theirs.config)
    assert listed(back) == listed(ours) and back.config.variance_type == "analytic"


def test_the_linear_path_has_chosen_timesteps_too(tmp_path):
    lists = {"spacing": "trailing", "trajectory": {"3": [1000, 500, 1]}}
    ours = FlowScheduler(shift=3.0, timestep_spacing="optimal", optimal_timesteps=lists)
    assert listed(ours) == [1000, 500, 1] and ours.sigmas.tolist() == pytest.approx([1, 0.5, 1e-3, 0])
    assert listed(ours, 1000) == list(range(1000, 0, -1))  # as many as there are
    ours.save_pretrained(tmp_path)
    assert listed(FlowScheduler.from_pretrained(tmp_path)) == listed(ours)
    stock = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    assert listed(stock) == listed(FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert listed(FlowScheduler.from_config(stock.config)) == listed(ours)
    plain = FlowScheduler(shift=3.0, timestep_spacing="linspace", optimal_timesteps=lists)
    assert listed(plain) == listed(FlowScheduler(shift=3.0))
    with pytest.raises(ValueError, match=r"timesteps must be in \[1, 1000\], got 0"):
        FlowScheduler(optimal_timesteps=lists | {"trajectory": {"2": [1000, 0]}})
    with pytest.raises(ValueError, match="invert_sigmas goes from 0 to T"):
        FlowScheduler(timestep_spacing="trailing", optimal_timesteps=lists, invert_sigmas=True)


def test_another_spacing_or_none_of_the_lists_leaves_them():
    ours = ExtDDIMScheduler(**CONFIG)
    plain = ExtDDIMScheduler(timestep_spacing="trailing")
    assert listed(ExtDDIMScheduler.from_config(ours.config, optimal_timesteps=None)) == listed(plain)
    linspace = ExtDDIMScheduler(timestep_spacing="linspace")
    assert listed(ExtDDIMScheduler.from_config(ours.config, timestep_spacing="linspace")) == listed(linspace)
    assert listed(ExtDDPMScheduler.from_config(ours.config)) == LISTS["trajectory"]["3"]


@pytest.mark.parametrize("cls", ALL)
def test_choices_without_what_was_chosen_are_refused(cls):
    with pytest.raises(
        ValueError, match="timestep_spacing 'optimal' needs optimal_timesteps, which training/calibrate.py"
    ):
        cls(timestep_spacing="optimal")
    with pytest.raises(
        ValueError, match="variance_type 'analytic' needs analytic_variance, which training/calibrate.py"
    ):
        cls(variance_type="analytic")
    with pytest.raises(ValueError, match=r"the timesteps of analytic_variance must be integers in \[0, 99\]"):
        cls(num_train_timesteps=100, analytic_variance=TABLE, beta_reference_timesteps=1000)
    with pytest.raises(ValueError, match=r"timesteps must be in \[0, 99\], got 9"):
        cls(num_train_timesteps=100, optimal_timesteps=LISTS, beta_reference_timesteps=1000)


@pytest.mark.parametrize(
    "name", ["ScoreSDEScheduler", "AnnealedLangevinScheduler", "ConsistencyScheduler", "ExtDDIMInverseScheduler"]
)
def test_schedulers_without_such_a_variance_step_by_a_calibrated_config(name):
    """They make the steps that they make of the config without what was measured."""
    table = {"timesteps": [0, 500, 999], "x0_variance": [1e-4, 0.05, 0.3]}
    config = ExtDDIMScheduler(prediction_type="v_prediction", clip_sample=False).config
    calibrated = ExtDDIMScheduler.from_config(config, variance_type="analytic", analytic_variance=table).config
    x_t, results = torch.linspace(-1, 1, 16).view(1, 1, 4, 4), []
    for each in (config, calibrated):
        scheduler = getattr(diffusers_ext, name).from_config(each)
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(0)
        more = {} if name == "ExtDDIMInverseScheduler" else {"generator": generator}
        results.append(scheduler.step(0.5 * x_t, scheduler.timesteps[0], x_t, **more).prev_sample)
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
