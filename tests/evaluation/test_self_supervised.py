"""Features that are trained without labels: the loss, the views, and what the network has learned."""

import json

import pytest
import torch
from accelerate import PartialState

from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.feature_folders import FEATURES_FILE, features_for, measuring_features
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.evaluation.report import describe_network, name_network
from diffusers_ext.evaluation.self_supervised import (
    draw_view,
    fit_features_without_labels,
    share_found,
    vicreg_loss,
)
from diffusers_ext.metrics.features import FeatureClassifierModel


def gratings(number, seed, side=16):
    """Waves of random direction, length and phase, which views keep the direction of."""
    generator = torch.Generator().manual_seed(seed)
    angle, phase = (2 * torch.pi * torch.rand(number, 1, 1, generator=generator) for _ in range(2))
    length = 4 + 6 * torch.rand(number, 1, 1, generator=generator)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    wave = torch.sin(2 * torch.pi * (x * angle.cos() + y * angle.sin()) / length + phase)
    return (127.5 + 100 * wave).round().to(torch.uint8)[:, None]


def unlabelled(images):
    return LabelledImages(images, torch.full([len(images)], -1), [])


@pytest.fixture(scope="module")
def real():
    train, held_out = unlabelled(gratings(96, 0)), unlabelled(gratings(200, 1))
    return RealImages(train, held_out, "gratings", "crop", ())


@pytest.fixture(scope="module")
def kept(real, tmp_path_factory):
    """The default features of these data and what is known of them, in a cache that is theirs."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFUSERS_EXT_CACHE", str(cache))
        return cache, *features_for(real, None, PartialState())


def test_the_loss_is_equation_6_of_the_paper():
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    expected = 25 * (z[0] - z[1]).square().mean()
    for view in z:
        covariance = torch.cov(view.T)
        for i in range(5):
            expected += 25 / 5 * max(0.0, 1 - (covariance[i, i] + 1e-4) ** 0.5)
            for j in range(5):
                expected += covariance[i, j] ** 2 / 5 if i != j else 0
    torch.testing.assert_close(vicreg_loss(*z), expected)
    with pytest.raises(ValueError, match="a batch of 2 or more, got \\(1, 5\\) and \\(1, 5\\)"):
        vicreg_loss(z[0][:1], z[1][:1])


def test_a_view_is_a_part_of_the_image_at_another_contrast(monkeypatch):
    """Of an image whose values are its coordinates, the values of a view are those of the part that it shows."""
    monkeypatch.setattr("diffusers_ext.evaluation.self_supervised.CONTRAST", 0.0)
    monkeypatch.setattr("diffusers_ext.evaluation.self_supervised.BRIGHTNESS", 0.0)
    side = torch.linspace(-1, 1, 32)
    image = torch.stack(torch.meshgrid(side, side, indexing="ij")).expand(200, -1, -1, -1)
    view = draw_view(image, torch.Generator().manual_seed(0), flip=True)
    height = (view[:, 0].amax((1, 2)) - view[:, 0].amin((1, 2))) / 2
    width = (view[:, 1].amax((1, 2)) - view[:, 1].amin((1, 2))) / 2
    assert view.abs().max() <= 1 and 0.25 < (height * width).min() < 0.35 and (height * width).max() > 0.9
    mirrored = view[:, 1, 0, 0] > view[:, 1, 0, -1]
    assert 70 < mirrored.sum() < 130 and (view[:, 0, 0, 0] < view[:, 0, -1, 0]).all()  # never upside down


def test_sequences_are_cut_in_time_alone():
    line = torch.linspace(-0.5, 0.5, 40).expand(50, 2, -1)
    view = draw_view(line, torch.Generator().manual_seed(0))
    slope = view.diff(dim=-1)[..., 5:-5]
    torch.testing.assert_close(slope, slope[..., :1].expand_as(slope), rtol=1e-3, atol=1e-5)
    assert view.shape == line.shape and (slope > 0).all() and slope.std() > 0


def test_data_without_labels_have_features_by_default_that_tell_images_apart(real, kept, monkeypatch, capsys):
    cache, features, about = kept
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(cache))
    untrained = FeatureClassifierModel.for_images((1, 16, 16), None).eval()
    assert about["held_out_share_found"] > 1.3 * share_found(untrained, real.held_out)
    assert (
        features.logits(torch.zeros(1, features.feature_dim)) is None
        and features.measure(real.train.images)[1] is None
    )
    again, same = measuring_features(real, None, PartialState())  # which is read and not trained again
    assert same == about and "training" not in capsys.readouterr().out
    assert torch.equal(again.measure(real.train.images)[0], features.measure(real.train.images)[0])

    evaluator = Evaluator(real.train, features, in_pixels=False)
    of_one_law = evaluator.measure(real.held_out.images)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (200, 1, 16, 16), generator=generator).to(torch.uint8)
    assert of_one_law["frechet_distance"] < evaluator.measure(noise)["frechet_distance"] / 3
    assert not {"label_accuracy", "classifier_score"} & set(of_one_law)


def test_what_is_known_of_them_is_said(kept):
    _, _, about = kept
    folder = about["folder"]
    assert json.loads(open(f"{folder}/{FEATURES_FILE}").read())["num_held_out_images"] == 200
    assert describe_network(about).startswith(f"the network in {folder}, trained without labels, which finds ")
    assert name_network(about, "gratings") == "a network trained on gratings without labels"


def test_no_features_can_be_asked_for(real):
    assert measuring_features(real, "none", PartialState()) == (None, None)


def test_the_seed_decides_the_weights():
    train = unlabelled(gratings(32, 0))
    settings = {"num_epochs": 1, "batch_size": 16, "show_progress": False}
    first, again, other = (fit_features_without_labels(train, **settings, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.conv_in.weight, again.conv_in.weight)
    assert not torch.allclose(first.conv_in.weight, other.conv_in.weight)
