"""Pipelines that make images from texts are asked for the captions of a data set's images."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers.guiders import ClassifierFreeGuidance
from PIL import Image

from diffusers_ext import ExtDDIMScheduler, TextGuidedDiffusionPipeline
from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.latent_cache import LatentsInfo, write_info
from diffusers_ext.evaluation.options import take_options_of_run
from diffusers_ext.evaluation.real_images import load_real_images
from diffusers_ext.evaluation.subject import generate_for
from diffusers_ext.hub.cards import write_card
from tiny_text import CAPTIONS, COLOURS, picture, save_pictures, tiny_clip, tiny_text_unet, tiny_tokenizer
from training import evaluate


TRAIN, TEST = [CAPTIONS[i % len(CAPTIONS)] for i in range(48)], CAPTIONS[::-1]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "cache"))


def colours(captions):
    """The column `label`: what the first word says."""
    numbers = [COLOURS.index(caption.split()[0]) for caption in captions]
    return {"label": (datasets.ClassLabel(names=list(COLOURS)), numbers)}


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Pictures with captions and labels in two splits."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    save_pictures(folder, "train", TRAIN, **colours(TRAIN))
    return save_pictures(folder, "test", TEST, **colours(TEST))


def text_pipeline(**components):
    tokenizer = tiny_tokenizer()
    scheduler = ExtDDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    parts = {"tokenizer": tokenizer, "text_encoder": tiny_clip(tokenizer)} | components
    return TextGuidedDiffusionPipeline(tiny_text_unet(), scheduler, **parts)


def save_run(folder, dataset_name, pipeline=None, **options):
    (pipeline or text_pipeline()).save_pretrained(folder)
    saved = {"dataset_name": dataset_name, "dataset_split": "train", "caption_column": None, "label_column": None}
    (folder / "train_config.yaml").write_text(yaml.safe_dump(saved | {"num_inference_steps": 2} | options))
    write_card(folder, data="Shapes.")
    return folder


def run(*arguments):
    return evaluate.main(evaluate.parse([str(argument) for argument in arguments]))


class Painter:
    """Paints what a text says, and nothing else."""

    scheduler, components = ExtDDIMScheduler(), {}

    def __call__(self, prompt, num_inference_steps=50, generator=None, output_type="np"):
        assert len(prompt) == len(generator)
        self.images = np.stack([picture(text) for text in prompt]) / 255
        return self

    def set_progress_bar_config(self, **config):
        pass


@pytest.mark.parametrize("count", [7, 12, 30])
def test_what_the_captions_ask_for_is_what_the_held_out_images_are(labelled, count):
    """Each caption in turn, with the labels of its picture, in the order in which held-out images are measured."""
    real = load_real_images(DataConfig(dataset_name=labelled), caption_column="text")
    images, labels, sampling = generate_for(real, Painter(), count, batch_size=5, seed=3)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3)).repeat(3)[:count]
    assert images.equal(real.held_out.images[order]) and labels.equal(real.held_out.labels[order])
    assert sampling["captions"] == {"column": "text", "split": "test", "number": 12} and not sampling["by_label"]


def test_images_are_those_of_the_pipeline_called_by_hand(labelled):
    pipe = text_pipeline()
    real = load_real_images(DataConfig(dataset_name=labelled), caption_column="text")
    images, _, sampling = generate_for(real, pipe, 3, num_inference_steps=2, batch_size=2, seed=1)
    texts, _ = real.captions.draw(3, 1)
    for i, text in enumerate(texts):
        by_hand = pipe(text, num_inference_steps=2, generator=torch.Generator().manual_seed(1_000_000 + i)).images[0]
        assert np.abs(np.asarray(by_hand).astype(int) - images[i].permute(1, 2, 0).numpy()).max() <= 1
    assert len(set(texts)) == 3 and sampling["guidance_scale"] == 4.0  # the pipeline's own default


def test_a_run_is_measured_without_options(labelled, tmp_path):
    folder = save_run(tmp_path / "run", labelled, guidance_scale=3.0)
    with pytest.warns(UserWarning, match="unreliable"):
        result = run(folder, "--num_images", 24, "--num_neighbours", 3)
    assert result == json.loads((folder / "evaluation.json").read_text())
    assert result["sampling"]["guidance_scale"] == 3.0 and result["sampling"]["num_inference_steps"] == 2
    assert result["generated"].keys() == result["held_out"].keys() >= {"frechet_distance", "label_accuracy"}
    assert result["held_out"]["svc_label_accuracy"] == 1.0 > result["generated"]["svc_label_accuracy"]
    card = (folder / "README.md").read_text()
    distance = f"{result['generated']['frechet_distance']:.4g}"
    assert f"of a classifier of shapes, images from captions of the split test | {distance} | 24 |" in card
    assert "the label of the picture whose caption was asked for" in card and "guidance 3" in card


def test_without_labels_and_held_out_captions_those_of_training_and_pixels_are_taken(tmp_path, capsys):
    data = tmp_path / "data" / "shapes"
    save_pictures(data, "train", TRAIN)
    save_pictures(data, "test", TEST, [None] * len(TEST))
    pipe = text_pipeline(guider=ClassifierFreeGuidance(2.0))  # which is no matter of the run's scale
    folder = save_run(tmp_path / "run", str(data), pipe, guidance_scale=3.0)
    result = run(folder, "--num_images", 20, "--cache_dir", tmp_path / "datasets", "--features", "none")
    assert result["features"] is None and result["sampling"]["guider"] == "ClassifierFreeGuidance"
    assert (
        result["sampling"]["guidance_scale"] is None and "ClassifierFreeGuidance" in (folder / "README.md").read_text()
    )
    assert set(result["generated"]) == {"num_images", "pixel_precision", "pixel_recall", "nearest_train_distance"}
    assert result["sampling"]["captions"] == {"column": "text", "split": "train", "number": 48}
    assert "asked for by the captions of the split train, column text" in capsys.readouterr().out
    assert result["held_out"]["num_images"] == 12


def test_captions_in_a_column_of_another_name_are_no_labels(tmp_path):
    """A column `label` of free texts has ones that the training split does not know."""
    data = tmp_path / "data"
    for split, captions in (("train", TRAIN[:40]), ("test", ["red edge", "green edge"])):
        texts = [f"{number}: {caption}" for number, caption in enumerate(captions)]
        save_pictures(data, split, captions, [""] * len(captions), label=(datasets.Value("string"), texts))
    options = DataConfig(dataset_name=str(data), cache_dir=str(tmp_path / "datasets"))
    with pytest.raises(ValueError, match="must have the labels of the training images"):
        load_real_images(options)
    real = load_real_images(options, caption_column="label")
    assert not real.has_labels and real.captions.texts == ("0: red edge", "1: green edge")


def test_a_split_of_which_some_images_have_captions_is_refused(tmp_path):
    data = tmp_path / "data"
    save_pictures(data, "train", TRAIN[:4], ["a", "b", "c", None])
    save_pictures(data, "test", TEST[:3], ["a", None, None])
    options = DataConfig(dataset_name=str(data), cache_dir=str(tmp_path / "datasets"), max_train_samples=3)
    with pytest.raises(ValueError, match="caption_column 'text' is empty in 2 of 3 rows of the split test"):
        load_real_images(options, caption_column="text")
    save_pictures(data, "test", TEST[:3], [None, None, None])
    one = dataclasses.replace(options, max_train_samples=1)  # a row that has a text
    assert load_real_images(one, caption_column="text").captions.texts == ("b",)


def test_a_run_on_latents_is_measured_on_the_images_with_its_captions(labelled, tmp_path):
    info = LatentsInfo(
        labelled, None, "train", (8, 8), "crop", 0, None, None, "text", (4, 4, 4), 48, False, None, "", ""
    )
    (tmp_path / "latents").mkdir()
    write_info(tmp_path / "latents", {"train": info})
    folder = save_run(tmp_path / "run", str(tmp_path / "latents"))
    config = take_options_of_run(evaluate.parse([str(folder)]), folder, of_data=["caption_column"])
    assert (config.dataset_name, config.caption_column, config.label_column) == (labelled, "text", None)


def test_what_does_not_apply_is_refused(labelled, tmp_path):
    folder = save_run(tmp_path / "run", labelled)
    blind = save_run(tmp_path / "blind", labelled, text_pipeline(tokenizer=None, text_encoder=None))
    guided = save_run(tmp_path / "guided", labelled, text_pipeline(guider=ClassifierFreeGuidance(2.0)))
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(picture("red dot")).save(images / "0.png")
    for arguments, message in [
        ((folder, "--bits_per_dim"), "--bits_per_dim is of images.* got a TextGuidedDiffusionPipeline"),
        ((folder, "--caption_column", "image"), "caption_column 'image' holds no text; its columns are"),
        ((guided, "--guidance_scale", 1), "guidance_scale is not of a pipeline with a guider"),
        ((blind,), "without a text_encoder cannot be asked for captions"),
        (
            (images, "--caption_column", "text"),
            "caption_column is of pipelines .* is a folder of images: leave it out",
        ),
        ((images, "--guidance_scale", 2), "guidance_scale is of a pipeline, and .* is a folder of images"),
        ((images, "--num_images", 5), "num_images is of a pipeline"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*arguments, "--dataset_name", labelled)
