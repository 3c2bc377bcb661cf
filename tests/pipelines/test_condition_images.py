"""Pipelines of images made from images: what is given, what is guided by, what is refused."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, TextGuidedDiffusionPipeline, UNetModel, VAEModel
from diffusers_ext.conditions import ImageCondition
from tiny import assert_same_output
from tiny_text import tiny_clip, tiny_tokenizer


T = 400


def pipeline(condition="lowres:2", num_classes=None, noise=0.0, image_channels=1, **options):
    image_condition = ImageCondition.parse(condition, image_channels, (8, 8), noise)
    torch.manual_seed(0)
    model = UNetModel(
        8,
        image_channels,
        image_channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        num_classes=num_classes,
        condition_channels=image_condition.network_channels((8, 8)),
        condition_level=noise > 0,
        **options,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = image_condition.to_config()
    pipe = GuidedDiffusionPipeline(model, ExtDDIMScheduler(clip_sample=False), image_condition=config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def step(pipe, x, **call):
    """The network's output that one step from T was made with."""
    x0 = pipe(latents=x, timesteps=[T], output_type="latent", **call).images
    level = pipe.scheduler.schedule.level(T, x)
    return (x - level.alpha * x0) / level.sigma


def noise(count=2, channels=1):
    return torch.randn(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_network_sees_the_condition_at_its_own_size():
    pipe, x, low = pipeline(), noise(), draw(2, 1, 4, 4)
    seen = (2 * low - 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_same_output(step(pipe, x, condition_image=low), pipe.denoiser(x, T, condition_image=seen).sample)
    assert_same_output(step(pipe, x), pipe.denoiser(x, T).sample)
    one = [low[:1], low[0], low[0].permute(1, 2, 0).numpy()]
    expected = pipe.denoiser(x, T, condition_image=seen[:1].expand(2, -1, -1, -1)).sample
    for image in one:
        assert_same_output(step(pipe, x, condition_image=image), expected)
    assert len(pipe(condition_image=low, num_inference_steps=2).images) == 2


@pytest.mark.parametrize("num_classes", [None, 3])
@torch.no_grad()
def test_guidance_leads_away_from_the_prediction_without_image_and_label(num_classes):
    pipe, x, low = pipeline(num_classes=num_classes), noise(), draw(1, 1, 4, 4)
    seen = pipe.image_condition.shown(2 * low - 1).expand(2, -1, -1, -1)
    labels = None if num_classes is None else torch.tensor([1, 1])
    with_both = pipe.denoiser(x, T, labels, condition_image=seen).sample
    with_none = pipe.denoiser(x, T).sample
    call = {"condition_image": low} | ({} if num_classes is None else {"class_labels": 1})
    expected = with_none + 3 * (with_both - with_none)
    assert_same_output(step(pipe, x, guidance_scale=3.0, **call), expected)
    assert_same_output(step(pipe, x, guidance_scale=3.0, low_memory=True, **call), expected)
    if num_classes is not None:  # an image alone, and a label alone, are something to guide to
        of_image, of_label = pipe.denoiser(x, T, condition_image=seen).sample, pipe.denoiser(x, T, labels).sample
        got = step(pipe, x, guidance_scale=3.0, condition_image=low)
        assert_same_output(got, with_none + 3 * (of_image - with_none))
        assert_same_output(step(pipe, x, guidance_scale=3.0, class_labels=1), with_none + 3 * (of_label - with_none))


@torch.no_grad()
def test_what_was_not_trained_without_stays_in_both_predictions():
    x, low = noise(), draw(1, 1, 4, 4)
    pipe = pipeline(num_classes=3, learned_without_image=False)
    seen = pipe.image_condition.shown(2 * low - 1).expand(2, -1, -1, -1)
    of_label = pipe.denoiser(x, T, torch.tensor([1, 1]), condition_image=seen).sample
    null = pipe.denoiser(x, T, condition_image=seen).sample
    got = step(pipe, x, guidance_scale=2.0, class_labels=1, condition_image=low)
    assert_same_output(got, null + 2 * (of_label - null))
    with pytest.raises(ValueError, match="guidance needs class_labels to guide to, got None"):
        pipe(condition_image=low, guidance_scale=2.0)
    pipe = pipeline(num_classes=3, learned_unconditional=False)
    both = pipe.denoiser(x, T, torch.tensor([2, 2]), condition_image=seen).sample
    without = pipe.denoiser(x, T, torch.tensor([2, 2])).sample
    got = step(pipe, x, guidance_scale=2.0, class_labels=2, condition_image=low)
    assert_same_output(got, without + 2 * (both - without))
    with pytest.raises(ValueError, match="guidance needs a model with labels and a null label"):
        pipe(2, guidance_scale=2.0)


@torch.no_grad()
def test_regions_add_the_directions_of_labels_beside_the_image():
    pipe, x, low = pipeline(num_classes=3), noise(), draw(1, 1, 4, 4)
    seen = pipe.image_condition.shown(2 * low - 1).expand(2, -1, -1, -1)
    null, one = (pipe.denoiser(x, T, torch.tensor([k, k]), condition_image=seen).sample for k in (3, 1))
    mask = draw(8, 8).numpy()
    got = step(pipe, x, condition_image=low, regions=[(mask, 1, 2.0)])
    assert_same_output(got, null + 2 * torch.tensor(mask) * (one - null))


@torch.no_grad()
def test_noise_of_the_asked_level_is_put_into_the_condition_and_the_network_is_given_the_level():
    pipe, x, low = pipeline(noise=0.5), noise(), draw(1, 1, 4, 4)
    clean = 2 * low - 1
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    got = step(pipe, x, condition_image=low, condition_noise_level=0.3, generator=generators)
    eps = torch.cat([torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    noised = pipe.image_condition.shown((1 - 0.3**2) ** 0.5 * clean + 0.3 * eps)
    level = torch.tensor([0.3, 0.3])
    assert_same_output(got, pipe.denoiser(x, T, condition_image=noised, condition_level=level).sample)
    plain = pipe.denoiser(x, T, condition_image=pipe.image_condition.shown(clean).expand(2, -1, -1, -1)).sample
    assert_same_output(step(pipe, x, condition_image=low), plain)


@torch.no_grad()
def test_latents_see_the_pixels_that_they_stand_for():
    vae = VAEModel(sample_size=16, in_channels=1, out_channels=1, block_out_channels=(4, 4), latent_channels=2)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    side = vae.config.sample_size
    latents, channels = vae.latent_shape, vae.config.in_channels
    condition = ImageCondition.parse("edges", channels, (side, side))
    width = condition.network_channels(latents[1:])
    assert width == (side // latents[1]) ** 2
    model = UNetModel(
        latents[1], latents[0], latents[0], block_out_channels=(8,), layers_per_block=1, condition_channels=width
    )
    torch.nn.init.normal_(model.conv_out.weight)
    pipe = GuidedDiffusionPipeline(
        model, ExtDDIMScheduler(clip_sample=False), vae, image_condition=condition.to_config()
    )
    pipe.set_progress_bar_config(disable=True)
    x, photo = torch.randn(1, *latents), draw(1, channels, side, side)
    made = pipe.condition_from_image(photo)
    assert made.shape == (1, 1, side, side)
    seen = condition.for_network(condition.of_images(2 * photo - 1), latents[1:])
    x0 = pipe(latents=x, timesteps=[T], output_type="latent", condition_image=made).images
    level = pipe.scheduler.schedule.level(T, x)
    expected = pipe.denoiser(x, T, condition_image=seen).sample
    assert_same_output((x - level.alpha * x0) / level.sigma, expected)


def test_the_condition_is_made_of_an_image_as_in_training_and_is_saved(tmp_path):
    pipe = pipeline("grey", image_channels=3)
    photo = Image.fromarray((255 * draw(8, 8, 3)).byte().numpy())
    made = pipe.condition_from_image(photo)
    expected = np.asarray(photo) @ [0.299, 0.587, 0.114] / 255
    np.testing.assert_allclose(made[0, 0].numpy(), expected, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.image_condition == pipe.image_condition == ImageCondition("grey", 1, 3, (8, 8))
    x = noise(1, 3)
    assert_same_output(step(loaded, x, condition_image=made), step(pipe, x, condition_image=made))


@torch.no_grad()
def test_texts_and_condition_images_together():
    tokenizer = tiny_tokenizer()
    encoder = tiny_clip(tokenizer)
    model = UNetModel(
        8,
        1,
        1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=encoder.config.hidden_size,
        condition_channels=1,
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe = TextGuidedDiffusionPipeline(model, ExtDDIMScheduler(clip_sample=False), tokenizer, encoder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.image_condition == ImageCondition("given", 1, 1, (8, 8))
    x, image = noise(1), draw(1, 1, 8, 8)
    cat, empty = (pipe.encode_prompt([text]).states for text in ("a cat", ""))
    both = model(x, T, encoder_hidden_states=cat, condition_image=2 * image - 1).sample
    none = model(x, T, encoder_hidden_states=empty).sample
    got = step(pipe, x, prompt="a cat", condition_image=image, guidance_scale=2.5)
    assert_same_output(got, none + 2.5 * (both - none))


@pytest.mark.parametrize(
    "options, call, message",
    [
        ({}, {"condition_image": torch.zeros(1, 1, 8, 8)}, "condition_image must be images of low resolution of 4x4 in 1 "
         r"channel, and so of 4x4, got 8x8; pipe.condition_from_image\(image\) makes it"),
        ({}, {"condition_image": torch.zeros(1, 3, 4, 4)}, "condition_image must have 1 channels"),
        ({}, {"condition_image": torch.full((1, 1, 4, 4), 2.0)}, r"condition_image must have finite values in \[0, 1\]"),
        ({"learned_without_image": False}, {}, r"condition_image must be given, images of low resolution of 4x4 .*dropout was 0"),
        ({}, {"condition_image": torch.zeros(3, 1, 4, 4), "batch_size": 2}, "batch_size has 2, condition_image has 3"),
        ({}, {"condition_image": torch.zeros(1, 1, 4, 4), "condition_noise_level": 0.1}, "was trained without noise"),
        ({"noise": 0.2}, {"condition_image": torch.zeros(1, 1, 4, 4), "condition_noise_level": 0.3}, r"in \[0, 0.2\]"),
        ({"noise": 0.2}, {"condition_noise_level": 0.1}, "condition_noise_level is of a condition_image, which is not given"),
        ({}, {"guidance_scale": 2.0}, "guidance needs a model with labels and a null label"),
    ],
)  # fmt: skip
def test_calls_that_do_not_fit_are_refused(options, call, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**options)(**call, num_inference_steps=2)


def test_images_are_inverted_under_their_condition_image():
    pipe, low, photo = pipeline(learned_without_image=False), draw(1, 1, 4, 4), draw(1, 1, 8, 8)
    latents = pipe.invert(photo, condition_image=low, num_inference_steps=30, num_refinements=2)
    call = {"num_inference_steps": 30, "output_type": "pt", "condition_image": low}
    again = pipe(latents=latents, **call).images
    torch.testing.assert_close(again, photo, rtol=0, atol=0.02)  # of the steps and the last of them
    both = pipe.interpolate(photo, 1 - photo, 3, condition_image=low, num_inference_steps=4, output_type="pt")
    assert both.shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="condition_image must be given"):
        pipe.invert(photo, num_inference_steps=2)


def test_a_series_has_a_condition_of_its_own_length():
    model = UNetModel(8, 1, 1, block_out_channels=(8,), layers_per_block=1, dims=1, condition_channels=2)
    pipe = GuidedDiffusionPipeline(model, ExtDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    series = pipe(condition_image=draw(1, 2, 8), num_inference_steps=2, output_type="pt").images
    assert series.shape == (1, 1, 8) and pipe.image_condition.size == (8,)


def test_pipelines_that_do_not_fit_are_refused():
    plain = UNetModel(8, 1, 1, block_out_channels=(8,), layers_per_block=1)
    condition = ImageCondition.parse("edges", 1, (8, 8)).to_config()
    with pytest.raises(ValueError, match="image_condition is of a denoiser with condition_channels"):
        GuidedDiffusionPipeline(plain, ExtDDIMScheduler(), image_condition=condition)
    pipe = GuidedDiffusionPipeline(plain, ExtDDIMScheduler())
    with pytest.raises(ValueError, match="condition_image was given, but the model was trained without: leave it out"):
        pipe(condition_image=torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="condition_from_image is of pipelines with condition images"):
        pipe.condition_from_image(torch.zeros(1, 1, 8, 8))
    two = UNetModel(8, 1, 1, block_out_channels=(8,), layers_per_block=1, condition_channels=2)
    with pytest.raises(
        ValueError, match="the denoiser's 2 condition_channels, got line art of 8x8 in 1 channel, which are 1"
    ):
        GuidedDiffusionPipeline(two, ExtDDIMScheduler(), image_condition=condition)
    noisy = ImageCondition("given", 2, 1, (8, 8), noise=0.3).to_config()
    with pytest.raises(ValueError, match="image_condition must have noise exactly if the denoiser takes its level"):
        GuidedDiffusionPipeline(two, ExtDDIMScheduler(), image_condition=noisy)
    with pytest.raises(ValueError, match="weak_denoiser must have no condition_channels or the denoiser's 2, got 1"):
        weak = UNetModel(8, 1, 1, block_out_channels=(8,), layers_per_block=1, condition_channels=1)
        GuidedDiffusionPipeline(two, ExtDDIMScheduler(), weak_denoiser=weak)
