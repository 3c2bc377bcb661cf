"""Guidance at its edges: first and last steps, repeated timesteps, state between calls, dtypes, components left out."""

import warnings

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig

from diffusers_ext import (
    ClassifierGuidance,
    ComposedGuidance,
    ExtDDIMScheduler,
    GuidedDiffusionPipeline,
    NoisyClassifierModel,
    WeakModelGuidance,
)
from diffusers_ext.schedulers.levels import describe_path
from tiny import assert_same_output


def randomized(model, seed):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def unet(num_classes=3, seed=0):
    return randomized(
        diffusers.UNetModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, num_classes=num_classes), seed
    )


def classifier(scheduler):
    return randomized(NoisyClassifierModel(8, 1, 3, (8, 16), noise_schedule=describe_path(scheduler)), 2)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(scheduler=None, num_classes=3, seed=0, **components):
    scheduler = scheduler or ExtDDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    return quiet(GuidedDiffusionPipeline(unet(num_classes, seed), scheduler, **components))


def sample(pipe, labels=(1, 2), **kwargs):
    count = kwargs.get("batch_size", 1) if labels is None else len(labels)
    generator = [torch.Generator().manual_seed(seed) for seed in range(count)]
    settings = {"num_inference_steps": 4, "output_type": "latent", "generator": generator} | kwargs
    return pipe(labels if labels is None else list(labels), **settings).images


def sizes_of_calls(pipe, **kwargs):
    """Images that the denoiser saw, by call, for one image."""
    sizes = []
    hook = pipe.denoiser.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    sample(pipe, **{"labels": [1]} | kwargs)
    hook.remove()
    return sizes


# Steps.


@pytest.mark.parametrize("cls", [EulerDiscreteScheduler, HeunDiscreteScheduler])
def test_an_interval_of_noise_levels_holds_for_every_call_of_a_step(cls):
    """The answer is the scheduler's own sigmas, which are sigma / alpha; each step of Heun's but the last is two calls."""
    pipe = pipeline(cls(timestep_spacing="trailing"))
    low, high = 0.5, 10.0
    sizes = sizes_of_calls(pipe, guidance_scale=2.0, guidance_interval={"sigma": (low, high)})
    sigmas = pipe.scheduler.sigmas[: len(sizes)].tolist()
    assert len(sizes) == (4 if cls is EulerDiscreteScheduler else 7)
    assert sizes == [2 if low <= sigma <= high else 1 for sigma in sigmas]
    assert set(sizes) == {1, 2}


def test_a_share_of_the_steps_is_one_of_the_calls_in_order():
    pipe = pipeline(HeunDiscreteScheduler(timestep_spacing="trailing"))
    assert sizes_of_calls(pipe, guidance_scale=2.0, guidance_interval=(0.25, 0.75)) == [1, 2, 2, 2, 2, 1, 1]
    guider = ClassifierFreeGuidance(2.0, start=0.25, stop=0.75)
    assert sizes_of_calls(pipe, guider=guider) == [1, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("guider", [ClassifierFreeGuidance(3.0), AdaptiveProjectedGuidance(3.0, 0.5)])
def test_one_step_is_first_and_last(guider):
    pipe = pipeline()
    assert sizes_of_calls(pipe, guider=guider, num_inference_steps=1) == [2]
    assert sizes_of_calls(pipe, guider=guider, num_inference_steps=1, guidance_interval=(0, 1)) == [2]


@pytest.mark.parametrize("interval, steps", [({"sigma": (1.0, 1.01)}, 4), ((0.2, 0.8), 1)])
def test_an_interval_between_the_steps_is_warned_of(interval, steps):
    pipe = pipeline()
    with pytest.warns(UserWarning, match=f"guidance_interval holds none of the {steps} steps"):
        sizes = sizes_of_calls(pipe, guidance_scale=2.0, guidance_interval=interval, num_inference_steps=steps)
    assert sizes == [1] * steps
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(pipe, guidance_scale=2.0, guidance_interval=(0, 0))  # none is what it says


def test_where_there_is_no_signal_a_stock_scheduler_makes_our_image():
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "clip_sample": False}
    config |= {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    images = []
    for scheduler in (ExtDDIMScheduler.from_config(config), DDIMScheduler(**config)):
        pipe = pipeline(scheduler, classifier=classifier(scheduler))
        images.append(sample(pipe, classifier_scale=3.0))
        assert not torch.allclose(images[-1], sample(pipe), rtol=1e-2, atol=1e-2)
        guided = sizes_of_calls(pipe, guidance_scale=2.0, guidance_interval={"sigma": (2.0, float("inf"))})
        assert guided == [2, 2, 2, 1]
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "guider",
    [
        SkipLayerGuidance(3.0, 2.0, 0.25, 0.75, skip_layer_guidance_layers=[0]),
        SmoothedEnergyGuidance(3.0, 2.0, seg_guidance_layers=[0], seg_guidance_start=0.25, seg_guidance_stop=0.75),
    ],
)
def test_what_is_not_perturbed_is_predicted_in_one_call(guider):
    """Of 4 steps, perturbed in the one after a quarter of them, as diffusers counts."""
    pipe = pipeline()
    assert sizes_of_calls(pipe, guider=guider) == [2, 2, 2, 1, 2]
    assert sizes_of_calls(pipe, guider=guider, low_memory=True) == [1] * 9
    together, apart = (sample(pipe, guider=guider, low_memory=low) for low in (False, True))
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)


# State.


def test_a_guider_serves_two_pipelines_in_turns():
    """With a momentum, which must not go from one call to the next, let alone to another number of images."""
    shared = AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5)
    pipes = pipeline(), pipeline(HeunDiscreteScheduler(), seed=1)
    for labels in ([1, 2], [0, 1, 2]):
        for pipe in pipes:
            fresh = AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5)
            expected = sample(pipe, labels, guider=fresh)
            assert torch.equal(sample(pipe, labels, guider=shared), expected)
            without = sample(pipe, labels, guider=AdaptiveProjectedGuidance(3.0))
            assert not torch.allclose(without, expected, rtol=1e-3, atol=1e-3)


def test_a_call_that_fails_leaves_the_guider_as_it_was():
    scheduler = ExtDDIMScheduler(clip_sample=False)
    pipe, guider = pipeline(scheduler, classifier=classifier(scheduler)), ClassifierGuidance(2.0)
    expected = sample(pipe, guider=guider)

    def fail(module, args):
        raise RuntimeError("out of memory")

    hook = pipe.denoiser.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(pipe, guider=guider, guidance_interval=(0.5, 1))
    hook.remove()
    assert guider._enabled and guider._context is None
    assert torch.equal(sample(pipe, guider=guider), expected)


# Precision.


@pytest.mark.parametrize(
    "make",
    [
        lambda: ClassifierFreeGuidance(3.0, guidance_rescale=0.7),
        lambda: AdaptiveProjectedGuidance(3.0, 0.5),
        lambda: TangentialClassifierFreeGuidance(3.0),
        lambda: ClassifierFreeZeroStarGuidance(3.0),
        lambda: SkipLayerGuidance(3.0, 2.0, 0.0, 1.0, skip_layer_guidance_layers=[0]),
        lambda: WeakModelGuidance(3.0),
        lambda: ClassifierGuidance(3.0, guidance_scale=2.0),
    ],
)
def test_networks_in_half_precision_are_guided_in_float32(make):
    scheduler = ExtDDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    pipe = pipeline(scheduler, classifier=classifier(scheduler), weak_denoiser=unet(seed=1))
    expected = sample(pipe, guider=make())
    images = sample(pipe.to(torch.bfloat16), guider=make())
    assert images.dtype == torch.float32
    assert (images - expected).norm() < 0.05 * expected.norm()


def test_a_weaker_network_may_have_another_precision():
    pipe = pipeline(weak_denoiser=unet(seed=1))
    expected = sample(pipe, guider=WeakModelGuidance(3.0))
    pipe.weak_denoiser.to(torch.bfloat16)
    images = sample(pipe, guider=WeakModelGuidance(3.0))
    assert (images - expected).norm() < 0.05 * expected.norm()


# What is saved.


def test_guidance_can_be_put_in_or_left_out_while_loading(tmp_path):
    pipe = pipeline(weak_denoiser=unet(seed=1))
    plain = sample(pipe)
    weak, free = sample(pipe, guider=WeakModelGuidance(3.0)), sample(pipe, guidance_scale=3.0)
    pipe.register_modules(guider=WeakModelGuidance(3.0), classifier=classifier(pipe.scheduler))
    pipe.save_pretrained(tmp_path / "with")
    pipeline().save_pretrained(tmp_path / "without")

    def loaded(name, **components):
        return quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path / name, **components))

    assert_same_output(sample(loaded("with")), weak)
    bare = loaded("with", guider=None, weak_denoiser=None, classifier=None)
    assert bare.guider is bare.weak_denoiser is bare.classifier is None
    assert_same_output(sample(bare), plain)
    assert_same_output(sample(loaded("with", guider=ClassifierFreeGuidance(3.0))), free)
    with pytest.raises(ValueError, match="needs a weaker network: give the pipeline one as weak_denoiser="):
        sample(loaded("with", weak_denoiser=None))
    assert_same_output(sample(loaded("without")), plain)
    added = loaded("without", guider=WeakModelGuidance(3.0), weak_denoiser=unet(seed=1))
    assert_same_output(sample(added), weak)


def test_a_pipeline_of_this_class_is_made_from_another():
    stock = diffusers.DDIMPipeline(unet(num_classes=None), ExtDDIMScheduler(clip_sample=False))
    pipe = quiet(GuidedDiffusionPipeline.from_pipe(stock, denoiser=stock.unet))
    assert pipe.scheduler is stock.scheduler and pipe.guider is None
    again = GuidedDiffusionPipeline.from_pipe(pipe, guider=WeakModelGuidance(3.0), weak_denoiser=unet(None, seed=1))
    assert again.denoiser is pipe.denoiser
    plain, weak = (sample(each, None) for each in (pipe, quiet(again)))
    assert not torch.allclose(plain, weak, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "guider, labels",
    [
        (SkipLayerGuidance(2.0, 2.0, 0.0, 1.0, skip_layer_config=LayerSkipConfig([0], skip_ff=False)), [1, 2]),
        (ComposedGuidance(guidance_rescale=0.5), [{1: 2.0}, {0: 1.0, 2: 2.0}]),
    ],
)
def test_guiders_with_more_than_numbers_are_saved_too(tmp_path, guider, labels):
    pipe = pipeline(guider=guider)
    expected = sample(pipe, labels)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(diffusers.DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded.guider) is type(guider)
    assert_same_output(sample(loaded, labels), expected)


# What is refused.


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"guidance_scale": float("nan")}, "guidance_scale must be finite and at least 0, got nan"),
        (
            {"guidance_scale": float("inf"), "classifier_scale": 1.0},
            "guidance_scale must be finite and at least 0, got inf",
        ),
        ({"guider": ClassifierFreeGuidance(float("nan"))}, "must have a finite guidance_scale, got nan"),
        ({"guider": ClassifierFreeZeroStarGuidance(2.0, guidance_rescale=0.5)}, "zeros, has no standard deviation"),
        (
            {"guider": ClassifierFreeGuidance},
            "guider must be one of diffusers.guiders .*, made by its class, got <class",
        ),
        ({"guider": 3.0}, "guider must be one of diffusers.guiders .*, got 3.0"),
        (
            {"guider": ClassifierFreeGuidance(3.0), "guidance_scale": 1.0},
            "not be given together with a guider.*got 1.0",
        ),
        ({"guidance_scale": 2.0, "guidance_interval": 0.5}, r"must be two numbers in \[0, 1\].*, got 0.5 \(steps\)"),
        ({"guidance_scale": 2.0, "guidance_interval": (None, 0.5)}, r"two numbers in \[0, 1\].*, got \(None, 0.5\)"),
        (
            {"guidance_scale": 2.0, "guidance_interval": {"sigma": (1, 2, 3)}},
            r"two numbers of at least 0.*\(1, 2, 3\)",
        ),
    ],
)
def test_what_would_make_nan_or_nothing_is_refused(kwargs, message):
    scheduler = ExtDDIMScheduler()
    with pytest.raises(ValueError, match=message):
        sample(pipeline(scheduler, classifier=classifier(scheduler)), **kwargs)


def test_chance_that_no_generator_has_is_warned_of():
    guiders = [AutoGuidance(2.0, auto_guidance_layers=[0], dropout=dropout) for dropout in (0.5, 1.0)]
    with pytest.warns(UserWarning, match="AutoGuidance with a dropout below 1 draws from torch's global generator"):
        sample(pipeline(), guider=guiders[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample(pipeline(), guider=guiders[1])


def test_weights_of_labels_cannot_do_without_their_guider():
    guider = ComposedGuidance()
    guider.disable()
    with pytest.raises(ValueError, match="ComposedGuidance must be enabled"):
        sample(pipeline(), [{1: 2.0}], guider=guider)


def test_a_scale_is_not_ignored_for_the_guider_of_the_pipeline():
    pipe = pipeline(guider=ClassifierFreeGuidance(3.0))
    with pytest.raises(ValueError, match="guidance_scale must not be given together with a guider.*, got 1.0"):
        sample(pipe, guidance_scale=1.0)
    sample(pipe)
    assert pipe.guidance_scale == 1.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ClassifierGuidance(1.0, float("nan")), "guidance_scale must be finite and at least 0, got nan"),
        (lambda: ClassifierGuidance(1.0, guidance_rescale=1.5), r"guidance_rescale must be in \[0, 1\], got 1.5"),
        (lambda: WeakModelGuidance(float("inf")), "guidance_scale must be finite and at least 0, got inf"),
        (lambda: WeakModelGuidance(guidance_rescale=-0.1), r"guidance_rescale must be in \[0, 1\], got -0.1"),
        (lambda: ComposedGuidance(2.0), r"guidance_rescale must be in \[0, 1\], got 2.0"),
    ],
)
def test_guiders_of_ours_refuse_scales_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("labels", [[1], [[1, 2]]])
@pytest.mark.parametrize("guider", [None, WeakModelGuidance(2.0)])
def test_labels_that_nothing_looks_at_are_refused(labels, guider):
    """The classifier knows labels, the denoiser none."""
    scheduler = ExtDDIMScheduler()
    pipe = pipeline(scheduler, num_classes=None, classifier=classifier(scheduler), weak_denoiser=unet(None, seed=1))
    with pytest.raises(ValueError, match="class_labels would do nothing: the denoiser takes none.*classifier_scale"):
        sample(pipe, labels, guider=guider)
    with pytest.raises(ValueError, match="class_labels would do nothing: the denoiser takes none"):
        pipe.invert(torch.zeros(1, 1, 8, 8), labels)
    sample(pipe, None, guider=guider)
