"""The texts of a call: how many images of each, what to lead away from, and whether it all fits the network."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers_ext.guidance.texts import TextEmbeds, longest_text, width_of
from diffusers_ext.pipelines.checks import refuse_wrapped


def context_width(denoiser: nn.Module) -> int | None:
    """Width of what a denoiser attends to, or `None` if it attends to nothing."""
    config = denoiser.config
    # diffusers' U-Nets may bring another width to their own.
    return config.get("encoder_hid_dim") or config.get("cross_attention_dim")


def check_text_components(
    denoiser: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    text_encoder: PreTrainedModel | None,
    weak_denoiser: nn.Module | None,
    max_text_length: int | None,
) -> None:
    """Refuses components that do not fit one another.

    Raises:
        ValueError: with what differs.
    """
    for name, network in {"denoiser": denoiser, "text_encoder": text_encoder, "weak_denoiser": weak_denoiser}.items():
        refuse_wrapped(name, network)
    width = context_width(denoiser)
    if width is None:
        raise ValueError(
            f"denoiser must have cross-attention to look at texts, got a {type(denoiser).__name__} with "
            "cross_attention_dim=None"
        )
    if (tokenizer is None) != (text_encoder is None):
        raise ValueError("tokenizer and text_encoder must be given together or not at all, got one of them")
    if text_encoder is None:
        if max_text_length is not None:
            raise ValueError(f"max_text_length has no meaning without a text_encoder, got {max_text_length}")
    else:
        if width_of(text_encoder) != width:
            raise ValueError(
                f"text_encoder must have hidden states of the denoiser's cross_attention_dim, {width}, got "
                f"{width_of(text_encoder)}"
            )
        longest_text(tokenizer, text_encoder, max_text_length)
    if weak_denoiser is not None and context_width(weak_denoiser) != width:
        raise ValueError(
            f"weak_denoiser must have the denoiser's cross_attention_dim, {width}, got {context_width(weak_denoiser)}"
        )


@dataclass
class TextCondition:
    """What the images of a call are to look like, and what not.

    Attributes:
        prompt: Of each image.
        negative: Of each image, or of all; `None` for the empty text.
        negative_is_empty: Whether that is the empty text for any of the images, said in words.
        encode: Gives the embeddings of texts.
        needs_negative: Whether any step asks for the unconditional prediction.
    """

    prompt: TextEmbeds
    negative: TextEmbeds | None
    encode: Callable[[list[str]], TextEmbeds]
    negative_is_empty: bool = False
    needs_negative: bool = False
    _empty: TextEmbeds | None = None

    @classmethod
    def of(
        cls,
        prompt: list[str] | TextEmbeds | None,
        negative: list[str] | TextEmbeds | None,
        encode: Callable[[list[str]], TextEmbeds],
        num_images_per_prompt: int,
        width: int,
    ) -> "TextCondition":
        """From texts or embeddings as they are given to a call.

        Raises:
            ValueError: if they do not fit one another or the width of the denoiser's context.
        """
        if prompt is None:
            raise ValueError("prompt or prompt_embeds must be given; an empty text stands for no text")
        if num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}")
        embeds = _embeds("prompt", prompt, encode, width)
        count = len(embeds.states)
        is_empty = isinstance(negative, list) and not all(text.strip() for text in negative)
        if negative is not None:
            given = negative.states if isinstance(negative, TextEmbeds) else negative
            if len(given) not in (1, count):
                raise ValueError(f"negative_prompt must be one or one for each of {count} prompts, got {len(given)}")
            negative = _embeds("negative_prompt", negative, encode, width)
            negative = negative.expand(count).repeat_interleave(num_images_per_prompt)
        return cls(embeds.repeat_interleave(num_images_per_prompt), negative, encode, is_empty)

    @property
    def has_negative(self) -> bool:
        """Whether the call says what to lead away from."""
        return self.negative is not None

    def can_guide(self, pipe) -> bool:
        """Whether there is, or can be made, something to lead away from that the denoiser knows."""
        if not pipe.knows_empty_text and (self.negative is None or self.negative_is_empty):
            return False
        return self.has_negative or pipe.text_encoder is not None

    def check_count(self, name: str, count: int) -> None:
        """Refuses so many of an argument that must be there once for each image."""
        images = len(self.prompt.states)
        if count != images:
            raise ValueError(
                f"{name} must be one or one for each of the {images} images (prompts times num_images_per_prompt), got "
                f"{count}"
            )

    def pairs(self, batch_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
        """What the network is called with, for the conditional and for the unconditional prediction."""
        positive = negative = self.prompt
        if self.needs_negative:
            if self.negative is None and self._empty is None:
                self._empty = self.encode([""])
            negative = self._empty if self.negative is None else self.negative
        both = [embeds.to(device, dtype).expand(batch_size) for embeds in (positive, negative)]
        # Those of one pass have the same number of tokens; what is added to the shorter ones is masked.
        length = max(embeds.states.shape[1] for embeds in both)
        with_mask = any(embeds.mask is not None or embeds.states.shape[1] < length for embeds in both)
        both = [embeds.padded(length, with_mask) for embeds in both]
        pairs = {"encoder_hidden_states": tuple(embeds.states for embeds in both)}
        if with_mask:
            pairs["encoder_attention_mask"] = tuple(embeds.mask for embeds in both)
        return pairs


def _embeds(name: str, given: list[str] | TextEmbeds, encode: Callable, width: int) -> TextEmbeds:
    if not isinstance(given, TextEmbeds):
        return encode(given)
    states, mask = given
    if states.ndim != 3 or states.shape[2] != width:
        raise ValueError(
            f"{name}_embeds must have shape (prompts, tokens, {width}), the denoiser's cross_attention_dim, got "
            f"{tuple(states.shape)}"
        )
    if mask is None:
        return given
    if mask.shape != states.shape[:2]:
        raise ValueError(
            f"{name}_attention_mask must have the shape of {name}_embeds without their width, {tuple(states.shape[:2])}, "
            f"got {tuple(mask.shape)}"
        )
    if not mask.bool().any(1).all():
        raise ValueError(f"{name}_attention_mask must leave each prompt a token to attend to")
    return TextEmbeds(states, mask.bool())
