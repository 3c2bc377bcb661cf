"""Sets of images of a run beside its data: which data, labels and noise they are of."""

import pytest
import torch

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline
from diffusers_ext.evaluation.comparison import SEED, Comparison
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.feature_folders import FEATURES_FILE
from diffusers_ext.evaluation.generate import generate_images
from diffusers_ext.metrics.features import FeatureClassifierModel
from tiny import tiny_unet


def save_features(folder, size):
    features = FeatureClassifierModel.for_images((1, *size), [str(digit) for digit in range(10)])
    features.save_pretrained(folder)
    (folder / FEATURES_FILE).write_text("{}")


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    save_features(tmp_path / "features", (8, 8))
    (tmp_path / "train_config.yaml").write_text("dataset_name: digits\nresolution: [8, 8]\n")
    return tmp_path


@pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")
@pytest.mark.parametrize("num_classes", [None, 10])
def test_sets_are_of_one_noise_and_measured_beside_the_data_of_the_run(run, num_classes):
    unet = tiny_unet(num_classes)
    pipe = GuidedDiffusionPipeline(unet, ExtDDIMScheduler(timestep_spacing="trailing"))
    comparison = Comparison.of(pipe, run, 20, str(run / "features"))
    assert len(comparison.real.train) == 1500 and comparison.held_out_distance > 0
    assert comparison.labels is None if num_classes is None else set(comparison.labels) == set(range(10))
    images = comparison.generate(pipe, 2, {"guidance_scale": 1.0})
    expected = generate_images(
        pipe,
        range(20),
        labels=comparison.labels,
        num_inference_steps=2,
        guidance_scale=1.0,
        seed=SEED,
        show_progress=False,
    )
    assert torch.equal(images, expected)
    features = FeatureClassifierModel.from_pretrained(run / "features")
    labels = None if num_classes is None else torch.tensor(comparison.labels)
    alone = Evaluator(comparison.real.train, features, in_pixels=False).measure(images, labels)
    assert comparison.measure(images) == pytest.approx(alone, rel=1e-4)
    assert len(list((run / "cache" / "reference").iterdir())) == 1


@pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")
def test_smaller_images_are_centred_on_the_border_of_the_data(run):
    """As the data are at the size at which they are compared: by hand, and the images themselves within."""
    (run / "train_config.yaml").write_text(
        "dataset_name: digits\nresolution: [8, 8]\nresize_mode: pad\npad_value: 3\n"
    )
    pipe = GuidedDiffusionPipeline(tiny_unet(10), ExtDDIMScheduler(timestep_spacing="trailing"))
    settings = (2, {"guidance_scale": 1.0})
    plain = Comparison.of(pipe, run, 20, str(run / "features")).generate(pipe, *settings)
    save_features(run / "wide", (12, 11))
    comparison = Comparison.of(pipe, run, 20, str(run / "wide"), resolution=(12, 11))
    images = comparison.generate(pipe, *settings)
    assert images.shape == (20, 1, 12, 11) and torch.equal(images[:, :, 2:10, 1:9], plain)
    border = images.clone()
    border[:, :, 2:10, 1:9] = comparison.pad_value
    assert (border == comparison.pad_value).all()
    assert comparison.pad_value == comparison.real.train.images[0, 0, 0, 0] > 0
    assert comparison.measure(images)["frechet_distance"] > 0
