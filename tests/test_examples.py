"""The pipelines that ship with the package."""

import re
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

import diffusers_ext
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.evaluation.evaluator import fit_svc
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.examples import example_names
from training.make_example import MAX_BYTES, RECIPES


FOLDER = Path(diffusers_ext.__file__).parent / "examples" / "digits"


@pytest.fixture(scope="module")
def digits():
    """The pipeline, loaded where no address can be reached."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_):
            raise AssertionError("asked for the network")

        patch.setattr(socket.socket, "connect", refuse)
        pipe = diffusers_ext.example("digits")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def images(digits):
    """Ten of each label, by the defaults."""
    labels = torch.arange(10).repeat_interleave(10)
    generators = [torch.Generator().manual_seed(seed) for seed in range(100)]
    return digits(class_labels=labels.tolist(), generator=generators, output_type="pt").images, labels


def test_a_call_by_label_makes_digits_as_pictures(digits):
    pictures = digits(class_labels=[3, 3, 7], generator=torch.Generator().manual_seed(0)).images
    assert [(picture.size, picture.mode) for picture in pictures] == [((8, 8), "L")] * 3
    assert digits.denoiser.dtype == torch.float32 and digits.scheduler.config.prediction_type == "v_prediction"


def test_the_digits_are_those_that_were_asked_for(images):
    """By the classifier that evaluate.py has, which reads 0.993 of real images that it has not seen."""
    made, labels = images
    real = prepare_images("digits")
    pixels = torch.from_numpy(np.asarray(real.pixels[range(len(real))])).permute(0, 3, 1, 2)
    svc = fit_svc(LabelledImages(pixels, torch.as_tensor(real.labels), list("0123456789")))
    predicted = torch.as_tensor(svc.predict(made.flatten(1).numpy()))
    assert (predicted == labels).float().mean() >= 0.88


def test_images_of_a_label_differ(images):
    """As real ones do: any two of a label are 1.5 to 4.5 apart."""
    for same in images[0].flatten(1).split(10):
        assert torch.pdist(same).min() > 0.5 and torch.pdist(same).mean() > 1.2


def test_an_unknown_name_is_refused_with_the_list():
    assert example_names() == ["digits"] == list(RECIPES)
    with pytest.raises(ValueError, match="there is no example 'cats': take one of digits"):
        diffusers_ext.example("cats")


def test_its_folder_is_small_and_holds_no_code_and_nothing_of_a_run():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} == {".json", ".md", ".png", ".safetensors", ".yaml"}
    assert not [path for path in files if "checkpoint" in str(path) or path.name == "metrics.jsonl"]


def test_its_card_says_how_to_load_it_and_how_well_it_does():
    card = ModelCard.load(FOLDER / "README.md")
    assert 'diffusers_ext.example("digits")' in card.text and "from_pretrained" not in card.text
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures["label_accuracy_by_an_svc"] > 0.9
    assert figures["frechet_distance"] > 0 and card.data.license == "apache-2.0"
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.text):
        Image.open(FOLDER / name).verify()
