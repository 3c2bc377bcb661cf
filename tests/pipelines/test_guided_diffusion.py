import logging

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance

import diffusers_ext
from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline, UNetModel
from tiny import assert_same_output, assert_same_weights


NAMES = {0: "ankle boot", 1: "bag", 2: "coat"}


def unet(**kwargs):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
    }
    model = UNetModel(**(config | {"num_classes": 3} | kwargs))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def pipeline(scheduler=None, **kwargs):
    pipe = GuidedDiffusionPipeline(unet(**kwargs), scheduler or ExtDDIMScheduler(), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe, **kwargs):
    return pipe(**({"num_inference_steps": 4, "output_type": "pt"} | kwargs)).images


class GaussianDenoiser(UNetModel):
    """The exact noise prediction for data N(0, 0.25), so that a sampler must return that variance."""

    def forward(self, sample, timestep, return_dict=True):
        table = ExtDDPMScheduler().schedule.alpha_bar[:-1].numpy()
        sigma_ve = np.interp(timestep.numpy(), np.arange(1000), ((1 - table) / table) ** 0.5)  # Heun goes between
        alpha_bar = 1 / (1 + torch.tensor(sigma_ve).to(sample)[:, None, None, None] ** 2)
        return ((1 - alpha_bar).sqrt() * sample / (0.25 * alpha_bar + 1 - alpha_bar),)


@pytest.mark.parametrize("scheduler", [ExtDDIMScheduler, ExtDDPMScheduler])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_image_i_is_the_same_alone_and_in_a_batch(scheduler, guidance_scale):
    pipe, labels = pipeline(scheduler()), [2, 0, 1]
    together = sample(pipe, class_labels=labels, guidance_scale=guidance_scale, generator=generators(5, 6, 7))
    for i, label in enumerate(labels):
        alone = sample(pipe, class_labels=label, guidance_scale=guidance_scale, generator=generators(5 + i))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_unconditional_sampling_equals_the_pipeline_of_diffusers():
    model = unet(num_classes=None, in_channels=3, out_channels=3)
    ours, stock = GuidedDiffusionPipeline(model, DDPMScheduler()), DDPMPipeline(model, DDPMScheduler())
    kwargs = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    expected = stock(generator=torch.Generator().manual_seed(1), **kwargs).images
    np.testing.assert_allclose(ours(generator=torch.Generator().manual_seed(1), **kwargs).images, expected, atol=1e-5)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_guidance_is_the_formula_at_every_step(scale, low_memory):
    """One DDIM step by hand: out = null + scale (cond - null)."""
    pipe, noise = pipeline(ExtDDIMScheduler(clip_sample=False)), torch.randn(2, 1, 8, 8)
    images = pipe(
        class_labels=[1, 2],
        guidance_scale=scale,
        latents=noise,
        timesteps=[700],
        output_type="latent",
        low_memory=low_memory,
    ).images
    with torch.no_grad():
        cond, null = (pipe.denoiser(noise, 700, torch.tensor(labels)).sample for labels in ([1, 2], [3, 3]))
    alpha_bar = pipe.scheduler.schedule.alpha_bar[700].float()
    expected = (noise - (1 - alpha_bar).sqrt() * (null + scale * (cond - null))) / alpha_bar.sqrt()
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-3)


def test_a_guider_given_for_the_call_replaces_the_scale():
    pipe = pipeline()
    by_scale = sample(pipe, class_labels=[0, 2], guidance_scale=3.0, generator=generators(1, 2))
    by_guider = sample(pipe, class_labels=[0, 2], guider=ClassifierFreeGuidance(3.0), generator=generators(1, 2))
    assert torch.equal(by_scale, by_guider)
    projected = sample(pipe, class_labels=[0, 2], guider=AdaptiveProjectedGuidance(3.0), generator=generators(1, 2))
    assert not torch.allclose(by_scale, projected)


def count_calls(pipe, **kwargs):
    sizes = []
    hook = pipe.denoiser.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    sample(pipe, **kwargs)
    hook.remove()
    return sizes


def test_network_calls_are_no_more_than_the_guidance_needs():
    pipe = pipeline()
    assert count_calls(pipe, class_labels=1) == [1] * 4
    assert count_calls(pipe, class_labels=1, guidance_scale=2.0) == [2] * 4
    assert count_calls(pipe, class_labels=1, guidance_scale=2.0, low_memory=True) == [1] * 8
    interval = ClassifierFreeGuidance(2.0, start=0.25, stop=0.75)
    assert count_calls(pipe, class_labels=1, guider=interval) == [1, 2, 2, 1]


def test_names_and_ids_mean_the_same():
    pipe = pipeline()
    by_name = sample(pipe, class_labels=["coat", "bag"], generator=generators(1, 2))
    assert torch.equal(by_name, sample(pipe, class_labels=torch.tensor([2, 1]), generator=generators(1, 2)))
    assert pipe.labels == {"ankle boot": 0, "bag": 1, "coat": 2}


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"class_labels": 5}, r"must be in \[0, 2\], or 3 for no label, got 5"),
        ({"class_labels": "boots"}, "no label named 'boots'; near ones are 'ankle boot'"),
        ({"class_labels": 1.5}, "class_labels must be ids or names, got 1.5"),
        ({"class_labels": [1, 2], "batch_size": 3}, "batch_size has 3, class_labels has 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"latents": torch.zeros(1, 1, 9, 8)}, r"latents must have shape \(1, 1, 8, 8\)"),
        ({"guidance_scale": 2.0}, "needs class_labels"),
        ({"class_labels": 1, "guidance_scale": 2.0, "guider": ClassifierFreeGuidance()}, "together with a guider"),
        ({"output_type": "jpeg"}, "one of pil, np, pt, latent, got 'jpeg'"),
        ({"trajectory_steps": [4]}, r"must be in \[0, 3\], got \[4\]"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "must be among"),
    ],
)
def test_bad_input_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline(), **kwargs)


def test_labels_and_guidance_need_a_model_that_has_them():
    pipe = pipeline(num_classes=None)
    with pytest.raises(ValueError, match="trained without labels"):
        sample(pipe, class_labels=1)
    with pytest.raises(ValueError, match="trained without labels"):
        sample(pipe, guidance_scale=2.0)
    with pytest.raises(ValueError, match="eta must be 0 for DDPMScheduler"):
        sample(pipeline(DDPMScheduler()), eta=0.5)


# std(x_0) / c of the sampler at 100 steps: first-order samplers have not converged there; the others have.
SCALES = {
    DDPMScheduler: 0.9365,
    DDIMScheduler: 0.9720,
    EulerAncestralDiscreteScheduler: 0.9365,
    EulerDiscreteScheduler: 0.9720,
    DPMSolverMultistepScheduler: 1.0,
    HeunDiscreteScheduler: 1.0,
    PNDMScheduler: 1.0,
    UniPCMultistepScheduler: 1.0,
}


@pytest.mark.parametrize("scheduler", SCALES)
def test_schedulers_of_diffusers_give_the_right_scale(scheduler):
    """With the exact denoiser for N(0, c^2), c = 0.5, a sampler must return that variance as far as it converged."""
    model = GaussianDenoiser(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(16,), layers_per_block=1
    )
    pipe = GuidedDiffusionPipeline(model, scheduler.from_config(ExtDDPMScheduler(clip_sample=False).config))
    pipe.set_progress_bar_config(disable=True)
    out = pipe(batch_size=64, num_inference_steps=100, generator=generators(*range(64)), output_type="latent")
    # 16384 draws leave 0.6 %; the rest is what a second-order method leaves, and spacings that differ by scheduler.
    assert out.images.std().item() == pytest.approx(0.5 * SCALES[scheduler], rel=0.02)


@pytest.mark.parametrize("scheduler", [ExtDDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_a_trajectory_leads_from_noise_to_the_image(scheduler):
    pipe = pipeline(scheduler())
    out = pipe(
        class_labels=1, num_inference_steps=4, generator=generators(1), output_type="pt", trajectory_steps=[0, 3]
    )
    first, last = out.trajectory
    assert first.timestep > last.timestep
    assert first.x_t.shape == first.x0_hat.shape == (1, 1, 8, 8)
    start = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * pipe.scheduler.init_noise_sigma
    torch.testing.assert_close(first.x_t, start)
    torch.testing.assert_close((last.x0_hat / 2 + 0.5).clamp(0, 1), out.images, rtol=1e-3, atol=1e-3)


def test_a_callback_can_change_the_sample():
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    images = sample(pipeline(), class_labels=1, callback_on_step_end=callback)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert (images == 0.5).all()


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pil_images_have_the_mode_of_their_channels(channels, mode):
    pipe = pipeline(in_channels=channels, out_channels=channels)
    kwargs = {"class_labels": [0, 1], "generator": generators(1, 2), "num_inference_steps": 2}
    pil, array = pipe(**kwargs).images, pipe(**(kwargs | {"generator": generators(1, 2)}), output_type="np").images
    assert [image.mode for image in pil] == [mode] * 2
    np.testing.assert_array_equal(np.asarray(pil[1]).reshape(8, 8, channels), (array[1] * 255).round().astype("uint8"))


def test_samples_that_are_no_images_need_another_output_type():
    pipe = pipeline(dims=1, sample_size=16, in_channels=2, out_channels=2)
    with pytest.raises(ValueError, match="output_type must be 'np' or 'pt'.* 2 channels and 1 dimensions"):
        pipe(class_labels=1, output_type="pil")
    assert sample(pipe, class_labels=[1, 2]).shape == (2, 2, 16)


def test_a_learned_variance_is_not_guided_and_reaches_only_a_scheduler_that_uses_it():
    for scheduler in (ExtDDPMScheduler(variance_type="learned_range"), DDIMScheduler()):
        pipe = pipeline(scheduler, out_channels=2)
        images = sample(pipe, class_labels=[1, 2], guidance_scale=2.0, generator=generators(1, 2))
        assert images.shape == (2, 1, 8, 8)
        assert images.isfinite().all()


def test_half_precision_keeps_the_sample_in_float32():
    pipe = pipeline().to(torch.bfloat16)
    latents = pipe(class_labels=1, num_inference_steps=2, output_type="latent").images
    assert latents.dtype == torch.float32


def test_networks_of_diffusers_serve_as_denoiser():
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=3,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
    )
    pipe = GuidedDiffusionPipeline(dit.eval(), ExtDDPMScheduler(variance_type="learned_range"), vae=vae.eval())
    pipe.set_progress_bar_config(disable=True)
    assert sample(pipe, class_labels=[0, 2], guidance_scale=2.0).shape == (2, 3, 16, 16)

    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=["DownBlock2D"],
        up_block_types=["UpBlock2D"],
        num_class_embeds=3,
    )
    pipe = GuidedDiffusionPipeline(model, ExtDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    assert sample(pipe, class_labels=[0, 2]).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="has no null label"):
        sample(pipe, class_labels=[0, 2], guidance_scale=2.0)
    with pytest.raises(ValueError, match="class_labels must be given"):
        sample(pipe)


@pytest.mark.parametrize("guider", [None, ClassifierFreeGuidance(2.5, stop=0.5), ClassifierFreeZeroStarGuidance(2.0)])
def test_a_saved_pipeline_makes_the_same_images(tmp_path, guider):
    pipe = pipeline()
    pipe.register_modules(guider=guider)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers_ext.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is GuidedDiffusionPipeline
    assert loaded.labels == pipe.labels
    assert_same_weights(loaded.denoiser, pipe.denoiser)
    first, again = (sample(p, class_labels="bag", generator=generators(4)) for p in (pipe, loaded))
    assert_same_output(again, first)


@pytest.mark.parametrize("short", [{"guidance_scale": 3.0}, {"class_labels": {1: 0.5, 2: 0.5}}])
def test_short_forms_of_guidance_do_not_tell_that_guiders_may_change(short, caplog):
    notice = logging.getLogger("diffusers.guiders.guider_utils")
    notice.addHandler(caplog.handler)
    try:
        sample(pipeline(num_classes=3), **({"class_labels": 1} | short))
        assert not caplog.records
        ClassifierFreeGuidance(3.0)
        assert caplog.records  # who names one is told
    finally:
        notice.removeHandler(caplog.handler)
