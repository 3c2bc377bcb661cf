"""Texts, a tokenizer and text encoders small enough for any test; nothing is downloaded."""

import torch
from transformers import CLIPTextModel, PreTrainedModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from diffusers_ext import UNetModel
from diffusers_ext.trainer.text_encoder import new_text_encoder, train_tokenizer


COLOURS = ("red", "green", "blue", "white")
SHAPES = ("dot", "bar", "edge")
CAPTIONS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
WIDTH = 16


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


def randomized(model: PreTrainedModel | UNetModel) -> PreTrainedModel | UNetModel:
    """As they are made, some layers are zero, and so is the influence of the text."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()
