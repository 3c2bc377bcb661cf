"""`FlowScheduler` in pipelines of diffusers for models of flow matching, with tiny random weights: the same images."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)

from diffusers_ext import FlowScheduler


def components() -> dict:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=0.0,
    )
    texts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    return {"transformer": transformer.eval(), "vae": vae.eval(), **dict.fromkeys(texts)}


@pytest.mark.product
@pytest.mark.parametrize("config", [{"shift": 3.0}, {"stochastic_sampling": True}, {"use_karras_sigmas": True}])
@pytest.mark.parametrize("cls", [StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline])
def test_stable_diffusion_3_makes_the_same_images(cls, config):
    g = torch.Generator().manual_seed(0)
    prompt, pooled = torch.randn(2, 5, 16, generator=g), torch.randn(2, 16, generator=g)
    start = {"height": 16, "width": 16}
    if cls is StableDiffusion3Img2ImgPipeline:
        start = {"image": torch.rand(1, 3, 16, 16, generator=g), "strength": 0.6}
    pipe, images = cls(**components(), scheduler=FlowMatchEulerDiscreteScheduler(**config)), []
    pipe.set_progress_bar_config(disable=True)
    for _ in range(2):
        torch.manual_seed(1)  # of the steps, to which this pipeline does not hand its generator
        result = pipe(
            prompt_embeds=prompt[:1],
            negative_prompt_embeds=prompt[1:],
            pooled_prompt_embeds=pooled[:1],
            negative_pooled_prompt_embeds=pooled[1:],
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **start,
        )
        images.append(result.images)
        pipe.scheduler = FlowScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(images[1], images[0], rtol=1e-4, atol=1e-4)
