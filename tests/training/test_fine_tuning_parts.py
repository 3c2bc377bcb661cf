"""Runs of autoencoders and classifiers that begin with one that is there."""

import pytest
import torch

from diffusers_ext import (
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    GuidedDiffusionPipeline,
    HierarchicalVAEModel,
    NoisyClassifierModel,
    VAEModel,
)
from diffusers_ext.schedulers.levels import describe_path
from tiny import tiny_unet
from training.train_classifier import TrainClassifierConfig
from training.train_classifier import main as train_classifier
from training.train_vae import TrainVAEConfig
from training.train_vae import main as train_vae


# So that a run leaves its network as it began, to rounding.
SMALL = {
    "train_batch_size": 8,
    "max_train_samples": 40,
    "max_train_steps": 2,
    "learning_rate": 1e-12,
    "mixed_precision": "no",
}


def randomized(network):
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def assert_close_weights(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def vae_config(output_dir, pretrained, **settings):
    settings = {"output_dir": str(output_dir), "pretrained_pipeline": str(pretrained), "sample_columns": 2} | settings
    return TrainVAEConfig(**SMALL | settings)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline with an autoencoder and a classifier, and a hierarchical autoencoder by itself."""
    folder = tmp_path_factory.mktemp("parts")
    vae = VAEModel(8, 1, 1, (8, 8), 1, learn_scale=True, latent_offset=0.5, scaling_factor=2.0, shift_factor=0.0)
    scheduler = ExtDDPMScheduler(num_train_timesteps=50, beta_schedule="sigmoid")
    classifier = NoisyClassifierModel(4, 1, 10, (8, 16), noise_schedule=describe_path(scheduler))
    unet = tiny_unet(num_classes=10)
    unet.register_to_config(sample_size=4)
    parts = {"vae": randomized(vae), "classifier": randomized(classifier)}
    scheduler = ExtDDIMScheduler.from_config(scheduler.config, clip_sample=False)
    GuidedDiffusionPipeline(unet, scheduler, **parts).save_pretrained(folder / "pipeline")
    randomized(HierarchicalVAEModel(8, 1, 1, (8, 8), 2, (2, 1), likelihood="laplace")).save_pretrained(
        folder / "levels"
    )
    return folder


def test_an_autoencoder_of_a_pipeline_is_gone_on_with(folders, tmp_path):
    config = vae_config(tmp_path / "run", folders / "pipeline")
    assert (config.architecture, config.latent_channels, config.learn_scale) == ("conv", 1, True)
    after = VAEModel.from_pretrained(train_vae(config))
    before = VAEModel.from_pretrained(folders / "pipeline", subfolder="vae")
    assert_close_weights(after, before)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # what the latents are measured to be has no influence on what is decoded
        got, expected = (vae.decode(vae.encode(images).latent_dist.mode()).sample for vae in (after, before))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_the_options_of_several_levels_are_taken_over(folders, tmp_path):
    config = vae_config(tmp_path, folders / "levels")
    assert (config.architecture, config.num_levels, config.level_channels) == ("hierarchical", 2, (2, 1))
    assert (config.likelihood, config.resolution) == ("laplace", (8, 8))


def test_what_an_autoencoder_is_not_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="latent_channels must be 1, as it is of --pretrained_pipeline"):
        vae_config(tmp_path, folders / "pipeline", latent_channels=3)
    with pytest.raises(
        ValueError, match="must be a VAEModel or HierarchicalVAEModel, or a pipeline with one as its vae"
    ):
        vae_config(tmp_path, folders)
    with pytest.raises(ValueError, match="the 1 channels that .* takes, got 3; see --image_mode"):
        train_vae(vae_config(tmp_path / "run", folders / "pipeline", image_mode="RGB"))
    with pytest.raises(ValueError, match="was trained on, 8x8, got 16x16; see --resolution"):
        train_vae(vae_config(tmp_path / "run", folders / "levels", resolution=(16,)))


def classifier_config(output_dir, pretrained, **settings):
    settings = {"output_dir": str(output_dir), "pretrained_pipeline": str(pretrained)} | settings
    return TrainClassifierConfig(**SMALL | {"max_measured_samples": 8} | settings)


def test_a_classifier_of_a_pipeline_is_gone_on_with_on_its_levels_and_latents(folders, tmp_path):
    config = classifier_config(tmp_path / "run", folders / "pipeline")
    after = NoisyClassifierModel.from_pretrained(train_classifier(config))
    before = NoisyClassifierModel.from_pretrained(folders / "pipeline", subfolder="classifier")
    assert_close_weights(after, before)
    assert after.config.noise_schedule == before.config.noise_schedule


@pytest.mark.parametrize("given, taken", [({}, 0.25), ({"dropout": 0.0}, 0.0), ({"dropout": 0.5}, 0.5)])
def test_dropout_of_a_classifier_is_its_own_or_as_given(tmp_path, given, taken):
    path = describe_path(ExtDDPMScheduler(num_train_timesteps=50))
    NoisyClassifierModel(8, 1, 10, (8, 16), noise_schedule=path, dropout=0.25).save_pretrained(tmp_path / "begun")
    options = SMALL | {"max_train_steps": 1, "output_dir": str(tmp_path / "run")} | given
    config = TrainClassifierConfig(pretrained_pipeline=str(tmp_path / "begun"), **options)
    assert config.dropout == taken
    after = NoisyClassifierModel.from_pretrained(train_classifier(config))
    assert (
        {part.p for part in after.modules() if isinstance(part, torch.nn.Dropout)} == {after.config.dropout} == {taken}
    )


def test_what_a_classifier_is_not_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match=r"block_out_channels must be \(8, 16\), as it is of"):
        classifier_config(tmp_path, folders / "pipeline", block_out_channels=(8, 8))
    with pytest.raises(ValueError, match="beta_schedule must be 'sigmoid', as it is of"):
        classifier_config(tmp_path, folders / "pipeline", beta_schedule="linear")
    with pytest.raises(ValueError, match="pipeline and pretrained_pipeline .* both say"):
        classifier_config(tmp_path, folders / "pipeline", pipeline="runs/digits")
    with pytest.raises(ValueError, match="the 10 labels that .* tells apart, got 12"):
        train_classifier(classifier_config(tmp_path / "run", folders / "pipeline", num_classes=12))
