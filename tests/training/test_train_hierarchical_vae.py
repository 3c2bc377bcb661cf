"""Real runs of training/train_vae.py and training/evaluate_vae.py with several levels of latents."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from diffusers import AutoModel

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, HierarchicalVAEModel, UNetModel
from diffusers_ext.commands.evaluate_vae import EvaluateVAEConfig, load_autoencoder
from diffusers_ext.commands.evaluate_vae import main as evaluate
from diffusers_ext.data.latent_cache import load_vae
from diffusers_ext.data.sources import load_digits
from diffusers_ext.evaluation.feature_folders import FEATURES_FILE
from diffusers_ext.latents import decode_latents, encode_latents
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.models.vae_likelihood import vae_likelihood
from diffusers_ext.trainer.run_folder import read_metrics
from runs import assert_same_run, forget_accelerate
from training.train_vae import TrainVAEConfig, main


SMALL = {
    "architecture": "hierarchical",
    "num_levels": 2,
    "block_out_channels": (8, 8),
    "train_batch_size": 8,
    "logging_steps": 2,
    "sample_columns": 3,
    "num_threads": 1,
    "mixed_precision": "no",
}


def config_of(output_dir, **settings):
    return TrainVAEConfig(**SMALL | {"output_dir": str(output_dir), "max_train_steps": 4} | settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One long enough to learn something, with held-out images."""
    settings = {"max_train_steps": 60, "train_batch_size": 16, "validation_split": "test", "validation_steps": 30}
    options = {"level_channels": (3, 2), "max_train_samples": 400, "max_validation_samples": 40}
    folder = main(config_of(tmp_path_factory.mktemp("runs") / "digits", **settings, **options, learning_rate=2e-3))
    forget_accelerate()
    return folder


def digits(split="test"):
    pixels = np.stack([np.asarray(image) for image in load_digits(split)["image"]])
    return torch.from_numpy(pixels[:, None]).float() / 127.5 - 1


def test_run_leaves_all_that_it_names(run):
    pictures = {"samples.png", "levels.png", "reconstructions.png"}
    for name in (
        *pictures,
        "loss.png",
        "metrics.jsonl",
        "README.md",
        "train_config.yaml",
        "config.json",
        "index.html",
    ):
        assert (run / name).stat().st_size > 0
    assert {path.name for path in (run / "before").iterdir()} == pictures
    card = (run / "README.md").read_text()
    assert "HierarchicalVAEModel.from_pretrained" in card and "2 levels of latents" in card
    assert "| 2 | 3 x 2 x 2 |" in card and "| 1 | 2 x 4 x 4 |" in card and "400 training images" in card
    records = read_metrics(run / "metrics.jsonl")
    last = records[-1]
    assert last["rate"] == pytest.approx(last["kl_of_level_1"] + last["kl_of_level_2"], rel=1e-4)
    assert last["loss"] == pytest.approx((last["distortion"] + last["rate"]) / 64, rel=1e-4)
    assert last["loss"] < records[0]["loss"] - 0.3 and "val_loss" in last


def test_the_saved_model_makes_images_and_is_measured_on_held_out_ones(run, tmp_path):
    vae = AutoModel.from_pretrained(str(run))
    assert isinstance(vae, HierarchicalVAEModel) and vae.sample(2).shape == (2, 1, 8, 8)
    torch.manual_seed(0)
    FeatureClassifierModel.for_images((1, 8, 8), [str(digit) for digit in range(10)]).save_pretrained(tmp_path)
    (tmp_path / FEATURES_FILE).write_text('{"held_out_accuracy": 0.1}')
    result = evaluate(EvaluateVAEConfig(model=str(run), features=str(tmp_path), num_samples=16, num_threads=1))
    forget_accelerate()
    again = vae_likelihood(vae, digits(), num_samples=16)
    assert result["elbo_nats"] == pytest.approx(again.bound.nats.mean().item(), rel=0.02)
    assert result["iwae_nats"] == pytest.approx(again.importance_weighted.mean().item(), rel=0.02)
    assert result["iwae_nats"] < result["elbo_nats"]
    levels = [result["rate_of_level_2_nats"], result["rate_of_level_1_nats"]]
    assert sum(levels) == pytest.approx(result["rate_nats"])
    assert levels == pytest.approx(again.rates.mean(1).tolist(), rel=0.05)
    assert result["elbo_bits_per_dim"] == pytest.approx(result["elbo_nats"] / 64 / np.log(2))
    assert result["latent_shape"] == [[3, 2, 2], [2, 4, 4]] and result["num_latents"] == 44
    card = (run / "README.md").read_text()
    assert "of which level 2" in card and "active latents of 44" in card


@pytest.mark.parametrize(
    "settings",
    [
        {"likelihood": "bernoulli", "binarize": "stochastic", "kl_warmup_steps": 5, "free_bits": 0.1},
        {
            "adversarial_weight": 0.5,
            "adversarial_start_step": 2,
            "discriminator_layers": 1,
            "discriminator_channels": 4,
        },
    ],
)
def test_a_run_that_was_broken_off_goes_on_to_the_bit(tmp_path, settings):
    settings = settings | {"max_train_samples": 60, "checkpointing_steps": 4, "lr_scheduler": "constant"}
    main(config_of(tmp_path / "whole", max_train_steps=8, **settings))
    forget_accelerate()
    part = config_of(tmp_path / "part", max_train_steps=4, **settings)
    main(part)
    forget_accelerate()
    folder = main(dataclasses.replace(part, max_train_steps=8, resume_from_checkpoint="latest"))
    assert_same_run(tmp_path / "whole", folder, 8)


def test_options_that_do_not_fit_are_refused():
    for options, message in [
        ({"latent_dim": 2}, "latent_dim has no meaning without architecture mlp"),
        ({"level_channels": (4,)}, "level_channels must be one number for each of 2 levels, from the top, got 4"),
        ({"resolution": (9,)}, "resolution must be a multiple of 2, .* got 9"),
        ({"num_levels": 0}, "num_levels must be at least 1, got 0"),
        ({"architecture": "conv"}, "num_levels has no meaning without architecture hierarchical"),
        (
            {"level_channels": (4, 4), "latent_channels": 8},
            "give latent_channels, the same for all levels, or level_channels, and not both",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            config_of("nowhere", **options)


def test_no_diffusion_model_is_trained_on_its_latents(run, tmp_path):
    vae = HierarchicalVAEModel.from_pretrained(run)
    refused = pytest.raises(ValueError, match="must have latents of one level, .* got a HierarchicalVAEModel")
    with refused:
        load_vae(str(run))
    with refused:
        GuidedDiffusionPipeline(denoiser=UNetModel(4, 2, 2, (8, 16), 1), vae=vae, scheduler=ExtDDIMScheduler())
    with refused:
        encode_latents(vae, digits()[:2])
    with refused:
        decode_latents(vae, torch.zeros(1, 2, 4, 4))
    with pytest.raises(ValueError, match="no folder of a VAEModel or HierarchicalVAEModel: it has a UNetModel"):
        UNetModel(8, 1, 1, (8, 16), 1).save_pretrained(tmp_path)
        load_autoencoder(str(tmp_path))
    assert json.loads((run / "config.json").read_text())["_class_name"] == "HierarchicalVAEModel"
