"""Pipelines whose denoiser works on the latents of a VAE, of this package or of diffusers."""

import diffusers
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel, VAEModel
from tiny import assert_same_output
from tiny_vae import tiny_vae


MEASURED = {"scaling_factor": 1.7, "shift_factor": 0.2}


def our_vae(**config):
    torch.manual_seed(0)
    options = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "latent_channels": 2,
    }
    vae = VAEModel(**options | MEASURED | config)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return vae.eval()


def unet(**config):
    torch.manual_seed(0)
    options = {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
    }
    model = UNetModel(**options | config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


VAES = {
    "ours": our_vae,
    "of diffusers": lambda: tiny_vae(latent_channels=2, channels=1, **MEASURED),
    "of series": lambda: our_vae(dims=1, sample_size=16),
}


def pipeline(vae, **config):
    pipe = GuidedDiffusionPipeline(unet(**config), ExtDDIMScheduler(clip_sample=False), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", VAES)
@torch.no_grad()
def test_latents_are_decoded_with_the_stored_scale_and_shift(name):
    vae = VAES[name]()
    pipe = pipeline(vae, dims=vae.config.get("dims", 2))
    kwargs = {"batch_size": 2, "num_inference_steps": 3}
    latents, images = (
        pipe(generator=torch.Generator().manual_seed(1), output_type=kind, **kwargs).images
        for kind in ("latent", "pt")
    )
    expected = vae.decode(latents / 1.7 + 0.2).sample
    torch.testing.assert_close(images, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    # An image goes the same way back: strength 0 is what the VAE makes of it.
    mean = vae.encode(images * 2 - 1).latent_dist.mean
    again = pipe(image=images, strength=0, output_type="latent").images
    torch.testing.assert_close(again, (mean - 0.2) * 1.7, rtol=1e-4, atol=1e-5)


def test_a_pipeline_with_a_vae_is_saved_whole(tmp_path):
    pipe = pipeline(our_vae())
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    noise = randn_tensor((2, 2, 8, 8), generator=torch.Generator().manual_seed(1))
    first, again = (p(latents=noise, num_inference_steps=3, output_type="pt").images for p in (pipe, loaded))
    assert_same_output(again, first)


@pytest.mark.parametrize(
    "vae, message",
    [
        (lambda: our_vae(latent_channels=4), "latents of the denoiser's 2 channels, got latent_channels=4"),
        (lambda: tiny_vae(latent_channels=4), "latents of the denoiser's 2 channels, got latent_channels=4"),
        (lambda: our_vae(sample_size=32), "latents of the denoiser's size, 8x8, got 16x16 for its images of 32x32"),
        (lambda: our_vae(dims=1), "latents of the denoiser's size, 8x8, got 8 for its images of 16"),
        (lambda: our_vae(architecture="mlp"), "got a fully connected one, whose are flat"),
    ],
)
def test_a_vae_that_does_not_fit_is_refused(vae, message):
    with pytest.raises(ValueError, match=message):
        pipeline(vae())


@pytest.mark.parametrize(
    "vae",
    [
        lambda: our_vae(scaling_factor=1.0, shift_factor=None),
        lambda: tiny_vae(latent_channels=2, channels=1, scaling_factor=None),
    ],
)
def test_a_scale_that_was_never_measured_is_refused_before_anything_is_computed(vae):
    pipe = pipeline(vae())
    pipe.denoiser.register_forward_pre_hook(lambda *args: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=r"never measured.*Set them by vae.register_to_config"):
        pipe(num_inference_steps=2)
    with pytest.raises(ValueError, match="never measured"):
        pipe.invert(torch.rand(1, 1, 16, 16))


@pytest.mark.parametrize("size, latents", [((17, 16), "8x8"), ((32, 32), "16x16"), ((4, 16), "too few")])
def test_an_image_whose_latents_do_not_fit_is_refused(size, latents):
    pipe = pipeline(VAES["of diffusers"]())
    with pytest.raises(
        ValueError, match=f"latents are the denoiser's 8x8, got {size[0]}x{size[1]}, whose latents are {latents}"
    ):
        pipe(image=torch.rand(1, 1, *size))


def test_latents_that_are_clipped_like_images_are_warned_of(recwarn):
    pipe = pipeline(our_vae())
    pipe.register_modules(scheduler=ExtDDIMScheduler(timestep_spacing="trailing"))
    with pytest.warns(UserWarning, match=r"clips what it predicts to \[-1, 1\]"):
        pipe(num_inference_steps=1)
    recwarn.clear()
    pipe.register_modules(scheduler=ExtDDIMScheduler(timestep_spacing="trailing", clip_sample=False))
    pipe(num_inference_steps=1)
    assert not recwarn.list
