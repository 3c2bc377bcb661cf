"""Text encoders for a training run: one that is there and stays as it is, or a small one of CLIP's kind made for it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError

import datasets
import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from diffusers_ext.atomic_files import finish_replacing
from diffusers_ext.data.captions import EmbeddingTable, embed_captions
from diffusers_ext.guidance.texts import encode_tokens, longest_text, tokenize, width_of
from diffusers_ext.untrusted import check_attention, check_component_folder


START, END = "<|startoftext|>", "<|endoftext|>"
# Each byte is a token, so that any text can be written, and there are the two special ones.
SMALLEST_VOCABULARY = 258


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-pair tokens of lower-case text (Sennrich et al. 2016), learned from the captions; any text can be written.

    Args:
        vocab_size: Largest number of tokens, the 256 bytes and two special ones included.
        max_length: Tokens at which a text is cut.

    Raises:
        ValueError: if the vocabulary has no room for the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY}: the bytes and two special tokens, got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    special = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END, model_max_length=max_length
    )


def longest_caption(tokenizer: PreTrainedTokenizerBase, captions: Iterable[str]) -> int:
    """Tokens of the longest caption, the special ones included."""
    return max(map(len, tokenizer(list(captions), verbose=False).input_ids))


def new_text_encoder(
    tokenizer: PreTrainedTokenizerBase, *, hidden_size: int, num_layers: int, num_attention_heads: int
) -> CLIPTextModel:
    """A text model of CLIP's kind for a tokenizer, with new weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            projection_dim=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_attention_heads,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def load_text_encoder(name: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the encoder of a folder, of a pipeline that has both, or of a name on the Hub; not trained.

    Raises:
        ValueError: if there are none, if the encoder has no hidden states, or if a pipeline that has it cannot be loaded.
    """
    finish_replacing(name)
    is_pipeline = (Path(name) / "text_encoder" / "config.json").is_file()
    check_component_folder(Path(name, "text_encoder") if is_pipeline else name)
    try:
        # Said, since transformers would ask on the terminal whether to run what lies beside it.
        options = {"trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(
            name, **options | ({"subfolder": "tokenizer"} if is_pipeline else {})
        )
        subfolder = {"subfolder": "text_encoder"} if is_pipeline else {}
        config = AutoConfig.from_pretrained(name, **options, **subfolder)
        check_attention({"attn_implementation": config._attn_implementation}, name)
        if config.model_type == "clip":  # a whole CLIP, of which the text model is wanted
            encoder = CLIPTextModel.from_pretrained(name, **subfolder)
        else:
            known = type(config) in AutoModelForTextEncoding._model_mapping
            encoder = (AutoModelForTextEncoding if known else AutoModel).from_pretrained(name, **subfolder)
    except (OSError, ValueError, KeyError, ImportError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"--pretrained_text_encoder {name} cannot be loaded: {error}") from error
    if encoder.config.is_encoder_decoder:
        encoder = encoder.get_encoder()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise ValueError(f"--pretrained_text_encoder {name} has a tokenizer without a token to pad with")
    encoder = encoder.eval().requires_grad_(False)
    _check_encoder(name, tokenizer, encoder)
    return tokenizer, encoder


@torch.no_grad()
def _check_encoder(name: str, tokenizer: PreTrainedTokenizerBase, encoder: PreTrainedModel) -> None:
    """Before training, and not when its pipeline is loaded afterwards."""
    kind = type(encoder).__name__
    if getattr(transformers, kind, None) is not type(encoder):
        raise ValueError(
            f"--pretrained_text_encoder {name} is a {kind}, which transformers loads only as a part of a larger model, so that "
            "no pipeline with it could be loaded: take a text encoder with a class of its own, as CLIP, T5 and BERT have"
        )
    try:
        tokens = tokenize(tokenizer, ["a"], longest_text(tokenizer, encoder), full_length=False)
        states = encode_tokens(encoder, *tokens, mask_padding=True).states
    except Exception as error:  # what a model raises that is not called with tokens
        raise ValueError(
            f"--pretrained_text_encoder {name} is a {kind}, which has no hidden states of tokens: {error}"
        ) from error
    if states.shape[-1] != width_of(encoder):
        raise ValueError(
            f"--pretrained_text_encoder {name} must have hidden states of its config's width, {width_of(encoder)}, got "
            f"{states.shape[-1]}"
        )


def encoded_captions(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    captions: Sequence[str],
    *,
    max_length: int,
    mask_padding: bool,
    dtype: str,
    in_memory: bool,
    cache_dir: str | None,
    device: torch.device,
) -> EmbeddingTable:
    """The hidden states that an encoder has of each caption, made on a device, which the encoder leaves again, and kept in a file.

    Args:
        max_length: Tokens at which a text is cut; those that are hidden where all texts are shorter are left out.
        dtype: "fp16" or "fp32", in which they are kept.
        in_memory: Read the file, rather than map it.
        cache_dir: That of `datasets` if None.
    """
    # Padding that is seen must be as long as it will be when images are made; that which is not, need not.
    if mask_padding:
        max_length = min(max_length, max(longest_caption(tokenizer, captions), 3))
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "diffusers_ext"
    how = {"max_length": max_length, "mask_padding": mask_padding, "dtype": dtype, "folder": folder}
    path = embed_captions(tokenizer, text_encoder.to(device), captions, **how)
    text_encoder.to("cpu")  # until images are made
    return EmbeddingTable(path, in_memory, mask_padding)


class TextDenoiser(nn.Module):
    """A denoiser and the text encoder that is trained with it, as one network whose condition are tokens.

    Args:
        mask_padding: Whether both look away from the padding of a text.
    """

    def __init__(self, denoiser: nn.Module, text_encoder: PreTrainedModel, mask_padding: bool = False):
        super().__init__()
        self.denoiser, self.text_encoder, self.mask_padding = denoiser, text_encoder, mask_padding
        # Where FSDP may cut.
        self._no_split_modules = [
            *(getattr(denoiser, "_no_split_modules", None) or ()),
            *(getattr(text_encoder, "_no_split_modules", None) or ()),
        ]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **condition_image: Tensor,
    ):
        """The denoiser's output.

        Args:
            sample, timestep, class_labels: As for the denoiser.
            input_ids, attention_mask: Of the tokens, int64, shape `(batch, tokens)`.
            condition_image: What the denoiser takes of a condition image.
        """
        embeds = encode_tokens(self.text_encoder, input_ids, attention_mask, self.mask_padding)
        return self.denoiser(
            sample,
            timestep,
            class_labels=class_labels,
            encoder_hidden_states=embeds.states,
            encoder_attention_mask=embeds.mask,
            **condition_image,
        )

    def enable_gradient_checkpointing(self):
        self.denoiser.enable_gradient_checkpointing()
        self.text_encoder.gradient_checkpointing_enable()

    def compile(self, *args, **kwargs):
        """Compiles the denoiser; the encoder takes a small share of a step."""
        self.denoiser.compile(*args, **kwargs)
