"""Image-to-image, inpainting, inversion and interpolation, against what they must do where the answer is known."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from PIL import Image

from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline, UNetModel, VPredictionScheduler
from diffusers_ext.diffusion.noising import predict_eps
from diffusers_ext.latents import decode_latents, encode_latents
from diffusers_ext.pipelines.image_inputs import images_to_tensor, mask_to_tensor
from diffusers_ext.pipelines.inversion import slerp
from diffusers_ext.schedulers.levels import noise_level
from gaussian_oracle import VARIANCE, denoise
from tiny import tiny_unet
from tiny_vae import tiny_vae


STD, CORRELATION = 0.5, 0.8  # of neighbouring pixels of a pair


class PairDenoiser(UNetModel):
    """Exact for x_0 ~ N(0, STD^2) whose pixels 2k and 2k + 1 of a row have the correlation: their sum and difference
    are independent."""

    def forward(self, sample, timestep, return_dict=True):
        level = ExtDDPMScheduler().schedule.level(timestep, sample)

        def eps(x, variance):
            return level.sigma * x / (variance * level.alpha**2 + level.sigma**2)

        left, right = sample[..., ::2], sample[..., 1::2]
        total, difference = (eps(left + sign * right, STD**2 * (1 + sign * CORRELATION)) for sign in (1, -1))
        return (torch.stack([total + difference, total - difference], dim=-1).flatten(-2) / 2,)


class OracleDenoiser(UNetModel):
    """Exact for x_0 ~ N(0, VARIANCE)."""

    def forward(self, sample, timestep, return_dict=True):
        level = noise_level(DDPMScheduler(), timestep[0], sample)  # Euler goes between the timesteps
        return (predict_eps(denoise(sample, level), sample, level),)


def oracle(kind=OracleDenoiser, size=8, channels=1):
    return kind(
        sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=(8,), layers_per_block=1
    )


def pipeline(denoiser, scheduler, **components):
    pipe = GuidedDiffusionPipeline(denoiser, scheduler, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def half_mask(size=8):
    mask = torch.zeros(size, size)
    mask[:, size // 2 :] = 1
    return mask


SCHEDULERS = [
    ExtDDPMScheduler,
    ExtDDIMScheduler,
    EulerDiscreteScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_strength_0_is_the_image_and_strength_1_does_not_look_at_it(scheduler):
    pipe, image = pipeline(tiny_unet(), scheduler()), pictures(2, 1, 8, 8)
    kwargs = {"num_inference_steps": 6, "output_type": "pt"}
    torch.testing.assert_close(pipe(image=image, strength=0, **kwargs).images, image)
    from_noise = pipe(batch_size=2, generator=generators(1, 2), **kwargs).images
    assert torch.equal(pipe(image=image, strength=1, generator=generators(1, 2), **kwargs).images, from_noise)
    between = pipe(image=image, strength=0.5, generator=generators(1, 2), **kwargs).images
    assert not torch.allclose(between, from_noise, atol=0.01)
    assert not torch.allclose(between, image, atol=0.01)


@pytest.mark.parametrize("strength, steps", [(0.29, 29), (0.3, 30), (0.295, 29), (0.001, 0), (1.0, 100)])
def test_strength_is_the_share_of_the_steps(strength, steps):
    pipe = pipeline(oracle(), ExtDDIMScheduler())
    pipe(image=pictures(1, 1, 8, 8), strength=strength, num_inference_steps=100)
    assert pipe.num_timesteps == steps


@pytest.mark.parametrize("scheduler", [ExtDDIMScheduler, EulerDiscreteScheduler])
def test_an_image_keeps_what_the_noise_level_leaves_of_it(scheduler):
    """With the exact denoiser the way down is linear: x_0 = gain (alpha image + sigma noise), gain as without an image."""
    config = ExtDDIMScheduler(clip_sample=False, timestep_spacing="linspace").config
    pipe = pipeline(oracle(size=32), scheduler.from_config(config))
    image = torch.full((16, 1, 32, 32), 0.9)
    out = pipe(
        image=image, strength=0.3, num_inference_steps=500, generator=generators(*range(16)), output_type="latent"
    ).images
    level = ExtDDPMScheduler().schedule.level(int(np.linspace(0, 999, 500).round()[::-1][350]), torch.zeros(1))
    # The probability flow scales x_t by the ratio of standard deviations.
    gain = (VARIANCE / (VARIANCE * level.alpha**2 + level.sigma**2)).sqrt()
    assert out.mean().item() == pytest.approx((gain * level.alpha * 0.8).item(), rel=0.03)
    assert out.std().item() == pytest.approx((gain * level.sigma).item(), rel=0.04)


@pytest.mark.parametrize("vae", [None, tiny_vae(latent_channels=1, channels=1, scaling_factor=1.5)])
@pytest.mark.parametrize("masked", [False, True])
def test_an_edited_image_is_the_same_alone_and_in_a_batch(vae, masked):
    pipe = pipeline(tiny_unet(num_classes=3), ExtDDPMScheduler(), vae=vae)
    images, labels, size = pictures(3, 1, *(8 if vae is None else 16,) * 2), [2, 0, 1], 8 if vae is None else 16
    kwargs = {"num_inference_steps": 6, "output_type": "pt", "guidance_scale": 2.0}
    if masked:
        kwargs |= {"mask_image": half_mask(size), "num_resample_steps": 2}
    together = pipe(labels, image=images, generator=generators(5, 6, 7), **kwargs).images
    for i, label in enumerate(labels):
        alone = pipe(label, image=images[i : i + 1], generator=generators(5 + i), **kwargs).images
        torch.testing.assert_close(alone[0], together[i], rtol=1e-3, atol=1e-4)


@pytest.mark.product
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_inpainting_keeps_what_is_known_exactly(scheduler, strength):
    pipe, image = pipeline(tiny_unet(), scheduler()), pictures(2, 1, 8, 8)
    out = pipe(
        image=image,
        mask_image=half_mask(),
        strength=strength,
        num_inference_steps=5,
        output_type="pt",
        generator=generators(1, 2),
    ).images
    torch.testing.assert_close(out[..., :4], image[..., :4], rtol=0, atol=1e-6)
    assert (out[..., 4:] - image[..., 4:]).abs().mean() > 0.05


def test_inpainting_in_latents_keeps_known_pixels_exactly():
    vae = tiny_vae(latent_channels=1, channels=1, scaling_factor=1.5)
    pipe, image = pipeline(tiny_unet(), ExtDDIMScheduler(), vae=vae), pictures(1, 1, 16, 16)
    mask = torch.zeros(16, 16)
    mask[3:9, 5:12] = 1  # not on the grid of the latents
    out = pipe(image=image, mask_image=mask, num_inference_steps=5, output_type="pt").images
    torch.testing.assert_close(out[:, :, mask == 0], image[:, :, mask == 0], rtol=0, atol=1e-6)
    assert (out - image)[:, :, mask == 1].abs().mean() > 0.05
    latents = pipe(image=image, mask_image=mask, num_inference_steps=5, output_type="latent").images
    known = torch.nn.functional.max_pool2d(mask[None], 2)[0] == 0
    with torch.no_grad():
        torch.testing.assert_close(latents[:, :, known], encode_latents(vae, image * 2 - 1)[:, :, known])


@pytest.mark.parametrize("scheduler", [ExtDDPMScheduler, ExtDDIMScheduler])
@pytest.mark.parametrize("num_resample_steps", [1, 3])
def test_known_pixels_have_the_noise_of_their_level(scheduler, num_resample_steps):
    """q(x_s | x_0) after each step, drawn anew, whatever the network says."""
    pipe, seen = pipeline(oracle(size=16), scheduler()), []
    pipe(
        image=torch.full((16, 1, 16, 16), 0.8),
        mask_image=half_mask(16),
        num_inference_steps=4,
        num_resample_steps=num_resample_steps,
        generator=torch.Generator().manual_seed(0),
        callback_on_step_end=lambda pipe, step, t, tensors: seen.append(tensors["latents"][..., :8]),
    )
    for x, timestep in zip(seen, [500, 250, 0, -1], strict=True):
        level = pipe.scheduler.schedule.level(timestep, torch.zeros(1))
        assert x.mean().item() == pytest.approx(0.6 * level.alpha.item(), abs=0.08 * level.sigma.item() + 1e-6)
        assert x.std().item() == pytest.approx(level.sigma.item(), rel=0.06, abs=1e-6)


def inpaint_pairs(num_resample_steps, num_inference_steps=150):
    """The new pixel of each pair whose other one is 0.6, in [-1, 1]."""
    scheduler = ExtDDPMScheduler(clip_sample=False, timestep_spacing="trailing")
    mask = torch.zeros(16, 16)
    mask[:, 1::2] = 1
    out = pipeline(oracle(PairDenoiser, 16), scheduler)(
        batch_size=8,
        image=torch.full((1, 1, 16, 16), 0.8),
        mask_image=mask,
        num_inference_steps=num_inference_steps,
        num_resample_steps=num_resample_steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    torch.testing.assert_close(out[..., ::2], torch.full((8, 1, 16, 8), 0.6))
    return out[..., 1::2]


def test_inpainted_pixels_follow_the_conditional_law():
    """x | 0.6 ~ N(0.6 rho, STD^2 (1 - rho^2)); resampling brings them there, with small steps."""
    mean, std = 0.6 * CORRELATION, STD * (1 - CORRELATION**2) ** 0.5
    once, often = inpaint_pairs(1), inpaint_pairs(5)
    assert often.mean().item() == pytest.approx(mean, abs=0.06)
    assert often.std().item() == pytest.approx(std, rel=0.12)
    assert abs(once.mean().item() - mean) > 3 * abs(often.mean().item() - mean)


@pytest.mark.product
@pytest.mark.parametrize("scheduler", [ExtDDIMScheduler, VPredictionScheduler])
@pytest.mark.parametrize("vae", [None, tiny_vae(latent_channels=1, channels=1, scaling_factor=1.5)])
def test_inverted_images_come_back(scheduler, vae):
    """Inversion, refined until it stands still, then sampling: the image, or what the VAE makes of it."""
    pipe = pipeline(tiny_unet(num_classes=3), scheduler(clip_sample=False), vae=vae)
    image = pictures(2, 1, *(8 if vae is None else 16,) * 2) * 0.6 + 0.2
    expected = image
    if vae is not None:
        with torch.no_grad():
            expected = decode_latents(vae, encode_latents(vae, image * 2 - 1)).clamp(-1, 1) / 2 + 0.5
    noise = pipe.invert(image, [1, 2], num_inference_steps=20, num_refinements=4)
    assert noise.shape == (2, 1, 8, 8)
    back = pipe([1, 2], latents=noise, num_inference_steps=20, output_type="pt").images
    torch.testing.assert_close(back, expected, rtol=0, atol=5e-3)
    right, wrong = (
        pipe(labels, latents=noise, num_inference_steps=20, output_type="latent").images for labels in ([1, 2], [0, 0])
    )
    assert not torch.allclose(wrong, right, atol=5e-3)


def test_the_error_of_an_inversion_falls_as_one_over_the_steps():
    pipe = pipeline(oracle(), ExtDDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    image = pictures(4, 1, 8, 8)
    errors = []
    for n in (50, 100, 200):
        noise = pipe.invert(image, num_inference_steps=n)
        back = pipe(latents=noise, num_inference_steps=n, output_type="latent").images
        errors.append((back - (2 * image - 1)).abs().max().item())
    assert errors[0] < 0.2
    for coarse, fine in zip(errors[:-1], errors[1:], strict=True):
        assert coarse / fine == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("vae", [None, tiny_vae(latent_channels=1, channels=1, scaling_factor=1.5)])
def test_an_interpolation_goes_from_one_image_to_the_other(vae):
    pipe = pipeline(oracle(), ExtDDPMScheduler(clip_sample=False), vae=vae)  # whose config is all that counts
    a, b = (0.6 * pictures(1, 1, *(8 if vae is None else 16,) * 2, seed=seed) + 0.2 for seed in (1, 2))
    images = pipe.interpolate(a, b, 5, num_inference_steps=100, num_refinements=3, output_type="pt")
    assert len(images) == 5
    ends = torch.cat([a, b])
    if vae is not None:
        with torch.no_grad():
            ends = decode_latents(vae, encode_latents(vae, ends * 2 - 1)).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(images[[0, -1]], ends, rtol=0, atol=0.01)
    distances = (images[1:] - images[:-1]).flatten(1).norm(dim=1)
    assert (distances < 0.6 * (ends[0] - ends[1]).norm()).all()


def test_slerp_keeps_the_length_and_the_plane():
    a, b = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b = b * a.norm() / b.norm()
    points = slerp(a, b, torch.linspace(0, 1, 7)).flatten(1)
    torch.testing.assert_close(points.norm(dim=1), a.norm().expand(7))
    torch.testing.assert_close(points[[0, -1]], torch.cat([a, b]).flatten(1))
    steps = (points[1:] * points[:-1]).sum(1)
    torch.testing.assert_close(steps, steps[:1].expand(6))  # equal angles
    torch.testing.assert_close(slerp(a, 2 * a, torch.tensor([0.5])), 1.5 * a)


def test_images_are_read_from_pil_numpy_and_pytorch():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    pil = [Image.fromarray(array) for array in pixels]
    for given in (
        pil,
        pixels,
        pixels.astype(np.float32) / 255,
        list(pixels),
        (expected + 1) / 2,
        expected.add(1).mul(127.5).round().byte(),
    ):
        torch.testing.assert_close(images_to_tensor(given, 3), expected)
    torch.testing.assert_close(images_to_tensor(pil[0], 3), expected[:1])
    grey = pil[0].convert("L")
    torch.testing.assert_close(images_to_tensor(pil[0], 1)[0, 0], torch.from_numpy(np.array(grey)) / 127.5 - 1)


def test_masks_are_read_from_pil_numpy_and_pytorch():
    mask = half_mask()
    array = mask.numpy()
    pil = Image.fromarray((array * 255).astype(np.uint8))
    for given in (
        mask,
        mask[None],
        mask[None, None],
        array,
        array[None],
        array[..., None],
        pil,
        pil.convert("RGB"),
        array * 0.7,
    ):
        assert torch.equal(mask_to_tensor(given), mask[None, None])
    both = torch.stack([mask, 1 - mask])
    for given in (both, both[:, None], both.numpy(), list(both)):
        assert torch.equal(mask_to_tensor(given), both[:, None])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64, bool])
@pytest.mark.parametrize("top", [1, 255])
def test_masks_of_integers_are_read_by_what_is_white_in_them(dtype, top):
    """0 and 1 mean the same in every type; else uint16 has a white of 65535, as in pictures of 16 bits."""
    mask = half_mask()
    values = mask.numpy().astype(dtype) * dtype(top if dtype != np.uint16 or top == 1 else 65535)
    for given in (values, torch.from_numpy(values), [values, values * 0]):
        assert torch.equal(mask_to_tensor(given)[:1], mask[None, None])
    if dtype in (np.uint8, np.uint16, np.int32):
        assert torch.equal(mask_to_tensor(Image.fromarray(values)), mask[None, None])


def test_images_of_integers_have_one_white_for_all_that_are_given():
    values = np.array([[0, 1000], [2000, 4095]])
    expected = torch.from_numpy(values / 4095 * 2 - 1).float()
    for dtype in (np.int32, np.int64, np.uint32):
        pair = np.stack([values // 100, values]).astype(dtype)[..., None]  # the first alone would have a white of 255
        for given in (pair, list(pair), torch.from_numpy(pair.astype(np.int64)).movedim(-1, 1)):
            torch.testing.assert_close(images_to_tensor(given, 1)[1, 0], expected)
            assert images_to_tensor(given, 1)[0].max() < -0.97
    pair = [Image.fromarray(part[..., 0].astype(np.int32)) for part in pair]
    torch.testing.assert_close(images_to_tensor(pair, 1)[1, 0], expected, atol=1e-4, rtol=0)
    assert images_to_tensor(pair, 3)[0].max() < -0.97
    with pytest.raises(ValueError, match=r"image must have finite values in \[0, 65535\], got 0 to 7e\+04"):
        images_to_tensor(np.array([[[0], [70_000]]]), 1)
    with pytest.raises(ValueError, match=r"image must have finite values in \[0, 255\], got -1 to 4"):
        images_to_tensor(np.array([[[-1], [4]]]), 1)


def test_dark_images_of_16_bits_are_warned_of():
    values = np.array([[0, 4095]], np.uint16)
    with pytest.warns(UserWarning, match="65535 is white in image of 16 bits, but its largest value is 4095"):
        assert images_to_tensor(Image.fromarray(values), 1).max() < -0.87


def test_transparent_images_show_black_and_photographs_stand_upright():
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    assert images_to_tensor(clear, 3).eq(-1).all()
    assert images_to_tensor(clear, 4)[0, :, 0, 0].tolist() == [1, -1, -1, -1]
    assert images_to_tensor(clear.convert("LA"), 2)[0, 1].eq(-1).all()
    turned = Image.new("L", (6, 4))
    turned.getexif()[0x112] = 6
    assert images_to_tensor(turned, 1).shape == (1, 1, 6, 4)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"strength": 0.5}, "strength must be given together with an image"),
        ({"mask_image": half_mask()}, "mask_image must be given together with an image"),
        ({"image": pictures(1, 1, 8, 8), "strength": 1.5}, r"strength must be in \[0, 1\], got 1.5"),
        ({"image": pictures(1, 1, 9, 8)}, "image must be of the model's size, 8x8, got 9x8"),
        ({"image": pictures(1, 3, 8, 8)}, "image must have 1 channels"),
        ({"image": pictures(1, 1, 8, 8) - 0.5}, r"finite values in \[0, 1\], got -0"),
        ({"image": torch.full((1, 1, 8, 8), float("nan"))}, "finite values"),
        ({"image": "cat.png"}, "PIL image, a NumPy array, a tensor or a list of one, got str"),
        ({"image": []}, "at least one image"),
        ({"image": [Image.new("L", (8, 8)), Image.new("L", (9, 8))]}, "images of one size, got 8x8, 8x9"),
        ({"image": pictures(2, 1, 8, 8), "batch_size": 3}, "batch_size has 3, image has 2"),
        (
            {"image": pictures(1, 1, 8, 8), "mask_image": half_mask(4)},
            "mask_image must have the size of image, 8x8, got 4x4",
        ),
        ({"image": pictures(1, 1, 8, 8), "latents": torch.zeros(1, 1, 8, 8)}, "latents must not be given"),
        ({"num_resample_steps": 0}, "num_resample_steps must be at least 1, got 0"),
        ({"num_resample_steps": 2}, "must be 1 without a mask_image"),
    ],
)
def test_bad_input_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        pipeline(tiny_unet(), ExtDDIMScheduler())(num_inference_steps=2, **kwargs)


def test_what_a_scheduler_cannot_do_is_refused():
    pipe = pipeline(tiny_unet(), DDPMScheduler())
    with pytest.raises(ValueError, match="num_resample_steps must be 1 for DDPMScheduler"):
        pipe(image=pictures(1, 1, 8, 8), mask_image=half_mask(), num_resample_steps=2)
    with pytest.raises(ValueError, match="inversion needs a scheduler of this package, .* got DDPMScheduler"):
        pipe.invert(pictures(1, 1, 8, 8))
    with pytest.raises(ValueError, match="num_images must be an integer of at least 2"):
        pipe.interpolate(pictures(1, 1, 8, 8), pictures(1, 1, 8, 8), 1)
