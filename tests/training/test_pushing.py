"""Runs that push what they save, while they go on and at their end."""

import json

import pytest
from diffusers import DiffusionPipeline

from diffusers_ext import GuidedDiffusionPipeline
from diffusers_ext.hub.__main__ import main as command
from diffusers_ext.trainer.run_folder import read_metrics
from training.train_ddpm import TrainConfig, main


ALICE = "hf_token_of_alice"


def config_of(output_dir, **settings):
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "train_batch_size": 4, "max_train_samples": 40}
    drawn = {"num_inference_steps": 2, "sample_columns": 1, "checkpointing_steps": 1, "max_train_steps": 4}
    pushed = {"push_to_hub": True, "push_to_hub_every": 2, "hub_model_id": "alice/digits"}
    return TrainConfig(**small | drawn | pushed | {"output_dir": str(output_dir)} | settings)


def test_every_kth_checkpoint_is_a_branch_and_the_token_is_nowhere(hub, tmp_path, capsys):
    run = tmp_path / "run"
    main(config_of(run, report_to="tensorboard", hub_token=ALICE))
    repo = hub.repos["model", "alice/digits"]
    assert set(repo.branches) == {"main", "checkpoint-2", "checkpoint-4"}
    # One commit each: nothing was pushed twice.
    assert sorted(hub.titles("alice/digits")[1:]) == [
        "Upload checkpoint-2",
        "Upload checkpoint-4",
        "Upload the pipeline",
    ]
    for name in repo.branches:
        files = hub.files("alice/digits", branch=name)
        assert json.loads(files["model_index.json"])["_class_name"] == ["pipeline", "GuidedDiffusionPipeline"]
    weights = [
        next(p for p in DiffusionPipeline.from_pretrained("alice/digits", revision=name).denoiser.parameters())
        for name in ("checkpoint-2", "checkpoint-4", "main")
    ]
    assert not weights[0].equal(weights[1]) and weights[1].equal(weights[2])
    assert not (run / "milestones" / "checkpoint-2").exists()

    written = [path for path in run.rglob("*") if path.is_file()]
    assert {"train_config.yaml", "README.md", "metrics.jsonl", "run_state.json"} <= {path.name for path in written}
    assert any("events.out" in path.name for path in written)
    texts = [path.read_bytes() for path in written] + [
        file.data for c in repo.commits.values() for file in c.files.values()
    ]
    assert not [text for text in texts if ALICE.encode() in text]
    out, err = capsys.readouterr()
    assert ALICE not in out + err


def test_a_hub_that_is_down_stops_no_run(hub, tmp_path, capsys, monkeypatch):
    """It is up when the run begins, and never again."""
    monkeypatch.setattr(
        "diffusers_ext.hub.push.push_patiently.__kwdefaults__", {"waits": (0,), "sleep": lambda _: None}
    )
    run = tmp_path / "run"
    hub.refuse = lambda number, path: 418 if number >= 5 else None
    main(config_of(run, hub_token=ALICE))
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 4
    out = capsys.readouterr().out
    assert f"to push it later: python -m diffusers_ext.hub push {run} alice/digits" in out
    milestone = run / "milestones" / "checkpoint-2"
    assert f"to push it later: python -m diffusers_ext.hub push {milestone} alice/digits --branch checkpoint-2" in out
    assert type(GuidedDiffusionPipeline.from_pretrained(milestone)) is GuidedDiffusionPipeline
    hub.refuse = lambda number, path: None
    monkeypatch.setenv("HF_TOKEN", ALICE)
    command(["push", str(milestone), "alice/digits", "--branch", "checkpoint-2"])
    assert "model_index.json" in hub.files("alice/digits", branch="checkpoint-2")

    main(config_of(run, hub_token=ALICE, resume_from_checkpoint="latest"))  # which pushes what is left
    assert "model_index.json" in hub.files("alice/digits", branch="checkpoint-4")
    assert not any((run / "milestones").iterdir())


def test_milestones_need_a_push(tmp_path):
    with pytest.raises(ValueError, match="push_to_hub_every .*push_to_hub"):
        config_of(tmp_path, push_to_hub=False)
