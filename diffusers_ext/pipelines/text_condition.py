"""The texts of a call: how many images of each, what to lead away from, and whether it all fits the network."""

from collections.abc import Callable, Sequence

import torch
from diffusers.guiders import BaseGuidance
from torch import Tensor

from diffusers_ext.guidance.guiders import ClassifierGuidance, ComposedGuidance
from diffusers_ext.guidance.guiding import asks_for_unconditional
from diffusers_ext.guidance.texts import (
    TextEmbeds,
    context_width,
    encode_tokens,
    longest_text,
    masks_padding_by_default,
    tokenize,
)


# Of classifier-free guidance where neither the call nor the pipeline says otherwise.
DEFAULT_GUIDANCE_SCALE = 4.0


class TextCondition:
    """The texts of a call.

    Args:
        pipe: A pipeline with `encode_prompt` and `knows_empty_text`.
        prompt: What the images show: texts or their embeddings.
        negative: What to lead away from: one text, or one for each of `prompt`; `None` for the empty text.
        num_images_per_prompt: Images of each prompt, which come one after the other.
        of_regions: The text of each region of the image.

    Raises:
        ValueError: if they do not fit one another or the width of the denoiser's context.
    """

    weighted = False  # as labels can be
    default_guidance_scale = DEFAULT_GUIDANCE_SCALE

    def __init__(
        self,
        pipe,
        prompt: list[str] | TextEmbeds | None,
        negative: list[str] | TextEmbeds | None,
        num_images_per_prompt: int,
        of_regions: Sequence[str] = (),
    ):
        if prompt is None:
            raise ValueError("prompt or prompt_embeds must be given; an empty text stands for no text")
        number = num_images_per_prompt
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"num_images_per_prompt must be an integer of at least 1, got {number!r}")
        width = None if pipe.denoiser is None else context_width(pipe.denoiser)
        embeds = _embeds("prompt", prompt, pipe.encode_prompt, width)
        self.num_prompts, self.num_images_per_prompt = len(embeds.states), num_images_per_prompt
        count = self.num_prompts
        negative_is_text = negative is not None and not isinstance(negative, TextEmbeds)
        self.negative_is_empty = negative_is_text and not all(text.strip() for text in negative)
        if negative is not None:
            given = negative.states if isinstance(negative, TextEmbeds) else negative
            if len(given) not in (1, count):
                raise ValueError(f"negative_prompt must be one or one for each of {count} prompts, got {len(given)}")
            negative = _embeds("negative_prompt", negative, pipe.encode_prompt, width)
            negative = negative.expand(count).repeat_interleave(num_images_per_prompt)
        self.prompt, self.negative = embeds.repeat_interleave(num_images_per_prompt), negative
        self.per_image = {"prompt": self.prompt.states}
        self._empty: TextEmbeds | None = None
        # Whether any step asks for the unconditional prediction, or did before a callback changed the guidance.
        self._needs_negative = False
        self.of_regions = [self._text_of_region(pipe, text) for text in of_regions]

    def _text_of_region(self, pipe, text: str) -> TextEmbeds:
        if not isinstance(text, str):
            raise ValueError(f"regions of this pipeline must be of texts, (mask, text, weight), got {text!r}")
        if not self.can_guide(pipe):
            raise ValueError(
                "regions need a text from which the direction of each text is taken, and the denoiser was trained without "
                "empty texts (caption_dropout was 0): give a negative_prompt that is not empty"
            )
        self._needs_negative = True
        return pipe.encode_prompt([text])

    def encode_empty(self, pipe) -> None:
        """Encodes the empty text, to lead away from where the call has no negative one; afterwards no encoder is needed."""
        if self._empty is None:
            self._empty = pipe.encode_prompt([""])

    def can_guide(self, pipe) -> bool:
        """Whether there is, or can be made, something to lead away from that the denoiser knows."""
        if not pipe.knows_empty_text and (self.negative is None or self.negative_is_empty):
            return False
        return self.negative is not None or self._empty is not None or pipe.text_encoder is not None

    def for_each_image(self, values: Tensor) -> Tensor:
        """What is given once for each of several prompts, as often as each has images; anything else as it is."""
        if len(values) != self.num_prompts or self.num_prompts == 1:
            return values
        return values.repeat_interleave(self.num_images_per_prompt, dim=0)

    def check_count(self, name: str, count: int) -> None:
        """Refuses an argument that must be given once for each image, and is given `count` times."""
        images = len(self.prompt.states)
        if count != images:
            raise ValueError(
                f"{name} must be one or one for each of the {images} images (prompts times num_images_per_prompt), got "
                f"{count}"
            )

    def check(
        self,
        pipe,
        guider: BaseGuidance | None,
        timesteps: Tensor,
        guide: Sequence[bool],
        *,
        led_elsewhere: bool = False,
    ) -> None:
        """Refuses a guider that the components or the texts do not suffice for, and a negative text without one.

        Args:
            guide: In which of the steps it acts.
            led_elsewhere: Whether there is another condition to guide to, such as an image.

        Raises:
            ValueError: with what is missing.
        """
        if isinstance(guider, ClassifierGuidance | ComposedGuidance):
            raise ValueError(f"{type(guider).__name__} is for labels, and this pipeline has texts")
        if hasattr(guider, "check_pipeline"):
            guider.check_pipeline(pipe, None)
        needed = guider is not None and asks_for_unconditional(guider, timesteps, guide)
        # A callback may end the guidance that there was.
        if self.negative is not None and not (needed or self._needs_negative):
            raise ValueError(
                "negative_prompt needs guidance, which this call has none of: give a guidance_scale other than 1, or a "
                "guider that looks at the unconditional prediction, in some of the steps"
            )
        if needed and led_elsewhere and not self.can_guide(pipe):
            return  # the text stays as it is in both predictions
        if needed and not self.can_guide(pipe) and not pipe.knows_empty_text:
            raise ValueError(
                "guidance needs a text to lead away from that the denoiser knows, and it was trained without empty texts "
                "(caption_dropout was 0): give a negative_prompt that is not empty, or a guidance_scale of 1"
            )
        if needed and not self.can_guide(pipe):
            raise ValueError(
                "guidance needs something to lead away from: give negative_prompt_embeds together with prompt_embeds, or "
                "a pipeline with a tokenizer and a text_encoder, which encodes the empty text"
            )
        self._needs_negative |= needed

    def inputs(self, pipe, batch_size: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Pairs of the embeddings of texts and negative texts, and of their masks where tokens are masked."""
        positive = negative = self.prompt
        if self._needs_negative:
            if self.negative is None:
                self.encode_empty(pipe)
            negative = self._empty if self.negative is None else self.negative
        both = self._alike(pipe, [positive, negative], batch_size, device)
        pairs = {"encoder_hidden_states": tuple(embeds.states for embeds in both)}
        if both[0].mask is not None:
            pairs["encoder_attention_mask"] = tuple(embeds.mask for embeds in both)
        return pairs

    def region_inputs(self, pipe, batch_size: int, device: torch.device) -> list[dict[str, Tensor]]:
        """The embeddings of the text of each region, as `inputs` has those of the images."""
        inputs = []
        for embeds in self._alike(pipe, self.of_regions, batch_size, device):
            inputs.append({"encoder_hidden_states": embeds.states})
            if embeds.mask is not None:
                inputs[-1]["encoder_attention_mask"] = embeds.mask
        return inputs

    def _alike(self, pipe, texts: list[TextEmbeds], batch_size: int, device: torch.device) -> list[TextEmbeds]:
        """Texts with as many tokens as the longest of the call: what is added to the shorter ones is masked."""
        every = [self.prompt, *self.of_regions]
        if self._needs_negative:
            every.append(self._empty if self.negative is None else self.negative)
        length = max(embeds.states.shape[1] for embeds in every)
        with_mask = any(embeds.mask is not None or embeds.states.shape[1] < length for embeds in every)
        texts = [embeds.to(device, pipe.denoiser.dtype).expand(batch_size) for embeds in texts]
        return [embeds.padded(length, with_mask) for embeds in texts]


class TextEncodingMixin:
    """Texts to hidden states, for a pipeline with a `tokenizer`, a `text_encoder` and a `denoiser`."""

    @property
    def max_text_length(self) -> int:
        """Tokens at which a text is cut, the special ones included."""
        return longest_text(self.tokenizer, self.text_encoder, self.config.max_text_length)

    @property
    def mask_padding(self) -> bool:
        """Whether encoder and denoiser look away from the padding of a text."""
        asked = self.config.mask_padding
        return masks_padding_by_default(self.text_encoder) if asked is None else asked

    @property
    def knows_empty_text(self) -> bool:
        """Whether the denoiser was trained with empty texts too, which guidance leads away from by default."""
        return bool(self.denoiser.config.get("learned_unconditional", True))

    @torch.no_grad()
    def encode_prompt(self, prompt: str | Sequence[str]) -> TextEmbeds:
        """Hidden states and mask of one or several texts, to be given to the call as `prompt_embeds` and its mask.

        Raises:
            ValueError: if the pipeline has no tokenizer and text encoder.
        """
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                "a text needs a pipeline with a tokenizer and a text_encoder: give those, or prompt_embeds"
            )
        prompt = [prompt] if isinstance(prompt, str) else prompt
        ids, mask = tokenize(self.tokenizer, prompt, self.max_text_length, full_length=not self.mask_padding)
        device = self._execution_device
        return encode_tokens(self.text_encoder, ids.to(device), mask.to(device), self.mask_padding)


def texts_or_embeds(
    name: str, text: str | Sequence[str] | None, embeds: Tensor | None, mask: Tensor | None
) -> Sequence[str] | TextEmbeds | None:
    """An argument of a call that is given as texts or as their embeddings; `None` if it is not given.

    Raises:
        ValueError: if it is given in both ways, or as something else.
    """
    if text is not None and embeds is not None:
        raise ValueError(f"{name} and {name}_embeds must not both be given")
    if embeds is None and mask is not None:
        raise ValueError(f"{name}_attention_mask belongs to {name}_embeds, which are not given")
    if embeds is not None:
        return TextEmbeds(embeds, mask)
    texts = [text] if isinstance(text, str) else text
    are_texts = isinstance(texts, list | tuple) and len(texts) and all(isinstance(each, str) for each in texts)
    if texts is not None and not are_texts:
        raise ValueError(f"{name} must be a text or a list of texts, got {text!r}")
    return texts


def _embeds(name: str, given: list[str] | TextEmbeds, encode: Callable, width: int | None) -> TextEmbeds:
    if not isinstance(given, TextEmbeds):
        return encode(given)
    states, mask = given
    if states.ndim != 3 or states.shape[2] != (width or states.shape[2]):
        raise ValueError(
            f"{name}_embeds must have shape (prompts, tokens, {width or 'cross_attention_dim'}), the denoiser's "
            f"cross_attention_dim, got {tuple(states.shape)}"
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
