import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from diffusers_ext.data.prepare import prepare_data, prepare_images
from diffusers_ext.data.validation import ValidationBatches, describe_held_out, prepare_validation
from diffusers_ext.figures import draw_loss
from diffusers_ext.trainer.config import TrainerConfig
from runs import assert_same_run, metrics, squared_error, trainer


@pytest.fixture(scope="module")
def data():
    return prepare_images("digits", max_samples=20)


@pytest.fixture(scope="module")
def held_out():
    return prepare_images("digits", split="test", max_samples=18)


PGM = b"P5\n8 8\n255\n" + bytes(range(64))
SETTINGS = {"validation_split": "test", "validation_steps": 5}


def without_validation(records):
    return [{name: value for name, value in record.items() if name != "val_loss"} for record in records]


def test_validation_is_in_the_log_when_it_is_due_and_at_the_end(data, held_out, tmp_path):
    trainer(data, tmp_path / "run", validation_data=held_out, **SETTINGS).train()
    records = metrics(tmp_path / "run")
    assert [record["step"] for record in records] == [3, 5, 6, 9, 10, 12]
    assert [record["step"] for record in records if "val_loss" in record] == [5, 10, 12]
    draw_loss(records, tmp_path / "loss.png")
    draw_loss(without_validation(records), tmp_path / "without.png")
    assert (tmp_path / "loss.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_validation_leaves_the_training_as_it_was_bit_for_bit(data, held_out, tmp_path):
    """Random states too: what the loss draws from the default generators is taken back."""

    def loss(model, batch):
        torch.rand(3)
        return squared_error(model, batch)

    settings = {"logging_steps": 1, "checkpointing_steps": 5}
    trainer(data, tmp_path / "without", loss, **settings).train()
    trainer(data, tmp_path / "with", loss, validation_data=held_out, **settings | SETTINGS).train()
    records = metrics(tmp_path / "with")
    assert sum("val_loss" in record for record in records) == 3
    lines = [json.dumps(record) for record in without_validation(records)]
    (tmp_path / "with" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert_same_run(tmp_path / "with", tmp_path / "without", 12)
    states = [
        torch.load(tmp_path / run / "checkpoint-12" / "random_states_0.pkl", weights_only=False)
        for run in ("with", "without")
    ]
    assert torch.equal(*(state["torch_manual_seed"] for state in states))
    assert states[0]["random_state"] == states[1]["random_state"]
    assert str(states[0]["numpy_random_seed"]) == str(states[1]["numpy_random_seed"])


class Recorder(nn.Module):
    """An objective that notes what it is given in evaluation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, model, batch):
        if not self.training:
            self.seen.append((model, model.training, batch))
        return squared_error(model, batch)


def test_the_loss_is_the_mean_over_the_held_out_images_with_the_averaged_weights(data, held_out, tmp_path):
    """18 images in batches of 4, the last of 2: computed here in one batch, with weights swapped by hand."""
    objective = Recorder()
    run = trainer(data, tmp_path / "run", objective, validation_data=held_out, **SETTINGS)
    run.train()
    assert objective.training and run.module.training
    last = objective.seen[-5:]
    assert [len(batch["time"]) for _, _, batch in last] == [4, 4, 4, 4, 2]
    assert all(model is run.module and not training for model, training, _ in objective.seen)
    everything = {name: torch.cat([batch[name] for _, _, batch in last]) for name in last[0][2]}
    np.testing.assert_array_equal(everything["labels"], held_out.labels)
    pixels = torch.from_numpy(held_out.pixels[range(18)]).permute(0, 3, 1, 2)
    torch.testing.assert_close(everything["images"], pixels / 127.5 - 1)
    for (name, parameter), average in zip(run.module.named_parameters(), run.average._average, strict=True):
        assert not torch.equal(parameter, average), name
        parameter.data.copy_(average)
    run.module.eval()
    with torch.no_grad():
        assert metrics(tmp_path / "run")[-1]["val_loss"] == pytest.approx(squared_error(run.module, everything).item())


def test_noise_and_times_are_the_same_each_time_and_in_every_run(held_out):
    batches = list(ValidationBatches(held_out, 4).share())
    for batch, again in zip(batches, ValidationBatches(held_out, 4).share(), strict=True):
        assert all(torch.equal(batch[name], again[name]) for name in batch)
    shares = [list(ValidationBatches(held_out, 4).share(index, 2)) for index in (0, 1)]
    assert [len(share) for share in shares] == [3, 2]
    for number, batch in enumerate(batches):
        other = shares[number % 2][number // 2]
        assert all(torch.equal(batch[name], other[name]) for name in batch)
    larger = next(ValidationBatches(held_out, 18).share())
    for name in larger:
        assert torch.equal(torch.cat([batch[name] for batch in batches]), larger[name])
    times = np.sort(larger["time"].numpy())
    np.testing.assert_allclose(times, (np.arange(18) + 0.5) / 18)
    assert (np.diff(larger["time"].numpy()) < 0).any()
    assert abs(larger["noise"].mean()) < 0.1 and abs(larger["noise"].std() - 1) < 0.1


def test_images_are_read_like_those_of_the_training(data):
    config = TrainerConfig(validation_split="test", resolution=(8, 8), max_train_samples=3, max_validation_samples=30)
    held_out = prepare_validation(config, data)
    assert len(held_out) == 30 and held_out.id2label == data.id2label
    assert prepare_validation(TrainerConfig(), data) is None


def test_images_are_brought_to_the_size_that_is_trained_on():
    """Which no option says: those of the training have got a border up to a multiple."""
    config = TrainerConfig(validation_split="test", max_train_samples=3, max_validation_samples=3)
    data = prepare_data(config, multiple_of=6)
    held_out = prepare_validation(config, data)
    assert held_out.size == data.size == (12, 12) and held_out.resize_mode == data.resize_mode == "pad"


def test_images_of_another_size_are_refused(data):
    """As latents have that were encoded at another resolution."""

    def prepare(config, **_):
        return prepare_images("digits", split="test", max_samples=3, resolution=(12, 8))

    with pytest.raises(ValueError, match="split 'test' must have the size of those trained on, 8x8, got 12x8"):
        prepare_validation(TrainerConfig(validation_split="test"), data, prepare)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """A folder of 20 different pictures, and of two in a split of their own that are among them."""
    folder = tmp_path_factory.mktemp("numbered")
    pictures = [b"P5\n8 8\n255\n" + bytes(range(number, number + 64)) for number in range(20)]
    for split, rows in (("train", pictures), ("test", pictures[:2])):
        pd.DataFrame({"image": rows}).to_parquet(folder / f"{split}.parquet")
    return {"dataset_name": str(folder), "cache_dir": str(tmp_path_factory.mktemp("cache"))}


@pytest.mark.parametrize("split", ["train[90%:]", "train"])
def test_images_that_are_all_trained_on_are_none_that_are_held_out(numbered, split):
    config = TrainerConfig(validation_split=split, **numbered)
    with pytest.raises(ValueError, match=r"must be others than those trained on, and all \d+ are among them"):
        prepare_validation(config, prepare_data(config))
    streamed = dataclasses.replace(config, validation_split="train", streaming=True, max_validation_samples=3)
    with pytest.raises(ValueError, match=r"must be others than those trained on, and all 3 are among them"):
        prepare_validation(streamed, prepare_data(streamed))


@pytest.mark.parametrize("split, known, number", [("train[9:15]", 3, 6), ("test", 2, 2), ("train[12:]", 0, 8)])
def test_how_many_are_trained_on_is_said(numbered, split, known, number):
    config = TrainerConfig(dataset_split="train[:12]", validation_split=split, **numbered)
    lines = describe_held_out(prepare_validation(config, prepare_data(config)), split)
    said = f"of these images: {known} of {number} are trained on too, by which the loss on them is too low"
    assert lines[0] == f"the loss is taken on {number} images of the split {split} too"
    assert [line for line in lines if "trained on" in line] == ([said] if known else [])
    assert describe_held_out(None, None) == []


def test_labels_are_numbered_like_those_of_the_training(data):
    """Of a training set with other numbers for the same names."""
    turned = dataclasses.replace(data, id2label={label: str(9 - label) for label in range(10)})
    config = TrainerConfig(validation_split="test", resolution=(8, 8), max_validation_samples=30)
    plain, held_out = prepare_validation(config, data), prepare_validation(config, turned)
    np.testing.assert_array_equal(held_out.labels, 9 - plain.labels)
    assert held_out.id2label == turned.id2label


def test_an_integer_means_the_same_label_in_both_splits(tmp_path):
    def save(split, labels):
        rows = pd.DataFrame({"image": [PGM] * len(labels), "label": labels})
        rows.to_parquet(tmp_path / f"{split}.parquet")

    save("train", [7, 10177, 12])
    save("test", [10177, 7])
    options = {"dataset_name": str(tmp_path), "cache_dir": str(tmp_path / "cache")}
    config = TrainerConfig(validation_split="test", resolution=(8, 8), **options)
    data = prepare_data(config)
    assert data.labels.tolist() == [0, 2, 1] and data.id2label == {0: "7", 1: "12", 2: "10177"}
    held_out = prepare_validation(config, data)
    assert held_out.labels.tolist() == [2, 0] and held_out.id2label == data.id2label
    save("test", [10177, 8])
    with pytest.raises(ValueError, match="the split 'test' have labels that are not trained on: 8"):
        prepare_validation(config, data)


def test_other_images_are_refused(data):
    config = TrainerConfig(validation_split="test", resolution=(8, 8), max_validation_samples=30)
    fewer = dataclasses.replace(data, id2label={label: str(label) for label in range(8)})
    with pytest.raises(ValueError, match="split 'test' have labels that are not trained on: 8, 9"):
        prepare_validation(config, fewer)
    with pytest.raises(ValueError, match="the validation images have labels and the training images have none"):
        prepare_validation(config, dataclasses.replace(data, labels=None, id2label=None))


def test_options_of_validation_need_a_split():
    with pytest.raises(ValueError, match="validation_steps has no meaning without validation_split"):
        TrainerConfig(validation_steps=3)
    with pytest.raises(ValueError, match="max_validation_samples must be at least 1, got 0"):
        TrainerConfig(validation_split="test", max_validation_samples=0)


def test_a_loss_that_is_not_finite_there_ends_the_run(data, held_out, tmp_path):
    def loss(model, batch):
        return squared_error(model, batch) * (1.0 if model.training else float("nan"))

    with pytest.raises(FloatingPointError, match=r"the loss on the held-out images is not finite \(nan\) at step 5"):
        trainer(data, tmp_path / "run", loss, validation_data=held_out, **SETTINGS).train()


def test_evaluating_without_images_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="there are no held-out images"):
        trainer(data, tmp_path / "run").evaluate()
