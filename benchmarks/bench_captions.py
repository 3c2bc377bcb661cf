"""How well a small text encoder knows captions that it was not trained with, by the dropout of byte-pair merges.

    python benchmarks/bench_captions.py path/to/twemoji64 --label_column label

The encoder is that of `training/train_text_to_image.py`, and learns to tell the labels of the images from the mean of its
hidden states, which is what a denoiser is told of a text beside attention to it (`pool_context`). Printed is the share of
held-out captions whose label it tells, the mean of the last steps, for each seed; beside it that of a linear model of the
characters, and with `--pretrained_text_encoder` of one of that encoder's mean hidden states. It says what the encoder can carry
over to other captions, not how good images are.
"""

import argparse
import statistics

import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from torch import nn

from diffusers_ext.data.bpe_dropout import BPEDropout
from diffusers_ext.data.captions import TokenTable
from diffusers_ext.data.sources import load_source
from diffusers_ext.guidance.texts import encode_tokens, longest_text, tokenize
from diffusers_ext.recipes.text_encoder import load_text_encoder, longest_caption, new_text_encoder, train_tokenizer


def accuracy(
    captions: dict[str, list[str]], labels: dict[str, torch.Tensor], rate: float, seed: int, options
) -> float:
    """The share of held-out captions, the mean of three times in the last half of the steps."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(captions["train"], options.vocab_size, 77)
    length = tokenizer.model_max_length = -(-longest_caption(tokenizer, captions["train"]) // 8) * 8
    dropout = BPEDropout(tokenizer, rate, seed) if rate else None
    table, held_out = (
        TokenTable(tokenizer, captions["train"], length, dropout),
        TokenTable(tokenizer, captions["test"], length),
    )
    encoder = new_text_encoder(tokenizer, hidden_size=128, num_layers=2, num_attention_heads=2)
    head = nn.Linear(128, 1 + int(labels["train"].max()))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.0)

    def predicted(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return head(encoder(batch["input_ids"]).last_hidden_state.mean(1))

    shares = []
    for step in range(1, options.steps + 1):
        rows = torch.randint(len(captions["train"]), (64,))
        uniform = {"text_uniform": torch.rand(64, dtype=torch.float64)} if rate else {}
        loss = F.cross_entropy(predicted(table.put_into({"labels": rows.clone()} | uniform)), labels["train"][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (options.steps // 2, 3 * options.steps // 4, options.steps):
            with torch.no_grad():
                found = predicted(held_out.put_into({"labels": torch.arange(len(captions["test"]))})).argmax(1)
            shares.append((found == labels["test"]).double().mean().item())
    return statistics.mean(shares)


@torch.no_grad()
def mean_states(name: str, captions: list[str], batch_size: int = 64) -> torch.Tensor:
    """The mean hidden states of captions by an encoder that is there, float32, shape `(captions, width)`."""
    tokenizer, encoder = load_text_encoder(name)
    longest, means = longest_text(tokenizer, encoder), []
    for start in range(0, len(captions), batch_size):
        tokens = tokenize(tokenizer, captions[start : start + batch_size], longest, full_length=False)
        encoded = encode_tokens(encoder, *tokens, mask_padding=True)
        weights = encoded.mask[..., None].float()
        means.append((encoded.states * weights).sum(1) / weights.sum(1))
    return torch.cat(means).float()


def linear_share(features: dict, labels: dict[str, torch.Tensor], strength: float) -> float:
    """The share of held-out captions whose label a linear model of their features tells."""
    linear = LogisticRegression(C=strength, max_iter=3000).fit(features["train"], labels["train"])
    return linear.score(features["test"], labels["test"])


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    captions, labels = {}, {}
    for kind, split in (("train", "train"), ("test", options.held_out_split)):
        source = load_source(options.dataset_name, None, split)
        captions[kind] = list(source[options.caption_column])
        labels[kind] = torch.tensor(list(source[options.label_column]))
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5))
    characters = {"train": vectors.fit_transform(captions["train"]), "test": vectors.transform(captions["test"])}
    share = linear_share(characters, labels, 30)
    print(
        f"{len(captions['train'])} captions, {len(captions['test'])} held out; linear in the characters: {share:.1%}"
    )
    if options.pretrained_text_encoder is not None:
        states = {split: mean_states(options.pretrained_text_encoder, captions[split]) for split in captions}
        print(f"linear in the states of {options.pretrained_text_encoder}: {linear_share(states, labels, 1):.1%}")
    for rate in options.rates:
        shares = [accuracy(captions, labels, rate, seed, options) for seed in options.seeds]
        each = ", ".join(f"{share:.1%}" for share in shares)
        print(f"dropout {rate:g}: {statistics.mean(shares):.1%} ({each})", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset_name")
    parser.add_argument("--caption_column", default="text")
    parser.add_argument("--label_column", default="label")
    parser.add_argument("--held_out_split", default="test")
    parser.add_argument("--pretrained_text_encoder", help="folder or name on the Hub; by default none")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.0, 0.1, 0.2, 0.4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of 64 captions")
    parser.add_argument("--vocab_size", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    main(parser.parse_args())
