import numpy as np
import pytest
import torch

from diffusers_ext.evaluation.feature_training import accuracy, fit_feature_classifier
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.metrics import FeatureClassifierModel
from tiny import assert_same_output, assert_same_weights


def coloured(count, shape, seed, num_classes=3):
    """Noisy images whose label is told by their mean brightness, which any classifier must learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, [count], generator=generator)
    noise = torch.randint(0, 40, [count, *shape], generator=generator)
    images = (noise + 80 * labels[:, None, None, None]).to(torch.uint8)
    return LabelledImages(images, labels, [f"class {label}" for label in range(num_classes)])


@pytest.mark.parametrize(
    "shape",
    [(1, 8, 8), (3, 16, 12), (2, 33, 40), (4, 5, 1), (3, 130, 64)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_any_shape_gives_features_and_logits(shape):
    model = FeatureClassifierModel.for_images(shape, ["a", "b", "c"]).eval()
    sample = torch.randn(2, *shape)
    features = model.extract_features(sample)
    assert features.shape == (2, 128) == (2, model.feature_dim)
    torch.testing.assert_close(model(sample), model.classifier(features))
    assert model(sample).shape == (2, 3)


def test_without_classes_it_is_its_features():
    model = FeatureClassifierModel.for_images((1, 8, 8), None).eval()
    sample = torch.randn(2, 1, 8, 8)
    assert torch.equal(model(sample), model.extract_features(sample)) and model.config.num_classes is None
    features, labels = model.measure(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    assert features.shape == (3, 128) and labels is None and model.logits(features) is None
    assert len(model.ids_among(["a", "b"])) == 0
    with pytest.raises(ValueError, match="label_names must have 0 names, got 1"):
        FeatureClassifierModel(8, 1, None, label_names=["a"])


def test_training_learns_and_the_saved_folder_gives_the_same_features(tmp_path):
    train, held_out = coloured(192, (1, 8, 8), seed=0), coloured(60, (1, 8, 8), seed=1)
    model = fit_feature_classifier(train, num_epochs=8, batch_size=16, show_progress=False)
    assert accuracy(model, held_out) == 1.0

    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    loaded = FeatureClassifierModel.from_pretrained(tmp_path)
    assert loaded.config.label_names == ["class 0", "class 1", "class 2"]
    assert_same_weights(loaded, model)
    for theirs, ours in zip(loaded.measure(held_out.images), model.measure(held_out.images), strict=True):
        assert_same_output(theirs, ours)


def test_accuracy_counts_by_hand():
    data = coloured(50, (1, 8, 8), seed=0)
    model = FeatureClassifierModel.for_images((1, 8, 8), data.label_names).eval()
    with torch.no_grad():
        right = [model(image[None].float() / 127.5 - 1).argmax().item() == label for image, label in data]
    assert accuracy(model, data) == pytest.approx(np.mean(right), abs=1e-12)


def test_the_seed_decides_the_weights():
    train = coloured(64, (1, 8, 8), seed=0)
    models = [
        fit_feature_classifier(train, num_epochs=1, batch_size=32, random_flip=True, seed=seed, show_progress=False)
        for seed in (0, 0, 1)
    ]
    first, again, other = [model.conv_in.weight for model in models]
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_measuring_does_not_depend_on_the_batch_or_the_mode(batch_size):
    data = coloured(20, (3, 16, 16), seed=0)
    model = FeatureClassifierModel.for_images((3, 16, 16), data.label_names).train()
    features, labels = model.measure(data.images, batch_size)
    assert model.training  # as it was
    whole, whole_labels = model.eval().measure(data.images)
    torch.testing.assert_close(features, whole, rtol=1e-4, atol=1e-6)
    assert labels.equal(whole_labels)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: FeatureClassifierModel(8, 1, 1), ValueError, "num_classes must be at least 2"),
        (lambda: FeatureClassifierModel(8, 1, 3, label_names=["a"]), ValueError, "must have 3 names, got 1"),
        (lambda: FeatureClassifierModel(8, 1, 3, stem_stride=3), ValueError, "stem_stride must be 1 or 2, got 3"),
        (
            lambda: FeatureClassifierModel(8, 1, 3)(torch.zeros(1, 3, 8, 8)),
            ValueError,
            r"takes images of \(channels, height, width\) \(1, 8, 8\), got \(3, 8, 8\)",
        ),
        (lambda: FeatureClassifierModel(8, 1, 3).measure(torch.zeros(1, 1, 8, 8)), TypeError, "must be uint8"),
        (lambda: LabelledImages(torch.zeros(1, 1, 8, 8), torch.zeros(1), []), TypeError, "must be uint8"),
        (
            lambda: LabelledImages(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 3]), ["a", "b"]),
            ValueError,
            r"labels must be in \[0, 1\], got 0 to 3",
        ),
        (
            lambda: LabelledImages(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0]), ["a", "b"]),
            ValueError,
            "one for each of the 2 images",
        ),
        (lambda: fit_feature_classifier(coloured(1, (1, 8, 8), 0)), ValueError, "at least 2 images, got 1"),
        (
            lambda: fit_feature_classifier(coloured(9, (1, 8, 8), 0), num_epochs=0),
            ValueError,
            "num_epochs must be at least 1, got 0",
        ),
        (
            lambda: fit_feature_classifier(
                coloured(64, (1, 8, 8), 0), batch_size=16, learning_rate=1e30, show_progress=False
            ),
            ValueError,
            "the loss is nan after epoch .: lower learning_rate",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
