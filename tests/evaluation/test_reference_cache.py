"""The features of the real images are measured once, and are those of these images and this network alone."""

import pytest
import torch

from diffusers_ext.data.identity import hash_weights
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.reference_cache import reference_features, reference_path
from diffusers_ext.metrics.module_features import ModuleFeatures


class Counting(torch.nn.Module):
    """The first row of the image."""

    def __init__(self, scale):
        super().__init__()
        self.scale, self.calls = torch.nn.Parameter(torch.tensor(scale)), 0

    def forward(self, images):
        self.calls += 1
        return self.scale * images[:, 0, 0]


def images(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (40, 1, 8, 8), generator=generator).to(torch.uint8)
    return LabelledImages(pixels, torch.full([40], -1), [])


def test_features_are_measured_once_and_read_afterwards(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path))
    module, train = Counting(2.0), images()
    features = ModuleFeatures(module, (1, 8, 8))
    sha256, before = hash_weights(features), module.calls
    first = reference_features(features, train, sha256)
    assert module.calls == before + 1
    second = reference_features(features, train, sha256)
    assert module.calls == before + 1 and torch.equal(first, second)
    torch.testing.assert_close(first, 2 * (train.images[:, 0, 0] / 127.5 - 1))

    path = reference_path(train, sha256, 8)
    assert [path] == list((tmp_path / "reference").iterdir())
    path.write_bytes(path.read_bytes()[:50])  # a file that was damaged is made again
    assert torch.equal(reference_features(features, train, sha256), first) and module.calls == before + 2
    measured = Evaluator(train, features, in_pixels=False, train_features=second).measure(images(1).images)
    assert measured == Evaluator(train, features, in_pixels=False).measure(images(1).images)


def test_a_cache_that_cannot_be_written_is_said_and_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "reference").write_text("a file where the folder would be")
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path))
    features = ModuleFeatures(Counting(1.0), (1, 8, 8))
    with pytest.warns(UserWarning, match="features of the real images are measured again next time"):
        found = reference_features(features, images(), hash_weights(features))
    assert torch.equal(found, features.measure(images().images)[0])


def test_other_images_and_other_networks_have_other_files():
    sha256, other = (hash_weights(ModuleFeatures(Counting(scale), (1, 8, 8))) for scale in (1.0, 2.0))
    paths = {
        reference_path(*of)
        for of in (
            (images(), sha256, 8),
            (images(1), sha256, 8),
            (images(), other, 8),
            (images().take(torch.arange(39)), sha256, 8),
        )
    }
    assert len(paths) == 4 and reference_path(images(), sha256, 8) in paths
