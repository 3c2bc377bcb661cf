"""Texts, a tokenizer and text encoders small enough for any test; nothing is downloaded."""

from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, PreTrainedModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from diffusers_ext import UNetModel
from diffusers_ext.recipes.text_encoder import new_text_encoder, train_tokenizer


COLOURS = ("red", "green", "blue", "white")
SHAPES = ("dot", "bar", "edge")
CAPTIONS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
WIDTH = 16


def picture(caption: str) -> np.ndarray:
    """8x8 pixels: a colour on grey, at a place that the second word says."""
    colour, shape = caption.split()
    pixels = np.full((8, 8, 3), 60, np.uint8)
    place = {"dot": np.s_[2:6, 2:6], "bar": np.s_[:, 3:5], "edge": np.s_[6:, :]}[shape]
    pixels[place] = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}[colour]
    return pixels


def save_pictures(folder: Path, split: str, captions: list[str], texts: list | None = None, **columns) -> str:
    """Pictures of these captions in parquet, with the texts in the column `text`.

    Args:
        texts: In place of the captions.
        columns: Further ones: their feature of `datasets` and their values.
    """
    columns = {"text": (datasets.Value("string"), captions if texts is None else texts)} | columns
    features = {"image": datasets.Image()} | {name: feature for name, (feature, _) in columns.items()}
    rows = {"image": [Image.fromarray(picture(caption)) for caption in captions]}
    rows |= {name: values for name, (_, values) in columns.items()}
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def tiny_tokenizer(max_length: int = 8) -> PreTrainedTokenizerFast:
    return train_tokenizer(CAPTIONS, vocab_size=300, max_length=max_length)


def tiny_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    torch.manual_seed(0)
    return randomized(new_text_encoder(tokenizer, hidden_size=WIDTH, num_layers=1, num_attention_heads=2))


def tiny_t5(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return randomized(T5EncoderModel(config))


def tiny_text_unet(**config) -> UNetModel:
    torch.manual_seed(1)
    tiny = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16)}
    tiny |= {"layers_per_block": 1, "cross_attention_dim": WIDTH}
    return randomized(UNetModel(**tiny | config))


def tiny_stable_diffusion(scheduler: SchedulerMixin) -> StableDiffusionPipeline:
    """One of diffusers, of 8x8 RGB images whose latents have as many pixels, in evaluation mode."""
    tokenizer = tiny_tokenizer()
    encoder = tiny_clip(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
    parts = (vae.eval(), encoder.eval(), tokenizer, unet.eval(), scheduler)
    return StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)


def randomized(model: PreTrainedModel | UNetModel) -> PreTrainedModel | UNetModel:
    """As they are made, some layers are zero, and so is the influence of the text."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()
