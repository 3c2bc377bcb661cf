"""Texts as the condition: what prompt i says shows in image i, and diffusers makes the same images."""

import logging

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.modeling_utils import ModelMixin

import diffusers_ext
from diffusers_ext import DiTModel, ExtDDIMScheduler, TextGuidedDiffusionPipeline, VAEModel
from tiny import assert_same_output, assert_same_weights
from tiny_text import WIDTH, randomized, tiny_clip, tiny_t5, tiny_text_unet, tiny_tokenizer


class MeanOfContext(ModelMixin, ConfigMixin):
    """Predicts a clean image that is, everywhere, the mean of the context's tokens that are not masked."""

    @register_to_config
    def __init__(self, sample_size=4, in_channels=3, cross_attention_dim=3):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))
        self.calls = []

    def forward(self, sample, timestep, encoder_hidden_states, encoder_attention_mask=None, return_dict=True):
        context = encoder_hidden_states
        self.calls.append(len(sample))
        mask = torch.ones(context.shape[:2]) if encoder_attention_mask is None else encoder_attention_mask
        mask = mask.to(context)[..., None]
        mean = (context * mask).sum(1) / mask.sum(1)
        return (mean[:, :, None, None].expand_as(sample),)


def mean_pipeline(**components):
    scheduler = ExtDDIMScheduler(prediction_type="sample", clip_sample=False)
    return quiet(TextGuidedDiffusionPipeline(MeanOfContext(), scheduler, **components))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_pipeline(kind="clip", denoiser=None, **components):
    tokenizer = tiny_tokenizer()
    encoder = {"clip": tiny_clip, "t5": tiny_t5}[kind](tokenizer)
    scheduler = ExtDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    return quiet(
        TextGuidedDiffusionPipeline(denoiser or tiny_text_unet(), scheduler, tokenizer, encoder, **components)
    )


def seeds(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def colours(images):
    """The one colour of each latent image."""
    assert (images.amax((2, 3)) - images.amin((2, 3))).max() < 1e-4
    return images.mean((2, 3))


EMBEDS = torch.tensor([[[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]], [[-0.5, 0.0, 0.5], [-0.5, 0.4, 0.1]]])
SETTINGS = {"num_inference_steps": 3, "output_type": "latent"}


def test_prompt_i_conditions_image_i_in_the_order_of_the_prompts():
    images = mean_pipeline()(prompt_embeds=EMBEDS, num_images_per_prompt=3, generator=seeds(6), **SETTINGS).images
    expected = EMBEDS.mean(1).repeat_interleave(3, dim=0)
    torch.testing.assert_close(colours(images), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("num_negatives", [1, 2])
def test_negative_prompts_enter_where_the_unconditional_prediction_does(num_negatives, low_memory):
    """u + w (c - u), with c and u the two means."""
    negative = torch.tensor([[[0.2, -0.2, 0.0]], [[0.0, 0.1, 0.4]]])[:num_negatives]
    pipe = mean_pipeline()
    images = pipe(
        prompt_embeds=EMBEDS,
        negative_prompt_embeds=negative,
        guidance_scale=3.0,
        generator=seeds(2),
        low_memory=low_memory,
        **SETTINGS,
    ).images
    u, c = negative.mean(1), EMBEDS.mean(1)
    torch.testing.assert_close(colours(images), (u + 3 * (c - u)), atol=1e-4, rtol=0)
    assert pipe.denoiser.calls == ([2] * 6 if low_memory else [4] * 3)


@pytest.mark.parametrize("last_scale", [1.0, 2.0])
def test_a_callback_may_end_the_guidance_by_a_negative_prompt(last_scale):
    """The one colour of the image is what the last step predicts."""
    pipe, negative = mean_pipeline(), torch.tensor([[[0.2, -0.2, 0.0]]])

    def set_scale(pipe, step, timestep, tensors):
        pipe._guidance_scale = last_scale

    images = pipe(
        prompt_embeds=EMBEDS,
        negative_prompt_embeds=negative,
        guidance_scale=3.0,
        generator=seeds(2),
        callback_on_step_end=set_scale,
        **SETTINGS,
    ).images
    u, c = negative.mean(1), EMBEDS.mean(1)
    torch.testing.assert_close(colours(images), u + last_scale * (c - u), atol=1e-4, rtol=0)
    assert pipe.denoiser.calls == ([4, 2, 2] if last_scale == 1 else [4] * 3)


def test_a_weaker_network_of_another_precision_guides_texts_too():
    weak = randomized(tiny_text_unet(block_out_channels=(8, 8)))
    pipe = text_pipeline(weak_denoiser=weak)
    call = {"guider": diffusers_ext.WeakModelGuidance(2.0)} | SETTINGS
    expected = pipe("red dot", generator=seeds(1), **call).images
    assert (expected - pipe("red dot", guidance_scale=1.0, generator=seeds(1), **SETTINGS).images).abs().max() > 0.1
    weak.to(torch.bfloat16)
    images = pipe("red dot", generator=seeds(1), **call).images
    assert (images - expected).norm() < 0.05 * expected.norm()


def test_masked_tokens_have_no_influence():
    mask = torch.tensor([[1, 0], [0, 1]])
    images = [
        mean_pipeline()(
            prompt_embeds=torch.where(mask[..., None].bool(), EMBEDS, fill),
            prompt_attention_mask=mask,
            generator=seeds(2),
            **SETTINGS,
        ).images
        for fill in (0.0, 50.0)
    ]
    torch.testing.assert_close(colours(images[0]), torch.stack([EMBEDS[0, 0], EMBEDS[1, 1]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(*images, atol=0, rtol=0)


def denoiser_of(architecture, **options):
    if architecture == "unet":
        return tiny_text_unet(**options)
    torch.manual_seed(1)
    tiny = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "patch_size": 4}
    return randomized(DiTModel(sample_size=8, in_channels=3, cross_attention_dim=WIDTH, **tiny, **options))


@pytest.mark.product
@pytest.mark.parametrize("pool_context", [False, True])
@pytest.mark.parametrize("architecture", ["unet", "dit"])
def test_masked_tokens_have_no_influence_on_networks_of_ours(architecture, pool_context):
    pipe = text_pipeline("t5", denoiser_of(architecture, pool_context=pool_context))
    embeds, mask = pipe.encode_prompt(["red dot", "a long green bar"])
    assert not mask[0].all()
    call = {"generator": seeds(2), "prompt_attention_mask": mask, "guidance_scale": 1.0} | SETTINGS
    one = pipe(prompt_embeds=embeds, **call).images
    other = pipe(
        prompt_embeds=torch.where(mask[..., None], embeds, torch.full_like(embeds, 3.0)),
        **call | {"generator": seeds(2)},
    ).images
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    unmasked = pipe(prompt_embeds=embeds, **call | {"generator": seeds(2), "prompt_attention_mask": None}).images
    assert (unmasked - one)[0].abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "architecture"), [("clip", "unet"), ("t5", "unet"), ("t5", "dit")])
def test_image_i_is_the_same_alone_and_in_a_batch(kind, architecture):
    """With T5 the texts of a batch are padded to the longest of it, and masked."""
    pipe = text_pipeline(kind, denoiser_of(architecture, pool_context=True))
    prompts = ["red dot", "a much longer green bar", "blue", ""]
    together = pipe(prompts, "white edge", generator=seeds(4), **SETTINGS).images
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, "white edge", generator=seeds(1, first=i), **SETTINGS).images
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_embeddings_given_are_those_of_the_prompt(kind):
    pipe = text_pipeline(kind)
    of_text = pipe(["red dot"], "blue", generator=seeds(1), **SETTINGS).images
    (embeds, mask), (negative, negative_mask) = pipe.encode_prompt("red dot"), pipe.encode_prompt("blue")
    given = pipe(
        prompt_embeds=embeds,
        prompt_attention_mask=mask,
        negative_prompt_embeds=negative,
        negative_prompt_attention_mask=negative_mask,
        generator=seeds(1),
        **SETTINGS,
    ).images
    torch.testing.assert_close(of_text, given, atol=1e-5, rtol=0)


def test_guidance_of_one_costs_one_call_and_no_encoding_of_the_empty_text(monkeypatch):
    pipe, encoded = text_pipeline(), []
    encode = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda texts: encoded.append(texts) or encode(texts))
    pipe("red dot", guidance_scale=1.0, generator=seeds(1), **SETTINGS)
    assert encoded == [["red dot"]]
    pipe("red dot", generator=seeds(1), **SETTINGS)
    assert encoded[1:] == [["red dot"], [""]]


@pytest.mark.product
@pytest.mark.parametrize("pipeline_class", [DiffusionPipeline, diffusers_ext.DiffusionPipeline])
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_stock_diffusers_loads_what_was_saved(tmp_path, kind, pipeline_class):
    pipe = text_pipeline(kind, guider=ClassifierFreeGuidance(2.0), max_text_length=6, mask_padding=True)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(pipeline_class.from_pretrained(tmp_path))
    assert type(loaded) is TextGuidedDiffusionPipeline
    assert (loaded.max_text_length, loaded.mask_padding, loaded.guider.guidance_scale) == (6, True, 2.0)
    images = [p("green bar", generator=seeds(1), **SETTINGS).images for p in (pipe, loaded)]
    assert_same_weights(loaded.denoiser, pipe.denoiser)
    assert_same_weights(loaded.text_encoder, pipe.text_encoder)
    assert_same_output(*reversed(images))


def test_stable_diffusion_pipeline_makes_the_same_images(tmp_path):
    """U-Net and VAE of ours with a CLIP text model, DDIM, guidance and a negative prompt."""
    tokenizer = tiny_tokenizer()
    unet = tiny_text_unet(in_channels=4, out_channels=4, pool_context=True)
    vae = VAEModel(sample_size=16, in_channels=3, out_channels=3, block_out_channels=(8, 16), latent_channels=4)
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.0)
    parts = {"tokenizer": tokenizer, "text_encoder": tiny_clip(tokenizer), "vae": vae.eval()}
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    stock = StableDiffusionPipeline(
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **parts,
    )
    stock.save_pretrained(tmp_path)
    stock = quiet(StableDiffusionPipeline.from_pretrained(tmp_path))
    ours = quiet(TextGuidedDiffusionPipeline(unet, ExtDDIMScheduler.from_config(scheduler.config), **parts))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"prompt": ["red dot", "green bar"], "guidance_scale": 3.0, "num_inference_steps": 4, "output_type": "np"}
    theirs = stock(negative_prompt=["blue", "white"], latents=latents, height=16, width=16, **call).images
    mine = ours(negative_prompt=["blue", "white"], latents=latents, **call).images
    assert mine.shape == (2, 16, 16, 3) and np.ptp(mine) > 0.1
    np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_text_that_is_too_long_is_cut_with_a_warning(caplog):
    pipe = text_pipeline()
    logger = logging.getLogger("diffusers_ext.guidance.texts")
    logger.addHandler(caplog.handler)
    try:
        long = pipe.encode_prompt(["red dot red dot red dot red dot red dot", "red", "blue " * 9])
    finally:
        logger.removeHandler(caplog.handler)
    (message,) = {record.getMessage() for record in caplog.records}
    assert "is cut to the 8 that the text encoder takes" in message and "and 1 of the other texts" in message
    assert long.states.shape[1] == 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": "red", "negative_prompt": "blue", "guidance_scale": 1.0}, "negative_prompt needs guidance"),
        ({"prompt": "red", "negative_prompt": "blue", "guidance_interval": (0, 0)}, "negative_prompt needs guidance"),
        (
            {"prompt": "red", "guidance_scale": 1.0, "guider": ClassifierFreeGuidance(2.0)},
            "guidance_scale must not be given together with a guider",
        ),
        ({}, "prompt or prompt_embeds must be given"),
        ({"prompt": "red", "prompt_embeds": torch.zeros(1, 2, WIDTH)}, "must not both be given"),
        ({"prompt_embeds": torch.zeros(1, 2, WIDTH + 1)}, rf"shape \(prompts, tokens, {WIDTH}\)"),
        (
            {"prompt_embeds": torch.zeros(1, 2, WIDTH), "prompt_attention_mask": torch.zeros(1, 3)},
            "must have the shape",
        ),
        (
            {"prompt_embeds": torch.zeros(1, 2, WIDTH), "prompt_attention_mask": torch.zeros(1, 2)},
            "a token to attend to",
        ),
        ({"prompt": ["red", "blue"], "generator": seeds(3)}, "generator must be one or one for each of the 2 images"),
        ({"prompt": ["red", "blue"], "negative_prompt": ["a", "b", "c"]}, "one for each of 2 prompts, got 3"),
        ({"prompt": ["red", "blue"], "latents": torch.zeros(3, 3, 8, 8)}, "prompt has 2"),
        ({"prompt": 3}, "must be a text or a list of texts"),
        ({"prompt": "red", "num_images_per_prompt": 0}, "at least 1, got 0"),
        ({"prompt": "red", "guider": diffusers_ext.ClassifierGuidance()}, "is for labels"),
    ],
)
def test_bad_calls_say_what_must_hold(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        text_pipeline()(**call)


def test_bad_components_say_what_must_hold():
    tokenizer, scheduler = tiny_tokenizer(), ExtDDIMScheduler()
    encoder = tiny_clip(tokenizer)
    with pytest.raises(ValueError, match="must have cross-attention"):
        TextGuidedDiffusionPipeline(tiny_text_unet(cross_attention_dim=None), scheduler, tokenizer, encoder)
    with pytest.raises(ValueError, match=f"cross_attention_dim, 24, got {WIDTH}"):
        TextGuidedDiffusionPipeline(tiny_text_unet(cross_attention_dim=24), scheduler, tokenizer, encoder)
    with pytest.raises(ValueError, match="together or not at all"):
        TextGuidedDiffusionPipeline(tiny_text_unet(), scheduler, tokenizer)
    with pytest.raises(ValueError, match="at most 8"):
        TextGuidedDiffusionPipeline(tiny_text_unet(), scheduler, tokenizer, encoder, max_text_length=9)
    with pytest.raises(ValueError, match="give those, or prompt_embeds"):
        mean_pipeline()("red dot")
    with pytest.raises(ValueError, match="something to lead away from"):
        mean_pipeline()(prompt_embeds=EMBEDS, guidance_scale=2.0)
