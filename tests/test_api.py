"""Training from Python: with a data set at hand, as the command of the same options does it, and without ending the process."""

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

import diffusers_ext
from diffusers_ext import TrainConfig, train
from diffusers_ext.api import load_trained
from diffusers_ext.commands import train_ddpm
from diffusers_ext.data.at_hand import keep_dataset
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer.signals import Interrupted
from diffusers_ext.untrusted import read_yaml_mapping
from runs import forget_accelerate


SMALL = {
    "resolution": 8,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "train_batch_size": 4,
    "max_train_steps": 3,
}
SMALL |= {"num_inference_steps": 2, "sample_columns": 1, "num_threads": 1, "mixed_precision": "no"}


class Pairs:
    """A map-style data set with the names of its labels, as those of torchvision are."""

    classes = ("cat", "dog")

    def __init__(self, number=6):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return torch.full((3, 8, 8), index / 255), index % 2


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pipeline of pairs and its folder, and what an `Accelerator` of the program, made before, has to say afterwards."""
    forget_accelerate()
    theirs = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    folder = tmp_path_factory.mktemp("runs") / "pairs"
    pipe = train(TrainConfig(output_dir=folder, **SMALL), dataset=Pairs())
    yield pipe, folder, (theirs.mixed_precision, theirs.gradient_accumulation_steps)
    forget_accelerate()


def test_a_run_gives_the_pipeline_of_a_data_set_at_hand(trained):
    pipe, folder, _ = trained
    assert isinstance(pipe, diffusers_ext.GuidedDiffusionPipeline)
    assert pipe.config.id2label == {"0": "cat", "1": "dog"}
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=["cat"], num_inference_steps=2).images[0].size == (8, 8)
    # So the data can be found again, by the run that goes on and by evaluation.
    named = read_yaml_mapping(folder / "train_config.yaml")["dataset_name"]
    assert named == str(keep_dataset(Pairs())) and len(prepare_images(named)) == 6


def test_the_card_names_the_command_that_makes_the_same_run(trained):
    _, folder, _ = trained
    card = (folder / "README.md").read_text()
    assert "\ndiffusers-ext train --dataset_name " in card and "accelerate launch" not in card


def test_an_accelerator_of_the_program_keeps_its_state(trained):
    assert trained[2] == ("bf16", 3)


def test_python_and_the_command_train_the_same_weights(trained, tmp_path):
    pipe, folder, _ = trained
    values = read_yaml_mapping(folder / "train_config.yaml") | {"output_dir": str(tmp_path / "again")}
    forget_accelerate()
    again = load_trained(train_ddpm.main(TrainConfig(**values)))
    for one, other in zip(pipe.denoiser.parameters(), again.denoiser.parameters(), strict=True):
        assert torch.equal(one, other)


def test_errors_are_exceptions(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match="config must be one of TrainConfig, TextConfig, TrainVAEConfig, got a dict"):
        train({"resolution": 8})
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        TrainConfig(learning_rate=0)
    config = TrainConfig(output_dir=tmp_path, **SMALL)

    def stopped(config):
        raise SystemExit(130)  # as a run ends after Ctrl-C, when it has saved

    monkeypatch.setitem(diffusers_ext.api._COMMANDS, TrainConfig, (stopped, "diffusers-ext train"))
    with pytest.raises(Interrupted, match="resume_from_checkpoint='latest' goes on from there"):
        train(config)


def rows_of(dataset):
    (path,) = keep_dataset(dataset).glob("train")
    return datasets.load_from_disk(path)


@pytest.mark.parametrize(
    "example, pixels",
    [
        (torch.tensor([[0.0, 1.0]]), [[0, 255]]),
        (torch.tensor([[[0, 7]]], dtype=torch.uint8), [[0, 7]]),
        (np.array([[[1, 2, 3]]], dtype=np.uint8), [[[1, 2, 3]]]),
        (Image.new("RGBA", (1, 1), (1, 2, 3, 4)), [[[1, 2, 3, 4]]]),
        (np.array([[True, False]]), [[255, 0]]),
        ({"img": np.zeros((1, 1), np.uint8), "target": 1}, [[0]]),
    ],
)
def test_every_kind_of_image_is_kept_as_it_is(example, pixels):
    assert np.array_equal(rows_of([example, example])[0]["image"], pixels)


def test_labels_texts_and_splits_are_kept():
    picture = Image.new("L", (2, 2))
    rows = rows_of(
        [{"image": picture, "label": np.int64(3), "caption": "a dot"}, {"image": picture, "label": 4, "caption": "b"}]
    )
    assert rows[0]["label"] == 3 and rows[1]["text"] == "b"
    assert rows_of([(picture, "cat"), (picture, "dog")])["label"] == ["cat", "dog"]
    assert rows_of([(picture, torch.tensor([0, 1]))])[0]["label"] == [0, 1]
    folder = keep_dataset({"train": [picture], "test": [picture, picture]})
    assert {name: len(part) for name, part in datasets.load_from_disk(folder).items()} == {"train": 1, "test": 2}


def test_a_data_set_is_kept_once_whatever_it_is_called(tmp_path):
    picture = tmp_path / "a.png"
    Image.new("L", (2, 2), 9).save(picture)
    one = datasets.Dataset.from_dict({"image": [str(picture)], "label": [0]}).cast_column("image", datasets.Image())
    folder = keep_dataset(one)
    assert (
        keep_dataset(one.with_format("numpy")) == folder and keep_dataset([(Image.new("L", (2, 2), 8), 0)]) != folder
    )
    assert not list(folder.parent.glob("writing-*"))
    picture.unlink()  # the file's contents are kept, not its name
    assert np.array_equal(datasets.load_from_disk(folder)["train"][0]["image"], np.full((2, 2), 9))


@pytest.mark.parametrize(
    "dataset, error, message",
    [
        ([], ValueError, "dataset must have examples, and has none"),
        (3, TypeError, "dataset must be a datasets.Dataset or a map-style data set of torch, got a int"),
        (
            datasets.Dataset.from_dict({"a": [1]}).to_iterable_dataset(),
            TypeError,
            "give its dataset_name with streaming",
        ),
        (
            [torch.tensor([[-1.0, 1.0]])],
            ValueError,
            r"floats in \[0, 1\], got values from -1 to 1: leave a normalisation out",
        ),
        ([torch.tensor([[float("nan")]])], ValueError, r"example 0 must have floats in \[0, 1\], got values from nan"),
        ([torch.zeros(2, 4, 4)], ValueError, "an image of 1, 3 or 4 channels, .* got one of 4x4x2"),
        ([np.zeros((2, 2), np.int32)], ValueError, r"example 0 must have 8 bits or floats in \[0, 1\], got int32"),
        (["a.png"], TypeError, "example 0 must have a picture of PIL, an array or a tensor, got a str"),
        ([{"mask": 1}], ValueError, "example 0 must have an image under image, img, .*; it has mask"),
        ([(1, 2, 3)], ValueError, r"an image, a pair \(image, label\) or a dict, got 3 values"),
        (
            [(Image.new("L", (1, 1)), 0), (Image.new("L", (1, 1)),)],
            ValueError,
            "example 1 must have image, label as the first",
        ),
    ],
)
def test_what_is_no_data_set_of_images_is_refused(dataset, error, message):
    with pytest.raises(error, match=message):
        keep_dataset(dataset)
