"""Guidance away from a middle layer's output, beside both outputs of the network added up by hand."""

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig

from diffusers_ext import (
    DiTModel,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    GuidedDiffusionPipeline,
    InternalGuidance,
    WeakModelGuidance,
)
from diffusers_ext.guidance.guided_denoiser import GuidedDenoiser
from tiny import assert_same_output, tiny_unet


LABELS = torch.tensor([0, 2])
T = torch.tensor(600)


def network(seed=0, **options):
    size = {"sample_size": 8, "in_channels": 1, "hidden_size": 16, "num_layers": 3, "num_attention_heads": 2}
    model = DiTModel(**size | {"num_classes": 3, "internal_guidance_layer": 2} | options)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def pipeline(denoiser=None, **components):
    scheduler = ExtDDIMScheduler(timestep_spacing="trailing")
    pipe = GuidedDiffusionPipeline(denoiser or network(), scheduler, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **call):
    call = {"class_labels": LABELS.tolist(), "num_inference_steps": 4} | call
    return pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **call).images


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def guided(model, guider, x, channels=1, step=0, num_steps=4, **options):
    conditions = {"class_labels": (LABELS, torch.tensor([3, 3]))}
    denoiser = GuidedDenoiser(model, ExtDDPMScheduler(), guider, conditions, channels, **options)
    with torch.no_grad():
        return denoiser(x, T, step, num_steps)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.0])
def test_each_prediction_is_led_away_from_the_middle_layers(guidance_scale, low_memory):
    """And then the conditional one from the unconditional one; a learned variance stays the conditional prediction's."""
    model, x, w = network(out_channels=2), draw(2, 1, 8, 8), 1.7
    calls = []
    handle = model.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    result = guided(model, InternalGuidance(w, guidance_scale), x, low_memory=low_memory)
    handle.remove()
    both = guidance_scale not in (0, 1)
    assert calls == ([2, 2] if low_memory else [4]) if both else calls == [2]
    with torch.no_grad():
        cond, uncond = (model(x, T, labels) for labels in (LABELS, torch.tensor([3, 3])))
    led = [out.internal_sample + w * (out.sample - out.internal_sample) for out in (cond, uncond)]
    expected = led[1] + guidance_scale * (led[0] - led[1])
    torch.testing.assert_close(result[:, :1], expected[:, :1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result[:, 1:], (uncond if guidance_scale == 0 else cond).sample[:, 1:])
    assert (cond.sample - cond.internal_sample).abs().max() > 0.1


def test_a_scale_of_1_is_the_network_to_the_bit():
    model, x = network(), draw(2, 1, 8, 8)
    assert torch.equal(guided(model, InternalGuidance(1.0), x), guided(model, None, x))
    free = ClassifierFreeGuidance(3.0)
    assert torch.equal(guided(model, InternalGuidance(1.0, 3.0), x), guided(model, free, x))
    plain = network(internal_guidance_layer=None)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "internal" not in name})
    images = sample(pipeline(model), internal_guidance_scale=1.0)
    assert torch.equal(images, sample(pipeline(model))) and torch.equal(images, sample(pipeline(plain)))
    assert (sample(pipeline(model), internal_guidance_scale=1.5) - images).abs().max() > 1e-3


def test_the_middle_layers_output_is_that_of_the_network_cut_there():
    """With the head of the middle layer as its output."""
    model, x = network(), draw(2, 1, 8, 8)
    shorter = network(num_layers=2, internal_guidance_layer=None)
    weights = {name: value for name, value in model.state_dict().items() if "blocks.2." not in name}
    heads = {name.removeprefix("internal_"): weights.pop(name) for name in list(weights) if "internal" in name}
    shorter.load_state_dict(weights | heads)
    torch.testing.assert_close(model(x, 5, LABELS).internal_sample, shorter(x, 5, LABELS).sample)
    assert len(model(x, 5, LABELS, return_dict=False)) == 1
    whole = model(x, 5, LABELS).sample
    model.remove_internal_output()
    out = model(x, 5, LABELS)
    assert torch.equal(out.sample, whole) and out.internal_sample is None
    assert not any("internal" in name for name in model.state_dict())
    assert DiTModel.from_config(model.config).internal_patch_out is None


def test_it_acts_in_its_own_share_of_the_steps():
    model, x = network(), draw(2, 1, 8, 8)
    guider, both = InternalGuidance(2.0, 3.0, internal_stop=0.5), InternalGuidance(2.0, 3.0)
    free = ClassifierFreeGuidance(3.0)
    for step, other in ((0, both), (1, both), (2, free), (3, free)):
        assert torch.equal(guided(model, guider, x, step=step), guided(model, other, x, step=step))
    ended = InternalGuidance(2.0, 3.0, stop=0.5)
    assert torch.equal(guided(model, ended, x, step=2), guided(model, None, x, step=2))


def test_the_short_form_of_a_call_is_the_guider():
    pipe = pipeline()
    for short, guider in (
        ({}, InternalGuidance(1.5)),
        ({"guidance_scale": 2.0, "guidance_rescale": 0.5}, InternalGuidance(1.5, 2.0, 0.5)),
    ):
        images = sample(pipe, internal_guidance_scale=1.5, **short)
        assert torch.equal(images, sample(pipe, guider=guider))
    half = sample(pipe, internal_guidance_scale=1.5, guidance_interval=(0.0, 0.5))
    assert torch.equal(half, sample(pipe, guider=InternalGuidance(1.5, stop=0.5)))


def test_an_image_is_the_same_alone_and_in_a_batch():
    pipe = pipeline()
    call = {"num_inference_steps": 3, "output_type": "latent", "internal_guidance_scale": 1.5, "guidance_scale": 2.0}
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    together = pipe([0, 2], generator=generators, **call).images
    alone = pipe(2, generator=torch.Generator().manual_seed(1), **call).images
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-4)


def test_the_guider_is_saved_with_the_pipeline(tmp_path):
    pipe = pipeline(guider=InternalGuidance(1.6, 2.0, internal_stop=0.7))
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.guider) is InternalGuidance and loaded.guider.config.internal_stop == 0.7
    assert_same_output(sample(loaded), expected)


def test_attention_may_be_cached_and_whole_blocks_may_not():
    pipe = pipeline()
    plain = sample(pipe, internal_guidance_scale=1.5)
    pipe.denoiser.enable_cache(TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True))
    cached = sample(pipe, internal_guidance_scale=1.5)
    assert cached.isfinite().all() and (cached - plain).abs().max() > 0
    pipe.denoiser.disable_cache()
    pipe.denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="InternalGuidance needs each block in each step, and the cache"):
        sample(pipe, internal_guidance_scale=1.5)
    sample(pipe)
    pipe.denoiser.disable_cache()
    assert torch.equal(sample(pipe, internal_guidance_scale=1.5), plain)


@pytest.mark.parametrize("denoiser", [tiny_unet(num_classes=3), network(internal_guidance_layer=None)])
def test_a_network_without_a_second_output_is_refused(denoiser):
    with pytest.raises(ValueError, match="InternalGuidance needs a network with a second output in a middle layer"):
        sample(pipeline(denoiser), internal_guidance_scale=1.5)


@pytest.mark.parametrize(
    "call, message",
    [
        ({"internal_guidance_scale": -1.0}, "internal_guidance_scale must be finite and at least 0, got -1.0: 1 is"),
        ({"internal_guidance_scale": float("nan")}, "internal_guidance_scale must be finite"),
        (
            {"internal_guidance_scale": 2.0, "guider": WeakModelGuidance(2.0)},
            "internal_guidance_scale must not be given together with a guider",
        ),
        ({"internal_guidance_scale": 2.0, "classifier_scale": 1.0}, "are two guiders, of which a call has one"),
        (
            {"internal_guidance_scale": 2.0, "class_labels": [{0: 1.0, 1: 1.0}]},
            "goes with no .*internal_guidance_scale",
        ),
    ],
)
def test_scales_that_make_no_sense_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline(), **call)


@pytest.mark.parametrize("layer", [0, 3, -1])
def test_a_layer_that_is_not_in_the_middle_is_refused(layer):
    with pytest.raises(
        ValueError, match=rf"internal_guidance_layer must be .* in \[1, num_layers - 1\], got {layer} of 3"
    ):
        network(internal_guidance_layer=layer)


def test_shares_of_the_steps_out_of_order_are_refused():
    with pytest.raises(
        ValueError, match=r"internal_start and internal_stop must be in \[0, 1\], the smaller one first"
    ):
        InternalGuidance(internal_start=0.6, internal_stop=0.5)
