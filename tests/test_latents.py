import pytest
import torch
from diffusers import AutoencoderDC

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.latents import decode_latents, encode_latents, image_channels, normalize_latents
from diffusers_ext.sizes import compression
from tiny_vae import tiny_vae


def images(count=3):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("shift", [None, 0.3, [0.1, 0.2, 0.3, 0.4]])
def test_latents_are_shifted_and_scaled_and_back(shift):
    vae = tiny_vae(scaling_factor=2.5, shift_factor=shift)
    mean = vae.encode(images()).latent_dist.mean
    z = encode_latents(vae, images())
    by_hand = torch.tensor(0.0 if shift is None else shift).reshape(-1, 1, 1)
    torch.testing.assert_close(z, (mean - by_hand) * 2.5)
    torch.testing.assert_close(decode_latents(vae, z), vae.decode(mean).sample)


@torch.no_grad()
def test_the_measured_scale_makes_latents_standard():
    vae, x = tiny_vae(), images(64)
    z = vae.encode(x).latent_dist.mean
    vae.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())
    assert encode_latents(vae, x).mean().abs() < 1e-4
    assert encode_latents(vae, x).std().item() == pytest.approx(1, abs=1e-4)


def test_statistics_by_channel_are_used_where_a_vae_has_them():
    z, mean, std = torch.randn(2, 4, 3, 3), [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    vae = tiny_vae(scaling_factor=0.5, latents_mean=mean, latents_std=std)
    expected = (z - torch.tensor(mean).view(-1, 1, 1)) * 0.5 / torch.tensor(std).view(-1, 1, 1)
    torch.testing.assert_close(normalize_latents(vae, z), expected)


@torch.no_grad()
def test_a_draw_of_image_i_comes_from_generator_i_and_has_the_posteriors_law():
    vae = tiny_vae(scaling_factor=1.0)
    together = encode_latents(vae, images(), [torch.Generator().manual_seed(i) for i in range(3)], sample=True)
    for i in range(3):
        alone = encode_latents(vae, images()[i : i + 1], [torch.Generator().manual_seed(i)], sample=True)
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    many = images(1).expand(2000, -1, -1, -1)
    draws = encode_latents(vae, many, [torch.Generator().manual_seed(i) for i in range(2000)], sample=True)
    posterior = vae.encode(images(1)).latent_dist
    assert ((draws.mean(0) - posterior.mean[0]) / posterior.std[0]).abs().max() < 5 / 2000**0.5
    torch.testing.assert_close(draws.std(0), posterior.std[0], rtol=0.1, atol=0)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"scaling_factor": None}, "never measured: its config has scaling_factor None"),
        ({"scaling_factor": float("nan")}, "positive finite scaling_factor"),
        ({"scaling_factor": 0.0}, "positive finite scaling_factor"),
        ({"scaling_factor": [1.0, 2.0]}, "one for each of 4 channels"),
    ],
)
def test_a_scale_that_cannot_be_used_is_refused(config, message):
    vae = tiny_vae(**config)
    with pytest.raises(ValueError, match=message):
        decode_latents(vae, torch.zeros(1, 4, 4, 4))
    with pytest.raises(ValueError, match=message), torch.no_grad():
        encode_latents(vae, images())


@torch.no_grad()
def test_an_autoencoder_without_a_posterior_is_one_like_any_other():
    """`AutoencoderDC` names its widths, its output and the number of its channels in ways of its own."""
    torch.manual_seed(0)
    blocks = {f"{half}_block_types": "ResBlock" for half in ("encoder", "decoder")}
    widths = {f"{half}_block_out_channels": (8, 16) for half in ("encoder", "decoder")}
    layers = {f"{half}_layers_per_block": (1, 1) for half in ("encoder", "decoder")}
    scales = {f"{half}_qkv_multiscales": ((), ()) for half in ("encoder", "decoder")}
    vae = AutoencoderDC(3, 4, 4, **blocks, **widths, **layers, **scales, scaling_factor=0.5).eval()
    x = images()
    z = encode_latents(vae, x)
    torch.testing.assert_close(z, vae.encode(x).latent * 0.5)
    assert (
        z.shape == (3, 4, 8 // compression(vae.config), 8 // compression(vae.config))
        and image_channels(vae.config) == 3
    )
    unet = UNetModel(4, 4, 4, block_out_channels=(8, 16), layers_per_block=1)
    pipe = GuidedDiffusionPipeline(unet, ExtDDIMScheduler(clip_sample=False), vae=vae)
    edited = pipe(image=(x + 1) / 2, strength=0.5, num_inference_steps=4, output_type="pt").images
    assert edited.shape == (3, 3, 8, 8)
