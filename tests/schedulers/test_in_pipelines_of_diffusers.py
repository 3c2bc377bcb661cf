"""Swapped into diffusers' own pipelines, with tiny random weights: the same images where diffusers is right."""

import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    ControlNetModel,
    DDIMInverseScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LEditsPPPipelineStableDiffusion,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionDiffEditPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_ext.schedulers import (
    AnnealedLangevinScheduler,
    ExtDDIMInverseScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    ScoreSDEScheduler,
    VPredictionScheduler,
)


pytestmark = pytest.mark.filterwarnings("ignore:the first of")

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
WIDTH = 8


def make_unet(**kwargs):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
        **kwargs,
    ).eval()


def make_vae():
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    ).eval()


def embeds():
    g = torch.Generator().manual_seed(2)
    positive, negative = torch.randn(2, 1, 7, WIDTH, generator=g)
    return {"prompt_embeds": positive, "negative_prompt_embeds": negative}


def image():
    return torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def stable_diffusion(scheduler):
    pipe = StableDiffusionPipeline(make_vae(), None, None, make_unet(), scheduler, **NO_CHECKER)
    return pipe, {**embeds(), "height": 16, "width": 16}


def image_to_image(scheduler):
    pipe = StableDiffusionImg2ImgPipeline(make_vae(), None, None, make_unet(), scheduler, **NO_CHECKER)
    return pipe, {**embeds(), "image": image(), "strength": 0.6}


def inpaint(scheduler):
    pipe = StableDiffusionInpaintPipeline(make_vae(), None, None, make_unet(), scheduler, **NO_CHECKER)
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    return pipe, {**embeds(), "image": image(), "mask_image": mask, "height": 16, "width": 16, "strength": 0.9}


def stable_diffusion_xl(scheduler):
    unet = make_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=24 + WIDTH
    )
    pipe = StableDiffusionXLPipeline(make_vae(), None, None, None, None, unet, scheduler, add_watermarker=False)
    pooled = torch.ones(1, WIDTH)
    extra = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": -pooled}
    return pipe, {**embeds(), **extra, "height": 16, "width": 16}


def controlnet(scheduler):
    unet = make_unet()
    torch.manual_seed(4)
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8)).eval()
    pipe = StableDiffusionControlNetPipeline(make_vae(), None, None, unet, control, scheduler, **NO_CHECKER)
    return pipe, {**embeds(), "image": image(), "height": 16, "width": 16}


def animate(scheduler):
    torch.manual_seed(5)
    adapter = MotionAdapter(
        block_out_channels=(8, 16),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=4,
        use_motion_mid_block=False,
    )
    pipe = AnimateDiffPipeline(make_vae(), None, None, make_unet(), adapter, scheduler)
    return pipe, {**embeds(), "num_frames": 2, "height": 16, "width": 16}


def dit(scheduler):
    torch.manual_seed(6)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
        out_channels=8,
    )
    return DiTPipeline(transformer.eval(), make_vae(), scheduler), {"class_labels": [1, 2]}


def pixels(scheduler):
    torch.manual_seed(7)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    return DDPMPipeline(unet.eval(), scheduler), {"batch_size": 2}


PIPELINES = {
    "stable diffusion": stable_diffusion,
    "image to image": image_to_image,
    "inpaint": inpaint,
    "xl": stable_diffusion_xl,
    "controlnet": controlnet,
    "animatediff": animate,
    "dit": dit,
    "ddpm": pixels,
}


def run(make, scheduler, num_steps, **kwargs):
    pipe, call = make(scheduler)
    assert pipe.scheduler is scheduler
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        result = pipe(**call, **kwargs, num_inference_steps=num_steps, generator=generator, output_type="np")
    return np.asarray(result[0])


@pytest.mark.product
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    ("stock", "ours"), [(DDIMScheduler, ExtDDIMScheduler), (DDPMScheduler, ExtDDPMScheduler)], ids=["ddim", "ddpm"]
)
def test_same_images_where_diffusers_is_right(name, stock, ours):
    config = stock.from_config(STABLE_DIFFUSION).config
    expected = run(PIPELINES[name], stock.from_config(config), 10)
    images = run(PIPELINES[name], ours.from_config(config), 10)
    assert images.std() > 0.01
    np.testing.assert_allclose(images, expected, atol=2e-3)


@pytest.mark.product
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    ("other", "predictor"), [(ExtDDIMScheduler, "ode"), (ExtDDPMScheduler, "ancestral")], ids=["ode", "ancestral"]
)
def test_the_sde_of_a_model_of_betas_has_the_images_of_ddim_and_ddpm(name, other, predictor):
    """In every loop, from noise, from images and with masks; those end at the data, as "ode" does."""
    config = other.from_config(STABLE_DIFFUSION | {"set_alpha_to_one": True, "timestep_spacing": "trailing"}).config
    expected = run(PIPELINES[name], other.from_config(config), 5)
    images = run(PIPELINES[name], ScoreSDEScheduler.from_config(config, predictor=predictor), 5)
    np.testing.assert_allclose(images, expected, atol=2e-3)


def test_same_images_with_noise():
    """`eta` reaches the step by its name."""
    config = DDIMScheduler(**STABLE_DIFFUSION).config
    a, b, c = (
        run(stable_diffusion, cls.from_config(config), 10, eta=eta)
        for cls, eta in ((DDIMScheduler, 1.0), (ExtDDIMScheduler, 1.0), (ExtDDIMScheduler, 0.0))
    )
    np.testing.assert_allclose(b, a, atol=2e-3)
    assert np.abs(b - c).max() > 0.02


@pytest.mark.product
@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize(
    ("ours", "config", "num_steps"),
    [
        (ExtDDIMScheduler, {"timestep_spacing": "trailing", "steps_offset": 0}, 7),
        (ExtDDPMScheduler, {"timestep_spacing": "quadratic", "variance_type": "fixed_large"}, 3),
        (VPredictionScheduler, {"prediction_type": "v_prediction"}, 3),
        (ScoreSDEScheduler, {"corrector_steps": 1}, 3),
        (AnnealedLangevinScheduler, {"num_langevin_steps": 2, "prediction_type": "v_prediction"}, 3),
    ],
    ids=["ddim", "ddpm", "v", "sde", "langevin"],
)
def test_pipelines_run_at_other_settings(name, ours, config, num_steps):
    scheduler = ours.from_config({**STABLE_DIFFUSION, **config})
    images = run(PIPELINES[name], scheduler, num_steps)
    assert np.isfinite(images).all() and images.std() > 0.01


def test_custom_timesteps_reach_the_scheduler():
    images = [
        run(stable_diffusion, ExtDDIMScheduler(**STABLE_DIFFUSION), None, timesteps=timesteps)
        for timesteps in ([901, 701, 501, 301, 101], [901, 601, 101])
    ]
    assert np.abs(images[0] - images[1]).max() > 1e-3


def test_ddim_pipeline_takes_our_config():
    """It puts stock's class in place of any other, and so must find its config in ours."""
    unet = pixels(ExtDDIMScheduler())[0].unet
    pipe = DDIMPipeline(unet, ExtDDIMScheduler(beta_schedule="sigmoid_alpha_bar"))
    assert type(pipe.scheduler) is DDIMScheduler
    torch.testing.assert_close(
        pipe.scheduler.alphas_cumprod, ExtDDIMScheduler(beta_schedule="sigmoid_alpha_bar").alphas_cumprod
    )


@pytest.fixture(scope="module")
def text():
    """A text encoder and a tokenizer of single letters, for the pipelines that take nothing but prompts."""
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for letter in "abcdefghijklmnopqrstuvwxyz":
        vocab[letter] = len(vocab)
        vocab[f"{letter}</w>"] = len(vocab)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    torch.manual_seed(8)
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config).eval(), tokenizer


def test_ledits_keeps_our_scheduler_and_reconstructs(text):
    """It replaces whatever is no `DDIMScheduler`, and records noise that our step must put back exactly."""
    encoder, tokenizer = text
    scheduler = ExtDDIMScheduler(**STABLE_DIFFUSION)
    pipe = LEditsPPPipelineStableDiffusion(make_vae(), encoder, tokenizer, make_unet(), scheduler, **NO_CHECKER)
    assert pipe.scheduler is scheduler
    replaced = LEditsPPPipelineStableDiffusion(
        make_vae(), encoder, tokenizer, make_unet(), ExtDDPMScheduler(), **NO_CHECKER
    )
    assert not isinstance(replaced.scheduler, ExtDDPMScheduler)
    pipe.set_progress_bar_config(disable=True)
    source = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    inversion = pipe.invert(
        Image.fromarray(source), num_inversion_steps=10, skip=0.1, generator=torch.Generator().manual_seed(0)
    )
    edited = pipe(generator=torch.Generator().manual_seed(0), output_type="np").images
    reconstruction = np.asarray(inversion.vae_reconstruction_images[0], dtype=np.float32) / 255
    np.testing.assert_allclose(edited[0], reconstruction, atol=0.02)


@pytest.mark.parametrize(("stock", "ours"), [(DDIMInverseScheduler, ExtDDIMInverseScheduler)])
def test_diffedit_inverts_the_same(stock, ours, text):
    encoder, tokenizer = text
    results = []
    for inverse in (stock, ours):
        scheduler = ExtDDIMScheduler(**STABLE_DIFFUSION)
        pipe = StableDiffusionDiffEditPipeline(
            make_vae(),
            encoder,
            tokenizer,
            make_unet(),
            scheduler,
            None,
            None,
            inverse.from_config(scheduler.config),
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        kwargs = {"image": image(), "num_inference_steps": 10, "inpaint_strength": 0.8, "output_type": "np"}
        results.append(pipe.invert(prompt="a", generator=generator, **kwargs).latents)
    assert type(pipe.inverse_scheduler) is ours
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)
