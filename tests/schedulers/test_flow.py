"""`FlowScheduler` beside diffusers' class: equal where that is right, and right where it is not."""

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_ext import ExtDDIMScheduler, FlowScheduler
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, NoiseLevel, add_noise, posterior, training_target


CONFIGS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "shift": 0.5},
    "beta": {"use_beta_sigmas": True},
    "terminal": {"shift_terminal": 0.1, "use_dynamic_shifting": True},
    "inverted": {"invert_sigmas": True},
    "stochastic": {"stochastic_sampling": True},
}


def pair(config) -> tuple[FlowMatchEulerDiscreteScheduler, FlowScheduler]:
    stock = FlowMatchEulerDiscreteScheduler(**config)
    return stock, FlowScheduler.from_config(stock.config)


def draws(*shape, seed=0, count=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)).unbind()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("options", [{"num_inference_steps": 2}, {"num_inference_steps": 9}, {"sigmas": [0.9, 0.4]}])
def test_timesteps_sigmas_and_steps_are_upstreams(name, options):
    stock, ours = pair(CONFIGS[name])
    options = options | ({"mu": 0.8} if "dynamic" in str(CONFIGS[name]) else {})
    for scheduler in (stock, ours):
        scheduler.set_timesteps(**options)
    assert torch.equal(ours.timesteps, stock.timesteps) and torch.equal(ours.sigmas, stock.sigmas)
    x = y = draws(2, 3, 4, 4)[0]
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    for t, output in zip(stock.timesteps, draws(2, 3, 4, 4, count=len(stock.timesteps), seed=2), strict=True):
        x = stock.step(output, t, x, generator=generators[0]).prev_sample
        y = ours.step(output, t, y, generator=generators[1]).prev_sample
        assert ours.step_index == stock.step_index
    torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", set(CONFIGS) - {"inverted"})
def test_the_list_before_set_timesteps_is_upstreams(name):
    stock, ours = pair(CONFIGS[name])
    assert torch.equal(ours.timesteps, stock.timesteps) and torch.equal(ours.sigmas[:-1], stock.sigmas)


def test_with_sigmas_of_their_own_the_timesteps_are_labels_alone():
    stock, ours = pair({"shift": 2.0})
    for scheduler in (stock, ours):
        scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.2], timesteps=[1000.0, 600.0, 200.0])
    assert torch.equal(ours.timesteps, stock.timesteps) and torch.equal(ours.sigmas, stock.sigmas)
    sample, output = draws(1, 3, 4, 4, count=2)
    expected = stock.step(output, stock.timesteps[0], sample).prev_sample
    torch.testing.assert_close(ours.step(output, ours.timesteps[0], sample).prev_sample, expected)
    sigmas = [ours.level(t, sample).sigma.item() for t in (1000.0, 600.0, 400.0, 200.0, 100.0)]
    listed = ours.sigmas.tolist()
    expected = [listed[0], listed[1], (listed[1] + listed[2]) / 2, listed[2], listed[2] / 2]
    assert sigmas == pytest.approx(expected, rel=1e-6)


def test_ours_is_one_of_diffusers_class_and_is_saved_and_loaded(tmp_path):
    ours = FlowScheduler(shift=3.0, prediction_type="v_prediction", timestep_spacing="trailing")
    assert isinstance(ours, FlowMatchEulerDiscreteScheduler)
    ours.save_pretrained(tmp_path)
    for again in (FlowScheduler.from_pretrained(tmp_path), FlowScheduler.from_config(ours.config)):
        assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
            k: v for k, v in ours.config.items() if k[0] != "_"
        }
        assert again.prediction_type == "v_prediction"


# Where upstream is wrong.


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_step_is_the_posterior_of_the_linear_path_in_any_order(prediction_type, eta):
    scheduler = FlowScheduler(prediction_type=prediction_type)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.2])
    x0, eps, noise = draws(2, 3, 4, 4, count=3)
    x0, eps, noise = x0.double(), eps.double(), noise.double()
    for index in (2, 0, 1):
        t, s = (NoiseLevel(1 - sigma, sigma) for sigma in scheduler.sigmas.double()[index : index + 2])
        x_t = add_noise(x0, eps, t)
        output = training_target(x0, eps, t, prediction_type)
        step = scheduler.step(output, scheduler.timesteps[index], x_t, eta=eta, variance_noise=noise)
        torch.testing.assert_close(step.pred_original_sample, x0, rtol=1e-5, atol=1e-5)
        expected = posterior(x0, x_t, t, s, eta).sample(noise)
        torch.testing.assert_close(step.prev_sample, expected, rtol=1e-5, atol=1e-5)
        assert scheduler.step_index == index + 1


def test_each_sample_steps_from_its_own_timestep_to_the_next_of_the_list():
    scheduler = FlowScheduler(shift=2.0)
    scheduler.set_timesteps(5)
    output, sample = draws(4, 3, 4, 4, count=2)
    timesteps = torch.stack([*scheduler.timesteps[[3, 0]], torch.tensor(700.0), torch.tensor(1e-3)])
    together = scheduler.step(output, timesteps, sample).prev_sample
    for i, t in enumerate(timesteps):
        torch.testing.assert_close(together[i], scheduler.step(output, t, sample).prev_sample[i])
    below = scheduler.sigmas[scheduler.sigmas < 0.7 - 1e-6].max()
    torch.testing.assert_close(together[2], sample[2] + (below - 0.7) * output[2])
    with pytest.raises(ValueError, match="one or one for each of the 4 samples"):
        scheduler.step(output, timesteps[:3], sample)


def test_ddims_options_are_refused_where_they_mean_nothing():
    scheduler = FlowScheduler()
    x = torch.zeros(1, 3, 2, 2)
    for options, message in (
        ({"s_churn": 1.0}, "s_churn, s_tmin, s_tmax and s_noise must be left"),
        ({"eta": 1.5}, "eta must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.step(x, scheduler.timesteps[0], x, **options)
    with pytest.raises(ValueError, match="must be one of the scheduler's timesteps, as a float"):
        scheduler.step(x, 3, x)


@pytest.mark.parametrize(
    "source", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"]
)
def test_configs_of_solvers_with_flow_sigmas_are_read_and_written(source):
    cls = getattr(diffusers, source)
    theirs = cls(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    ours = FlowScheduler.from_config(theirs.config)
    assert (ours.config.shift, ours.prediction_type, ours.config.timestep_spacing) == (3.0, "flow", "linspace")
    back = cls.from_config(ours.config)
    keys = "use_flow_sigmas", "prediction_type", "flow_shift", "num_train_timesteps"
    assert all(back.config[key] == theirs.config[key] for key in keys)


def test_a_model_of_another_path_is_refused_by_its_kind():
    for config, kind in (
        (diffusers.DDIMScheduler().config, "a model of a Gaussian path given by betas"),
        (ExtDDIMScheduler().config, "a model of a Gaussian path given by betas"),
        ({"_class_name": "EDMEulerScheduler"}, "a model with EDM's preconditioning"),
    ):
        with pytest.raises(ValueError, match=f"FlowScheduler is for a flow-matching model.* is that of {kind}"):
            FlowScheduler.from_config(config)
