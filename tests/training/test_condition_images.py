"""Runs with condition images, from the data to the evaluation."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel, VAEModel
from diffusers_ext.conditions import ImageCondition, add_condition_noise
from diffusers_ext.data.batches import BOTH_DROPPED, BatchOptions, make_batches
from diffusers_ext.data.identity import identify
from diffusers_ext.data.latent_cache import SampleSpace
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.pixels import to_images
from diffusers_ext.recipes.image_condition import ConditionMaker
from training.evaluate import EvaluateConfig
from training.evaluate import main as evaluate
from training.train_ddpm import TrainConfig, main
from training.train_text_to_image import TextConfig
from training.train_text_to_image import main as train_texts


SMALL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "train_batch_size": 4,
    "max_train_samples": 20,
    "num_inference_steps": 2,
    "sample_columns": 2,
    "max_train_steps": 4,
    "mixed_precision": "no",
    "num_threads": 1,
}


def config_of(output_dir, **settings):
    return TrainConfig(**SMALL | {"output_dir": str(output_dir)} | settings)


def save_pairs(folder, sizes, number=12):
    """Parquet of colour images, their negatives in grey as condition images, and labels."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", number), ("test", 6)):
        pixels = generator.integers(256, size=(count, 8, 8, 3)).astype(np.uint8)
        rows = {"picture": [Image.fromarray(each) for each in pixels], "label": np.arange(count) % 2}
        rows["sketch"] = [
            Image.fromarray(255 - each[..., 0]).resize(sizes[row % len(sizes)]) for row, each in enumerate(pixels)
        ]
        features = {"picture": datasets.Image(), "sketch": datasets.Image(), "label": datasets.ClassLabel(2)}
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of super-resolution on digits, with noise in its conditions."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    settings = {
        "condition": "lowres:2",
        "condition_noise": 0.4,
        "validation_split": "test",
        "max_validation_samples": 6,
    }
    return main(config_of(folder, checkpointing_steps=2, **settings))


def test_a_run_saves_how_its_condition_is_made(run):
    pipe = DiffusionPipeline.from_pretrained(run)
    assert pipe.image_condition == ImageCondition("lowres", 1, 1, (8, 8), 2, 0.4)
    config = pipe.denoiser.config
    assert (config.condition_channels, config.condition_level, config.learned_without_image) == (1, True, True)
    image = pipe(3, condition_image=Image.new("L", (4, 4)), num_inference_steps=2, guidance_scale=2.0).images[0]
    assert image.size == (8, 8)
    # Condition, two samples and the image, two columns of each.
    assert Image.open(run / "samples.png").size[1] == 4 * 66 + 2
    assert (run / "denoising.png").exists()


def test_without_labels_a_grid_is_guided_by_what_is_dropped_alone(tmp_path):
    """That is refused before the first step."""
    options = {"unconditional": True, "guidance_scale": 3.0, "max_train_steps": 1}
    for more in ({}, {"condition": "lowres:2", "condition_dropout": 0.0}):
        with pytest.raises(ValueError, match="guidance_scale, .* must be 1 for images without labels, .* got 3"):
            main(config_of(tmp_path / "run", **options, **more))
        assert not (tmp_path / "run").exists()
    assert (main(config_of(tmp_path / "run", **options, condition="lowres:2")) / "samples.png").exists()


def test_it_resumes_to_the_bit(run, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(run, half)
    shutil.rmtree(half / "checkpoint-4")
    options = TrainConfig(
        **SMALL
        | {"output_dir": str(half), "checkpointing_steps": 2, "condition": "lowres:2", "condition_noise": 0.4}
        | {"validation_split": "test", "max_validation_samples": 6, "resume_from_checkpoint": "latest"}
    )
    main(options)
    before, after = (DiffusionPipeline.from_pretrained(folder).denoiser.state_dict() for folder in (run, half))
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_evaluation_measures_how_close_the_images_are(run, capsys):
    result = evaluate(EvaluateConfig(pipeline=str(run), num_images=8, num_inference_steps=2, num_threads=1, svc=False))
    measures = result["conditioned"]
    assert measures["condition"] == "images of low resolution of 4x4 in 1 channel" and measures["held_out"]
    assert measures["num_images"] == 8 and measures["psnr"] > 0 and measures["bicubic_psnr"] > measures["psnr"]
    assert "by images of low resolution of 4x4 in 1 channel of held-out images: RMSE " in capsys.readouterr().out
    assert json.loads((run / "evaluation.json").read_text())["conditioned"] == measures
    assert "PSNR to held-out images of digits" in (run / "README.md").read_text()
    assert Image.open(run / "conditions.png").size[1] == 4 * 66 + 2
    with pytest.raises(ValueError, match="--bits_per_dim is of models without condition images"):
        evaluate(EvaluateConfig(pipeline=str(run), num_images=8, bits_per_dim=True))


def test_a_run_goes_on_with_the_condition_of_its_pipeline(run, tmp_path):
    began = DiffusionPipeline.from_pretrained(run)
    config = config_of(tmp_path / "on", pretrained_pipeline=str(run), learning_rate=1e-12)
    assert (config.condition, config.condition_noise) == ("lowres:2", 0.4)
    on = DiffusionPipeline.from_pretrained(main(config))
    assert on.image_condition == began.image_condition
    for name, value in began.denoiser.state_dict().items():
        torch.testing.assert_close(on.denoiser.state_dict()[name], value, rtol=0, atol=1e-6)
    larger = config_of(tmp_path / "larger", pretrained_pipeline=str(run), resolution=(16,))
    assert DiffusionPipeline.from_pretrained(main(larger)).image_condition.image_size == (16, 16)
    for settings, message in (
        ({"condition": "edges"}, "condition must be 'lowres:2', as it is of"),
        ({"condition_column": "sketch"}, "condition_column must be left out with"),
        ({"condition_noise": 0.1}, "condition_noise must be 0.4, as it is of"),
    ):
        with pytest.raises(ValueError, match=message):
            config_of(tmp_path, pretrained_pipeline=str(run), **settings)
    GuidedDiffusionPipeline(UNetModel(8, 1, 1, (8, 16), 1), ExtDDIMScheduler()).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="must be left out with .*, whose network sees no condition image"):
        config_of(tmp_path, pretrained_pipeline=str(tmp_path / "plain"), condition="edges")


def test_draws_of_conditions_depend_on_the_position_alone():
    data = prepare_images("digits", max_samples=30)
    random = {"condition_dropout": 0.3, "condition_noise": 0.5, "condition_shape": (1, 4, 4), "label_dropout": 0.2}
    both = [make_batches(data, BatchOptions(seed=0, batch_size=size, **random)) for size in (400, 200)]
    whole = next(both[0])
    for name in ("condition_given", "condition_level", "condition_noise", "labels", "noise"):
        parts = [
            next(make_batches(data, BatchOptions(seed=0, batch_size=200, **random), position=p))[name]
            for p in (0, 200)
        ]
        assert torch.equal(whole[name], torch.cat(parts)), name
    plain = next(make_batches(data, BatchOptions(seed=0, batch_size=400, label_dropout=0.2)))
    assert all(torch.equal(plain[name], whole[name]) for name in ("pixels", "noise", "time"))  # as without conditions
    without, null = ~whole["condition_given"], whole["labels"] == data.num_classes
    shares = [without.float().mean(), null[without].float().mean(), null[~without].float().mean()]
    for share, expected in zip(shares, (0.3, BOTH_DROPPED, 0.2), strict=True):
        assert abs(share.item() - expected) < 0.1  # four standard deviations of the share of 120 to 400
    assert 0.2 < whole["condition_level"].mean() < 0.3 and whole["condition_level"].max() <= 0.5
    assert abs(whole["condition_noise"].std().item() - 1) < 0.05


def test_a_batch_gets_the_condition_that_the_pipeline_makes(run):
    pipe, data = DiffusionPipeline.from_pretrained(run), prepare_images("digits", max_samples=10)
    condition, space = pipe.image_condition, SampleSpace.of(data, None)
    options = BatchOptions(seed=0, batch_size=6, condition_dropout=0.5, condition_noise=0.4, condition_shape=(1, 4, 4))
    batch = next(make_batches(data, options))
    images = to_images(batch.pop("pixels"))
    with torch.autocast("cpu", torch.bfloat16):  # of the run, in which conditions are not made
        made = ConditionMaker(condition, space, None)(batch | {"images": images})
    of_pipeline = 2 * pipe.condition_from_image(images / 2 + 0.5) - 1
    noised = add_condition_noise(of_pipeline, batch["condition_noise"], batch["condition_level"])
    torch.testing.assert_close(made["condition_image"], condition.shown(noised), rtol=0, atol=1e-5)
    assert "condition_noise" not in made


def test_a_column_of_condition_images(tmp_path):
    name = save_pairs(tmp_path / "pairs", [(8, 8)])
    data = prepare_images(name, image_column="picture", condition_column="sketch")
    rows, still = np.arange(12), (np.full((12, 2), 0.5), np.zeros(12, bool))
    pixels, sketches = data.read(rows, *still), data.read_conditions(rows, *still)
    assert sketches.shape == (12, 8, 8, 1) and (sketches[..., 0] == 255 - pixels[..., 0]).all()
    flipped = make_batches(data, BatchOptions(seed=0, batch_size=8, random_flip=True, condition_dropout=0.1))
    batch = next(flipped)
    assert torch.equal(batch["condition_pixels"][:, 0], 255 - batch["pixels"][:, 0])
    alone = prepare_images(name, condition_column="sketch")  # the other column is that of the images
    assert alone.channels == 3 and identify(alone)["contents"] == identify(data)["contents"]
    assert identify(prepare_images(name, image_column="picture"))["contents"] != identify(data)["contents"]

    settings = {
        "dataset_name": name,
        "condition_column": "sketch",
        "condition_dropout": 0.0,
        "max_train_samples": None,
    }
    folder = main(config_of(tmp_path / "run", label_dropout=0.0, validation_split="test", **settings))
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.image_condition == ImageCondition("given", 1, 3, (8, 8))
    assert not pipe.denoiser.config.learned_without_image
    with pytest.raises(ValueError, match="condition_image must be given, condition images of 8x8 in 1 channel"):
        pipe(1)
    result = evaluate(
        EvaluateConfig(pipeline=str(folder), num_images=8, num_inference_steps=2, num_threads=1, svc=False)
    )
    assert result["conditioned"]["num_images"] == 8 and "bicubic_psnr" not in result["conditioned"]


def test_a_column_of_another_size_is_refused(tmp_path):
    name = save_pairs(tmp_path / "small", [(4, 4)])
    message = "condition_column 'sketch', row 0: a condition image must have the size of its image, 8x8, got 4x4"
    with pytest.raises(ValueError, match=message):
        main(config_of(tmp_path / "run", dataset_name=name, condition_column="sketch"))
    assert not (tmp_path / "run").exists()
    late = save_pairs(tmp_path / "late", [(8, 8)] * 66 + [(4, 4)], number=67)  # after the first rows
    data = prepare_images(late, condition_column="sketch", max_bad_share=0.02)
    assert len(data) == 66 and "1 of 67 images could not be decoded and are left out" in data.notes
    with pytest.raises(ValueError, match="condition_column must be another column than that of the images"):
        prepare_images(name, image_column="picture", condition_column="picture")
    with pytest.raises(ValueError, match="image_column 'label' holds no images"):
        prepare_images(name, image_column="picture", condition_column="label")


def test_texts_streams_and_latents_have_condition_images_too(tmp_path):
    settings = {"condition": "edges", "model": "dit", "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    options = {
        name: value for name, value in SMALL.items() if not name.endswith("channels") and name != "layers_per_block"
    }
    texts = train_texts(
        TextConfig(**options | settings, output_dir=str(tmp_path / "texts"), text_hidden_size=16, text_num_layers=1)
    )
    pipe = DiffusionPipeline.from_pretrained(texts)
    assert len(pipe("3", condition_image=Image.new("L", (8, 8)), num_inference_steps=2).images) == 1

    stream = {"streaming": True, "validation_split": "test", "max_validation_samples": 4, "shuffle_buffer": 10}
    folder = main(config_of(tmp_path / "stream", condition="lowres:2", **stream))
    assert DiffusionPipeline.from_pretrained(folder).denoiser.config.condition_channels == 1

    vae = VAEModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 4), latent_channels=2)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    vae.save_pretrained(tmp_path / "vae")
    folder = main(config_of(tmp_path / "latents", condition="edges", vae=str(tmp_path / "vae")))
    assert DiffusionPipeline.from_pretrained(folder).denoiser.config.condition_channels == 4


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"condition": "blur"}, "condition must be lowres:K with K of at least 2, grey or edges, got 'blur'"),
        ({"condition": "edges", "condition_column": "sketch"}, "two ways to the same: give one of them"),
        (
            {"condition_column": "sketch", "streaming": True},
            "condition_column needs images that are decoded beforehand",
        ),
        ({"condition_dropout": 0.2}, "condition_dropout has no meaning without condition or condition_column"),
        ({"condition": "edges", "condition_dropout": 1.0}, r"condition_dropout must be in \[0, 1\), got 1"),
        ({"condition": "edges", "condition_noise": 1.5}, r"condition_noise must be in \[0, 1\], got 1.5"),
    ],
)
def test_options_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_data_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="condition grey needs images of colour"):
        main(config_of(tmp_path / "run", condition="grey"))
    with pytest.raises(ValueError, match="a stream has none of: give --validation_split and --max_validation_samples"):
        main(config_of(tmp_path / "run", condition="edges", streaming=True))
    assert not Path(tmp_path / "run").exists()


def test_the_network_learns_to_use_the_condition():
    """The loss of a trained network is lower with its condition image than without."""
    torch.manual_seed(0)
    model = UNetModel(8, 1, 1, block_out_channels=(8, 8), layers_per_block=1, condition_channels=1)
    optimizer, generator = torch.optim.Adam(model.parameters(), 3e-3), torch.Generator().manual_seed(0)

    def losses(given):
        image = torch.rand(32, 1, 8, 8, generator=generator) * 2 - 1
        x_t = torch.randn(32, 1, 8, 8, generator=generator)
        return (model(x_t, 999, condition_image=image, condition_given=given).sample - image).square().mean((1, 2, 3))

    for _ in range(60):
        loss = losses(torch.rand(32, generator=generator) > 0.2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        with_image, without = losses(torch.ones(32)).mean(), losses(torch.zeros(32)).mean()
    assert with_image < 0.5 * without and without < 0.5  # 1/3 is the variance
