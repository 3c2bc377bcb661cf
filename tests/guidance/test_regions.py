"""Labels and texts that hold in parts of an image."""

import numpy as np
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedGuidance, ClassifierFreeGuidance
from PIL import Image

from diffusers_ext import (
    DiTModel,
    ExtDDIMScheduler,
    GuidedDiffusionPipeline,
    TextGuidedDiffusionPipeline,
    UNetModel,
    VAEModel,
    WeakModelGuidance,
)
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, predict_eps, predict_x0, training_target
from tiny import tiny_unet
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer


MEANS, STDS = (-0.8, 0.5, 0.9, 0.1), (0.3, 0.2, 0.5, 0.8)  # of the pixels under each label; the last is the null label
T = 400


class PixelwiseDenoiser(UNetModel):
    """The exact network for images whose pixels are independent, N(mean, std^2) of their label."""

    @classmethod
    def make(cls, scheduler, side=8, channels=1):
        model = cls(side, channels, channels, block_out_channels=(4,), layers_per_block=1, num_classes=3)
        model.scheduler, model.sizes = scheduler, []
        return model

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        self.sizes.append(len(sample))
        level = self.scheduler.schedule.level(timestep, sample)
        mean, std = (torch.tensor(each).to(sample)[class_labels].view(-1, 1, 1, 1) for each in (MEANS, STDS))
        x0 = expected_x0(sample, level, mean, std)
        return (training_target(x0, predict_eps(x0, sample, level), level, self.scheduler.config.prediction_type),)


def expected_x0(x_t, level, mean, std):
    """E[x_0 | x_t] of a Gaussian."""
    return mean + level.alpha * std**2 / (level.alpha**2 * std**2 + level.sigma**2) * (x_t - level.alpha * mean)


def eps_of_label(x_t, level, label):
    return (x_t - level.alpha * expected_x0(x_t, level, MEANS[label], STDS[label])) / level.sigma


def oracle(prediction_type="epsilon"):
    scheduler = ExtDDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    pipe = GuidedDiffusionPipeline(PixelwiseDenoiser.make(scheduler), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def halves(side=8):
    left = np.zeros((side, side), np.float32)
    left[:, : side // 2] = 1
    soft = np.linspace(0, 1, side * side, dtype=np.float32).reshape(side, side)
    return left, soft


def noise(count=2, side=8):
    return torch.randn(count, 1, side, side, generator=torch.Generator().manual_seed(0))


def eps_seen(pipe, **call):
    """The eps that one step from T was made with."""
    x = noise()
    x0 = pipe(latents=x, timesteps=[T], output_type="latent", **call).images  # the predicted x_0
    level = pipe.scheduler.schedule.level(T, x)
    return (x - level.alpha * x0) / level.sigma, x, level


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES[:4])
@pytest.mark.parametrize("base", [None, 2])
def test_each_pixel_has_the_weighted_directions_of_its_masks(prediction_type, base):
    left, soft = halves()
    pipe = oracle(prediction_type)
    eps, x, level = eps_seen(pipe, class_labels=base, regions=[(left, 0, 1.5), (soft, 1, -0.5)])
    null, outside = (eps_of_label(x, level, label) for label in (3, 3 if base is None else base))
    expected = outside + 1.5 * torch.tensor(left) * (eps_of_label(x, level, 0) - null)
    expected = expected - 0.5 * torch.tensor(soft) * (eps_of_label(x, level, 1) - null)
    torch.testing.assert_close(eps, expected, rtol=1e-4, atol=1e-4)
    # One call: the regions, the null label, and the base if that is another.
    assert pipe.denoiser.sizes == [2 * (3 if base is None else 4)]


def test_outside_of_all_masks_is_the_plain_prediction():
    left, _ = halves()
    pipe = oracle()
    for call in ({}, {"class_labels": 1}, {"class_labels": 1, "guidance_scale": 3.0}):
        plain, got = (eps_seen(pipe, **call, **more)[0] for more in ({}, {"regions": [(left, 0, 1.0)]}))
        torch.testing.assert_close(got[..., 4:], plain[..., 4:], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got[..., :4], plain[..., :4], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("low_memory", [False, True])
def test_guiders_act_on_the_blended_prediction(low_memory):
    left, _ = halves()
    pipe = oracle()
    eps, x, level = eps_seen(pipe, regions=[(left, 0, 1.0)], guidance_scale=3.0, low_memory=low_memory)
    null = eps_of_label(x, level, 3)
    torch.testing.assert_close(
        eps, null + 3.0 * torch.tensor(left) * (eps_of_label(x, level, 0) - null), rtol=1e-4, atol=1e-4
    )
    # The unconditional prediction is the null one, and is made twice where each prediction has a call of its own.
    assert sum(pipe.denoiser.sizes) == (6 if low_memory else 4)


@pytest.mark.parametrize(
    "guider",
    [ClassifierFreeGuidance(2.5), AdaptiveProjectedGuidance(2.5), WeakModelGuidance(2.0)],
    ids=lambda g: type(g).__name__,
)
def test_a_full_mask_is_the_label_under_every_guider(guider):
    pipe, full = GuidedDiffusionPipeline(tiny_unet(3), ExtDDIMScheduler(clip_sample=False)), np.ones((8, 8))
    weak = tiny_unet(3)
    for parameter in weak.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    pipe.register_modules(weak_denoiser=weak)
    pipe.set_progress_bar_config(disable=True)
    call = {"latents": noise(), "num_inference_steps": 3, "output_type": "latent", "guider": guider}
    torch.testing.assert_close(
        pipe(regions=[(full, 1, 1.0)], **call).images, pipe(1, **call).images, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_sets_and_weights_of_labels_are_full_masks(kind):
    model = tiny_unet(3)
    if kind == "dit":
        options = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "num_classes": 3}
        model = DiTModel(sample_size=8, in_channels=1, **options)
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    pipe, full = GuidedDiffusionPipeline(model, ExtDDIMScheduler(clip_sample=False)), np.ones((8, 8))
    pipe.set_progress_bar_config(disable=True)
    call = {"latents": noise(), "num_inference_steps": 3, "output_type": "latent"}
    composed = pipe({0: 1.5, 2: -0.5}, **call).images
    torch.testing.assert_close(
        pipe(regions=[(full, 0, 1.5), (full, 2, -0.5)], **call).images, composed, rtol=1e-3, atol=1e-3
    )
    sets = pipe([[0, 2]], **call).images
    torch.testing.assert_close(pipe(regions=[(full, [0, 2], 1.0)], **call).images, sets, rtol=1e-3, atol=1e-3)
    mixed = pipe(1, regions=[(np.zeros((8, 8)), [0, 2], 1.0), (full, 1, 0.0)], **call).images
    torch.testing.assert_close(mixed, pipe(1, **call).images, rtol=1e-3, atol=1e-3)


def test_masks_of_images_are_averaged_over_the_pixels_of_a_latent():
    vae = VAEModel(sample_size=16, in_channels=1, out_channels=1, block_out_channels=(4, 4), latent_channels=1)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    scheduler = ExtDDIMScheduler(clip_sample=False)
    pipe = GuidedDiffusionPipeline(PixelwiseDenoiser.make(scheduler), scheduler, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 7, 16))  # the fourth latent of each row has half of it
    eps, x, level = eps_seen(pipe, regions=[(mask, 0, 1.0)])
    null = eps_of_label(x, level, 3)
    share = torch.tensor([1, 1, 1, 0.5, 0, 0, 0, 0])
    torch.testing.assert_close(eps, null + share * (eps_of_label(x, level, 0) - null), rtol=1e-4, atol=1e-4)
    with pytest.raises(
        ValueError, match=r"the mask of regions\[0\] must be of the size of the images, 16x16, got 8x8"
    ):
        pipe(regions=[(np.ones((8, 8)), 0, 1.0)])


def test_texts_hold_in_regions():
    tokenizer = tiny_tokenizer()
    pipe = TextGuidedDiffusionPipeline(
        tiny_text_unet(), ExtDDIMScheduler(clip_sample=False), tokenizer, tiny_clip(tokenizer)
    )
    pipe.set_progress_bar_config(disable=True)
    side, channels = pipe.denoiser.config.sample_size, pipe.denoiser.config.in_channels
    x = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    call = {"latents": x, "timesteps": [T], "output_type": "latent", "guidance_scale": 1.0}
    left = np.zeros((side, side))
    left[:, : side // 2] = 1
    cat, heart, null = (pipe(text, **call).images for text in ("a cat", "a red heart", ""))
    got = pipe("a cat", regions=[(left, "a red heart", 0.5)], **call).images
    torch.testing.assert_close(got, cat + 0.5 * torch.tensor(left).float() * (heart - null), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"regions of this pipeline must be of texts, \(mask, text, weight\), got 3"):
        pipe("a cat", regions=[(left, 3, 1.0)])
    pipe.denoiser.register_to_config(learned_unconditional=False)
    with pytest.raises(ValueError, match="regions need a text from which .* give a negative_prompt that is not empty"):
        pipe("a cat", regions=[(left, "a red heart", 1.0)])


@pytest.mark.parametrize(
    "regions, message",
    [
        ([], r"regions must be a list of \(mask, label or text, weight\), got \[\]"),
        ([(np.ones((8, 8)), 1)], r"regions\[0\] must be \(mask, label or text, weight\), got \(array"),
        ([(np.ones((8, 8)), 1, float("nan"))], r"the weight of regions\[0\] must be a finite number, got nan"),
        ([(np.ones((8, 9)), 1, 1.0)], r"the mask of regions\[0\] must be of the size of the images, 8x8, got 8x9"),
        (
            [(np.full((8, 8), 1.5), 1, 1.0)],
            r"the mask of regions\[0\] must have finite values in \[0, 1\], got 1.5 to 1.5",
        ),
        ([(np.ones((8, 8)), 7, 1.0)], r"class_labels must be in \[0, 2\], or 3 for no label, got 7"),
        ([(np.ones((8, 8)), {1: 2.0}, 1.0)], "regions have weights of their own"),
    ],
)
def test_regions_that_cannot_be_are_refused(regions, message):
    with pytest.raises(ValueError, match=message):
        oracle()(regions=regions)


def test_regions_need_labels_and_a_null_label():
    region = [(np.ones((8, 8)), 1, 1.0)]
    without = GuidedDiffusionPipeline(tiny_unet(), ExtDDIMScheduler())
    with pytest.raises(ValueError, match="the model was trained without labels"):
        without(regions=region)
    labelled = tiny_unet(3)
    labelled.register_to_config(learned_unconditional=False)
    with pytest.raises(ValueError, match=r"regions need a null label, .* \(label_dropout was 0\)"):
        GuidedDiffusionPipeline(labelled, ExtDDIMScheduler())(1, regions=region)
    with pytest.raises(ValueError, match="regions have weights of their own"):
        oracle()({1: 1.0}, regions=region)


def test_a_learned_variance_stays_that_of_the_base():
    from diffusers_ext.guidance.regions import Regions

    base, region, null = torch.randn(3, 2, 4, 8, 8)
    blended = Regions([], {}, [torch.ones(1, 1, 8, 8)], [2.0]).blend(base, [region], null, 2)
    torch.testing.assert_close(blended[:, :2], (base + 2 * (region - null))[:, :2])
    assert torch.equal(blended[:, 2:], base[:, 2:])


def test_predicted_x0_is_blended_the_same_for_every_prediction_type():
    left, _ = halves()
    x0s = []
    for kind in PREDICTION_TYPES[:4]:
        eps, x, level = eps_seen(oracle(kind), regions=[(left, 0, 2.0)])
        x0s.append(predict_x0(eps, x, level, "epsilon"))
    for other in x0s[1:]:
        torch.testing.assert_close(other, x0s[0], rtol=1e-3, atol=1e-3)
