"""From captions to what a denoiser attends to: columns, tokens, encoders, and the table that batches are made with."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffusers_ext.commands.train_text_to_image import load_data
from diffusers_ext.data.captions import embed_captions, find_caption_column, mask_path
from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.label_columns import fair_share
from diffusers_ext.data.sources import load_source
from diffusers_ext.guidance.texts import encode_tokens, longest_text, tokenize
from diffusers_ext.recipes.text_encoder import TextDenoiser, load_text_encoder
from diffusers_ext.recipes.text_to_image import TextConfig
from tiny_text import (
    CAPTIONS,
    WIDTH,
    save_pictures,
    tiny_clip,
    tiny_t5,
    tiny_text_unet,
    tiny_tokenizer,
)


TEXTS = ["red dot", "", "a much longer green bar"]


def words_tokenizer(**options):
    """A token for each word and none besides, so that the empty text has none at all."""
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "red", "green", "dot", "bar"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special | options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("full_length", [False, True])
def test_tokens_are_padded_as_the_tokenizer_itself_does(side, full_length):
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = side
    ids, mask = tokenize(tokenizer, TEXTS, 8, full_length=full_length)
    padding = "max_length" if full_length else "longest"
    own = tokenizer(TEXTS, padding=padding, truncation=True, max_length=8, return_tensors="pt")
    assert torch.equal(ids, own.input_ids) and torch.equal(mask, own.attention_mask)


@pytest.mark.parametrize("options", [{}, {"padding_side": "left"}, {"model_input_names": ["input_ids"]}])
def test_a_text_without_tokens_is_one_of_padding_that_is_seen(options):
    """In a batch and alone, where nothing but padding would be a mean over no token, or no token at all."""
    tokenizer = words_tokenizer(**options)
    ids, mask = tokenize(tokenizer, ["red dot", ""], 4, full_length=False)
    first = 1 if options.get("padding_side") == "left" else 0
    assert ids[1].tolist() == [0, 0] and mask[1].tolist() == [int(place == first) for place in range(2)]
    assert [part.tolist() for part in tokenize(tokenizer, [""], 4, full_length=False)] == [[[0]], [[1]]]
    encoder = tiny_t5(tokenizer)
    alone = encode_tokens(encoder, *tokenize(tokenizer, [""], 4, full_length=False), True)
    together = encode_tokens(encoder, ids, mask, True)
    torch.testing.assert_close(alone.states[0, 0], together.states[1, first])


def test_a_tokenizer_that_cannot_pad_and_lengths_without_room_for_a_text_are_refused():
    with pytest.raises(ValueError, match="no token to pad with"):
        tokenize(words_tokenizer(pad_token=None), TEXTS, 8, full_length=False)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="at least 3, 2 special tokens and one of the text and at most 8, .* got 2"):
        longest_text(tokenizer, tiny_clip(tokenizer), 2)
    assert longest_text(tokenizer, tiny_clip(tokenizer), 3) == 3
    with pytest.raises(ValueError, match="max_text_length must be at least 3"):
        TextConfig(max_text_length=2)


def embedded(folder, encoder, captions=CAPTIONS, dtype="fp32"):
    options = {"max_length": 8, "mask_padding": True, "dtype": dtype, "folder": folder}
    return embed_captions(tiny_tokenizer(), encoder, captions, **options)


def test_captions_are_encoded_once_for_each_encoder_and_set_of_texts(tmp_path):
    encoder = tiny_t5(tiny_tokenizer())
    path = embedded(tmp_path, encoder)
    forward, encoder.forward = encoder.forward, None  # what would be called again
    assert embedded(tmp_path, encoder) == path
    with pytest.raises(TypeError):
        embedded(tmp_path, encoder, CAPTIONS[:5])
    encoder.forward = forward
    mask_path(path).unlink()  # as a copy that was broken off leaves it
    states = np.load(path)
    assert embedded(tmp_path, encoder) == path and np.array_equal(np.load(path), states)
    with torch.no_grad():
        encoder.shared.weight[0, 0] += 1
    assert embedded(tmp_path, encoder) != path != embedded(tmp_path, encoder, CAPTIONS[:5])


def test_hidden_states_beyond_fp16_are_refused_and_leave_nothing(tmp_path):
    encoder = tiny_t5(tiny_tokenizer())
    torch.nn.init.constant_(encoder.encoder.final_layer_norm.weight, 1e6)
    with pytest.raises(ValueError, match="do not fit fp16: give --text_cache_dtype fp32"):
        embedded(tmp_path, encoder, dtype="fp16")
    assert not list(tmp_path.iterdir())
    assert embedded(tmp_path, encoder).is_file()


STRING, LABELS = datasets.Value("string"), datasets.ClassLabel(names=["a", "b"])


@pytest.mark.parametrize(
    ("columns", "named", "found"),
    [
        ({"prompt": STRING, "caption": STRING}, None, "caption"),
        ({"story": STRING, "label": LABELS}, None, "label"),
        ({"story": STRING, "text": datasets.Value("int64"), "txt": STRING}, None, "txt"),
        ({"caption": STRING, "story": STRING}, "story", "story"),
        ({"caption": datasets.List(STRING), "text": STRING}, None, "text"),
    ],
)
def test_the_column_of_the_captions(tmp_path, columns, named, found):
    assert find_caption_column(config_of(tmp_path, columns), named) == found


@pytest.mark.parametrize(
    ("columns", "named", "message"),
    [
        ({"story": STRING}, None, "no column of captions .* name it with --caption_column; its columns are: story"),
        ({"one": LABELS, "two": LABELS}, None, "name it with --caption_column; its columns are: one .ClassLabel"),
        (
            {"story": STRING},
            "text",
            r"caption_column 'text' is not in the data set; its columns are: story \(string\)",
        ),
        ({"text": datasets.Value("int64")}, "text", "caption_column 'text' holds no text"),
        ({"caption": datasets.List(STRING)}, None, "'caption' holds lists of texts, and an image is trained with one"),
        ({"caption": STRING, "more": datasets.List(STRING)}, "more", "'more' holds lists of texts, .* a row for each"),
    ],
)
def test_columns_that_are_no_captions_are_refused(tmp_path, columns, named, message):
    with pytest.raises(ValueError, match=message):
        find_caption_column(config_of(tmp_path, columns), named)


def config_of(folder, columns):
    values = {"string": "a", "int64": 0}
    rows = {
        name: [["a"] if isinstance(kind, datasets.List) else 0 if kind == LABELS else values[kind.dtype]]
        for name, kind in columns.items()
    }
    datasets.Dataset.from_dict(rows, features=datasets.Features(columns)).to_parquet(folder / "train.parquet")
    return DataConfig(dataset_name=str(folder), cache_dir=str(folder / "cache"))


def test_empty_cells_are_refused_in_the_rows_that_are_used(tmp_path):
    name = save_pictures(tmp_path / "data", "train", CAPTIONS, [*CAPTIONS[:-2], "", None])
    save_pictures(tmp_path / "data", "test", CAPTIONS[:3], [None, None, ""])
    config = TextConfig(dataset_name=name, cache_dir=str(tmp_path / "cache"), validation_split="test")
    with pytest.raises(
        ValueError, match="caption_column 'text' is empty in 1 of 12 rows of the split train: leave them"
    ):
        load_data(config, Accelerator(cpu=True), None)
    source = load_source(name, cache_dir=config.cache_dir)
    without = next(count for count in range(11, 0, -1) if 11 not in fair_share(source, count, "text"))
    config = dataclasses.replace(config, max_train_samples=without)
    with pytest.raises(ValueError, match="caption_column 'text' is empty in 2 of 3 rows of the split test"):
        load_data(config, Accelerator(cpu=True), None)


@pytest.mark.parametrize("frozen", [None, tiny_clip, tiny_t5])
def test_each_image_is_in_a_batch_with_its_own_caption(tmp_path, frozen):
    """In both splits, of which each has captions that the other does not have; some are there twice, one is empty."""
    written = {"train": [*CAPTIONS[:6], "", *CAPTIONS[:3]], "test": ["Zebra", CAPTIONS[8], CAPTIONS[1], "", "Zebra"]}
    for split, texts in written.items():
        name = save_pictures(tmp_path / "data", split, CAPTIONS[: len(texts)], texts)
    options = {"vocab_size": 300, "text_hidden_size": WIDTH, "text_num_layers": 1}
    if frozen:
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(tmp_path / "encoder")
        frozen(tokenizer).save_pretrained(tmp_path / "encoder")
        options = {"pretrained_text_encoder": str(tmp_path / "encoder"), "text_cache_dtype": "fp32"}
    config = TextConfig(dataset_name=name, cache_dir=str(tmp_path / "cache"), validation_split="test", **options)
    *both, texts = load_data(config, Accelerator(cpu=True), None)
    for data, captions in zip(both, written.values(), strict=True):
        # The null label, which dropout puts in, is the empty text.
        rows = torch.tensor([*data.labels, data.num_classes])
        batch = data.with_condition({"labels": rows})
        if frozen:
            ids, mask = tokenize(texts.tokenizer, [*captions, ""], texts.max_length, full_length=True)
            masked = frozen is tiny_t5
            with torch.no_grad():
                expected = encode_tokens(texts.text_encoder, ids, mask, mask_padding=masked).states
            states = batch["encoder_hidden_states"]
            seen = mask[:, : states.shape[1]].bool() if masked else slice(None)
            torch.testing.assert_close(states[seen], expected[:, : states.shape[1]][seen], atol=1e-5, rtol=1e-5)
            assert ("encoder_attention_mask" in batch) == masked
            assert not masked or torch.equal(batch["encoder_attention_mask"], seen)
        else:
            decoded = [texts.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in batch["input_ids"]]
            assert decoded == [caption.lower() for caption in [*captions, ""]]


SMALL = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def encoder_of(kind, vocab_size):
    match kind:
        case "t5":
            sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
            return transformers.T5Model(
                transformers.T5Config(vocab_size=vocab_size, decoder_start_token_id=0, **sizes)
            )
        case "bert":
            config = transformers.BertConfig(vocab_size=vocab_size, max_position_embeddings=8, **SMALL)
            return transformers.BertModel(config)
        case "gpt2":
            sizes = {"n_positions": 8, "n_embd": WIDTH, "n_layer": 1, "n_head": 2}
            return transformers.GPT2Model(transformers.GPT2Config(vocab_size=vocab_size, **sizes))
        case "bart":
            sizes = {"d_model": WIDTH, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 8}
            sizes |= {
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
            }
            return transformers.BartModel(transformers.BartConfig(vocab_size=vocab_size, **sizes))
        case "vit":
            return transformers.ViTModel(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("t5", "T5EncoderModel"),
        ("bert", "BertModel"),
        ("gpt2", "GPT2Model"),
        ("bart", "is a BartEncoder, which transformers loads only as a part of a larger model"),
        ("vit", "is a ViTModel, which has no hidden states of tokens"),
    ],
)
def test_an_encoder_of_transformers_is_taken_or_refused_before_training(tmp_path, kind, expected):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    whole = encoder_of(kind, len(tokenizer))
    whole.save_pretrained(tmp_path)
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            load_text_encoder(str(tmp_path))
        return
    tokenizer, encoder = load_text_encoder(str(tmp_path))
    assert type(encoder).__name__ == expected and not any(p.requires_grad for p in encoder.parameters())
    ids, mask = tokenize(tokenizer, TEXTS, 8, full_length=False)
    states = encode_tokens(encoder, ids, mask, True).states
    inner = whole.get_encoder() if kind == "t5" else whole
    with torch.no_grad():
        own = inner.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(states, own)


def test_an_encoder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--pretrained_text_encoder .*nothing cannot be loaded"):
        load_text_encoder(str(tmp_path / "nothing"))


@pytest.mark.parametrize("mask_padding", [False, True])
def test_hidden_padding_has_no_influence_on_a_denoiser_with_its_encoder(mask_padding):
    tokenizer = tiny_tokenizer()
    model = TextDenoiser(tiny_text_unet(), tiny_t5(tokenizer), mask_padding)
    x, outputs = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for length in (8, 12):
        ids, mask = tokenize(tokenizer, TEXTS[:2], length, full_length=True)
        with torch.no_grad():
            outputs.append(model(x, torch.tensor([1, 900]), input_ids=ids, attention_mask=mask).sample)
    assert torch.allclose(*outputs, atol=1e-4) == mask_padding


@pytest.mark.parametrize("mask_padding", [False, True])
def test_checkpointing_a_denoiser_with_its_encoder_changes_no_gradient(mask_padding):
    tokenizer = tiny_tokenizer()
    ids, mask = tokenize(tokenizer, TEXTS, 8, full_length=True)
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        model = TextDenoiser(tiny_text_unet(pool_context=True), tiny_clip(tokenizer), mask_padding).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(x, torch.tensor([1, 50, 900]), input_ids=ids, attention_mask=mask).sample.square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=lambda text, name=name: f"{name}: {text}")
    used = [name for name, gradient in gradients[0].items() if gradient.any()]
    assert any(name.startswith("text_encoder") for name in used) and len(used) == len(gradients[0])
