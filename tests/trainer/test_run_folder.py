import dataclasses
import json

import pytest
import yaml

from diffusers_ext.options import to_yaml
from diffusers_ext.recipes.networks import NetworkConfig
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.run_folder import (
    MetricsLog,
    check_output_dir,
    check_same_run,
    clear_output_dir,
    read_metrics,
)


@pytest.mark.parametrize("what", ["train_config.yaml", "metrics.jsonl", "model_index.json", "checkpoint-7"])
def test_a_folder_that_holds_another_run_is_refused(tmp_path, what):
    (tmp_path / what).mkdir() if what.startswith("checkpoint") else (tmp_path / what).write_text("{}")
    with pytest.raises(ValueError, match="holds another run.*--resume_from_checkpoint latest.*--overwrite_output_dir"):
        check_output_dir(TrainerConfig(output_dir=str(tmp_path)))
    check_output_dir(TrainerConfig(output_dir=str(tmp_path), resume_from_checkpoint="latest"))
    check_output_dir(TrainerConfig(output_dir=str(tmp_path), overwrite_output_dir=True))


def test_a_folder_with_other_things_is_taken(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    check_output_dir(TrainerConfig(output_dir=str(tmp_path)))
    check_output_dir(TrainerConfig(output_dir=str(tmp_path / "new")))
    with pytest.raises(ValueError, match="output_dir must be a folder, .* is a file"):
        check_output_dir(TrainerConfig(output_dir=str(tmp_path / "notes.txt")))


@pytest.mark.parametrize("options", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "latest"}])
@pytest.mark.parametrize("name", ["README.md", "config.json", "samples.png", "index.html"])
def test_files_that_no_run_has_written_are_not_replaced(tmp_path, name, options):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds no run, but {name}. Move what is yours away, or choose another"):
        check_output_dir(TrainerConfig(output_dir=str(tmp_path), **options))


def test_nothing_is_cleared_where_no_run_is(tmp_path):
    for name in ("logs", "samples"):
        (tmp_path / name).mkdir()
    check_output_dir(TrainerConfig(output_dir=str(tmp_path), overwrite_output_dir=True))
    (tmp_path / "config.json").write_text("mine")
    clear_output_dir(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "logs", "samples"]


def test_clearing_removes_the_run_and_nothing_else(tmp_path):
    for name in ("checkpoint-7", ".checkpoint-8.partial", ".saving-x", "denoiser", "samples", "logs", "mine"):
        (tmp_path / name).mkdir()
    files = (
        "train_config.yaml metrics.jsonl samples.png loss.png README.md index.html evaluation.json notes.txt".split()
    )
    for name in [*files, ".partial-loss.png"]:
        (tmp_path / name).write_text("x")
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "P", "denoiser": ["diffusers_ext", "UNetModel"]})
    )
    clear_output_dir(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "notes.txt"]


def test_options_that_make_another_run_are_refused_and_others_are_said(tmp_path):
    (tmp_path / "train_config.yaml").write_text(to_yaml(TrainerConfig(seed=1, max_train_steps=10)))
    assert check_same_run(TrainerConfig(seed=1, max_train_steps=20), tmp_path) == ["max_train_steps is now 20, was 10"]
    with pytest.raises(ValueError, match="is of a run with seed 1, got 2: give the same seed, or start a new run"):
        check_same_run(TrainerConfig(seed=2), tmp_path)


@pytest.mark.parametrize("model, size", [("unet", {}), ("dit", {"num_registers": 2})])
def test_a_run_from_before_an_option_existed_had_its_default(tmp_path, model, size):
    config = NetworkConfig(model=model, **size)
    newer = ("mlp_ratio", "qk_norm", "block_out_channels", "ema_snapshot_steps", "logging_steps", "dropout")
    written = {name: value for name, value in yaml.safe_load(to_yaml(config)).items() if name not in newer}
    (tmp_path / "train_config.yaml").write_text(yaml.safe_dump(written))
    assert check_same_run(config, tmp_path) == []
    later = dataclasses.replace(config, logging_steps=7)
    assert check_same_run(later, tmp_path) == ["logging_steps is now 7, was 20"]
    with pytest.raises(ValueError, match=r"is of a run with dropout 0\.0, got 0\.1: give the same dropout"):
        check_same_run(dataclasses.replace(config, dropout=0.1), tmp_path)
    with pytest.raises(ValueError, match="is of a run with ema_snapshot_steps None, got 5: give the same"):
        check_same_run(dataclasses.replace(config, ema_snapshot_steps=5), tmp_path)


def test_metrics_after_the_step_that_a_run_goes_on_from_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(path, step=2)
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 0.5}]
    MetricsLog(path).close()
    assert read_metrics(path) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"train_batch_size": 0}, "train_batch_size must be at least 1, got 0"),
        ({"checkpoints_total_limit": 0}, "checkpoints_total_limit must be at least 1, got 0"),
        ({"resolution": (8, 8, 8)}, "resolution must be one side or height and width, got 8 8 8"),
        ({"max_bad_share": 1.5}, r"max_bad_share must be in \[0, 1\), got 1.5"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite, got inf"),
        ({"lr_scheduler": "polynomial", "lr_power": -1.0}, "lr_power must be at least 0, got -1.0"),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": -1}, "lr_num_cycles must be at least 1, got -1"),
        ({"adam_beta1": 1.5}, r"adam_beta1 must be in \[0, 1\), got 1.5"),
        ({"adam_beta2": -0.1}, r"adam_beta2 must be in \[0, 1\), got -0.1"),
        ({"adam_weight_decay": -1.0}, "adam_weight_decay must be at least 0, got -1.0"),
        ({"adam_epsilon": -1.0}, "adam_epsilon must be at least 0, got -1.0"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, got -1"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1"),
        ({"hub_model_id": "a/b"}, "hub_model_id has no meaning without push_to_hub"),
        ({"hub_private_repo": True}, "hub_private_repo has no meaning without push_to_hub"),
        ({"tracker_project_name": "a"}, "tracker_project_name has no meaning without report_to"),
        ({"seed": -1}, r"seed must be in \[0, 4294967295\], got -1"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": "latest"}, "contradict each other"),
        ({"ema_std": 0.1, "ema_decay": 0.9}, "ema_std and ema_decay are two kinds of average"),
        ({"ema_warmup": True}, "ema_warmup has no meaning without ema_decay"),
        ({"use_ema": False, "ema_decay": 0.9}, "ema_decay has no meaning without use_ema"),
        ({"max_train_steps": 0}, "max_train_steps must be positive, got 0"),
        ({"max_train_time": "soon"}, "a duration must look like 600 "),
    ],
)
def test_options_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**settings)


def test_a_log_on_a_full_disk_names_the_checkpoints_that_are_kept(tmp_path):
    (tmp_path / "checkpoint-6").mkdir()
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 6})
    log._file = open("/dev/full", "ab", buffering=0)
    with pytest.raises(OSError, match="No space left .*metrics.jsonl could not be written, .* are kept: checkpoint-6"):
        log.write({"step": 7})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 6}]
