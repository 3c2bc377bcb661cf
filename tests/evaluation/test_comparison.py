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


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    features = FeatureClassifierModel.for_images((1, 8, 8), [str(digit) for digit in range(10)])
    features.save_pretrained(tmp_path / "features")
    (tmp_path / "features" / FEATURES_FILE).write_text("{}")
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
