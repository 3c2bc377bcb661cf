"""Real runs of the scripts on sequences, from the data's own units back to them."""

import shutil

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext import VAEModel
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.feature_folders import features_for
from diffusers_ext.evaluation.real_images import load_real_images
from diffusers_ext.metrics.module_features import ModuleFeatures
from runs import assert_same_run, forget_accelerate
from training import cache_latents, evaluate, train_ddpm, train_features, train_vae


LENGTH, CHANNELS = 16, 2
COMMON = {"train_batch_size": 4, "logging_steps": 2, "sample_columns": 2, "num_threads": 1, "mixed_precision": "no"}
SMALL = COMMON | {"block_out_channels": (8, 16), "layers_per_block": 1, "num_inference_steps": 2}
CONV = {"architecture": "conv", "block_out_channels": (8, 8), "latent_channels": 2}


def waves(number, seed):
    """Slow and fast waves of 20 to 24 values around 50 and 2000: two labels in two channels of different units."""
    random = np.random.default_rng(seed)
    rows = []
    for label in (np.arange(number) % 2).tolist():
        time, phase = np.arange(random.integers(20, 25)), random.random()
        wave = np.sin(2 * np.pi * ((1 + 2 * label) * time / 16 + phase))
        rows.append({"values": np.stack([50 + 5 * wave, 2000 - 300 * wave], 1).tolist(), "label": label})
    return datasets.Dataset.from_list(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waves")
    waves(48, 0).to_parquet(folder / "train.parquet")
    waves(24, 1).to_parquet(folder / "test.parquet")
    return str(folder)


def train(data, output_dir, **settings):
    options = SMALL | {"dataset_name": data, "resolution": (LENGTH,), "max_train_steps": 4} | settings
    folder = train_ddpm.main(train_ddpm.TrainConfig(output_dir=str(output_dir), **options))
    forget_accelerate()
    return folder


def quiet(folder):
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    settings = {"validation_split": "test", "save_images_steps": 2, "checkpointing_steps": 2}
    return train(data, tmp_path_factory.mktemp("runs") / "ddpm", **settings)


@pytest.fixture(scope="module")
def vae(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "vae"
    options = COMMON | CONV | {"dataset_name": data, "resolution": (LENGTH,), "max_train_steps": 2}
    train_vae.main(train_vae.TrainVAEConfig(output_dir=str(folder), **options))
    forget_accelerate()
    return folder


def test_a_pipeline_gives_arrays_in_the_units_of_the_data(data, run):
    pipe, known = quiet(run), prepare_images(data, resolution=(LENGTH,), resize_mode="crop")
    real = known.pixels[np.arange(2)]
    arrays = pipe(class_labels=[0, 1], num_inference_steps=2).images
    assert arrays.shape == (2, LENGTH, CHANNELS) and arrays.dtype == np.float32
    means = prepare_images(data, resolution=(LENGTH,)).value_scale.shift
    assert pipe.config.value_scale["shift"] == list(means) and abs(means[0] - 50) < 1 and abs(means[1] - 2000) < 60
    # Nothing of what goes in and comes out again is lost or cut, though it leaves the range of the training a little.
    given = real + [4, 300]
    same = pipe(image=given, class_labels=[0, 1], strength=0.0).images
    assert np.allclose(same, given, rtol=1e-6)
    tensors = pipe(image=torch.from_numpy(given).movedim(-1, 1), strength=0.0, output_type="pt").images
    assert tensors.shape == (2, CHANNELS, LENGTH) and np.allclose(tensors.movedim(1, -1), given, rtol=1e-6)
    mask = np.arange(LENGTH) >= LENGTH // 2
    partly = pipe(image=given, class_labels=[0, 1], mask_image=mask, num_inference_steps=2).images
    assert np.allclose(partly[:, ~mask], given[:, ~mask], rtol=1e-6)
    assert np.abs(partly[:, mask] - given[:, mask]).min() > 0
    assert pipe.interpolate(given[:1], given[1:], 3, num_inference_steps=2).shape == (3, LENGTH, CHANNELS)


def test_a_run_draws_curves_and_says_what_it_was_trained_on(run):
    for name in ("samples.png", "samples/step-0000002.png", "denoising.png"):
        width, height = Image.open(run / name).size
        assert width > 200 and height > 120
    card = (run / "README.md").read_text()
    assert "48 sequences, length 16, 2 channels, 2 labels" in card and "It makes sequences like those" in card
    assert "pipeline_tag: other" in card and "cut to 16 at random" in card
    assert "UNetModel" in card and "DDPMPipeline" not in card  # which makes images
    assert yaml.safe_load((run / "train_config.yaml").read_text())["resize_mode"] == "random_crop"


def test_a_run_that_is_resumed_is_the_one_that_was_not_stopped(data, run, tmp_path):
    settings = {"validation_split": "test", "save_images_steps": 2, "checkpointing_steps": 2}
    shutil.copytree(run / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    for name in ("train_config.yaml", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path / "stopped" / name)
    train(data, tmp_path / "stopped", resume_from_checkpoint="latest", **settings)
    assert_same_run(run, tmp_path / "stopped", 4)


def test_a_run_goes_on_in_the_scale_of_its_pipeline(data, run, tmp_path):
    """Its data are a part of those of the pipeline, with a scale of their own."""
    network = {"block_out_channels": train_ddpm.TrainConfig().block_out_channels, "layers_per_block": 2}
    settings = network | {"pretrained_pipeline": str(run), "max_train_samples": 4, "max_train_steps": 2}
    folder = train(data, tmp_path / "on", **settings)
    part = prepare_images(data, resolution=(LENGTH,), max_samples=4).value_scale.to_config()
    scale = quiet(folder).config.value_scale
    assert scale == quiet(run).config.value_scale != part
    with pytest.raises(ValueError, match="sequence_scale must be left out with .*, which has a scale, got min_max"):
        train(data, tmp_path / "other", **settings, sequence_scale="min_max")


def test_latents_of_sequences_are_trained_on_in_the_scale_of_their_autoencoder(data, vae, tmp_path, capsys):
    scale = VAEModel.from_pretrained(vae).config.value_scale
    assert abs(scale["shift"][1] - 2000) < 60
    assert {"reconstructions.png", "samples.png"} <= {path.name for path in vae.iterdir()}
    assert "pipeline_tag: other" in (vae / "README.md").read_text()
    on_the_fly = train(data, tmp_path / "latent", vae=str(vae), max_train_samples=20, max_train_steps=2)
    # Of fewer sequences the range is another, and yet the scale is that of the autoencoder.
    assert quiet(on_the_fly).config.value_scale == scale
    with pytest.raises(ValueError, match="sequence_scale mean_max has no meaning beside --vae"):
        train(data, tmp_path / "other", vae=str(vae), sequence_scale="mean_max")
    forget_accelerate()
    with pytest.raises(ValueError, match="random_crop needs the images anew"):
        cache_latents.CacheConfig(dataset_name=data, vae=str(vae), resize_mode="random_crop")
    options = {"dataset_name": data, "vae": str(vae), "resolution": (LENGTH,), "resize_mode": "crop"}
    cached = cache_latents.main(cache_latents.CacheConfig(output_dir=str(tmp_path / "cached"), **options))
    forget_accelerate()
    pipe = quiet(train(str(cached), tmp_path / "from_cache", vae=str(vae), resolution=None, max_train_steps=2))
    assert pipe.config.value_scale == scale
    arrays = pipe(class_labels=[0, 1], num_inference_steps=2).images
    assert arrays.shape == (2, LENGTH, CHANNELS) and pipe.denoiser.config.dims == 1


def test_sequences_are_measured_in_features_and_values(data, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "cache"))
    features = {"dataset_name": data, "resolution": (LENGTH,), "resize_mode": "crop", "num_train_epochs": 12}
    about = train_features.main(train_features.FeaturesConfig(output_dir=str(tmp_path / "features"), **features))
    assert about["held_out_accuracy"] > 0.9
    forget_accelerate()
    options = {"num_images": 12, "num_inference_steps": 2, "num_threads": 1, "mixed_precision": "no"}
    options |= {"pipeline": str(run), "features": str(tmp_path / "features")}
    result = evaluate.main(evaluate.EvaluateConfig(**options))
    generated, held_out = result["generated"], result["held_out"]
    assert {"frechet_distance", "label_accuracy", "value_precision", "value_recall"} <= set(generated)
    assert result["image_shape"] == [CHANNELS, LENGTH] and not any("pixel" in name for name in generated)
    assert held_out["label_accuracy"] > 0.9 and held_out["frechet_distance"] < generated["frechet_distance"]
    assert "share that this classifier gives the label asked for" in (run / "README.md").read_text()
    with pytest.raises(ValueError, match="which have a density and no probability"):
        evaluate.main(evaluate.EvaluateConfig(**options, bits_per_dim=True))


def test_without_labels_the_latents_of_an_autoencoder_are_features(data, vae):
    config = evaluate.EvaluateConfig(
        pipeline="p", dataset_name=data, resolution=(LENGTH,), resize_mode="crop"
    ).for_data()
    real = load_real_images(config)
    features, about = features_for(real, vae, PartialState())
    assert about["dim"] == features.feature_dim == 2 * LENGTH // 2
    evaluator = Evaluator(real.train, features, num_reference=12)
    same, shifted = (evaluator.measure(real.train.images + offset) for offset in (0, 100))
    assert abs(same["frechet_distance"]) < 1e-6 < shifted["frechet_distance"]
    assert "label_accuracy" not in same
    # Any module will do, and one that sees own units as they are.
    module = ModuleFeatures(torch.nn.AvgPool1d(4), (CHANNELS, LENGTH))
    values, labels = module.measure(real.train.images)
    assert labels is None and torch.allclose(values[:, 0], real.train.images[:, 0, :4].mean(1))
    with pytest.raises(ValueError, match="must give a tensor"):
        ModuleFeatures(torch.nn.Flatten(0), (CHANNELS, LENGTH))


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"model": "dit", "block_out_channels": (64, 128, 128), "layers_per_block": 2},
            "the data are sequences: take --model unet",
        ),
        ({"resolution": (6,), "block_out_channels": (8, 8, 8)}, "resolution must be a multiple of 4, .*halves"),
        ({"resolution": None}, "of several lengths .*give --resolution"),
        ({"streaming": True, "max_train_samples": 8}, "sequences are not read as a stream"),
        ({"attention_resolutions": (5,)}, "attention_resolutions must be among the sides"),
    ],
)
def test_a_denoiser_of_sequences_refuses_what_it_cannot_be(settings, message, data, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path / "run", **settings)
    assert not (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"architecture": "hierarchical"}, "architecture hierarchical is of images"),
        ({"likelihood": "bernoulli"}, "likelihood bernoulli is of images"),
        ({"architecture": "conv", "adversarial_weight": 0.5}, "adversarial_weight is of images"),
    ],
)
def test_an_autoencoder_of_sequences_refuses_what_is_of_images(settings, message, data, tmp_path):
    options = COMMON | {"dataset_name": data, "resolution": (LENGTH,), "output_dir": str(tmp_path / "run")} | settings
    with pytest.raises(ValueError, match=message):
        train_vae.main(train_vae.TrainVAEConfig(**options))
    forget_accelerate()


def test_an_autoencoder_of_images_is_refused_for_sequences(data, tmp_path):
    vae = VAEModel(LENGTH, CHANNELS, CHANNELS, (8,), latent_channels=2, scaling_factor=1.5, shift_factor=0.0)
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="--vae is of images, and the data are sequences"):
        train(data, tmp_path / "run", vae=str(tmp_path / "vae"))
    forget_accelerate()
