"""How a step is called: timesteps, noise, generators, dtypes, and the conventions of diffusers."""

import copy
import pickle

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_ext.diffusion.noising import add_noise
from diffusers_ext.diffusion.timesteps import TIMESTEP_SPACINGS
from diffusers_ext.schedulers import (
    ConsistencyScheduler,
    ExtDDIMInverseScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    ScoreSDEScheduler,
    VPredictionScheduler,
)


SAMPLERS = (ExtDDPMScheduler, ExtDDIMScheduler, VPredictionScheduler, ScoreSDEScheduler, ConsistencyScheduler)
WITHOUT_ETA = (ExtDDPMScheduler, ScoreSDEScheduler, ConsistencyScheduler)


def batch(size=2, dtype=torch.float32, shape=(3, 8, 8)):
    return torch.randn(2, size, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def generators(count):
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.product
@pytest.mark.parametrize("cls", [ExtDDPMScheduler, ExtDDIMScheduler, ScoreSDEScheduler])
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.filterwarnings("ignore:the first of")
def test_every_number_of_steps_walks_its_list(cls, spacing):
    """The exact noise and x_0 are found at each next timestep, and the last step ends at x_0 itself.

    For n up to 100, and each 7th from there: `tests/diffusion/test_timesteps.py` has the lists of all.
    """
    scheduler = cls(timestep_spacing=spacing, clip_sample=False)
    eps, x0 = batch(1, torch.float64, (1,))
    for n in (*range(1, 101), *range(104, 1000, 7), 1000):
        scheduler.set_timesteps(n)
        listed = scheduler.timesteps
        expected_next = torch.cat([listed[1:], torch.tensor([-1])])
        assert torch.equal(scheduler.previous_timestep(listed), expected_next)
        x0s, noises = x0.expand(n, 1), eps.expand(n, 1)
        x_t = add_noise(x0s, noises, scheduler.schedule.level(listed, x0s))
        if cls is ExtDDIMScheduler:
            x_s = scheduler.step(noises, listed, x_t).prev_sample
            torch.testing.assert_close(x_s, add_noise(x0s, noises, scheduler.schedule.level(expected_next, x0s)))
        generator = torch.Generator().manual_seed(0)
        state = generator.get_state()
        final = scheduler.step(noises[-1:], listed[-1], x_t[-1:], generator=generator).prev_sample
        torch.testing.assert_close(final, x0)
        assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("cls", SAMPLERS)
def test_a_timestep_between_the_listed_ones_steps_to_the_next_lower(cls):
    scheduler = cls(timestep_spacing="leading", clip_sample=False)
    scheduler.set_timesteps(10)
    assert scheduler.previous_timestep(950) == 900
    assert scheduler.previous_timestep(901) == 900
    assert scheduler.previous_timestep(900) == 800
    assert scheduler.previous_timestep(1) == 0
    assert scheduler.previous_timestep(0) == -1
    noise, x0 = batch(dtype=torch.float64)
    v = scheduler.config.prediction_type == "v_prediction"
    output = scheduler.get_velocity(x0, noise, 950) if v else noise
    kwargs = {"variance_noise": torch.zeros_like(noise)} if cls in WITHOUT_ETA else {}
    prev_sample = scheduler.step(output, 950, scheduler.add_noise(x0, noise, 950), **kwargs).prev_sample
    scheduler.set_timesteps(timesteps=[950, 900, 100])
    expected = scheduler.step(output, 950, scheduler.add_noise(x0, noise, 950), **kwargs).prev_sample
    assert torch.equal(prev_sample, expected)


@pytest.mark.product
@pytest.mark.parametrize("cls", [*SAMPLERS, ExtDDIMInverseScheduler])
@pytest.mark.parametrize("timestep", [1000, -1, 1500])
def test_timesteps_outside_the_path_are_refused(cls, timestep):
    output, sample = batch()
    scheduler = cls()
    scheduler.set_timesteps(10)
    for value in (timestep, torch.tensor(timestep), torch.tensor([timestep, 5])):
        with pytest.raises(ValueError, match=rf"timestep must be in \[0, 999\], got \[?{timestep}"):
            scheduler.step(output, value, sample)
    with pytest.raises(ValueError, match="timestep must be an integer, got 10.5"):
        scheduler.step(output, 10.5, sample)
    with pytest.raises(ValueError, match="one or one for each of the 2 samples, got shape"):
        scheduler.step(output, torch.tensor([1, 2, 3]), sample)


@pytest.mark.product
@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 5), (1, 7), (31,)])
def test_an_image_is_the_same_alone_and_in_a_batch(cls, shape):
    """Bit for bit, over a whole loop, each image with a generator of its own."""
    scheduler = cls()
    scheduler.set_timesteps(7)
    kwargs = {} if cls in WITHOUT_ETA else {"eta": 0.7}
    start = batch(8, shape=shape)[0]

    def sample(x, generator):
        for t in scheduler.timesteps:
            x = scheduler.step(x.sin(), t, x, generator=generator, **kwargs).prev_sample
        return x

    together = sample(start, generators(8))
    for i in range(8):
        assert torch.equal(sample(start[i : i + 1], [generators(8)[i]]), together[i : i + 1])
        assert torch.equal(sample(start[i : i + 1], generators(8)[i]), together[i : i + 1])


@pytest.mark.parametrize("cls", SAMPLERS)
def test_samples_at_their_own_timesteps_are_the_same_alone(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    kwargs = {} if cls in WITHOUT_ETA else {"eta": 1.0}
    output, sample = batch(4, shape=(3, 5, 5))
    timesteps = torch.tensor([999, 500, 0, 37])
    together = scheduler.step(output, timesteps, sample, generator=generators(4), **kwargs)
    for i in range(4):
        one = slice(i, i + 1)
        alone = scheduler.step(output[one], timesteps[one], sample[one], generator=[generators(4)[i]], **kwargs)
        assert torch.equal(alone.prev_sample, together.prev_sample[one])
        known = scheduler.step(output[one], int(timesteps[i]), sample[one], generator=[generators(4)[i]], **kwargs)
        torch.testing.assert_close(known.prev_sample, together.prev_sample[one], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned", "learned_range"])
def test_a_sample_at_its_last_step_gets_no_noise_while_others_do(variance_type):
    scheduler = ExtDDPMScheduler(variance_type=variance_type, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    output, sample = batch(2, shape=(6 if "learned" in variance_type else 3, 5, 5))
    a, b = (
        scheduler.step(output, torch.tensor([999, 99]), sample[:, :3], generator=torch.Generator().manual_seed(seed))
        for seed in (0, 1)
    )
    assert torch.equal(a.prev_sample[1], b.prev_sample[1])
    assert not torch.equal(a.prev_sample[0], b.prev_sample[0])


@pytest.mark.parametrize("cls", SAMPLERS)
def test_bad_noise_sources_are_refused(cls):
    scheduler = cls()
    scheduler.set_timesteps(10)
    output, sample = batch()
    kwargs = {} if cls in WITHOUT_ETA else {"eta": 1.0}
    with pytest.raises(ValueError, match="one or one for each of 2 samples, got 3"):
        scheduler.step(output, 500, sample, generator=generators(3), **kwargs)
    with pytest.raises(ValueError, match="pass one of generator and variance_noise, got both"):
        scheduler.step(output, 500, sample, generator=generators(1)[0], variance_noise=output, **kwargs)
    with pytest.raises(ValueError, match=r"variance_noise must have shape \(2, 3, 8, 8\), got \(1, 3, 8, 8\)"):
        scheduler.step(output, 500, sample, variance_noise=output[:1], **kwargs)


@pytest.mark.product
@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize("channels", [1, 4, 9])
def test_output_of_the_wrong_channels_is_refused(cls, channels):
    sample = batch()[0]
    output = torch.zeros(2, channels, 8, 8)
    with pytest.raises(ValueError, match=r"model_output must have shape \(2, 3, 8, 8\).*got \(2, "):
        cls().step(output, 500, sample)


def test_ddpm_takes_a_variance_exactly_when_it_is_learned():
    sample, double = batch()[0], torch.zeros(2, 6, 8, 8)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) for variance_type 'fixed_small', got \(2, 6, 8, 8\)"):
        ExtDDPMScheduler().step(double, 500, sample)
    with pytest.raises(ValueError, match=r"\(2, 6, 8, 8\) for variance_type 'learned_range', got \(2, 3, 8, 8\)"):
        ExtDDPMScheduler(variance_type="learned_range").step(sample, 500, sample)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_out_of_range_is_refused(eta):
    output, sample = batch()
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got"):
        ExtDDIMScheduler().step(output, 500, sample, eta)


@pytest.mark.product
@pytest.mark.parametrize("cls", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_half_precision_rounds_once(cls, dtype):
    """A step in half precision is the float32 step, rounded."""
    output, sample = batch(dtype=dtype)
    noise = batch()[0].to(dtype)
    scheduler = cls()
    scheduler.set_timesteps(10)
    kwargs = {"variance_noise": noise} | ({} if cls in WITHOUT_ETA else {"eta": 1.0})
    result = scheduler.step(output, 500, sample, **kwargs)
    wide = torch.float32 if dtype != torch.float64 else dtype
    kwargs["variance_noise"] = noise.to(wide)
    exact = scheduler.step(output.to(wide), 500, sample.to(wide), **kwargs)
    for name in ("prev_sample", "pred_original_sample"):
        assert result[name].dtype == dtype
        assert torch.equal(result[name], exact[name].to(dtype))


@pytest.mark.parametrize("cls", [*SAMPLERS, ExtDDIMInverseScheduler])
def test_arguments_are_left_alone(cls):
    output, sample = batch()
    for config in ({}, {"clip_sample": False}):
        scheduler = cls(**config)
        scheduler.set_timesteps(10)
        before = output.clone(), sample.clone()
        kwargs = {} if cls is ExtDDIMInverseScheduler else {"variance_noise": before[0]}
        scheduler.step(output, 500, sample, **kwargs)
        scheduler.add_noise(sample, output, torch.tensor([1, 2]))
        assert torch.equal(output, before[0]) and torch.equal(sample, before[1])


def test_x0_prediction_is_returned_without_being_clipped_in_place():
    output, sample = batch()
    scheduler = ExtDDIMScheduler(prediction_type="sample", clip_sample_range=0.1)
    before = output.clone()
    result = scheduler.step(output, 500, sample)
    assert torch.equal(output, before) and result.pred_original_sample.abs().max() <= 0.1


# Conventions of diffusers.


@pytest.mark.parametrize("cls", [*SAMPLERS, ExtDDIMInverseScheduler])
def test_conventions(cls):
    scheduler = cls()
    sampler = cls is not ExtDDIMInverseScheduler
    full = torch.arange(1000)
    assert torch.equal(scheduler.timesteps, full.flip(0) if sampler else full)
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.num_inference_steps is None
    assert len(scheduler) == 1000 and scheduler.order == 1 and scheduler.init_noise_sigma == 1.0
    assert isinstance(scheduler.betas, torch.Tensor) and scheduler.betas.dtype == torch.float32
    assert scheduler.alphas_cumprod.shape == scheduler.alphas.shape == (1000,)
    assert any(stock.__module__.startswith("diffusers.") for stock in scheduler.compatibles)
    x = batch()[0]
    assert scheduler.scale_model_input(x, 3) is x
    output, sample = batch()
    assert scheduler.step(output, 1, sample).prev_sample.shape == sample.shape  # before set_timesteps
    prev_sample, x0 = scheduler.step(output, 1, sample, return_dict=False)
    assert prev_sample.shape == x0.shape
    assert isinstance(scheduler.previous_timestep(5), torch.Tensor) and scheduler.previous_timestep(5).item() == 4
    scheduler.set_timesteps(10, device="cpu")
    assert scheduler.num_inference_steps == 10
    assert scheduler.previous_timestep(scheduler.timesteps.min()).item() == -1


def test_subclasses():
    assert issubclass(ExtDDPMScheduler, DDPMScheduler) and issubclass(ExtDDIMScheduler, DDIMScheduler)
    assert issubclass(VPredictionScheduler, ExtDDIMScheduler)


def test_variances_are_those_that_diffusers_tests():
    """The figures of diffusers' own tests of `_get_variance`."""
    ddpm, ddim = ExtDDPMScheduler(), ExtDDIMScheduler()
    for t, expected in ((0, 0.0), (487, 0.00979), (999, 0.02)):
        assert ddpm._get_variance(t).item() == pytest.approx(expected, abs=1e-5)
    for t, s, expected in ((0, 0, 0), (420, 400, 0.14771), (980, 960, 0.32460), (487, 486, 0.00979), (999, 998, 0.02)):
        assert ddim._get_variance(t, s).item() == pytest.approx(expected, abs=1e-5)
    assert ddim._get_variance(torch.tensor(20), torch.tensor(-30)).item() == 0
    assert ddpm.schedule.sigma[0] == pytest.approx(0.01)


@pytest.mark.parametrize("variance_type", ["fixed_small_log", "fixed_large", "fixed_large_log"])
def test_variance_types_are_variances(variance_type):
    beta = ExtDDPMScheduler().betas[500].item()
    variance = ExtDDPMScheduler(variance_type=variance_type)._get_variance(500).item()
    assert variance == pytest.approx(beta, rel=1e-4 if "large" in variance_type else 1e-2)
    assert ExtDDPMScheduler()._get_variance(500, variance_type=variance_type).item() == variance


def test_learned_variances_are_variances():
    scheduler, log_var = ExtDDPMScheduler(variance_type="learned"), torch.full((1, 3), -4.0)
    torch.testing.assert_close(scheduler._get_variance(500, log_var), log_var.exp())
    bounds = [scheduler._get_variance(500, variance_type=name) for name in ("fixed_small", "fixed_large")]
    for output, bound in zip((-1.0, 1.0), bounds, strict=True):
        variance = scheduler._get_variance(500, torch.full((1, 3), output), variance_type="learned_range")
        torch.testing.assert_close(variance, bound.expand(1, 3))
    with pytest.raises(ValueError, match="predicted_variance must be given for variance_type 'learned'"):
        scheduler._get_variance(500)


def test_custom_timesteps():
    scheduler = ExtDDIMScheduler()
    scheduler.set_timesteps(timesteps=[999, 600, 10])
    assert scheduler.timesteps.tolist() == [999, 600, 10] and scheduler.num_inference_steps == 3
    assert scheduler.previous_timestep(600) == 10
    scheduler.set_timesteps(timesteps=torch.tensor([500, 3]))
    assert scheduler.timesteps.tolist() == [500, 3]
    scheduler.set_timesteps(5)
    assert not scheduler.custom_timesteps


@pytest.mark.product
@pytest.mark.parametrize("cls", [*SAMPLERS, ExtDDIMInverseScheduler])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_inference_steps": 1001}, r"num_inference_steps must be an integer in \[1, 1000\].*got 1001"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"timesteps": [5, 7]}, "timesteps must be in descending order, got 5 before 7"),
        ({"timesteps": [1000, 7]}, r"timesteps must be in \[0, 999\], got 1000"),
        ({"timesteps": [5], "num_inference_steps": 1}, "pass one of num_inference_steps and timesteps"),
        ({}, "pass one of num_inference_steps and timesteps"),
    ],
)
def test_bad_timesteps_are_refused(cls, kwargs, message):
    scheduler = cls()
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(**kwargs)
    assert len(scheduler.timesteps) == 1000


@pytest.mark.parametrize("cls", [*SAMPLERS, ExtDDIMInverseScheduler])
def test_whole_floats_are_timesteps_for_each_sample(cls):
    """Some pipelines of diffusers make such; others are refused, and none is rounded."""
    scheduler = cls()
    scheduler.set_timesteps(10)
    output, sample = batch()
    draws = {} if cls is ExtDDIMInverseScheduler else {"variance_noise": torch.zeros_like(sample)}
    each = torch.tensor([700, 30])
    expected = scheduler.step(output, each, sample, **draws).prev_sample
    for dtype in (torch.float32, torch.float64, torch.float16):
        assert torch.equal(scheduler.step(output, each.to(dtype), sample, **draws).prev_sample, expected)
        following = scheduler.previous_timestep(each.to(dtype))
        assert following.dtype == torch.int64 and torch.equal(following, scheduler.previous_timestep(each))
    for wrong in ([700.5, 30.0], [float("nan"), 30.0], [float("inf"), 30.0]):
        for use in (lambda t: scheduler.step(output, t, sample), scheduler.previous_timestep):
            with pytest.raises(ValueError, match="timestep must be an integer, got "):
                use(torch.tensor(wrong))
            with pytest.raises(ValueError, match="timestep must be an integer, got "):
                use(wrong[0])
    for wrong in ([9000], [-1, 3], [9000.0, 3.0]):
        with pytest.raises(ValueError, match=r"timestep must be in \[0, 999\], got \[(9000|-1)"):
            scheduler.previous_timestep(torch.tensor(wrong))
    with pytest.raises(ValueError, match="timestep must be an integer, got a tensor of torch.float32"):
        scheduler.step(output.to("meta"), each.to("meta", torch.float32), sample.to("meta"))


@pytest.mark.parametrize("cls", [*SAMPLERS, ExtDDIMInverseScheduler])
def test_noise_is_added_at_the_timesteps_of_the_path_alone(cls):
    """The clean end, -1, has a level, and no network is trained there: who asks for it means another timestep."""
    scheduler, (sample, noise) = cls(), batch()
    for use in (scheduler.add_noise, scheduler.get_velocity):
        for timesteps in (-1, torch.tensor(-1), torch.tensor([5, -1])):
            with pytest.raises(ValueError, match=r"timesteps must be in \[0, 999\], got -1"):
                use(sample, noise, timesteps)
        with pytest.raises(ValueError, match=r"timesteps must be in .*999\], got"):
            use(sample, noise, torch.tensor([5, 1000]))
    assert scheduler.level(-1, sample).sigma.item() == 0


def test_timesteps_replaced_from_outside_are_followed():
    """Image-to-image pipelines cut the list, some by assignment."""
    scheduler = ExtDDIMScheduler()
    scheduler.set_timesteps(10)
    scheduler.timesteps = torch.tensor([700, 30])
    assert scheduler.previous_timestep(700) == 30
    output, sample = batch()
    cut = scheduler.step(output, 700, sample).prev_sample
    scheduler.set_timesteps(timesteps=[700, 30])
    assert torch.equal(cut, scheduler.step(output, 700, sample).prev_sample)


def test_timesteps_changed_in_place_are_followed():
    scheduler, expected, (output, sample) = ExtDDIMScheduler(), ExtDDIMScheduler(), batch()
    scheduler.set_timesteps(10)
    scheduler.step(output, 400, sample)
    known = scheduler._current_transitions()
    assert scheduler._current_transitions() is known
    scheduler.timesteps += 50
    expected.set_timesteps(timesteps=scheduler.timesteps)
    assert scheduler.previous_timestep(450) == 350
    for timestep in (450, scheduler.timesteps[3], torch.tensor([450, 50])):
        results = [each.step(output, timestep, sample).prev_sample for each in (scheduler, expected)]
        assert torch.equal(*results)
    with torch.inference_mode():  # whose tensors count no changes
        scheduler.set_timesteps(10)
        assert scheduler.previous_timestep(400) == 300
        scheduler.step(output, scheduler.timesteps[0], sample)


def test_a_config_replaced_from_outside_is_followed():
    """`StableDiffusionPipeline` switches clipping off behind the scheduler's back."""
    scheduler = ExtDDIMScheduler()
    scheduler.set_timesteps(10)
    output, sample = batch()
    scheduler.step(output, 500, sample)
    scheduler.register_to_config(clip_sample=False)
    expected = ExtDDIMScheduler(clip_sample=False)
    expected.set_timesteps(10)
    for name in ("prev_sample", "pred_original_sample"):
        a, b = (s.step(output, 500, sample)[name] for s in (scheduler, expected))
        assert torch.equal(a, b)


def test_steps_at_other_values_of_eta_leave_a_scheduler_as_it_was():
    output, sample = batch()
    scheduler = ExtDDIMScheduler()
    scheduler.set_timesteps(5)
    noise = torch.zeros_like(sample)
    for eta in torch.linspace(0, 1, 30).tolist():
        scheduler.step(output, 500, sample, eta, variance_noise=noise)
    fresh = ExtDDIMScheduler()
    fresh.set_timesteps(5)
    assert torch.equal(scheduler.step(output, 500, sample).prev_sample, fresh.step(output, 500, sample).prev_sample)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_step_the_same(duplicate):
    scheduler = ExtDDIMScheduler()
    scheduler.set_timesteps(10)
    output, sample = batch()
    expected = scheduler.step(output, 500, sample).prev_sample
    assert torch.equal(duplicate(scheduler).step(output, 500, sample).prev_sample, expected)
