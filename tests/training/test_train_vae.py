"""Real runs of the scripts, with networks as small as they get."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoModel
from PIL import Image

from diffusers_ext import VAEModel
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.data.sources import load_digits
from diffusers_ext.evaluation.feature_folders import FEATURES_FILE
from diffusers_ext.latents import encode_latents
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.models.vae_likelihood import vae_likelihood
from diffusers_ext.trainer.run_folder import read_metrics
from runs import assert_same_run, forget_accelerate
from training.evaluate_vae import EvaluateVAEConfig, parse
from training.evaluate_vae import main as evaluate
from training.train_vae import TrainVAEConfig, main


SMALL = {"train_batch_size": 8, "logging_steps": 2, "sample_columns": 3, "num_threads": 1, "mixed_precision": "no"}
CONV = {"architecture": "conv", "block_out_channels": (8, 8), "latent_channels": 2}
MLP = {"latent_dim": 2, "hidden_dims": (32,)}


def config_of(output_dir, **settings):
    return TrainVAEConfig(**SMALL | {"output_dir": str(output_dir), "max_train_steps": 4} | settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A fully connected one on digits, long enough to learn something."""
    folder = main(
        config_of(tmp_path_factory.mktemp("runs") / "digits", **MLP, max_train_steps=300, train_batch_size=32)
    )
    forget_accelerate()
    return folder


def digits(split="train"):
    pixels = np.stack([np.asarray(image) for image in load_digits(split)["image"]])
    return torch.from_numpy(pixels[:, None]).float() / 127.5 - 1


def test_run_leaves_all_that_it_names(run):
    pictures = {"reconstructions.png", "samples.png", "interpolations.png", "traversals.png", "manifold.png"}
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
    assert "VAEModel.from_pretrained" in card and "digits, split train: 1500 images, 8x8 grey" in card
    assert "Latents of shape 2, measured on 1500 training images" in card and "reconstructions.png" in card
    record = read_metrics(run / "metrics.jsonl")[-1]
    assert {"distortion", "rate", "kl_of_latent_0", "kl_of_latent_1", "active_latents", "likelihood_scale"} <= set(
        record
    )
    assert record["loss"] == pytest.approx((record["distortion"] + record["rate"]) / 64, rel=1e-4)


def test_saved_model_is_the_average_and_has_learned(run):
    vae = VAEModel.from_pretrained(run)
    losses = [record["loss"] for record in read_metrics(run / "metrics.jsonl")]
    first, last = losses[0], float(np.mean(losses[-20:]))  # that of two steps is off by 0.3
    assert last < first - 0.3
    with torch.no_grad():
        bound = vae_likelihood(vae, digits("test"), levels=None, num_samples=4).bound.nats.mean() / 64
    assert bound == pytest.approx(last, rel=0.06)  # nats a value, of images that it was not trained on


def test_its_latents_have_mean_0_and_std_1_on_the_training_data(run):
    vae = AutoModel.from_pretrained(str(run))
    with torch.no_grad():
        z = encode_latents(vae, digits(), torch.Generator().manual_seed(0), sample=True)
    assert z.mean().abs() < 0.02 and abs(z.std() - 1) < 0.02
    assert vae.is_measured and vae.config.scaling_factor != 1.0


def test_it_is_measured_on_held_out_images(run, tmp_path):
    torch.manual_seed(0)
    FeatureClassifierModel.for_images((1, 8, 8), [str(digit) for digit in range(10)]).save_pretrained(tmp_path)
    (tmp_path / FEATURES_FILE).write_text('{"held_out_accuracy": 0.1}')
    options = {"features": str(tmp_path), "num_images": 150, "num_samples": 64, "num_threads": 1}
    result = evaluate(EvaluateVAEConfig(model=str(run), **options, num_likelihood_images=100))
    assert json.loads((run / "evaluation.json").read_text()) == result
    vae, images = VAEModel.from_pretrained(run), digits("test")
    order = torch.randperm(297, generator=torch.Generator().manual_seed(0))[:150]
    with torch.no_grad():
        again = vae_likelihood(vae, images[order[:100]], num_samples=64)
        decoded = vae(images[order]).sample
    assert result["elbo_nats"] == pytest.approx(again.bound.nats.mean().item(), rel=0.02)
    assert result["iwae_nats"] == pytest.approx(again.importance_weighted.mean().item(), rel=0.01)
    assert result["elbo_nats"] == pytest.approx(result["distortion_nats"] + result["rate_nats"])
    assert result["iwae_nats"] < result["elbo_nats"]
    assert result["elbo_bits_per_dim"] == pytest.approx(result["elbo_nats"] / 64 / np.log(2))
    error = ((decoded.clamp(-1, 1) - images[order]) / 2).square().flatten(1).mean(1)
    assert result["psnr"] == pytest.approx(-10 * error.log10().mean().item(), abs=0.05)  # of 8-bit images
    assert result["rmse"] == pytest.approx(255 * error.mean().sqrt().item(), rel=0.01)
    assert 0 < result["ssim"] < 1 and result["frechet_distance"] > 0 and result["active_latents"] == 2
    card = (run / "README.md").read_text()
    assert "draws from the prior, which are not samples of the data" in card and "is no sample of the data" in card
    assert (run / "modeling_diffusers_ext.py").is_file()
    assert "negative importance-weighted bound of 64 draws, bits/dim" in card and "PSNR of reconstructions, dB" in card
    assert "| RMSE of reconstructions, of 256 values | " in card
    assert f"\npython training/evaluate_vae.py {run} " in card or f"\npython training/evaluate_vae.py {run}\n" in card


def test_evaluation_says_what_is_missing(run, tmp_path):
    with pytest.raises(ValueError, match="say what to evaluate"):
        EvaluateVAEConfig()
    with pytest.raises(ValueError, match="no train_config.yaml that names its data set"):
        evaluate(EvaluateVAEConfig(model=str(tmp_path)))
    with pytest.raises(ValueError, match="is no folder of a VAEModel"):
        evaluate(EvaluateVAEConfig(model=str(tmp_path), dataset_name="digits"))
    with pytest.raises(
        ValueError, match=r"takes images of \(channels, height, width\) \(1, 8, 8\), those of digits are"
    ):
        evaluate(EvaluateVAEConfig(model=str(run), resolution=(16,)))
    with pytest.raises(
        ValueError, match="features have no meaning for images in black and white, got runs/features with"
    ):
        evaluate(EvaluateVAEConfig(model=str(run), binarize="threshold", features="runs/features"))
    assert parse([str(run), "--num_samples", "3"]).num_samples == 3


@pytest.mark.parametrize(
    "settings",
    [
        {**MLP, "likelihood": "bernoulli", "binarize": "stochastic", "kl_warmup_steps": 5, "free_bits": 0.1},
        {
            **CONV,
            "likelihood": "laplace",
            "adversarial_weight": 0.5,
            "adversarial_start_step": 2,
            "discriminator_layers": 1,
            "discriminator_channels": 4,
            "gradient_accumulation_steps": 2,
        },
    ],
)
def test_a_run_that_was_broken_off_goes_on_to_the_bit(tmp_path, settings):
    settings = settings | {"max_train_samples": 60, "checkpointing_steps": 3, "lr_scheduler": "constant"}
    whole = config_of(tmp_path / "whole", max_train_steps=6, **settings)
    main(whole)
    forget_accelerate()
    part = config_of(tmp_path / "part", max_train_steps=3, **settings)
    main(part)
    forget_accelerate()
    folder = main(dataclasses.replace(part, max_train_steps=6, resume_from_checkpoint="latest"))
    # The second line of the log of the first part ends at its last step, 3; the whole one's at 4.
    for path in (tmp_path / "whole", tmp_path / "part"):
        lines = [line for line in (path / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] != 3]
        kept = [line for line in lines if json.loads(line)["step"] != 4]
        (path / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert_same_run(tmp_path / "whole", tmp_path / "part", 6)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("whole", "part")]
    assert configs[0] == configs[1]
    if "adversarial_weight" in settings:
        last = read_metrics(folder / "metrics.jsonl")[-1]
        assert last["adversary_loss"] > 0 and last["adversarial_weight"] > 0


def test_convolutional_runs_take_colour_streams_and_held_out_images(tmp_path):
    """Images that are not square, from a stream; and the loss on the held-out ones of digits."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
    settings = CONV | {"dataset_name": str(tmp_path / "images"), "resolution": (8, 12), "max_train_steps": 2}
    folder = main(config_of(tmp_path / "stream", streaming=True, max_measured_samples=8, **settings))
    forget_accelerate()
    vae = VAEModel.from_pretrained(folder)
    assert vae.config.in_channels == 3 and vae.latent_shape == (2, 4, 6) and vae.is_measured
    assert "measured on 8 training images" in (folder / "README.md").read_text()
    settings = CONV | {"validation_split": "test", "max_validation_samples": 20, "validation_steps": 2}
    folder = main(config_of(tmp_path / "held_out", save_images_steps=2, **settings))
    assert all("val_loss" in record for record in read_metrics(folder / "metrics.jsonl"))
    assert (folder / "samples" / "step-0000002" / "reconstructions.png").exists()


def test_latents_are_measured_on_each_training_image_once(tmp_path):
    """With a last batch that is not full; by hand, over the images as they are."""
    folder = main(config_of(tmp_path / "run", **MLP, max_train_samples=21, max_train_steps=2))
    vae = VAEModel.from_pretrained(folder)
    data = prepare_images("digits", max_samples=21)
    images = torch.from_numpy(data.pixels[np.arange(21)]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    mean = posterior.mean.double()
    std = (mean.square() + posterior.var.double()).mean().sqrt()  # the mean is 0 now
    assert mean.mean().abs() < 1e-5
    assert 1 / vae.config.scaling_factor == pytest.approx(std.item(), rel=1e-5)
    forget_accelerate()
    settings = MLP | {"max_train_samples": 21, "max_train_steps": 2, "max_measured_samples": 16}
    folder = main(config_of(tmp_path / "part", **settings))
    assert "measured on 16 training images" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kl_weight": -1.0}, "kl_weight must be at least 0, got -1"),
        ({"likelihood_scale": 0.0}, "likelihood_scale must be positive, got 0"),
        ({"likelihood": "bernoulli", "learn_scale": True}, "learn_scale has no meaning"),
        ({"binarize": "threshold"}, "binarize threshold needs --likelihood bernoulli, got gaussian"),
        ({**CONV, "resolution": (9,)}, "resolution must be a multiple of 2, .* got 9"),
        ({"adversarial_weight": 1.0, "resolution": (8,)}, "needs images of at least 12 pixels, got 8"),
        ({"latent_channels": 8}, "latent_channels has no meaning without architecture conv"),
        ({"architecture": "conv", "latent_dim": 2}, "latent_dim has no meaning without architecture mlp"),
        ({"perceptual_weight": 2.0}, "perceptual_weight has no meaning without perceptual_network"),
        ({"discriminator_layers": 3}, "discriminator_layers has no meaning without adversarial_weight"),
        (
            {"likelihood": "bernoulli", "likelihood_scale": 0.2},
            "likelihood_scale has no meaning without likelihood gaussian or laplace",
        ),
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"max_measured_samples": 0}, "max_measured_samples must be at least 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TrainVAEConfig(**options)


def test_what_does_not_fit_the_data_is_told_before_anything_is_written(tmp_path):
    config = config_of(tmp_path / "run", adversarial_weight=1.0, max_train_samples=20)
    with pytest.raises(
        ValueError, match="needs images of at least 12 pixels, got 8: give fewer --discriminator_layers"
    ):
        main(config)
    forget_accelerate()
    with pytest.raises(ValueError, match="perceptual_network must be lpips or a folder"):
        main(config_of(tmp_path / "run", perceptual_network="nowhere", max_train_samples=20))
    assert not (tmp_path / "run").exists()


def test_a_run_is_overwritten_only_when_asked_to(run, tmp_path):
    saved = yaml.safe_load((run / "train_config.yaml").read_text())
    assert saved["learn_scale"] is None and saved["architecture"] == "mlp"
    config = config_of(run, **MLP)
    with pytest.raises(ValueError, match="holds another run"):
        main(config)
    other = config_of(tmp_path / "run", **MLP, max_train_samples=20)
    main(other)
    forget_accelerate()
    main(config_of(tmp_path / "run", **CONV, max_train_samples=20, overwrite_output_dir=True))
    assert VAEModel.from_pretrained(tmp_path / "run").config.architecture == "conv"
    assert not (tmp_path / "run" / "manifold.png").exists()
