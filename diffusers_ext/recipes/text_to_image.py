"""The texts of a training run: its options, its tokenizer and encoder, and the way from a caption to the network."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers_ext.command_names import name_commands
from diffusers_ext.data.bpe_dropout import BPEDropout
from diffusers_ext.data.captions import EmbeddingTable, TokenTable
from diffusers_ext.draws import derived_seed
from diffusers_ext.guidance.texts import longest_text, masks_padding_by_default
from diffusers_ext.options import fixed_option, option, takes_keywords
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.recipes.presets import PRESETS
from diffusers_ext.recipes.pretrained import read_pretrained
from diffusers_ext.recipes.sample_grids import MAX_ROWS
from diffusers_ext.recipes.text_encoder import (
    SMALLEST_VOCABULARY,
    encoded_captions,
    load_text_encoder,
    longest_caption,
    new_text_encoder,
    train_tokenizer,
)


TEXT_CACHES, TEXT_CACHE_DTYPES = ("memory", "disk"), ("fp16", "fp32")
# Options that are given with a pipeline to begin with alone, or resolved by its path.
OF_PRETRAINED = (
    *("pretrained_pipeline", "lora_rank", "lora_alpha", "lora_target_modules"),
    *("path", "scheduler", "prediction_type", "loss_weighting"),
)

LONGEST_BY_DEFAULT = 77  # tokens of a text for an encoder that is made for the run, as many as CLIP's
NUM_PROMPTS = 8

PICTURES = {
    "samples.png": "samples, a row for each text",
    "denoising.png": "x_t and the predicted x_0 on the way, decoded if they are latents",
}


@takes_keywords
@dataclass(frozen=True)
class TextConfig(DenoisingConfig):
    """Train a Gaussian diffusion model on images and their captions."""

    caption_column: str | None = fixed_option(
        None, "column of the captions; by default one of a usual name, or else the names of the labels", "texts"
    )
    caption_dropout: float = fixed_option(0.1, "probability of training an image with an empty text, for guidance")
    max_text_length: int | None = fixed_option(
        None, "tokens at which a text is cut; by default all that the encoder takes, or that the captions need"
    )
    mask_padding: bool | None = fixed_option(
        None, "hide the padding of a text from encoder and denoiser; by default no with CLIP and yes with others"
    )
    pool_context: bool = fixed_option(
        True, "tell each block the mean of a text's hidden states too, and not only what attention finds in them"
    )
    pretrained_text_encoder: str | None = fixed_option(
        None,
        "encoder that stays as it is: a folder or name of transformers, or a pipeline that has one; each caption is "
        "encoded once. Without it a text model of CLIP's kind is made and trained together with the denoiser",
        "text encoder that stays as it is",
        alias="text_encoder",
    )
    text_cache: Literal[TEXT_CACHES] = option(
        "memory", "where encoded captions are while training; both write a file", needs="pretrained_text_encoder"
    )
    text_cache_dtype: Literal[TEXT_CACHE_DTYPES] = fixed_option(
        "fp16", "numbers that encoded captions are kept in", needs="pretrained_text_encoder"
    )
    vocab_size: int = fixed_option(
        2000,
        "number of different tokens at most, learned from the captions",
        "text encoder made for the run",
        at_least=SMALLEST_VOCABULARY,
    )
    bpe_dropout: float = fixed_option(
        0.0,
        "probability with which two parts of a word are not merged into one token, anew for each image, so that unknown words "
        "are made of known parts (arXiv 1910.13267)",
    )
    text_hidden_size: int = fixed_option(128, "width of the text encoder", at_least=1)
    text_num_layers: int = fixed_option(2, "blocks of the text encoder", at_least=1)
    text_num_attention_heads: int | None = fixed_option(
        None, "its attention heads; by default one for each 64 of the width", at_least=1
    )
    validation_prompts: tuple[str, ...] | None = option(
        None, f"texts of the sample grids; by default {NUM_PROMPTS} of the captions", "sampling of texts"
    )
    guidance_scale: float = option(4.0, "classifier-free guidance of the sample grids; 1 is none")

    OF_NEW_ENCODER: ClassVar[tuple[str, ...]] = (
        *("vocab_size", "bpe_dropout", "text_hidden_size", "text_num_layers", "text_num_attention_heads"),
    )

    takes_texts: ClassVar[bool] = True
    # Without guidance in training, on top of which that of the calls would come, which texts have by default; and without the
    # learning rate that was found beside it.
    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        name: {option: value for option, value in options.items() if option not in left_out}
        for name, options in PRESETS.items()
        for left_out in [("model_guidance_scale", "learning_rate") if "model_guidance_scale" in options else ()]
    }
    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *DenoisingConfig.ESSENTIAL,
        *("caption_column", "pretrained_text_encoder", "validation_prompts"),
    )

    @property
    def origin(self) -> tuple[str, str | None]:
        how, name = super().origin
        if name is None and self.pretrained_text_encoder is not None:
            how = f"whose denoiser was trained from scratch, beside the text encoder of `{self.pretrained_text_encoder}`,"
        return how, name

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must be in [0, 1), got {self.caption_dropout:g}")
        if not 0 <= self.bpe_dropout < 1:
            raise ValueError(f"bpe_dropout must be in [0, 1), got {self.bpe_dropout:g}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in ("label_column", "num_classes", "label_names", "unconditional"):
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} has no meaning here, where captions are the condition: see caption_column")
        if self.data_mean == "class":
            raise ValueError("data_mean class is for labels, which captions are not: use data_mean overall")
        if self.path == "learned":
            raise ValueError(name_commands("path learned is for images without captions, of training/train_ddpm.py"))
        if self.streaming:
            raise ValueError("streaming reads no captions ahead, which are cut into tokens beforehand: leave it out")
        if self.pretrained_text_encoder is not None:
            for name in self.OF_NEW_ENCODER:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name} is of an encoder made for the run: leave it or pretrained_text_encoder out"
                    )
        if self.max_text_length is not None and self.max_text_length < 1 + self.num_special_tokens:
            raise ValueError(
                f"max_text_length must be at least {1 + self.num_special_tokens}, for the tokens of start and end and one of "
                f"the text, got {self.max_text_length}"
            )
        if self.text_hidden_size % self.text_heads:
            raise ValueError(
                f"text_hidden_size must be a multiple of text_num_attention_heads, got {self.text_hidden_size} and "
                f"{self.text_heads}"
            )
        if self.validation_prompts is not None and not 1 <= len(self.validation_prompts) <= MAX_ROWS:
            raise ValueError(
                f"validation_prompts must be 1 to {MAX_ROWS} texts, a row each, got {len(self.validation_prompts)}"
            )

    @property
    def num_special_tokens(self) -> int:
        """Tokens beside those of a text, as far as they are known before the tokenizer is."""
        return 2 if self.pretrained_text_encoder is None else 0

    @property
    def text_heads(self) -> int:
        """Attention heads of a new encoder."""
        if self.text_num_attention_heads is not None:
            return self.text_num_attention_heads
        width = self.text_hidden_size
        return next(heads for heads in range(max(width // 64, 1), 0, -1) if width % heads == 0)

    def _take_over(self) -> None:
        """The text encoder of a pipeline stays as it is, as do the ways in which its network saw texts."""
        super()._take_over()
        source = read_pretrained(self.pretrained_pipeline)
        theirs = {name: source.config.get(name) for name in ("max_text_length", "mask_padding")}
        theirs["pretrained_text_encoder"] = source.name
        for name, value in theirs.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(
                    f"{name} must be left out with --pretrained_pipeline {source.name}, which has it as {value}, got "
                    f"{getattr(self, name)}"
                )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "pool_context", bool(source.denoiser.get("pool_context")))

    def for_data(self, caption_column: str) -> DenoisingConfig:
        """The options by which images and captions are read: captions are labels with names."""
        names = [field.name for field in dataclasses.fields(DenoisingConfig)]
        values = {name: getattr(self, name) for name in names}
        if self.pretrained_pipeline is not None:  # whose path is nothing that the reading of images depends on
            values |= dict.fromkeys(OF_PRETRAINED)
        return DenoisingConfig(**values | {"label_column": caption_column})

    def prompts_of(self, captions: Sequence[str]) -> list[str]:
        """The texts of the sample grids."""
        if self.validation_prompts is not None:
            return list(self.validation_prompts)
        return some_prompts(captions)


def some_prompts(captions: Sequence[str]) -> list[str]:
    """Captions that are shown in a sample grid, evenly spread over them."""
    rows = np.linspace(0, len(captions) - 1, min(NUM_PROMPTS, len(captions)))
    return [captions[round(row)] for row in rows]


@dataclass(frozen=True)
class Texts:
    """The way from a caption to what a denoiser attends to.

    Attributes:
        trained: Whether the encoder is trained with the denoiser.
        max_length: Tokens at which a text is cut.
        mask_padding: Whether encoder and denoiser look away from the padding.
        dropout: What divides captions otherwise in training, and remembers how; None without.
    """

    config: TextConfig
    tokenizer: PreTrainedTokenizerBase
    text_encoder: PreTrainedModel
    trained: bool
    max_length: int
    mask_padding: bool
    dropout: BPEDropout | None = None

    @classmethod
    def of(cls, config: TextConfig, captions: Sequence[str]) -> "Texts":
        """The encoder that the options name, or a new one whose tokens are learned from the captions."""
        dropout = None
        if config.pretrained_text_encoder is not None:
            tokenizer, encoder = load_text_encoder(config.pretrained_text_encoder)
            max_length = longest_text(tokenizer, encoder, config.max_text_length)
        else:
            tokenizer = train_tokenizer(captions, config.vocab_size, LONGEST_BY_DEFAULT)
            if config.bpe_dropout:
                dropout = BPEDropout(tokenizer, config.bpe_dropout, config.seed)
            # A multiple of 8 leaves prompts some room.
            needed = min(-(-_longest_division(dropout, tokenizer, captions) // 8) * 8, LONGEST_BY_DEFAULT)
            max_length = tokenizer.model_max_length = config.max_text_length or needed
            torch.manual_seed(derived_seed(config.seed, 1))  # another seed than the denoiser's
            encoder = new_text_encoder(
                tokenizer,
                hidden_size=config.text_hidden_size,
                num_layers=config.text_num_layers,
                num_attention_heads=config.text_heads,
            )
        mask_padding = masks_padding_by_default(encoder) if config.mask_padding is None else config.mask_padding
        trained = config.pretrained_text_encoder is None
        return cls(config, tokenizer, encoder, trained, max_length, mask_padding, dropout)

    def table(self, captions: Sequence[str], device: torch.device) -> TokenTable | EmbeddingTable:
        """The tokens or embeddings that stand for the captions in a batch."""
        config = self.config
        if self.trained:
            length = self.max_length  # of padding that is seen; that which is hidden need not be so long
            if self.mask_padding:
                length = min(length, max(_longest_division(self.dropout, self.tokenizer, captions), 3))
            return TokenTable(self.tokenizer, captions, length, self.dropout)
        return encoded_captions(
            self.tokenizer,
            self.text_encoder,
            captions,
            max_length=self.max_length,
            mask_padding=self.mask_padding,
            dtype=config.text_cache_dtype,
            in_memory=config.text_cache == "memory",
            cache_dir=config.cache_dir,
            device=device,
        )


def _longest_division(dropout: BPEDropout | None, tokenizer: PreTrainedTokenizerBase, captions: Sequence[str]) -> int:
    """Tokens of the longest caption, the special ones included, however it is divided in training."""
    longest = longest_caption(tokenizer, captions)
    if dropout is None:
        return longest
    return max(longest, *(2 + len(tokens) for caption in captions for tokens in dropout.variants(caption)))
