"""Data sets whose classes are of unequal size: a perfect generator must be measured as one."""

import json
from collections import Counter
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.feature_folders import FEATURES_FILE
from diffusers_ext.evaluation.label_shares import balanced_labels, describe_labels, proportional_labels
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.evaluation.report import describe_proportions
from diffusers_ext.evaluation.subject import generate_for
from diffusers_ext.hub.cards import write_card
from diffusers_ext.metrics import FeatureStatistics
from diffusers_ext.metrics.features import FeatureClassifierModel
from training import evaluate


NAMES = ["dark", "grey", "bright"]
COUNTS = [400, 30, 20]
pytestmark = pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")


def paint(labels, seed):
    """Grey pictures of 8x8, a class by its brightness."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(-25, 26, (len(labels), 1, 8, 8), generator=generator)
    return (40 + 85 * torch.as_tensor(labels).view(-1, 1, 1, 1) + noise).to(torch.uint8)


def labelled(counts, seed):
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    return LabelledImages(paint(labels, seed), labels, NAMES)


@pytest.fixture(scope="module")
def real():
    return RealImages(labelled(COUNTS, 0), labelled(COUNTS, 1), "shades", "crop", ())


@pytest.fixture(scope="module")
def features():
    torch.manual_seed(0)
    return FeatureClassifierModel.for_images((1, 8, 8), NAMES).eval()


def unet(num_classes=3):
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "num_classes": num_classes}
    return UNetModel(sample_size=8, in_channels=1, out_channels=1, **sizes)


class Perfect:
    """Pictures of the data set's own distribution, of the labels asked for."""

    scheduler, components, config = ExtDDIMScheduler(), {"denoiser": unet()}, {"id2label": dict(enumerate(NAMES))}

    def __call__(self, class_labels, num_inference_steps=50, generator=None, output_type="np"):
        return SimpleNamespace(images=paint(class_labels, generator[0].initial_seed()).movedim(1, -1).numpy() / 255)

    def set_progress_bar_config(self, **config):
        pass


def test_a_perfect_generator_is_as_far_as_held_out_images(real, features):
    images, labels, sampling = generate_for(real, Perfect(), 450)
    assert torch.bincount(labels).tolist() == COUNTS
    assert sampling["labels"]["proportions"] == "as often as in the training images"
    evaluator = Evaluator(real.train, features, num_reference=450)
    generated, held_out = evaluator.measure(images, labels), evaluator.measure_held_out(real.held_out, 450)
    assert generated["frechet_distance"] < 2 * held_out["frechet_distance"]
    assert "reference_weighted" not in generated and "reference_weighted" not in held_out
    # Without their labels, equally many of each class are far away, which the test could not tell otherwise.
    equally = evaluator.measure(paint(balanced_labels(450, 3), 2))
    assert equally["frechet_distance"] > 20 * held_out["frechet_distance"]


def test_a_set_with_other_proportions_is_compared_with_weighted_real_images(real, features):
    """As a folder with equally many of each class. The mix is right again where the real ones have it themselves."""
    labels = torch.tensor(balanced_labels(450, 3))
    images = paint(labels, 2)
    evaluator = Evaluator(real.train, features, num_reference=450)
    weighted = evaluator.measure(images, labels)
    assert weighted["reference_weighted"] is True
    alike = Evaluator(labelled([150] * 3, 3), features, num_reference=450).measure(images, labels)
    assert "reference_weighted" not in alike
    unweighted = evaluator.measure(images)["frechet_distance"]
    assert weighted["frechet_distance"] < unweighted / 10 and alike["frechet_distance"] < unweighted / 10
    for measure in ("feature_recall", "pixel_recall", "pixel_precision"):
        assert weighted[measure] == pytest.approx(alike[measure], abs=0.15)
    weights = evaluator.weights_for(labels)
    shares = torch.zeros(3, dtype=torch.float64).index_add_(0, real.train.labels, weights)
    torch.testing.assert_close(shares, torch.full([3], 1 / 3, dtype=torch.float64))


def test_proportions_within_chance_are_left_alone(real):
    evaluator = Evaluator(real.train, in_pixels=False)
    generator = torch.Generator().manual_seed(0)
    chances = torch.tensor(COUNTS, dtype=torch.float64)
    for count in (20, 100, 1000):
        drawn = torch.multinomial(chances, count, replacement=True, generator=generator)
        assert evaluator.weights_for(drawn) is None
    assert evaluator.weights_for(torch.tensor([0] * 100 + [1] * 100)) is not None
    assert evaluator.weights_for(None) is None
    absent = Evaluator(LabelledImages(*real.train.tensors, [*NAMES, "none"]), in_pixels=False)
    assert absent.weights_for(torch.tensor([3] * 100)) is None  # there is no image to weight


@given(st.lists(st.integers(0, 500), min_size=1, max_size=12).filter(any), st.integers(0, 400))
def test_each_label_has_its_share_to_within_one_image(counts, num_images):
    labels = proportional_labels(num_images, counts)
    assert len(labels) == num_images and labels == proportional_labels(num_images, counts)
    there = [count for count in counts if count]
    if max(there) <= 1.1 * min(there):
        counts = [1 if count else 0 for count in counts]
    numbers = Counter(labels)
    for label, count in enumerate(counts):
        assert abs(numbers[label] - num_images * count / sum(counts)) < 1
        assert count or not numbers[label]
    first = [labels.index(label) for label in sorted(numbers)]
    assert first == list(range(len(numbers)))  # one of each comes first


def test_largest_remainders_get_what_rounding_down_leaves():
    """Quotas 3.57, 2.14, 1.43, 0.71, 0.14: two are left, for remainders of 0.71 and 0.57."""
    counts = [25, 15, 10, 5, 1]
    assert [proportional_labels(8, counts).count(label) for label in range(5)] == [4, 2, 1, 1, 0]
    assert describe_labels(proportional_labels(8, counts), counts) == {
        "proportions": "as often as in the training images",
        "num_labels": 5,
        "num_asked": 4,
        "fewest": 1,
        "most": 4,
    }


@pytest.mark.parametrize("num_images", [1, 9, 1000])
def test_equal_classes_come_in_turn(num_images):
    assert proportional_labels(num_images, [50] * 10) == balanced_labels(num_images, 10)
    digits = [149, 152, 148, 153, 151, 152, 151, 149, 145, 150]  # a random split of equal ones
    assert proportional_labels(num_images, digits) == balanced_labels(num_images, 10)
    years = [0] * 2018 + [7, 7, 7]
    assert proportional_labels(num_images, years) == [2018 + i % 3 for i in range(num_images)]
    assert describe_labels(balanced_labels(9, 3), [50, 0, 52])["proportions"] == "equally often"


@pytest.mark.parametrize("counts", [[], [0, 0], [3, -1]])
def test_counts_that_give_no_proportions_are_refused(counts):
    with pytest.raises(ValueError, match="counts must not be negative, and one of them positive"):
        proportional_labels(5, counts)


def test_weighted_statistics_are_numpys():
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights[:5] = 0
    statistics = FeatureStatistics.of_weighted(features, weights)
    np.testing.assert_allclose(statistics.mean, np.average(features, axis=0, weights=weights), rtol=1e-12)
    expected = np.cov(features.numpy(), rowvar=False, aweights=weights.numpy())
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-12, atol=1e-14)
    alike, plain = (
        FeatureStatistics.of_weighted(features, torch.full([60], 0.3)),
        FeatureStatistics(4).update(features),
    )
    torch.testing.assert_close(alike.covariance, plain.covariance, rtol=1e-12, atol=1e-14)
    for bad in (torch.ones(59), -torch.ones(60), torch.eye(60)[0]):
        with pytest.raises(ValueError, match="weights must be one for each of 60 samples"):
            FeatureStatistics.of_weighted(features, bad)


def save_shades(folder, split, counts, seed):
    data = labelled(counts, seed)
    pictures = [Image.fromarray(picture.numpy()) for picture in data.images[:, 0]]
    columns = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": pictures, "label": data.labels.tolist()}
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=columns).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_the_result_says_in_which_proportions_labels_were_asked_for(tmp_path, capsys, features):
    """In the JSON, in the table that is printed, in the model card; and so for a folder of images."""
    features.save_pretrained(tmp_path / "features")
    (tmp_path / "features" / FEATURES_FILE).write_text('{"held_out_accuracy": 0.3}\n')
    data, run = tmp_path / "shades", tmp_path / "run"
    save_shades(data, "train", COUNTS, 0)
    save_shades(data, "test", [40, 40, 40], 1)  # equally many, as test splits of such data sets often have
    pipe = GuidedDiffusionPipeline(unet(), ExtDDIMScheduler(), id2label=dict(enumerate(NAMES)))
    pipe.save_pretrained(run)
    (run / "train_config.yaml").write_text(f"dataset_name: {data}\nnum_inference_steps: 2\n")
    write_card(run, data="Shades.")
    shared = [
        "--cache_dir",
        str(tmp_path / "datasets"),
        "--features",
        str(tmp_path / "features"),
        "--num_neighbours",
        "3",
    ]
    result = evaluate.main(evaluate.parse([str(run), *shared, "--num_images", "30"]))
    known = {"num_labels": 3, "num_asked": 3, "fewest": 1, "most": 27}
    assert known.items() <= result["sampling"]["labels"].items()
    assert result == json.loads((run / "evaluation.json").read_text())
    assert result["held_out"]["reference_weighted"] and "reference_weighted" not in result["generated"]
    printed = capsys.readouterr().out
    assert "as often as in the training images: 3 labels, 1 to 27 images of each\n" in printed
    assert "the held-out images have labels in other proportions than the training images" in printed
    assert "ExtDDIMScheduler, labels as often as in the training images | 2 |" in (run / "README.md").read_text()

    for name, picture in zip(NAMES, paint([0, 1, 2], 4), strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(picture[0].numpy()).save(tmp_path / "images" / name / f"{number}.png")
    result = evaluate.main(evaluate.parse([str(tmp_path / "images"), "--dataset_name", str(data), *shared]))
    assert result["generated"]["reference_weighted"] and result["sampling"] is None
    assert "the measured images have labels in other proportions" in capsys.readouterr().out


def test_images_that_show_labels_in_other_proportions_are_found_by_the_classifier(real):
    """Also where none was asked for. A network of the mean brightness reads all of them right."""
    features = ModuleOfBrightness()
    evaluator = Evaluator(real.train, features, num_reference=450, in_pixels=False)
    alike = evaluator.measure(paint(proportional_labels(450, COUNTS), 2))
    assert alike["label_share_distance"] == pytest.approx(0, abs=1e-9) and alike["label_shares_differ"] is False
    other = evaluator.measure(paint(balanced_labels(450, 3), 2))
    shares = [(400 / 450 - 1 / 3), (1 / 3 - 30 / 450), (1 / 3 - 20 / 450)]
    assert other["label_share_distance"] == pytest.approx(sum(shares) / 2) and other["label_shares_differ"] is True
    # Those that are asked for in other proportions are compared with as many of each label.
    asked = torch.tensor(balanced_labels(450, 3))
    assert evaluator.measure(paint(asked, 2), asked)["label_share_distance"] == pytest.approx(0, abs=1e-9)
    lines = describe_proportions({"sampling": None, "generated": other})
    assert len(lines) == 1 and "do not show the labels in the proportions of the training images" in lines[0]
    assert "55.6% of them" in lines[0]


class ModuleOfBrightness(FeatureClassifierModel):
    """The mean of an image as two features, of which the classes are thirds of the range."""

    def __init__(self):
        super().__init__((8, 8), 1, 3, block_out_channels=(2,), label_names=NAMES)
        with torch.no_grad():
            # The largest of 2 a c - c^2 over the classes' brightness c is that of the nearest.
            centres = torch.tensor([40.0, 125.0, 210.0]) / 127.5 - 1
            self.classifier.weight.copy_(torch.stack([2 * centres, 0 * centres], 1))
            self.classifier.bias.copy_(-centres.square())

    def extract_features(self, sample):
        mean = sample.mean((1, 2, 3))
        return torch.stack([mean, sample.flatten(1).std(1)], 1)
