"""`FlowScheduler` beside diffusers' class: equal where that is right, and right where it is not."""

import itertools

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusers_ext import ExtDDIMScheduler, FlowScheduler
from diffusers_ext.diffusion.noising import (
    PREDICTION_TYPES,
    NoiseLevel,
    add_noise,
    posterior,
    predict_eps,
    training_target,
)
from gaussian_oracle import VARIANCE, denoise, output_std_ratio


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


@pytest.mark.product
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


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"inverted"}))
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


@pytest.mark.product
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
    for i, index in enumerate((3, 0)):
        t, s = scheduler.sigmas[index : index + 2]
        torch.testing.assert_close(together[i], sample[i] + (s - t) * output[i])
    below = scheduler.sigmas[scheduler.sigmas < 0.7 - 1e-6].max()
    torch.testing.assert_close(together[2], sample[2] + (below - 0.7) * output[2])
    with pytest.raises(ValueError, match="one or one for each of the 4 samples"):
        scheduler.step(output, timesteps[:3], sample)


@pytest.mark.parametrize("wrong", [1000.5, -0.5, float("nan"), float("inf")])
def test_timesteps_outside_the_path_are_refused_in_tensors_too(wrong):
    """Those that the host can look at without waiting; NaN is in no range."""
    scheduler = FlowScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    output, x = draws(2, 3, 4, 4, count=2)
    tokens = torch.tensor([[500.0, wrong, 0.0]] * 2)
    for timestep in (wrong, torch.tensor(wrong), torch.tensor([wrong]), torch.tensor([500.0, wrong])):
        for use in (
            lambda t: scheduler.step(output, t, x),
            lambda t: scheduler.reverse_step(output, t, x),
            lambda t: scheduler.level(t, x),
            lambda t: scheduler.add_noise(x, output, t),
            lambda t: scheduler.scale_noise(x, t, output),
            lambda t: scheduler.previous_timestep(t),
        ):
            with pytest.raises(ValueError, match=rf"timestep must be in \[0, 1000\], got .*{wrong}"):
                use(timestep)
    with pytest.raises(ValueError, match=r"timestep must be in \[0, 1000\]"):
        scheduler.step(output[:, :, 0], 500.0, x[:, :, 0], per_token_timesteps=tokens)


def test_levels_are_found_within_transforms_of_torch():
    scheduler, x = FlowScheduler(), draws(2, 3, count=1)[0]
    timesteps = torch.tensor([250.0, 750.0])
    each = torch.func.vmap(lambda t: scheduler.level(t.reshape(1), x).sigma)(timesteps)
    assert each.flatten().tolist() == [0.25, 0.75]
    slope = torch.func.grad(lambda t: scheduler.add_noise(x, torch.ones_like(x), t).sum())(timesteps)
    torch.testing.assert_close(slope, (1 - x).sum(1) / 1000)


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


@pytest.mark.parametrize("name", ["timesteps", "sigmas"])
def test_lists_changed_in_place_are_followed(name):
    scheduler, replaced = FlowScheduler(shift=3.0), FlowScheduler(shift=3.0)
    output, x = draws(2, 3, 4, 4, count=2)
    for each in (scheduler, replaced):
        each.set_timesteps(4)
        each.step(output, each.timesteps[1], x)
    known = scheduler._current_transitions()
    assert scheduler._current_transitions() is known
    getattr(scheduler, name).mul_(0.9)
    setattr(replaced, name, getattr(replaced, name) * 0.9)
    for i in range(4):
        results = [each.step(output, each.timesteps[i], x).prev_sample for each in (scheduler, replaced)]
        assert torch.equal(*results)
    assert scheduler._current_transitions() is not known


def test_a_shift_is_read_by_the_name_that_was_set_last(tmp_path):
    """`shift` here and in the schedulers of flow matching, `flow_shift` in the solvers of other paths."""
    ours = FlowScheduler(shift=3.0)
    solver = diffusers.UniPCMultistepScheduler.from_config(ours.config, flow_shift=5.0)
    solver.save_pretrained(tmp_path)
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    unset = diffusers.UniPCMultistepScheduler.from_config(
        stock.config, use_flow_sigmas=True, prediction_type="flow_prediction"
    )
    for scheduler, shift in (
        (FlowScheduler.from_config(diffusers.UniPCMultistepScheduler.from_config(ours.config).config), 3.0),
        (FlowScheduler.from_config(solver.config), 5.0),
        (FlowScheduler.from_pretrained(tmp_path), 5.0),
        (FlowScheduler.from_config(unset.config), 3.0),
        (FlowScheduler.from_config(FlowMatchEulerDiscreteScheduler.from_config(ours.config, shift=4.0).config), 4.0),
        (FlowScheduler.from_config(ours.config, flow_shift=5.0), 5.0),
        (FlowScheduler.from_config(ours.config, shift=4.0), 4.0),
        (FlowScheduler.from_config(solver.config, shift=4.0), 4.0),
        (FlowScheduler.from_config(solver.config, flow_shift=2.0), 2.0),
        (FlowScheduler.from_config(stock.config, flow_shift=2.0), 2.0),
        (FlowScheduler.from_config(stock.config), 3.0),
        (FlowScheduler.from_config({"flow_shift": 2.0}), 2.0),
    ):
        assert scheduler.config.shift == scheduler.config.flow_shift == shift
    with pytest.raises(ValueError, match="one number by two names"):
        FlowScheduler.from_config(ours.config, shift=2.0, flow_shift=4.0)


def test_a_model_of_another_path_is_refused_by_its_kind():
    for config, kind in (
        (diffusers.DDIMScheduler().config, "a model of a Gaussian path given by betas"),
        (ExtDDIMScheduler().config, "a model of a Gaussian path given by betas"),
        ({"_class_name": "EDMEulerScheduler"}, "a model with EDM's preconditioning"),
    ):
        with pytest.raises(ValueError, match=f"FlowScheduler is for a flow-matching model.* is that of {kind}"):
            FlowScheduler.from_config(config)


# The exact law on Gaussian data, N(0, 0.25) in every coordinate.


def std_ratio(scheduler, **options) -> float:
    """std(x_0) of the sampler over that of the data, from exact outputs; by two steps of a unit each."""

    def step(x_t, timestep, noise):
        level = scheduler.level(timestep, x_t)
        x0 = denoise(x_t, level)
        output = training_target(x0, predict_eps(x0, x_t, level), level, scheduler.prediction_type)
        return scheduler.step(output, timestep, x_t, variance_noise=noise, return_dict=False, **options)[0]

    return output_std_ratio(step, scheduler.timesteps)


def test_the_standard_deviation_is_the_product_of_eulers_gains():
    """x_s = x_t (1 + (s - t) (t - 0.25 (1 - t)) / (0.25 (1 - t)^2 + t^2)), in numbers of Python."""
    scheduler = FlowScheduler(shift=2.0)
    scheduler.set_timesteps(12)
    gain, sigmas = 1.0, scheduler.sigmas.tolist()
    for t, s in itertools.pairwise(sigmas):
        gain *= 1 + (s - t) * (t - VARIANCE * (1 - t)) / (VARIANCE * (1 - t) ** 2 + t**2)
    assert std_ratio(scheduler) == pytest.approx(gain / VARIANCE**0.5, rel=1e-6)


@pytest.mark.parametrize("prediction_type", ["flow", "sample", "v_prediction"])
def test_the_flow_converges_with_first_order_to_the_law_of_the_data(prediction_type):
    scheduler = FlowScheduler(prediction_type=prediction_type, timestep_spacing="trailing")
    errors = []
    for num_steps in (20, 40, 80, 320):
        scheduler.set_timesteps(num_steps)
        errors.append(1 - std_ratio(scheduler))
    assert 1.9 < errors[0] / errors[1] < 2.1 and 3.8 < errors[2] / errors[3] < 4.1 and 0 < errors[3] < 5e-3


@pytest.mark.parametrize("prediction_type", ["epsilon", "score"])
def test_outputs_that_say_nothing_of_noise_start_below_it(prediction_type):
    scheduler = FlowScheduler(prediction_type=prediction_type, timestep_spacing="trailing")
    assert scheduler.timesteps[0] == 999
    scheduler.set_timesteps(200)
    assert scheduler.timesteps[0] == 999 and std_ratio(scheduler) == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match=f"must be below 1 for prediction_type '{prediction_type}'"):
        scheduler.set_timesteps(timesteps=[1000, 500])


@pytest.mark.parametrize("num_steps", [5, 50])
def test_the_posterior_has_its_own_law(num_steps):
    """Var x_s = (gain of x_t)^2 Var x_t + std^2 with the posterior's, which at eta = 1 has too little of x_0's variance."""
    scheduler = FlowScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    variance, sigmas = 1.0, scheduler.sigmas.tolist()
    for t, s in itertools.pairwise(sigmas):
        std = s * (1 - ((1 - t) * s / ((1 - s) * t)) ** 2) ** 0.5
        shrink = VARIANCE * (1 - t) / (VARIANCE * (1 - t) ** 2 + t**2)
        gain = (1 - s) * shrink + (s**2 - std**2) ** 0.5 * (1 - (1 - t) * shrink) / t
        variance = gain**2 * variance + std**2
    assert std_ratio(scheduler, eta=1.0) == pytest.approx((variance / VARIANCE) ** 0.5, rel=1e-6)
    error = 1 - (variance / VARIANCE) ** 0.5
    assert 0 < error < 3.5 / num_steps  # first order


def test_a_step_back_is_undone_by_the_step():
    for prediction_type in PREDICTION_TYPES:
        scheduler = FlowScheduler(prediction_type=prediction_type, shift=2.0)
        scheduler.set_timesteps(5)
        x_s, output = draws(2, 3, 4, 4, count=2)
        for t in scheduler.timesteps[[4, 1]] if prediction_type == "sample" else scheduler.timesteps:
            x_t = x_s
            for _ in range(60 if prediction_type == "sample" else 1):  # whose noise is what x_t says
                x_t = scheduler.reverse_step(output, t, x_s, model_input=x_t).prev_sample
            if prediction_type != "sample" or t != scheduler.timesteps[4]:
                torch.testing.assert_close(scheduler.step(output, t, x_t).prev_sample, x_s, rtol=1e-4, atol=1e-4)


# More of what upstream gets wrong.


def test_noise_is_added_at_the_level_of_the_timestep_in_full_precision():
    stock, ours = pair({"shift": 3.0})
    sample, noise = draws(2, 3, 4, 4, count=2)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(8)
    t = ours.timesteps[[5, 2]]
    expected = stock.scale_noise(sample, t, noise)
    torch.testing.assert_close(ours.scale_noise(sample, t, noise), expected)
    ours.set_begin_index(3)
    for result in (ours.scale_noise(sample, t, noise), ours.add_noise(sample, noise, t)):
        torch.testing.assert_close(result, expected)
    half = ours.add_noise(sample.bfloat16(), noise.bfloat16(), torch.tensor([1.0, 999.0]))
    sigma = torch.tensor([0.001, 0.999]).view(2, 1, 1, 1)
    wide = (1 - sigma) * sample.bfloat16() + sigma * noise.bfloat16()
    assert torch.equal(half, wide.bfloat16())
    torch.testing.assert_close(ours.add_noise(sample, noise, 250.0), 0.75 * sample + 0.25 * noise)
    with pytest.raises(ValueError, match="noise must be given"):
        ours.scale_noise(sample, t)


def test_a_step_in_half_precision_rounds_once():
    scheduler = FlowScheduler()
    scheduler.set_timesteps(4)
    sample, output = (x.bfloat16() for x in draws(2, 3, 4, 4, count=2))
    t, s = scheduler.sigmas[1:3]
    expected = (sample.float() + (s - t) * output.float()).bfloat16()
    assert torch.equal(scheduler.step(output, scheduler.timesteps[1], sample).prev_sample, expected)
    double = scheduler.step(output.double(), scheduler.timesteps[1], sample.double())
    assert double.prev_sample.dtype == torch.float64


@pytest.mark.parametrize("shape", [{}, {"stochastic_sampling": True}])
def test_timesteps_of_tokens_step_to_the_next_of_the_list(shape):
    stock, ours = pair(shape)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    sample, output, noise = draws(2, 3, 4, count=3)
    timesteps = torch.tensor([[1000.0, 500.25, 0.0], [250.75, 100.0, 1.0]])
    result = ours.step(
        -output, 1000.0, sample, per_token_timesteps=timesteps, **({"variance_noise": noise} if shape else {})
    )
    if not shape:
        expected = stock.step(-output, 1000.0, sample, per_token_timesteps=timesteps).prev_sample
        torch.testing.assert_close(result.prev_sample, expected)
    for i in range(2):
        for j in range(3):
            sigma = timesteps[i, j] / 1000
            below = ours.sigmas[ours.sigmas < sigma - 1e-6]
            s = below.max() if len(below) else torch.tensor(0.0)
            x0 = sample[i, j] - sigma * output[i, j]
            expected = (1 - s) * x0 + s * noise[i, j] if shape else sample[i, j] + (s - sigma) * output[i, j]
            torch.testing.assert_close(result.prev_sample[i, j], expected, rtol=1e-4, atol=1e-5)
    half = ours.step(output.bfloat16(), 1000.0, sample.bfloat16(), per_token_timesteps=timesteps).prev_sample
    assert half.dtype == torch.bfloat16


def test_an_inverted_list_has_inverted_levels_from_the_start():
    scheduler = FlowScheduler(invert_sigmas=True, stochastic_sampling=True)
    assert scheduler.timesteps[0] == 0 and scheduler.sigmas[-1] == 1
    scheduler.set_timesteps(4)
    x0, eps, noise = draws(2, 3, 4, 4, count=3)
    t, s = scheduler.sigmas[1:3]
    x_t = scheduler.add_noise(x0, eps, scheduler.timesteps[1])
    torch.testing.assert_close(x_t, t * x0 + (1 - t) * eps)
    output = scheduler.get_velocity(x0, eps)
    step = scheduler.step(output, scheduler.timesteps[1], x_t, variance_noise=noise)
    torch.testing.assert_close(step.pred_original_sample, x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(step.prev_sample, s * x0 + (1 - s) * noise, rtol=1e-4, atol=1e-5)
    assert scheduler.previous_timestep(scheduler.timesteps[-1]) == 1000


def test_lists_of_one_step_and_of_timesteps_alone():
    one = FlowScheduler(shift_terminal=0.1)
    one.set_timesteps(1)
    assert one.sigmas.tolist() == [1, 0]
    scheduler = FlowScheduler(shift=3.0)
    scheduler.set_timesteps(timesteps=[900, 300])
    assert scheduler.sigmas.tolist() == pytest.approx([0.9, 0.3, 0]) and scheduler.timesteps.tolist() == [900, 300]
    assert [scheduler.previous_timestep(t).item() for t in (900.0, 500.0, 300.0, 20.0)] == [300, 300, 0, 0]
    for options, message in (
        ({}, "num_inference_steps must be at least 1, or sigmas or timesteps must be given"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1"),
        ({"num_inference_steps": 3, "sigmas": [0.5]}, "they must agree"),
        ({"sigmas": [0.5, 0.9]}, "sigmas must go from noise to data"),
        ({"sigmas": [0.5, 0.0]}, "sigmas must go from noise to data"),
        ({"timesteps": [1200, 3]}, "sigmas must go from noise to data"),
    ):
        with pytest.raises(ValueError, match=message):
            scheduler.set_timesteps(**options)
    for options, message in (
        ({"prediction_type": "velocity"}, "prediction_type must be one of"),
        ({"timestep_spacing": "leading"}, "timestep_spacing must be one of linspace, trailing"),
        ({"shift": 0}, "shift must be above 0"),
        ({"shift": 2.0, "flow_shift": 3.0}, "one number by two names"),
        ({"use_flow_sigmas": False}, "use_flow_sigmas must be True"),
        ({"num_train_timesteps": 0}, "num_train_timesteps must be an integer of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowScheduler(**options)


def test_the_noise_of_a_sample_is_its_generators_alone():
    scheduler = FlowScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(3)
    output, sample = draws(2, 3, 4, 4, count=2)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    both = scheduler.step(output, scheduler.timesteps[0], sample, generator=generators()).prev_sample
    alone = scheduler.step(output[1:], scheduler.timesteps[0], sample[1:], generator=generators()[1]).prev_sample
    torch.testing.assert_close(both[1:], alone)
    last, states = generators()[0], generators()[0].get_state()
    scheduler.step(output, scheduler.timesteps[-1], sample, generator=last)
    assert torch.equal(last.get_state(), states)
