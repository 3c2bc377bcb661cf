"""Real runs of the script, with a network as small as it gets."""

import dataclasses
import io
import json
import os
import shutil
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import diffusers_ext
from diffusers_ext.commands.train_ddpm import TrainConfig, build_objective, build_scheduler, main
from diffusers_ext.data.sources import load_digits
from diffusers_ext.options import parse_config
from diffusers_ext.trainer.run_folder import read_metrics
from environment import HUNG_AFTER
from processes import Launched, in_ranks


ROOT = Path(__file__).parents[2]
SMALL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "train_batch_size": 4,
    "max_train_samples": 40,
    "num_inference_steps": 2,
    "sample_columns": 2,
    "logging_steps": 2,
}


TWO_PROCESSES = ("--config_file", str(ROOT / "docs" / "accelerate" / "ddp.yaml"), "--main_process_port", "0")


def config_of(output_dir, **settings):
    return TrainConfig(**SMALL | {"output_dir": str(output_dir), "max_train_steps": 4} | settings)


def arguments(config):
    """The config as a command line."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            flag = [f"--{'' if value else 'no-'}{field.name}"] if isinstance(value, bool) else [f"--{field.name}"]
            words += flag + [
                str(part) for part in (value if isinstance(value, tuple) else [value]) if value is not True
            ]
    return words


def save_images(folder, pixels, **columns):
    """A folder of parquet with these pictures, (number, height, width, channels)."""
    pictures = [Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture) for picture in pixels]
    features = {"image": datasets.Image()} | {name: datasets.Value("int64") for name in columns}
    folder.mkdir()
    rows = datasets.Dataset.from_dict({"image": pictures} | columns, features=datasets.Features(features))
    rows.to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run on digits in two processes, and what it printed. Launched it is below, where it is terminated."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    settings = {
        "train_batch_size": 2,
        "mixed_precision": "no",
        "label_dropout": 0.5,
        "random_flip": True,
        "max_grad_norm": 0.1,
        "validation_split": "test",
        "validation_steps": 2,
        "max_validation_samples": 8,
        "save_images_steps": 2,
        "report_to": "tensorboard",
        "num_threads": 1,
    }
    return folder, in_ranks(lambda: main(config_of(folder, **settings)))


def test_run_leaves_all_that_it_names(run):
    folder, output = run
    assert f"in {folder}:" in output and output.count("trained for 4 steps, 16 images") == 1
    for name in (
        "samples.png",
        "denoising.png",
        "loss.png",
        "loss_by_snr.png",
        "loss_by_snr.csv",
        "metrics.jsonl",
        "README.md",
        "index.html",
        "train_config.yaml",
    ):
        assert name in output and (folder / name).stat().st_size > 0
    assert (folder / "samples" / "step-0000002.png").exists()
    assert list((folder / "logs").rglob("events.out.tfevents*"))
    assert "digits, split train: 40 images, 8x8 grey, 10 labels" in output
    assert "images/s" in output and "left" in output and "100%" in output
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    records = read_metrics(folder / "metrics.jsonl")
    assert [(record["step"], record["images"]) for record in records] == [(2, 8), (4, 16)]
    # Ten rows of two pictures of 64 pixels, each with a margin, and the labels on their left.
    assert Image.open(folder / "samples.png").size[1] == 10 * 66 + 2


def test_trackers_get_the_numbers_of_the_log_and_the_grids(run):
    folder, _ = run
    file = max(
        (folder / "logs").rglob("events.out.tfevents*"), key=lambda path: path.stat().st_size
    )  # the others: options
    events = EventAccumulator(str(file.parent), size_guidance={"images": 0}).Reload()
    for name in ("loss", "val_loss", "learning_rate"):
        records = read_metrics(folder / "metrics.jsonl")
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx({record["step"]: record[name] for record in records}, rel=1e-6)
    grids = events.Images("samples")
    assert [grid.step for grid in grids] == [2, 4, 4]  # while training, and at the end from the pipeline as saved
    for grid, path in ((grids[0], folder / "samples" / "step-0000002.png"), (grids[2], folder / "samples.png")):
        drawn = np.asarray(Image.open(io.BytesIO(grid.encoded_image_string)))
        np.testing.assert_array_equal(drawn, np.asarray(Image.open(path)))


def test_the_lines_that_it_prints_load_the_pipeline(run):
    folder, output = run
    lines = output.strip().splitlines()[-3:]
    assert lines[0] == "import diffusers_ext"
    namespace = {}
    exec("\n".join(lines), namespace)
    pipe = namespace["pipeline"]
    assert isinstance(pipe, diffusers_ext.GuidedDiffusionPipeline)
    image = pipe(class_labels="3", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (8, 8) and image.mode == "L"


def test_saved_pipeline_holds_the_averaged_weights_and_the_trainings_schedule(run):
    folder, _ = run
    pipe = DiffusionPipeline.from_pretrained(folder)
    average = load_file(folder / "checkpoint-4" / "average.safetensors")
    own = load_file(folder / "checkpoint-4" / "model.safetensors")
    differences = 0
    for name, value in pipe.denoiser.named_parameters():
        torch.testing.assert_close(value.data, average[name], rtol=0, atol=0)
        differences += not torch.equal(average[name], own[name])
    assert differences
    config = pipe.scheduler.config
    assert (config.prediction_type, config.beta_schedule, config.num_train_timesteps) == (
        "v_prediction",
        "cosine",
        1000,
    )
    index = json.loads((folder / "model_index.json").read_text())
    assert index["denoiser"] == ["diffusers_ext", "UNetModel"]
    assert {int(label): name for label, name in pipe.config.id2label.items()} == {n: str(n) for n in range(10)}


def test_resolved_options_and_the_whole_batch_make_the_same_run_in_one_process(run, tmp_path):
    """Here in this process, from the options that the launched run has written."""
    folder, _ = run
    config = parse_config(
        TrainConfig,
        [
            "--config",
            str(folder / "train_config.yaml"),
            "--output_dir",
            str(tmp_path / "again"),
            "--train_batch_size",
            "4",
        ],
    )
    assert config.resolution == (8, 8) and config.resize_mode == "pad" and config.ema_std is not None
    main(config)
    two, one = (
        load_file(path / "checkpoint-4" / "model.safetensors")
        | {
            f"average {name}": value
            for name, value in load_file(path / "checkpoint-4" / "average.safetensors").items()
        }
        for path in (folder, tmp_path / "again")
    )
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    logs = [read_metrics(path / "metrics.jsonl") for path in (tmp_path / "again", folder)]
    for mine, theirs in zip(*logs, strict=True):
        assert theirs["images"] == mine["images"] and theirs["learning_rate"] == mine["learning_rate"]
        assert [theirs[name] for name in ("loss", "val_loss")] == pytest.approx(
            [mine[name] for name in ("loss", "val_loss")], rel=1e-4
        )
    for grid in ("samples.png", "samples/step-0000002.png"):
        pixels = [np.asarray(Image.open(path / grid)).astype(int) for path in (tmp_path / "again", folder)]
        assert abs(pixels[0] - pixels[1]).max() <= 2


def test_a_second_run_in_the_same_folder_is_refused_continued_or_overwritten(run, tmp_path):
    config = config_of(tmp_path / "run", max_train_steps=2)
    main(config)
    with pytest.raises(ValueError, match="holds another run, checkpoints up to checkpoint-2"):
        main(config)
    main(dataclasses.replace(config, max_train_steps=3, resume_from_checkpoint="latest"))
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [2, 3]
    main(dataclasses.replace(config, overwrite_output_dir=True))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_terminated_processes_end_clearly_and_the_run_goes_on(tmp_path):
    """A signal to the whole group, as job schedulers send it: the launcher hands it on a second time."""
    config = config_of(tmp_path / "run", max_train_steps=None, max_train_time="1h", train_batch_size=2)
    process = Launched(ROOT / "training" / "train_ddpm.py", arguments(config), TWO_PROCESSES)
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + HUNG_AFTER
    while len(read_metrics(metrics)) < 2:
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate()
    assert output.count("SIGTERM at step") == 1 and "--resume_from_checkpoint latest goes on from there" in output
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    # On one process, with the whole batch.
    main(config_of(tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=step + 2))
    assert read_metrics(metrics)[-1]["step"] == step + 2


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_unlabelled_colour_images_that_are_not_square(tmp_path, prediction_type):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 12, 3), dtype=np.uint8)
    name = save_images(tmp_path / "data", pixels)
    settings = {
        "prediction_type": prediction_type,
        "loss_weighting": "min_snr",
        "channels_last": False,
        "max_train_steps": 2,
    }
    folder = main(config_of(tmp_path / "run", dataset_name=name, **settings))
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.denoiser.config.num_classes is None and pipe.scheduler.config.prediction_type == prediction_type
    images = pipe(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 12, 3)


def test_unconditional_leaves_the_labels_out_and_fits_diffusers_own_pipeline(tmp_path):
    folder = main(config_of(tmp_path / "run", unconditional=True, max_train_steps=1, compile=False))
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert pipe.denoiser.config.num_classes is None and pipe.config.id2label is None
    stock = DDPMPipeline(pipe.denoiser, pipe.scheduler)
    assert stock(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


@pytest.mark.parametrize("model", ["unet", "dit"])
def test_a_run_without_label_dropout_has_no_null_label_to_guide_by(tmp_path, model):
    network = {} if model == "unet" else {"block_out_channels": (64, 128, 128), "layers_per_block": 2}
    config = config_of(tmp_path / "run", label_dropout=0.0, max_train_steps=1, model=model, **network)
    pipe = DiffusionPipeline.from_pretrained(main(config))
    assert pipe.null_label is None
    pipe(1, num_inference_steps=2)
    with pytest.raises(ValueError, match="has no null label"):
        pipe(1, num_inference_steps=2, guidance_scale=2.0)
    with pytest.raises(ValueError, match="guidance_scale, .* must be 1 with a label_dropout of 0, .* got 2"):
        main(config_of(tmp_path / "other", label_dropout=0.0, guidance_scale=2.0))
    assert not (tmp_path / "other").exists()


def test_images_get_a_border_rather_than_being_enlarged(tmp_path, capsys):
    pixels = np.full((5, 28, 28, 1), 255, np.uint8)
    name = save_images(tmp_path / "data", pixels, label=[0, 1, 0, 1, 1])
    folder = main(config_of(tmp_path / "run", dataset_name=name, resolution=(32,), max_train_steps=1))
    assert "28x28 images are centred on 32x32 with a border of 0 (--resize_mode pad)" in capsys.readouterr().out
    assert yaml.safe_load((folder / "train_config.yaml").read_text())["resize_mode"] == "pad"
    assert DiffusionPipeline.from_pretrained(folder).denoiser.config.sample_size == 32


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"resolution": (30,)},
            "resolution must be a multiple of 4, since block_out_channels has 3 widths .* 30: take 28 or 32",
        ),
        ({"resolution": (2, 8)}, "got 2: take 4"),
        ({"label_dropout": 1.0}, r"label_dropout must be in \[0, 1\), got 1"),
        ({"label_dropout": 0.5, "unconditional": True}, "label_dropout has no meaning with unconditional, .* got 0.5"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"objective": "hybrid", "vlb_weight": 0.0}, "vlb_weight must be positive, got 0"),
        ({"vlb_weight": 0.1}, "vlb_weight has no meaning without objective hybrid: give both or neither"),
        ({"snr_gamma": 3.0, "loss_weighting": "p2"}, "snr_gamma has no meaning without loss_weighting min_snr"),
        ({"beta_end": 0.03}, "beta_end has no meaning without beta_schedule linear, scaled_linear or sigmoid"),
        ({"lr_power": 2.0}, "lr_power has no meaning without lr_scheduler polynomial"),
        ({"objective": "vlb", "loss_weighting": "p2"}, "which objective vlb has none of, got p2"),
        ({"num_train_timesteps": 20}, r"num_inference_steps must be at most num_train_timesteps \(20\), got 50"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_a_transformer_is_trained_saved_and_goes_on(tmp_path):
    dit = {
        **{"model": "dit", "patch_size": 2, "hidden_size": 16, "num_layers": 3, "position_embedding": "rope"},
        **{"norm": "rms", "mlp": "swiglu", "value_residual": True, "patch_embedding": "conv", "long_skips": True},
        **{"internal_guidance_layer": 2, "internal_guidance_loss_weight": 0.3, "model_guidance_scale": 2.0},
    }
    unet = ("block_out_channels", "layers_per_block")
    config = TrainConfig(
        **{name: value for name, value in SMALL.items() if name not in unet},
        **dit,
        output_dir=str(tmp_path / "run"),
        max_train_steps=2,
    )
    folder = main(config)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipe.denoiser, diffusers_ext.DiTModel) and pipe.denoiser.config.patch_size == 2
    assert pipe.denoiser.internal_patch_out.weight.any()
    assert pipe(class_labels=3, num_inference_steps=2, internal_guidance_scale=1.5, output_type="np").images.any()
    written = parse_config(TrainConfig, ["--config", str(folder / "train_config.yaml")])
    assert written.dit_options(8) == config.dit_options(8)
    with pytest.raises(ValueError, match="num_layers"):
        main(dataclasses.replace(config, num_layers=4, max_train_steps=3, resume_from_checkpoint="latest"))
    main(dataclasses.replace(config, max_train_steps=3, resume_from_checkpoint="latest"))
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == 3


def test_a_presets_guidance_that_has_no_labels_is_left_out_and_said(tmp_path, capsys):
    options = {"model": "unet", "max_train_steps": 1, "num_inference_steps": 2, "calibrate": False}
    settings = {**SMALL, **options, "preset": "quick", "output_dir": str(tmp_path / "run")}
    folder = main(TrainConfig(**settings, unconditional=True))
    assert "no model_guidance_scale, which the preset has" in capsys.readouterr().out
    assert parse_config(TrainConfig, ["--config", str(folder / "train_config.yaml")]).model_guidance_scale is None
    card = (folder / "README.md").read_text()  # whose command makes the run again
    assert "training/train_ddpm.py" in card and "--model_guidance_scale" not in card
    refused = tmp_path / "refused"
    with pytest.raises(ValueError, match="model_guidance_scale needs labels or texts, and digits has none"):
        main(TrainConfig(**SMALL | {"output_dir": str(refused)}, unconditional=True, model_guidance_scale=2.0))
    assert not refused.exists()


def test_nothing_is_written_when_the_data_are_refused(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match=r"no column of images; its columns are: text \(string\)"):
        main(config_of(tmp_path / "run", dataset_name=str(folder)))
    assert not (tmp_path / "run").exists()


def test_pushed_run_is_the_folder_with_its_card(hub, tmp_path):
    main(
        config_of(
            tmp_path / "run",
            max_train_steps=1,
            push_to_hub=True,
            hub_model_id="alice/digits",
            hub_token="hf_token_of_alice",
        )
    )
    pipe = DiffusionPipeline.from_pretrained("alice/digits")
    assert isinstance(pipe, diffusers_ext.GuidedDiffusionPipeline)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "alice/digits" in card and "hf_token_of_alice" not in card
    assert "hf_token_of_alice" not in (tmp_path / "run" / "train_config.yaml").read_text()


def test_a_hub_that_refuses_does_so_before_training(hub, tmp_path):
    with pytest.raises(PermissionError):
        main(config_of(tmp_path / "run", push_to_hub=True, hub_model_id="alice/digits", hub_token="hf_wrong"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_loss_of_a_perfect_model_is_zero_and_of_a_blank_one_is_its_target(prediction_type):
    config = TrainConfig(prediction_type=prediction_type)
    scheduler = build_scheduler(config)
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 64, 1, 4, 4, generator=generator)
    batch = {"images": x0, "noise": eps, "time": (torch.arange(64) + 0.5).double() / 64}
    alpha_bar = scheduler.alphas_cumprod.double()[(batch["time"] * 1000).long()].view(-1, 1, 1, 1)
    targets = {"epsilon": eps, "sample": x0, "v_prediction": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0}
    target = targets[prediction_type].float()

    def model(answer):
        def call(sample, timesteps, class_labels):
            torch.testing.assert_close(
                sample, (alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps).float(), rtol=1e-3, atol=1e-3
            )
            return type("Output", (), {"sample": answer})

        return call

    objective = build_objective(config, scheduler)
    assert objective(model(target), batch) < 1e-6
    blank = objective(model(torch.zeros_like(x0)), batch)
    torch.testing.assert_close(blank, target.square().mean(), rtol=1e-3, atol=0)


def test_digits_by_name_and_as_a_folder_are_the_same_data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    load_digits().to_parquet(folder / "train.parquet")
    main(config_of(tmp_path / "named", max_train_steps=2))
    main(config_of(tmp_path / "folder", max_train_steps=2, dataset_name=str(folder)))
    named, other = (read_metrics(tmp_path / run / "metrics.jsonl")[-1]["loss"] for run in ("named", "folder"))
    assert named == other


def test_a_hybrid_run_with_importance_sampling_resumes_bit_by_bit_and_is_sampled_with_its_variances(tmp_path):
    settings = {"objective": "hybrid", "timestep_sampling": "importance", "num_train_timesteps": 4}
    settings |= {"train_batch_size": 16, "max_train_steps": 8, "checkpointing_steps": 5, "scheduler": "ddpm"}
    whole = main(config_of(tmp_path / "whole", **settings))
    part = tmp_path / "part"
    shutil.copytree(whole / "checkpoint-5", part / "checkpoint-5")
    shutil.copy(whole / "train_config.yaml", part)
    shutil.copy(whole / "metrics.jsonl", part)
    main(config_of(part, resume_from_checkpoint="latest", **settings))
    for name in ("model", "average", "objective"):
        one, two = (load_file(folder / "checkpoint-8" / f"{name}.safetensors") for folder in (whole, part))
        assert all(torch.equal(one[key], two[key]) for key in one), name
    assert one["timestep_sampler.loss_count"].sum() == 8 * 16 and (one["timestep_sampler.loss_count"] >= 10).all()
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (whole, part)]
    for one, two in zip(*logs, strict=True):
        same = [name for name in one if "second" not in name]
        assert {name: one[name] for name in same} == {name: two[name] for name in same}
        assert {"loss_q1", "error_q4", "vlb_bits_per_dim"} <= one.keys()
    assert (part / "loss_by_snr.csv").read_text() == (whole / "loss_by_snr.csv").read_text()
    assert (part / "loss_by_snr.png").stat().st_size > 0

    pipe = DiffusionPipeline.from_pretrained(whole)
    assert pipe.denoiser.config.out_channels == 2 and pipe.scheduler.variance_type == "learned_range"
    settings = {"class_labels": [1, 2], "num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
    for scheduler in (pipe.scheduler, diffusers_ext.ExtDDIMScheduler.from_config(pipe.scheduler.config)):
        pipe.scheduler = scheduler
        assert pipe(**settings).images.shape == (2, 8, 8, 1)


def test_images_of_many_plain_steps_have_no_noise_left_of_what_was_clipped(tmp_path):
    """The pipeline says so for itself: the noise in x_t is what the clipped x_0 leaves, without guidance too."""
    folder = main(config_of(tmp_path / "run", max_train_steps=1))
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def images(**call):
        generator = torch.Generator().manual_seed(0)
        return pipe(class_labels=[1], num_inference_steps=4, output_type="np", generator=generator, **call).images

    assert np.array_equal(images(), images(use_clipped_model_output=True))
    assert not np.array_equal(images(), images(use_clipped_model_output=False))
