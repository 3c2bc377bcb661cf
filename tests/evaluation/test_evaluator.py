"""Which measures a set of images gets, and by what the labels are compared."""

import copy

import pytest
import torch

from diffusers_ext.evaluation.evaluator import Evaluator, can_measure_held_out, describe_left_out, knows_labels
from diffusers_ext.evaluation.feature_training import fit_feature_classifier
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.metrics.features import FeatureClassifierModel


NAMES = ["dark", "grey", "bright"]
pytestmark = pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")


def shades(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randint(-25, 26, (count, 1, 8, 8), generator=generator)
    return LabelledImages((40 + 85 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8), labels, NAMES)


@pytest.fixture(scope="module")
def train():
    return shades(150, 0)


@pytest.fixture(scope="module")
def features(train):
    return fit_feature_classifier(train, num_epochs=6, batch_size=16, show_progress=False)


def renamed(features, names, classes):
    """The same network with its classes in another order: class i is the class `classes[i]` of `features`."""
    other = FeatureClassifierModel.for_images((1, 8, 8), names).eval()
    weights = copy.deepcopy(features.state_dict())
    for part in ("classifier.weight", "classifier.bias"):
        weights[part] = weights[part][classes]
    other.load_state_dict(weights)
    return other


def label_accuracy(train, features, images):
    measures = Evaluator(train, features, in_pixels=False).measure(images.images, images.labels)
    return measures.get("label_accuracy")


def test_labels_are_compared_by_name_with_a_classifier_of_another_data_set(train, features):
    """Whose classes have other ids: the same images must get the same accuracy."""
    images = shades(60, 1)
    images.labels[:6] = (images.labels[:6] + 1) % 3  # these do not show their label
    assert label_accuracy(train, features, images) == pytest.approx(0.9, abs=1e-9)
    other = renamed(features, ["bright", "dark", "grey", "white"], [2, 0, 1, 2])
    assert other.ids_among(NAMES).tolist() == [2, 0, 1, -1]
    other.classifier.bias.data[3] -= 100  # the class that these images do not have is never the likeliest
    assert knows_labels(other, train)
    assert label_accuracy(train, other, images) == pytest.approx(0.9, abs=1e-9)


def test_a_classifier_of_other_names_gives_no_label_accuracy_and_it_is_said(train, features):
    other = renamed(features, ["dark", "grey", "pale"], [0, 1, 2])
    assert not knows_labels(other, train)
    assert label_accuracy(train, other, shades(60, 1)) is None
    real = RealImages(train, shades(60, 1), "shades", "crop", ())
    assert describe_left_out(real, features, 5) == []
    (line,) = describe_left_out(real, other, 5)
    assert "does not know the labels of shades by their names, so label_accuracy is left out" in line


@pytest.mark.parametrize("count, is_measured", [(6, True), (5, False), (None, False)])
def test_held_out_images_that_are_too_few_are_left_out_and_it_is_said(train, features, count, is_measured):
    held_out = None if count is None else shades(count, 1)
    real = RealImages(train, held_out, "shades", "crop", ())
    assert can_measure_held_out(real, 5) == is_measured
    lines = describe_left_out(real, features, 5)
    if is_measured:
        assert lines == [] and Evaluator(train, features).measure_held_out(held_out, 60)["num_images"] == 6
    else:
        (line,) = lines
        assert ("got 5" if count else "name one by --held_out_split") in line
