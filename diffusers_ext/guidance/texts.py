"""Between texts and what a denoiser attends to: tokens, and the hidden states that an encoder of transformers makes.

A text is cut into tokens and padded to a common length. Whether the padding is hidden is a matter of how the encoder
and the denoiser were trained, and both must be used the same way again:

    CLIP      sees the padding, and so does the denoiser: all texts have the full length, as in Stable Diffusion
    others    the padding is masked in the encoder and in the denoiser, and has no influence
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers.utils import logging
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.get_logger(__name__)

# Encoders that see their padding by default.
SEE_PADDING = ("clip_text_model", "clip")

# A tokenizer without a limit of its own has this as its limit or more, and its texts are cut at `DEFAULT_LENGTH`.
_NO_LIMIT = 100_000
DEFAULT_LENGTH = 256


class TextEmbeds(NamedTuple):
    """Hidden states of texts, as a denoiser attends to them.

    `states`: shape `(texts, tokens, width)`; `mask`: true where to attend to, shape `(texts, tokens)`, or `None` for
    everywhere.
    """

    states: Tensor
    mask: Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> "TextEmbeds":
        return TextEmbeds(self.states.to(device, dtype), None if self.mask is None else self.mask.to(device))

    def repeat_interleave(self, count: int) -> "TextEmbeds":
        """Each text `count` times, one after the other."""
        return TextEmbeds(*(None if part is None else part.repeat_interleave(count, dim=0) for part in self))

    def expand(self, count: int) -> "TextEmbeds":
        """One text repeated `count` times; `count` texts stay as they are."""
        return TextEmbeds(*(None if part is None else part.expand(count, *part.shape[1:]) for part in self))

    def padded(self, length: int, with_mask: bool) -> "TextEmbeds":
        """At least `length` tokens, of which those that are added are masked; with a mask if asked for or needed."""
        states, mask = self
        missing = length - states.shape[1]
        if mask is None and (with_mask or missing > 0):
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        if missing > 0:
            states = nn.functional.pad(states, (0, 0, 0, missing))
            mask = nn.functional.pad(mask, (0, missing))
        return TextEmbeds(states, mask)


def width_of(text_encoder: PreTrainedModel) -> int:
    """Width of the hidden states of an encoder."""
    config = text_encoder.config
    for name in ("d_model", "hidden_size"):
        if getattr(config, name, None):
            return getattr(config, name)
    return config.get_text_config().hidden_size


def context_width(denoiser: nn.Module) -> int | None:
    """Width of what a denoiser attends to, or `None` if it attends to nothing."""
    config = denoiser.config
    # diffusers' U-Nets may bring another width to their own.
    return config.get("encoder_hid_dim") or config.get("cross_attention_dim")


def masks_padding_by_default(text_encoder: PreTrainedModel) -> bool:
    """Whether the padding of this kind of encoder is hidden; see the top of the module."""
    return text_encoder.config.model_type not in SEE_PADDING


def longest_text(tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, asked: int | None = None) -> int:
    """Tokens at which a text is cut: as asked for, or all that tokenizer and encoder can take.

    Raises:
        ValueError: if they cannot take as many as asked for.
    """
    known = [tokenizer.model_max_length, getattr(text_encoder.config, "max_position_embeddings", None)]
    known = [limit for limit in known if limit is not None and 0 < limit < _NO_LIMIT]
    if asked is None:
        return min(known, default=DEFAULT_LENGTH)
    special = tokenizer.num_special_tokens_to_add()
    if not special < asked <= min(known, default=asked):
        limit = f" and at most {min(known)}, which is what the text encoder takes" if known else ""
        raise ValueError(
            f"max_text_length must be at least {special + 1}, {special} special tokens and one of the text{limit}, got {asked}"
        )
    return asked


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int, *, full_length: bool
) -> tuple[Tensor, Tensor]:
    """Numbers of the tokens and mask, 1 where there is text, both int64 of shape `(texts, tokens)`.

    A text that is too long is cut at its end, with a warning that names what is lost. One without any token, as the empty
    text is to a tokenizer that adds none, is one token of padding that is not hidden.

    Args:
        full_length: Pad to `max_length`, and not only to the longest of the texts.

    Raises:
        ValueError: if the tokenizer has no token to pad with.
    """
    texts, padding = list(texts), tokenizer.pad_token_id
    if padding is None:
        raise ValueError("the tokenizer has no token to pad with: set its pad_token, to its eos_token for example")
    uncut = tokenizer(texts, padding=False, truncation=False, verbose=False).input_ids
    # Padded here, since some tokenizers make no mask, and to all of them a text without tokens is nothing but padding.
    cut = tokenizer(texts, padding=False, truncation=True, max_length=max_length).input_ids
    cut = [tokens or [padding] for tokens in cut]
    length = max_length if full_length else max(map(len, cut))
    input_ids = torch.full((len(texts), length), padding)
    mask = torch.zeros_like(input_ids)
    for row, tokens in enumerate(cut):
        first = length - len(tokens) if tokenizer.padding_side == "left" else 0
        input_ids[row, first : first + len(tokens)] = torch.tensor(tokens)
        mask[row, first : first + len(tokens)] = 1
    too_long = [(text, ids) for text, ids in zip(texts, uncut, strict=True) if len(ids) > max_length]
    if too_long:  # one warning, and not one for each caption of a data set
        text, ids = too_long[0]
        lost = tokenizer.decode(ids[max_length - 1 : -1], skip_special_tokens=True)
        others = f"; and {len(too_long) - 1} of the other texts" if len(too_long) > 1 else ""
        logger.warning(
            f"a text of {len(ids)} tokens is cut to the {max_length} that the text encoder takes, so that its end has no "
            f"influence: {lost.strip()[:100]!r} of {text[:60]!r}{others}"
        )
    return input_ids, mask


def encode_tokens(
    text_encoder: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, mask_padding: bool
) -> TextEmbeds:
    """The last hidden states of the tokens, with a mask if the padding is hidden."""
    mask = attention_mask if mask_padding else None
    states = text_encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
    return TextEmbeds(states, None if mask is None else mask.bool())
