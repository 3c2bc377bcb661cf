import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.pretrained_features import NORMALISATION, load_pretrained_features


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Networks of the two families, tiny and with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    root = tmp_path_factory.mktemp("networks")
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(root / "dinov2")
    config = CLIPVisionConfig(**sizes, intermediate_size=32, projection_dim=12)
    CLIPVisionModelWithProjection(config).save_pretrained(root / "clip")
    return root


def draw(count, channels, side, seed=0):
    shape = (count, channels, side, side)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.mark.parametrize("family, dim", [("dinov2", 16), ("clip", 12)])
def test_the_features_are_those_of_the_network_on_normalised_pixels(folders, family, dim):
    features = load_pretrained_features(f"{family}:{folders / family}")
    images = draw(5, 3, 16)
    measured, labels = features.measure(images, batch_size=2)
    assert measured.shape == (5, dim) and features.feature_dim == dim and labels is None

    cls = {"dinov2": Dinov2Model, "clip": CLIPVisionModelWithProjection}[family]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in NORMALISATION[family])
    with torch.no_grad():
        output = cls.from_pretrained(folders / family)(pixel_values=(images / 255 - mean) / std)
    expected = output.pooler_output if family == "dinov2" else output.image_embeds
    torch.testing.assert_close(measured, expected, atol=1e-4, rtol=1e-4)


def test_grey_images_of_another_size_are_shown_to_it_as_grey(folders):
    features = load_pretrained_features(f"clip:{folders / 'clip'}")
    grey = draw(2, 1, 12)
    torch.testing.assert_close(features.measure(grey)[0], features.measure(grey.repeat(1, 3, 1, 1))[0])
    flat = torch.full((1, 1, 12, 12), 77, dtype=torch.uint8)
    larger = torch.full((1, 1, 16, 16), 77, dtype=torch.uint8)
    torch.testing.assert_close(features.measure(flat)[0], features.measure(larger)[0], atol=1e-4, rtol=1e-4)


def test_images_without_labels_are_measured_in_features(folders):
    features = load_pretrained_features(f"clip:{folders / 'clip'}")
    train = LabelledImages(draw(60, 1, 8), torch.full((60,), -1), [])
    result = Evaluator(train, features, in_pixels=False).measure(draw(40, 1, 8, seed=1))
    assert result["frechet_distance"] > 0 and 0 <= result["coverage"] <= 1
    assert "label_accuracy" not in result and "classifier_score" not in result
    assert Evaluator(train, features, in_pixels=False).measure(train.images)["frechet_distance"] < 1e-6


def test_what_is_not_there_is_refused_with_what_to_do(folders, tmp_path):
    with pytest.raises(ValueError, match="features must be a folder or one of inception, dinov2, clip, got vgg"):
        load_pretrained_features("vgg")
    with pytest.raises(
        ValueError, match="features clip are not to be had from .*Save a CLIPVisionModelWithProjection"
    ):
        load_pretrained_features(f"clip:{tmp_path}")
    with pytest.raises(ValueError, match="one network, which takes no source"):
        load_pretrained_features("inception:somewhere")
    with pytest.raises(ValueError, match="1 or 3 channels, got 4"):
        load_pretrained_features(f"clip:{folders / 'clip'}").measure(draw(1, 4, 8))
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="features inception need the package torch-fidelity"):
            load_pretrained_features("inception")


def test_inception_is_torch_fidelity_s_network_read_from_the_file_of_its_weights(tmp_path, monkeypatch):
    """Where the extra is installed: random weights in the place of the real ones, which come from another machine."""
    package = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    file = tmp_path / "checkpoints" / package.URL_INCEPTION_V3.rpartition("/")[2]
    file.parent.mkdir()

    class Untrained(package.FeatureExtractorInceptionV3):
        """As it is made, before weights are read."""

        def load_state_dict(self, *args, **settings):
            pass

    torch.save({}, file)
    torch.save(Untrained("untrained", ["2048"]).state_dict(), file)
    features = load_pretrained_features("inception")
    images = draw(3, 1, 40)
    measured, labels = features.measure(images, batch_size=2)
    reference = package.FeatureExtractorInceptionV3("reference", ["2048", "logits_unbiased"], str(file))
    expected, logits = reference(images.expand(-1, 3, -1, -1))
    assert labels is None and measured.shape == (3, features.feature_dim)
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.logits(measured), logits, rtol=1e-4, atol=1e-5)
