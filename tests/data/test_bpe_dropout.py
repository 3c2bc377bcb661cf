"""Dropout of byte-pair merges, beside the tokenizer itself and beside the probabilities of a word of two merges."""

from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from diffusers_ext.data.bpe_dropout import NUM_VARIANTS, BPEDropout
from diffusers_ext.data.captions import TokenTable
from diffusers_ext.recipes.text_encoder import train_tokenizer
from diffusers_ext.recipes.text_to_image import TextConfig, Texts


CAPTIONS = ["green apple", "Green heart", "a very much longer caption of green things", "naïve ☂"]


def tokenizer(captions=CAPTIONS, vocab_size=300):
    return train_tokenizer(captions, vocab_size, 77)


def test_without_dropout_the_tokens_are_those_of_the_tokenizer():
    words, dropout = tokenizer(), BPEDropout(tokenizer(), 0.0, seed=0)
    for text in (*CAPTIONS, "", "unseen apples", "GREEN"):
        assert dropout(text, 3) == words(text).input_ids[1:-1]


def test_every_division_is_of_the_same_text():
    words, dropout = tokenizer(), BPEDropout(tokenizer(), 0.5, seed=0)
    for text in CAPTIONS:
        divisions = {tuple(dropout(text, variant)) for variant in range(20)}
        assert len(divisions) > 5
        assert {words.decode(list(tokens)).strip() for tokens in divisions} == {text.lower()}


def test_merges_are_left_out_as_often_as_they_should_be():
    # "abc" is first "a b c", of which a and b alone can be merged, and then "ab c".
    vocabulary = {part: number for number, part in enumerate(["a", "b", "c", "ab", "abc"])}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c")]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words, rate, number = PreTrainedTokenizerFast(tokenizer_object=backend), 0.3, 4000
    counts = Counter(len(BPEDropout(words, rate, seed)("abc", 1)) for seed in range(number))
    for num_tokens, expected in {3: rate, 2: (1 - rate) * rate, 1: (1 - rate) ** 2}.items():
        error = (expected * (1 - expected) / number) ** 0.5
        assert abs(counts[num_tokens] / number - expected) < 4 * error


def test_a_word_in_a_variant_follows_from_the_seed_alone():
    first, second, other = (BPEDropout(tokenizer(), 0.3, seed) for seed in (1, 1, 2))
    second("green", 9)  # an order of its own
    texts = [(text, variant) for text in CAPTIONS for variant in range(8)]
    assert [first(*each) for each in texts] == [second(*each) for each in reversed(texts)][::-1]
    assert [first(*each) for each in texts] != [other(*each) for each in texts]


def test_a_batch_has_the_division_that_its_numbers_say():
    words = tokenizer()
    dropout = BPEDropout(words, 0.4, seed=0)
    table = TokenTable(words, CAPTIONS, 24, dropout)
    rows, variant = torch.tensor([0, 1, 4]), 5
    uniform = torch.full((3,), (variant + 0.5) / NUM_VARIANTS, dtype=torch.float64)
    batch = table.put_into({"labels": rows.clone(), "text_uniform": uniform})
    assert batch.keys() == {"input_ids", "attention_mask"}
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], [*CAPTIONS[:2], ""], strict=True):
        expected = [words.bos_token_id, *dropout(text, 1 + variant), words.eos_token_id]
        assert ids.tolist() == expected + [words.pad_token_id] * (24 - len(expected))
        assert mask.tolist() == [1] * len(expected) + [0] * (24 - len(expected))
    last = table.put_into({"labels": rows, "text_uniform": torch.full((3,), 1 - 2.0**-53, dtype=torch.float64)})
    assert last["input_ids"].shape == (3, 24)


def test_held_out_captions_and_those_that_would_be_cut_stay_whole():
    words = tokenizer()
    plain, table = TokenTable(words, CAPTIONS, 24), TokenTable(words, CAPTIONS, 24, BPEDropout(words, 0.9, seed=0))
    rows = torch.arange(5)
    assert torch.equal(table.put_into({"labels": rows})["input_ids"], plain.put_into({"labels": rows})["input_ids"])
    short = TokenTable(words, CAPTIONS, 8, BPEDropout(words, 0.9, seed=0))
    uniform = torch.zeros(5, dtype=torch.float64)
    dropped = short.put_into({"labels": rows, "text_uniform": uniform})["input_ids"]
    assert torch.equal(dropped[2], TokenTable(words, CAPTIONS, 8).put_into({"labels": rows})["input_ids"][2])


@pytest.mark.parametrize("mask_padding", [False, True])
def test_texts_have_room_for_every_division_of_their_captions(mask_padding):
    """Also of the longest one, which would otherwise stay whole, and of captions that are a word each."""
    captions = ["strawberry", "blueberry", "raspberry"] * 20
    config = TextConfig(dataset_name="data", bpe_dropout=0.9, mask_padding=mask_padding, text_hidden_size=16)
    texts = Texts.of(config, captions)
    table = texts.table(captions, torch.device("cpu"))
    uniform = (torch.arange(NUM_VARIANTS, dtype=torch.float64) + 0.5) / NUM_VARIANTS
    for row in range(3):
        rows = torch.full((NUM_VARIANTS,), row)
        ids = table.put_into({"labels": rows, "text_uniform": uniform})["input_ids"]
        for variant, found in enumerate(ids, 1):
            expected = BPEDropout(texts.tokenizer, 0.9, config.seed)(captions[row], variant)
            assert found[1 : 1 + len(expected)].tolist() == expected
            assert found[1 + len(expected)] == texts.tokenizer.eos_token_id
        assert len(ids.unique(dim=0)) > 1


def test_other_tokenizers_and_rates_are_refused():
    for rate in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"rate must be in \[0, 1\)"):
            BPEDropout(tokenizer(), rate, 0)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"red": 0}, unk_token="red")))
    with pytest.raises(ValueError, match="by byte pairs, got one of kind WordLevel"):
        BPEDropout(words, 0.1, 0)
