"""Latents from disk beside the same images encoded at each batch."""

import dataclasses
from functools import partial

import datasets
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch.testing import assert_close

from diffusers_ext import VAEModel
from diffusers_ext.data.batches import BatchOptions, make_batches
from diffusers_ext.data.latent_cache import SampleSpace, fingerprint, load_vae, prepare_samples, read_info
from diffusers_ext.data.validation import prepare_validation
from diffusers_ext.evaluation.options import DataOptions, take_options_of_run
from diffusers_ext.trainer.run_folder import read_metrics
from processes import in_ranks
from runs import forget_accelerate
from training.cache_latents import CacheConfig, main
from training.train_ddpm import TrainConfig
from training.train_ddpm import main as train


CACHE = {"max_train_samples": 40, "shard_size": 16, "batch_size": 8, "mixed_precision": "no", "num_threads": 1}
RUN = {
    "max_train_samples": 40,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "train_batch_size": 8,
    "max_train_steps": 2,
    "num_inference_steps": 2,
    "sample_columns": 2,
    "logging_steps": 1,
    "mixed_precision": "no",
    "num_threads": 1,
}


def save_vae(folder, seed=0, **config):
    """One for digits, with posteriors wide enough that a draw is not its mean."""
    torch.manual_seed(seed)
    settings = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8), "latent_channels": 2}
    vae = VAEModel(sample_size=8, **settings)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae.register_to_config(**{"scaling_factor": 1.7, "shift_factor": 0.3} | config)
    vae.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def vae_path(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vae_path):
    """The latents of 40 digits and their mirror images, in three shards."""
    forget_accelerate()
    folder = tmp_path_factory.mktemp("latents") / "digits"
    return main(CacheConfig(vae=vae_path, output_dir=str(folder), random_flip=True, **CACHE))


def batch_of(config, number=0):
    """The first batch of a run, as its loss gets it."""
    vae = load_vae(config.vae)
    data = prepare_samples(config, vae)
    space = SampleSpace.of(data, vae)
    options = BatchOptions(
        seed=3, batch_size=8, random_flip=config.random_flip, label_dropout=0.3, **space.batch_options
    )
    batch = next(iter(make_batches(data, options)))
    pixels = batch.pop("pixels")
    images = pixels if pixels.is_floating_point() else pixels.float() / 127.5 - 1
    with torch.no_grad():
        return space.encoder(torch.device("cpu"))(batch | {"images": images}), data


@pytest.mark.parametrize("random_flip", [False, True])
def test_cached_latents_are_those_encoded_at_each_batch(folder, vae_path, random_flip):
    """Drawn by the same numbers, from moments that are rounded to float16, which has 11 bits."""
    settings = {"vae": vae_path, "random_flip": random_flip, "max_train_samples": 40}
    cached, data = batch_of(TrainConfig(dataset_name=str(folder), **settings))
    fresh, images = batch_of(TrainConfig(dataset_name="digits", **settings))
    assert cached.keys() == fresh.keys() == {"images", "noise", "time", "labels"}
    for name in ("noise", "time", "labels"):
        assert torch.equal(cached[name], fresh[name])
    assert cached["images"].shape == (8, 2, 4, 4) == cached["noise"].shape
    assert_close(cached["images"], fresh["images"], rtol=2e-3, atol=2e-3 * fresh["images"].abs().max().item())
    assert (data.id2label, len(data), data.num_classes) == (images.id2label, 40, 10)


def test_held_out_latents_need_no_mirror_images(vae_path, tmp_path):
    """Beside training with them: nothing of the held-out ones is random."""
    folder, options = str(tmp_path / "digits"), CACHE | {"max_train_samples": 4}
    for split, random_flip in (("train", True), ("test", False)):
        main(CacheConfig(vae=vae_path, output_dir=folder, dataset_split=split, random_flip=random_flip, **options))
        forget_accelerate()
    config = TrainConfig(dataset_name=folder, vae=vae_path, random_flip=True, validation_split="test")
    vae = load_vae(vae_path)
    data = prepare_samples(config, vae)
    assert len(prepare_validation(config, data, partial(prepare_samples, vae=vae))) == len(data) == 4


def test_latents_are_drawn_and_scaled(folder, vae_path):
    """Of many draws of one image, the mean and the spread are those of its posterior, scaled."""
    config = TrainConfig(dataset_name=str(folder), vae=vae_path, max_train_samples=1)
    vae = load_vae(vae_path)
    data = prepare_samples(config, vae)
    space = SampleSpace.of(data, vae)
    batch = next(iter(make_batches(data, BatchOptions(seed=0, batch_size=4000, **space.batch_options))))
    draws = space.encoder(torch.device("cpu"))(batch | {"images": batch["pixels"]})["images"]
    image = prepare_samples(TrainConfig(max_train_samples=40), None).pixels[data.rows]
    posterior = vae.encode(torch.from_numpy(image).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist
    std = 1.7 * posterior.std[0]
    assert_close(draws.mean(0), 1.7 * (posterior.mean[0] - 0.3), rtol=0, atol=4.5 * std.max().item() / 4000**0.5)
    assert_close(draws.std(0), std, rtol=4.5 / 8000**0.5, atol=0)


def test_shards_can_be_read_by_anyone(folder, vae_path):
    rows = datasets.load_dataset(str(folder), split="train")
    assert rows.features["label"].names == [str(digit) for digit in range(10)] and len(rows) == 80
    assert [path.name for path in sorted(folder.glob("*"))] == [
        "latents.yaml",
        *(f"train-{number:05}-of-00003.parquet" for number in range(3)),
    ]
    info = read_info(folder)["train"]
    assert info.vae_fingerprint == fingerprint(load_vae(vae_path))
    assert (info.latent_shape, info.resolution, info.num_images, info.dataset_name) == (
        (2, 4, 4),
        (8, 8),
        40,
        "digits",
    )


def test_two_processes_and_a_second_go_make_the_same_shards(folder, vae_path, tmp_path):
    """One shard is there already, as after a run that was stopped."""
    there = tmp_path / "latents"
    config = CacheConfig(vae=vae_path, output_dir=str(there), random_flip=True, **CACHE)
    output = in_ranks(lambda: main(config))
    assert output.count("40 images of train in 3 shards, 0 of them there already") == 1

    names = [f"train-{number:05}-of-00003.parquet" for number in range(3)]
    for name in names:
        assert pixels_of(there / name) == pixels_of(folder / name)
    kept = (there / names[0]).stat().st_mtime_ns
    (there / names[1]).unlink()
    main(config)
    assert (there / names[0]).stat().st_mtime_ns == kept
    assert pixels_of(there / names[1]) == pixels_of(folder / names[1])


def pixels_of(path):
    return datasets.Dataset.from_parquet(str(path), cache_dir=path.parent / ".cache")["pixels"][:]


def test_other_latents_in_the_folder_are_refused_or_replaced(vae_path, tmp_path):
    other = save_vae(tmp_path / "other", seed=1)
    config = CacheConfig(vae=vae_path, output_dir=str(tmp_path / "latents"), **CACHE)
    main(config)
    forget_accelerate()
    changed = dataclasses.replace(config, vae=other)
    with pytest.raises(
        ValueError, match="holds latents of train that are of other images, another VAE or other options"
    ):
        main(changed)
    forget_accelerate()
    # Their shards would stand beside those that are there.
    with pytest.raises(ValueError, match="another VAE or other options"):
        main(dataclasses.replace(config, shard_size=CACHE["shard_size"] // 2))
    assert not list((tmp_path / "latents").glob(".train.plan.json"))
    forget_accelerate()
    main(dataclasses.replace(changed, overwrite_output_dir=True))
    assert read_info(tmp_path / "latents")["train"].vae_fingerprint == fingerprint(load_vae(other))
    forget_accelerate()
    main(dataclasses.replace(changed, dataset_split="test"))  # beside the other split
    assert set(read_info(tmp_path / "latents")) == {"train", "test"}


@pytest.mark.parametrize("cached", [True, False])
def test_training_on_latents_makes_a_pipeline_of_images(folder, vae_path, tmp_path, cached):
    config = TrainConfig(
        dataset_name=str(folder) if cached else "digits", vae=vae_path, output_dir=str(tmp_path / "run"), **RUN
    )
    pipe = DiffusionPipeline.from_pretrained(train(config))
    pipe.set_progress_bar_config(disable=True)
    assert fingerprint(pipe.vae) == fingerprint(load_vae(vae_path))
    assert not pipe.scheduler.config.clip_sample
    assert pipe.denoiser.config.in_channels == 2 and pipe.denoiser.config.sample_size in ([4, 4], (4, 4), 4)
    images = pipe(class_labels=[3, 5], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 1, 8, 8)


def test_a_run_on_latents_is_measured_by_their_images(folder, tmp_path):
    (tmp_path / "train_config.yaml").write_text(f"dataset_name: {folder}\ndataset_split: train\nresolution: [8, 8]\n")
    options = take_options_of_run(DataOptions(), tmp_path)
    assert (options.dataset_name, options.resolution, options.max_train_samples) == ("digits", (8, 8), 40)


def test_the_loss_of_cached_latents_is_that_of_encoding_at_each_batch(folder, vae_path, tmp_path):
    """Same images, draws and noise: the first loss is equal but for the float16 of the cache."""
    losses = []
    for number, name in enumerate((str(folder), "digits")):
        output_dir = tmp_path / str(number)
        train(TrainConfig(dataset_name=name, vae=vae_path, output_dir=str(output_dir), model="dit", **DIT))
        losses.append([record["loss"] for record in read_metrics(output_dir / "metrics.jsonl")])
        forget_accelerate()
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


DIT = {name: value for name, value in RUN.items() if name not in ("block_out_channels", "layers_per_block")}
DIT |= {"patch_size": 2, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}


def test_an_autoencoder_of_diffusers_will_do(tmp_path):
    widths = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(in_channels=1, out_channels=1, latent_channels=2, sample_size=8, **widths, **types)
    vae.save_pretrained(tmp_path / "vae")
    folder = main(CacheConfig(vae=str(tmp_path / "vae"), output_dir=str(tmp_path / "latents"), **CACHE))
    cached, _ = batch_of(TrainConfig(dataset_name=str(folder), vae=str(tmp_path / "vae"), max_train_samples=40))
    fresh, _ = batch_of(TrainConfig(vae=str(tmp_path / "vae"), max_train_samples=40))
    assert_close(cached["images"], fresh["images"], rtol=2e-3, atol=1e-3)


def test_what_does_not_fit_is_refused(folder, vae_path, tmp_path):
    def refused(match, **settings):
        forget_accelerate()
        with pytest.raises(ValueError, match=match):
            train(
                TrainConfig(
                    **{"dataset_name": str(folder), "vae": vae_path, "output_dir": str(tmp_path / "run")}
                    | RUN
                    | settings
                )
            )
        assert not (tmp_path / "run").exists()

    refused("holds latents: give the VAE that they are of, --vae", vae=None)
    refused("holds latents of another VAE than --vae: they were made by", vae=save_vae(tmp_path / "other", seed=1))
    refused("was never measured", vae=save_vae(tmp_path / "new", scaling_factor=1.0, shift_factor=None))
    refused("holds latents of the splits train, got test: encode it by", dataset_split="test")
    refused("holds latents made with resolution .*, got .16, 16.: leave it out", resolution=(16,))
    refused("latents must be multiples of 8, .* got 4x4 from images of 8x8: .* multiple of 16", **WIDE)
    refused("leave streaming out", streaming=True)
    refused("cannot be loaded as an autoencoder", vae=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="vae must name the autoencoder to encode by"):
        CacheConfig()


WIDE = {"block_out_channels": (8, 8, 8, 8)}


def test_mirror_images_are_needed_for_flips(vae_path, tmp_path):
    folder = main(CacheConfig(vae=vae_path, output_dir=str(tmp_path / "latents"), **CACHE))
    config = TrainConfig(dataset_name=str(folder), vae=vae_path, random_flip=True)
    with pytest.raises(ValueError, match="random_flip needs mirrored latents, .*: encode with --random_flip"):
        prepare_samples(config, load_vae(vae_path))
