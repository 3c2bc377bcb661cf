"""Captions as the condition of training: found, cut into tokens or encoded once, and put into the batches.

Captions are read as labels with names: the label of an image is the number of its caption among the different ones, and
the null label, which dropout puts in, that of the empty text. A table says what each of them is to the network.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers_ext.command_names import name_commands
from diffusers_ext.data.bpe_dropout import NUM_VARIANTS, BPEDropout
from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.identity import hash_weights
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.label_columns import describe_feature, fair_share, find_label_column
from diffusers_ext.data.latent_cache import read_info
from diffusers_ext.data.sources import load_source
from diffusers_ext.guidance.texts import encode_tokens, tokenize


# Where captions are looked for, in this order; `txt` is WebDataset's.
USUAL_COLUMNS = ("caption", "captions", "text", "prompt", "txt", "description")
ENCODED_AT_ONCE = 64


def find_caption_column(config: DataConfig, name: str | None = None) -> str:
    """The column of the captions: the named one, or one of a usual name, or the names of the labels.

    Raises:
        ValueError: if there is none, if the named one holds no text, or if it has empty cells.
    """
    if infos := read_info(config.dataset_name):
        if config.dataset_split not in infos:
            raise ValueError(
                f"{config.dataset_name} holds latents of {', '.join(infos)}, and none of the split {config.dataset_split}"
            )
        made = infos[config.dataset_split].label_column
        if made is None or name not in (None, made):
            raise ValueError(
                name_commands(
                    f"{config.dataset_name} holds latents that were made with label_column {made}: encode the images with "
                    f"training/cache_latents.py --label_column {name or 'THE_COLUMN_OF_THE_CAPTIONS'}"
                )
            )
        return made
    source = load_source(
        config.dataset_name, config.dataset_config_name, config.dataset_split, cache_dir=config.cache_dir
    )
    column = _find_column(source, name)
    if config.max_train_samples is not None:
        source = source.select(fair_share(source, config.max_train_samples, column))
    refuse_missing(source, column, config.dataset_split)
    return column


def _find_column(source: datasets.Dataset, name: str | None) -> str:
    features = source.features
    columns = "its columns are: " + ", ".join(
        f"{column} ({describe_feature(feature)})" for column, feature in features.items()
    )
    texts = [column for column, feature in features.items() if _holds_text(feature)]
    wanted = USUAL_COLUMNS if name is None else [name]
    found = [column for column in wanted if column in texts]
    if found:
        return found[0]
    lists = [column for column in wanted if _holds_text(getattr(features.get(column), "feature", None))]
    if lists:
        raise ValueError(
            f"caption_column {lists[0]!r} holds lists of texts, and an image is trained with one: write a row for each text, "
            f"or name a column of single ones; {columns}"
        )
    if name is not None:
        reason = "holds no text" if name in features else "is not in the data set"
        raise ValueError(f"caption_column {name!r} {reason}; {columns}")
    try:
        labels = find_label_column(source)
    except ValueError:  # there are several
        labels = None
    if labels in texts:
        return labels
    raise ValueError(
        f"the data set has no column of captions that is known by its name: name it with --caption_column; {columns}"
    )


def _holds_text(feature: object) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def count_missing(source: datasets.Dataset, column: str) -> int:
    """Rows whose cell is empty; an empty text is one that is there."""
    values = source.with_format("arrow")[column]
    return (values if hasattr(values, "null_count") else values[:]).null_count


def refuse_missing(source: datasets.Dataset, column: str, split: str) -> None:
    """Refuses empty cells.

    Raises:
        ValueError: with their number.
    """
    if missing := count_missing(source, column):
        raise ValueError(
            f"caption_column {column!r} is empty in {missing} of {len(source)} rows of the split {split}: leave them out, or "
            "give them an empty text, which stands for any picture"
        )


def captions_of(data: ImageData) -> list[str]:
    """The different captions, in the order of their numbers.

    Raises:
        ValueError: if an image has several, as latents of labels may.
    """
    if data.has_label_sets:
        raise ValueError(f"{data.name} has several labels an image, and an image is trained with one caption")
    return [data.id2label[number] for number in range(len(data.id2label))]


def has_empty_caption(data: ImageData) -> bool:
    """Whether an image has an empty text, which stands for any picture."""
    return any(not caption.strip() for caption in captions_of(data))


class TokenTable:
    """The tokens of each caption, for an encoder that is trained.

    Args:
        tokenizer: That of the encoder.
        captions: In the order of their numbers; the number after the last is the empty text.
        max_length: Tokens at which a text is cut.
        dropout: What divides captions otherwise, for batches with `text_uniform`; None for batches without.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        captions: Sequence[str],
        max_length: int,
        dropout: BPEDropout | None = None,
    ):
        captions = [*captions, ""]
        ids, mask = tokenize(tokenizer, captions, max_length, full_length=True)
        # (1 + variants, captions, tokens); the first are the tokens as they are.
        num_tables = 1 if dropout is None else 1 + NUM_VARIANTS
        self._ids, self._mask = (
            table.expand(num_tables, *table.shape).clone() for table in (ids.to(torch.int32), mask.to(torch.uint8))
        )
        for variant in range(1, num_tables):
            for row, caption in enumerate(captions):
                tokens = [tokenizer.bos_token_id, *dropout(caption, variant), tokenizer.eos_token_id]
                if len(tokens) <= max_length:  # what would be cut stays as it is
                    self._ids[variant, row] = tokenizer.pad_token_id
                    self._ids[variant, row, : len(tokens)] = torch.tensor(tokens)
                    self._mask[variant, row] = torch.arange(max_length) < len(tokens)

    def put_into(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with `input_ids` and `attention_mask`, int64 of shape `(batch, tokens)`, instead of `labels`.

        `text_uniform`, in [0, 1) of shape `(batch,)`, says which of the other divisions of its caption an image gets.
        """
        rows, variants = batch.pop("labels"), 0
        if (uniform := batch.pop("text_uniform", None)) is not None:
            variants = 1 + (uniform * NUM_VARIANTS).long()
        found = {"input_ids": self._ids[variants, rows], "attention_mask": self._mask[variants, rows]}
        return batch | {name: value.long() for name, value in found.items()}


class EmbeddingTable:
    """The hidden states of each caption, from a file that `embed_captions` has written.

    Args:
        path: Of the hidden states; the mask lies beside it.
        in_memory: Read the file, rather than map it.
        mask_padding: Whether the network looks away from the padding.
    """

    def __init__(self, path: Path, in_memory: bool, mask_padding: bool):
        self._path, self._in_memory, self._mask_padding = path, in_memory, mask_padding
        self._mask, self._states = np.load(mask_path(path)), None

    def put_into(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with `encoder_hidden_states`, float32 of shape `(batch, tokens, width)`, instead of `labels`.

        And with `encoder_attention_mask`, bool of shape `(batch, tokens)`, if the padding is hidden.
        """
        if self._states is None:
            self._states = np.load(self._path, mmap_mode=None if self._in_memory else "r")
        rows = batch.pop("labels").numpy()
        batch |= {"encoder_hidden_states": torch.from_numpy(self._states[rows].astype(np.float32))}
        if self._mask_padding:
            batch |= {"encoder_attention_mask": torch.from_numpy(self._mask[rows])}
        return batch

    def __getstate__(self):
        return self.__dict__ | {"_states": None}  # a spawned worker opens the file itself


def mask_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.mask.npy")


@torch.no_grad()
def embed_captions(
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    captions: Sequence[str],
    *,
    max_length: int,
    mask_padding: bool,
    dtype: str,
    folder: Path,
) -> Path:
    """Encodes each caption once, and the empty text as the last; what is there already is taken as it is.

    The file's name says what it depends on: the encoder's weights, the tokens and the type of the numbers.

    Args:
        dtype: "fp16" or "fp32", in which the hidden states are kept.
        folder: Where the files are kept.

    Returns: The path of the hidden states, `(captions + 1, tokens, width)`; see `mask_path` for that of the mask.
    """
    ids, mask = tokenize(tokenizer, [*captions, ""], max_length, full_length=True)
    options = json.dumps([text_encoder.config.to_dict(), mask_padding, dtype], default=str).encode()
    digest = hash_weights(text_encoder, options + ids.numpy().tobytes() + mask.numpy().tobytes())
    path = folder / f"text_embeddings-{digest[:32]}.npy"
    if path.exists() and mask_path(path).exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".text_embeddings-") as partial:
        states = None
        starts = range(0, len(ids), ENCODED_AT_ONCE)
        for start in tqdm(starts, desc="encoding captions", disable=len(starts) < 20):
            rows = slice(start, start + ENCODED_AT_ONCE)
            part = (ids[rows].to(text_encoder.device), mask[rows].to(text_encoder.device))
            found = encode_tokens(text_encoder, *part, mask_padding).states.float().cpu().numpy()
            if states is None:
                shape, kept = (len(ids), *found.shape[1:]), np.float16 if dtype == "fp16" else np.float32
                states = open_memmap(Path(partial, path.name), mode="w+", dtype=kept, shape=shape)
            if not np.isfinite(found.astype(states.dtype)).all():
                raise ValueError("hidden states of the text encoder do not fit fp16: give --text_cache_dtype fp32")
            states[rows] = found
        states.flush()
        np.save(Path(partial, mask_path(path).name), mask.bool().numpy())
        Path(partial, mask_path(path).name).replace(mask_path(path))
        Path(partial, path.name).replace(path)  # comes last: without it nothing is there
    return path


def with_texts(data: ImageData, texts: TokenTable | EmbeddingTable) -> ImageData:
    """The data with what their captions are to the network."""
    return replace(data, texts=texts)
