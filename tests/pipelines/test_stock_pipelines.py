"""Pipelines of diffusers become pipelines of ours, from disk and in memory, with the pictures that they make themselves."""

import json
import logging

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DanceDiffusionPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    IPNDMScheduler,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet1DModel,
    UNet2DConditionModel,
    VQModel,
)

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, TextGuidedDiffusionPipeline
from tiny import assert_same_weights, image_of, random_stock_dit, tiny_stock_unet, tiny_unet
from tiny_text import tiny_stable_diffusion


# Of images in [0, 1]; the two sum the same numbers, but for the order in which a CFG's batch or a step has them.
TOLERANCE = 1e-4


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both_ways(stock, folder):
    """A pipeline of ours from the saved folder, and from the one in memory."""
    stock.save_pretrained(folder)
    return [GuidedDiffusionPipeline.from_pretrained(folder), GuidedDiffusionPipeline.from_pipe(stock)]


@pytest.mark.parametrize(("stock_class", "scheduler"), [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_a_ddpm_or_ddim_pipeline_makes_the_same_pictures_here(stock_class, scheduler, tmp_path):
    stock = quiet(stock_class(tiny_stock_unet(), scheduler()))
    expected = image_of(stock)
    for ours in both_ways(stock, tmp_path):
        assert type(ours) is GuidedDiffusionPipeline and type(ours.scheduler) is scheduler
        assert_same_weights(ours.denoiser, stock.unet)
        assert np.abs(image_of(ours) - expected).max() < TOLERANCE


def test_a_dit_pipeline_keeps_its_labels_and_makes_the_same_pictures_here(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8).eval()
    dit = random_stock_dit(num_embeds_ada_norm=1000, out_channels=8)
    scheduler = DDIMScheduler(clip_sample=False)
    stock = quiet(DiTPipeline(dit, vae, scheduler, id2label={0: "tench, Tinca tinca", 1: "goldfish"}))
    ask = {"class_labels": [1], "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    expected = stock(**ask, generator=torch.Generator().manual_seed(0)).images
    stock.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())  # in which the published pipelines have them
    (tmp_path / "model_index.json").write_text(
        json.dumps(index | {"id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}})
    )
    for ours in (GuidedDiffusionPipeline.from_pretrained(tmp_path), GuidedDiffusionPipeline.from_pipe(stock)):
        quiet(ours)
        assert len(ours.labels) == 2 and ours.get_label_ids("goldfish") == [1]
        got = ours(**ask, generator=torch.Generator().manual_seed(0)).images
        assert np.abs(got - expected).max() < TOLERANCE


def test_an_ldm_pipeline_makes_the_same_pictures_here(tmp_path):
    torch.manual_seed(0)
    vqvae = VQModel(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=16,
        sample_size=8,
    ).eval()
    stock = quiet(LDMPipeline(vqvae, tiny_stock_unet(in_channels=3, out_channels=3), DDIMScheduler(clip_sample=False)))
    expected = image_of(stock)
    ours = GuidedDiffusionPipeline.from_pipe(stock)
    assert ours.vae is vqvae
    assert np.abs(image_of(ours) - expected).max() < TOLERANCE
    picture = np.full((1, 8, 8, 3), 0.5, np.float32)
    assert quiet(ours)(image=picture, strength=0.5, num_inference_steps=4, output_type="np").images.shape == (
        1,
        8,
        8,
        3,
    )


def test_a_stable_diffusion_pipeline_makes_the_same_pictures_of_a_text_here(tmp_path):
    torch.manual_seed(0)
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False)
    stock = quiet(tiny_stable_diffusion(scheduler))
    ask = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "np"}

    def picture(pipeline, text):
        return pipeline([text], **ask, generator=torch.Generator().manual_seed(0)).images

    text, other = "red dot", "green bar"
    expected = picture(stock, text)
    assert np.abs(picture(stock, other) - expected).max() > 20 * TOLERANCE
    stock.save_pretrained(tmp_path)
    for ours in (TextGuidedDiffusionPipeline.from_pretrained(tmp_path), TextGuidedDiffusionPipeline.from_pipe(stock)):
        quiet(ours)
        assert type(ours) is TextGuidedDiffusionPipeline
        assert_same_weights(ours.denoiser, stock.unet)
        assert_same_weights(ours.text_encoder, stock.text_encoder)
        assert np.abs(picture(ours, text) - expected).max() < TOLERANCE


def test_parts_and_options_that_are_given_take_the_place_of_the_saved_ones(tmp_path):
    DDPMPipeline(tiny_stock_unet(num_class_embeds=2), DDPMScheduler()).save_pretrained(tmp_path)
    scheduler = ExtDDIMScheduler()
    ours = GuidedDiffusionPipeline.from_pretrained(tmp_path, scheduler=scheduler, id2label={0: "shirt", 1: "shoe"})
    assert ours.scheduler is scheduler and ours.labels == {"shirt": 0, "shoe": 1}
    network = tiny_unet()
    ours = GuidedDiffusionPipeline.from_pretrained(tmp_path, denoiser=network, torch_dtype=torch.bfloat16)
    assert ours.denoiser is network and network.dtype == torch.bfloat16


def test_what_was_a_stock_pipeline_is_saved_and_loaded_as_ours(tmp_path):
    stock = DDPMPipeline(tiny_stock_unet(), DDPMScheduler())
    GuidedDiffusionPipeline.from_pipe(stock).save_pretrained(tmp_path)
    assert_same_weights(GuidedDiffusionPipeline.from_pretrained(tmp_path).denoiser, stock.unet)


def test_parts_that_do_not_fit_are_refused_with_what_they_are():
    def ours(stock):
        return GuidedDiffusionPipeline.from_pipe(stock)

    conditional = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    with_texts = StableDiffusionPipeline(
        None, None, None, conditional, DDIMScheduler(), None, None, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="without texts: .* got UNet2DConditionModel; for it there is TextGuided"):
        ours(with_texts)
    with pytest.raises(
        ValueError, match="with texts alone: .* got UNet2DModel; for it there is GuidedDiffusionPipeline"
    ):
        TextGuidedDiffusionPipeline.from_pipe(DDPMPipeline(tiny_stock_unet(), DDPMScheduler()))
    sound = UNet1DModel(
        sample_size=16, block_out_channels=(8,), down_block_types=("DownBlock1D",), up_block_types=("UpBlock1D",)
    )
    with pytest.raises(ValueError, match="got UNet1DModel"):
        ours(DanceDiffusionPipeline(sound, IPNDMScheduler()))
    with pytest.raises(ValueError, match="class_embed_type=None, got a UNet2DModel with 'timestep'"):
        ours(DDPMPipeline(tiny_stock_unet(class_embed_type="timestep"), DDPMScheduler()))
    sizeless = tiny_stock_unet()
    sizeless.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="sample_size=None: set it by"):
        ours(DDPMPipeline(sizeless, DDPMScheduler()))


def test_a_pipeline_without_a_network_is_refused_with_the_components_that_it_has():
    class Upscaler(DiffusionPipeline):
        def __init__(self, vae):
            super().__init__()
            self.register_modules(vae=vae)

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with pytest.raises(ValueError, match="Upscaler has none of them: its components are vae"):
        GuidedDiffusionPipeline.from_pipe(Upscaler(vae))


def test_components_that_are_left_out_are_named(caplog):
    class WithMore(DDPMPipeline):
        def __init__(self, unet, scheduler, other):
            super().__init__(unet, scheduler)
            self.register_modules(other=other)

    pipeline = WithMore(tiny_stock_unet(), DDPMScheduler(), DDPMScheduler())
    logger = logging.getLogger("diffusers_ext.pipelines.stock")
    logger.addHandler(caplog.handler)
    try:
        GuidedDiffusionPipeline.from_pipe(pipeline)
    finally:
        logger.removeHandler(caplog.handler)
    assert "no use for other of WithMore" in caplog.text
