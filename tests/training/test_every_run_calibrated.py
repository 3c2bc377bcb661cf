"""The last stage of runs of every kind: what their pipelines then do by default was measured on their own data."""

import json

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from calibrations import make_little
from diffusers_ext import VAEModel
from diffusers_ext.calibration import data as calibration_data
from diffusers_ext.calibration import guidance
from diffusers_ext.calibration.examples import Parts
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.recipes import calibration as recipe
from processes import in_ranks
from runs import forget_accelerate
from tiny_text import CAPTIONS, WIDTH, save_pictures
from training import cache_latents, calibrate, train_ddpm, train_text_to_image


pytestmark = pytest.mark.filterwarnings("ignore:the Fréchet distance of")
COMMON = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "train_batch_size": 4,
    "max_train_steps": 2,
    "num_train_timesteps": 40,
    "num_inference_steps": 2,
    "sample_columns": 2,
    "mixed_precision": "no",
    "num_threads": 1,
    "calibrate": True,
}
# As `accelerate launch` says it.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
FSDP |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
TEXTS = {"text_hidden_size": WIDTH, "text_num_layers": 1, "vocab_size": 300, "validation_prompts": ("red dot",)}


@pytest.fixture(autouse=True, scope="module")
def little():
    """No data set is so small here that a classifier of it is trained in a moment."""
    with pytest.MonkeyPatch.context() as patch:
        make_little(patch)
        patch.setattr(recipe, "MOST_TO_TRAIN_ON", 0)
        yield


@pytest.fixture(autouse=True)
def no_features_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    colours = ("colour", datasets.ClassLabel(names=["red", "green", "blue", "white"]))
    labels = [i // 3 for i in range(len(CAPTIONS))] * 2
    save_pictures(folder, "train", CAPTIONS * 2, **{colours[0]: (colours[1], labels)})
    return save_pictures(folder, "validation", CAPTIONS, **{colours[0]: (colours[1], labels[:12])})


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Grey pictures in six files, of which each has one brightness, that is its label."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(6):
        pixels = np.full((10, 8, 8), 40 * shard, np.uint8) + np.random.default_rng(shard).integers(
            8, size=(10, 8, 8), dtype=np.uint8
        )
        rows = {"image": [Image.fromarray(each) for each in pixels], "label": [shard] * 10}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(6)})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"train-{shard:05}-of-00006.parquet")
    return str(folder)


def waves(folder):
    folder.mkdir()
    random = np.random.default_rng(0)
    values = [[[v] for v in np.sin(np.arange(16) * (1 + i % 2) + random.random()).tolist()] for i in range(32)]
    rows = {"values": values, "label": [i % 2 for i in range(32)]}
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train.parquet")
    return str(folder)


def report_of(folder):
    forget_accelerate()
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    report = json.loads((folder / "calibration.json").read_text())
    assert report["quick_features"]["num_steps"] >= 2 and report["gained"] and "steps" in report
    assert "for it, in" in report["lines"][0] and "## Calibration" in (folder / "README.md").read_text()
    assert pipe.config.call_defaults == report["call_defaults"]
    return pipe, report


def test_a_run_on_texts_chooses_by_the_images_of_captions(texts, tmp_path, monkeypatch):
    search = guidance.search

    def one_of_them(trials, default):
        search(trials, default)
        return guidance.Guidance(2.5, 0.0, 0.5)

    monkeypatch.setattr(guidance, "search", one_of_them)
    settings = COMMON | TEXTS | {"dataset_name": texts, "ema_snapshot_steps": 1, "caption_column": "text"}
    config = train_text_to_image.TextConfig(output_dir=str(tmp_path / "run"), **settings)
    pipe, report = report_of(train_text_to_image.main(config))
    assert report["guidance"]["default"] == 4.0 and "split validation" in report["guidance"]["source"]
    assert len(report["averages"]["tried"]) > 1  # of denoiser and text encoder together
    assert pipe.scheduler.config.variance_type == "analytic"
    assert (
        report["call_defaults"]["guidance_scale"] == 2.5 and "timestep" in report["call_defaults"]["guidance_interval"]
    )
    generator = [torch.Generator().manual_seed(0)]
    plain = pipe("red dot", generator=generator, output_type="pt").images
    assert len(pipe("red dot", trajectory_steps=[0, 1]).trajectory) == 2  # the steps that it was calibrated for
    said = {"guidance_scale": 2.5, "guidance_interval": (0.0, 0.5)}
    again = [torch.Generator().manual_seed(0)]
    assert torch.equal(pipe("red dot", num_inference_steps=2, generator=again, output_type="pt", **said).images, plain)
    # The command finds captions as the run did, and a classifier of the labels beside them.
    options = ["--output_dir", str(tmp_path / "out"), "--max_time", "1s", "--num_threads", "1"]
    found = calibrate.main(calibrate.parse([str(tmp_path / "run"), *options]))
    assert "label_accuracy" in found["gained"][0]["after"] and "quick_features" not in found


def test_a_run_on_latents_of_captions_looks_at_the_images_that_they_were_made_of(texts, tmp_path):
    torch.manual_seed(0)
    vae = VAEModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 16), latent_channels=4)
    vae.register_to_config(scaling_factor=1.3, shift_factor=0.1)
    vae.save_pretrained(tmp_path / "vae")
    names = {"vae": str(tmp_path / "vae"), "output_dir": str(tmp_path / "latents")}
    cache_latents.main(cache_latents.CacheConfig(dataset_name=texts, label_column="text", num_threads=1, **names))
    forget_accelerate()
    settings = (
        COMMON | TEXTS | names | {"dataset_name": str(tmp_path / "latents"), "output_dir": str(tmp_path / "run")}
    )
    pipe, report = report_of(train_text_to_image.main(train_text_to_image.TextConfig(**settings)))
    assert "split validation" in report["guidance"]["source"] and "last_noise" not in report["analytic_variance"]
    assert pipe("red dot", output_type="pt").images.shape == (1, 3, 8, 8)


def test_a_run_on_condition_images_chooses_by_those_of_real_images(shards, tmp_path):
    """The split that the run takes the loss on is that by which it chooses."""
    settings = COMMON | {"dataset_name": shards, "condition": "lowres:2", "unconditional": True}
    settings |= {"dataset_split": "train[:60%]", "validation_split": "train[60%:]"}
    config = train_ddpm.TrainConfig(**settings, output_dir=str(tmp_path / "run"))
    pipe, report = report_of(train_ddpm.main(config))
    assert "the split train[60%:], and" in report["steps"]["source"]
    assert "guidance" not in report and "by the features of a classifier" in report["left_out"][0]  # without labels
    grey = torch.full((1, 1, 4, 4), 0.5)
    assert torch.isfinite(torch.as_tensor(pipe(condition_image=grey, output_type="np").images)).all()


def test_a_run_on_sequences_is_calibrated_in_their_own_units(tmp_path):
    config = train_ddpm.TrainConfig(
        **COMMON, dataset_name=waves(tmp_path / "data"), resolution=(16,), output_dir=str(tmp_path / "run")
    )
    pipe, report = report_of(train_ddpm.main(config))
    assert "last_noise" not in report["analytic_variance"] and report["guidance"]["tried"]
    assert pipe(class_labels=1).images.shape == (1, 16, 1)


def test_a_run_on_several_labels_an_image_asks_for_the_sets_of_real_ones(tmp_path):
    rows, random = {"image": [], "tags": []}, np.random.default_rng(0)
    for row in range(32):
        rows["image"].append(Image.fromarray(random.integers(256, size=(8, 8), dtype=np.uint8)))
        rows["tags"].append([name for bit, name in enumerate(("dark", "old", "soft")) if row >> bit & 1])
    (tmp_path / "data").mkdir()
    features = {"image": datasets.Image(), "tags": datasets.List(datasets.Value("string"))}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "data" / "train.parquet")
    settings = COMMON | {"dataset_name": str(tmp_path / "data"), "label_column": "tags"}
    pipe, report = report_of(train_ddpm.main(train_ddpm.TrainConfig(**settings, output_dir=str(tmp_path / "run"))))
    assert "guidance" not in report and "by the features of a classifier" in report["left_out"][0]
    subject = calibrate_subject(tmp_path / "run")
    data = calibration_data.Data.load(
        calibration_data.CalibrationOptions().of_run(str(tmp_path / "run"), pipe), subject
    )
    parts = Parts.of(data.real, None, seed=0)
    assert subject.asked(parts.train.take(torch.tensor([0, 5, 7]))) == {"labels": [[], [0, 2], [0, 1, 2]]}
    halves = [{tuple(row) for row in part.sets.tolist()} for part in (parts.choose, parts.report)]
    assert halves[0] | halves[1] == {tuple(bool(n >> bit & 1) for bit in range(3)) for n in range(8)}


def test_a_run_on_a_stream_reads_some_of_each_part_of_it(shards, tmp_path, monkeypatch, capfd):
    for name in ("FEWEST_SAMPLED", "MOST_SAMPLED"):
        monkeypatch.setattr(calibration_data, name, 30)
    settings = COMMON | {"dataset_name": shards, "streaming": True, "shuffle_buffer": 10}
    config = train_ddpm.TrainConfig(**settings, output_dir=str(tmp_path / "run"))
    _, report = report_of(train_ddpm.main(config))
    assert report["analytic_variance"]["num_images"] == 30
    real = calibration_data.Data.load(
        calibration_data.CalibrationOptions().of_run(str(tmp_path / "run"), None),
        calibrate_subject(tmp_path / "run"),
    ).real
    assert real.train.labels.bincount().tolist() == [5] * 6
    assert "30 images, from all over it" in " ".join(real.notes)
    two = train_ddpm.TrainConfig(**settings | {"train_batch_size": 2}, output_dir=str(tmp_path / "two"))
    assert in_ranks(lambda: train_ddpm.main(two)).count("calibrating for") == 1
    report_of(tmp_path / "two")


def calibrate_subject(folder):
    return Subject.of(DiffusionPipeline.from_pretrained(folder), 2)


def test_what_cannot_be_calibrated_ends_as_it_was_saved(texts, tmp_path, monkeypatch, capsys):
    """Captions that a validation split lacks, an image alone, a fault on the way: each run has its card and pipeline."""
    lacking = tmp_path / "lacking"
    save_pictures(lacking, "train", CAPTIONS * 2)
    save_pictures(lacking, "validation", CAPTIONS, [None] * len(CAPTIONS))
    settings = COMMON | TEXTS | {"dataset_name": str(lacking), "output_dir": str(tmp_path / "texts")}
    _, report = report_of(train_text_to_image.main(train_text_to_image.TextConfig(**settings)))
    assert "half of the training images" in report["steps"]["source"]
    settings = COMMON | {"dataset_name": "digits", "max_train_samples": 1, "output_dir": str(tmp_path / "one")}
    folder = train_ddpm.main(train_ddpm.TrainConfig(**settings | {"train_batch_size": 1}))
    assert "no network of features" in (folder / "README.md").read_text()
    forget_accelerate()

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(recipe, "calibrate", broken)
    settings = COMMON | {"dataset_name": "digits", "output_dir": str(tmp_path / "broken")}
    folder = train_ddpm.main(train_ddpm.TrainConfig(**settings))
    assert "not calibrated: RuntimeError: out of memory" in capsys.readouterr().out
    assert (folder / "README.md").is_file() and not (folder / "calibration.json").exists()
    assert DiffusionPipeline.from_pretrained(folder).config.call_defaults is None
    forget_accelerate()
    monkeypatch.setattr(calibration_data, "load_real_images", gone)
    train_ddpm.main(train_ddpm.TrainConfig(**settings | {"overwrite_output_dir": True}))
    assert "not calibrated: the data are gone" in capsys.readouterr().out


def gone(*args, **kwargs):
    raise FileNotFoundError("the data are gone")


def test_a_test_split_that_cannot_be_read_is_no_reason_to_choose_nothing(tmp_path):
    folder = tmp_path / "data"
    for split, labels in (("train", [0, 1] * 12), ("test", [0, -1])):
        rows = {
            "image": [Image.fromarray(np.full((8, 8), 9 * i, np.uint8)) for i, _ in enumerate(labels)],
            "label": labels,
        }
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    settings = COMMON | {"dataset_name": str(folder), "output_dir": str(tmp_path / "run")}
    _, report = report_of(train_ddpm.main(train_ddpm.TrainConfig(**settings)))
    assert "The split test was not looked at: label_column 'label' must hold integers" in report["left_out"][0]


def test_processes_that_spread_the_weights_end_calibrated_too(shards, tmp_path, monkeypatch):
    """Features are trained by the first alone, whose launcher says FSDP."""
    settings = COMMON | {"dataset_name": shards, "train_batch_size": 2, "output_dir": str(tmp_path / "run")}
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    output = in_ranks(lambda: train_ddpm.main(train_ddpm.TrainConfig(**settings)))
    assert output.count("calibrating for") == 1 and "not calibrated" not in output
    report_of(tmp_path / "run")
