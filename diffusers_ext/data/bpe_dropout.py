"""Byte-pair tokens with dropout: other divisions of the same words into tokens (Provilkov et al. 2019, arXiv 1910.13267).

An encoder that learns from few captions sees a word it does not know as tokens that it knows from nowhere either, since its
known words were always whole. Where merges are left out at random it learns from the parts of words too.
"""

import json
from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from diffusers_ext.draws import derived_seed


NUM_VARIANTS = 16  # that a text has in a training


class BPEDropout:
    """Divides texts into tokens as a tokenizer does, but that each merge is left out with some probability.

    Args:
        tokenizer: By byte pairs.
        rate: Probability with which a merge is left out, each time that it could be made, in [0, 1).
        seed: What a word becomes in a variant follows from it, from the variant and from the word alone.

    Raises:
        ValueError: if the tokenizer is of another kind, or the rate out of range.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rate: float, seed: int):
        if not 0 <= rate < 1:
            raise ValueError(f"the rate must be in [0, 1), got {rate}")
        self._backend = tokenizer.backend_tokenizer
        model = json.loads(self._backend.to_str())["model"]
        if model["type"] != "BPE":
            raise ValueError(f"dropout of merges needs a tokenizer by byte pairs, got one of kind {model['type']}")
        self._vocabulary, self._rate, self._seed = model["vocab"], rate, seed
        pairs = (tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"])
        self._rank = {pair: rank for rank, pair in enumerate(pairs)}
        self._known: dict[tuple[str, int], list[int]] = {}

    def __call__(self, text: str, variant: int) -> list[int]:
        """Numbers of the tokens of a text, without special ones."""
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        return [number for word in words for number in self._tokens(word, variant)]

    def variants(self, text: str) -> Iterator[list[int]]:
        """All divisions that the text has in a training."""
        return (self(text, variant) for variant in range(1, 1 + NUM_VARIANTS))

    def _tokens(self, word: str, variant: int) -> list[int]:
        key = (word, variant)
        if key not in self._known:
            random = np.random.default_rng([derived_seed(self._seed, 2), variant, *word.encode()])
            self._known[key] = [self._vocabulary[part] for part in self._merged(list(word), random)]
        return self._known[key]

    def _merged(self, parts: list[str], random: np.random.Generator) -> Sequence[str]:
        """Algorithm 1 of the paper: of the merges that are possible and not left out, the first learned one, until none is."""
        while len(parts) > 1:
            ranks = [self._rank.get(pair) for pair in zip(parts, parts[1:], strict=False)]
            kept = random.random(len(ranks)) >= self._rate
            possible = [
                (rank, i) for i, (rank, keep) in enumerate(zip(ranks, kept, strict=True)) if keep and rank is not None
            ]
            if not possible:
                break
            i = min(possible)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts
