import io
import json
import shutil
from contextlib import redirect_stdout

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from diffusers_ext import UNetModel
from diffusers_ext.commands import reconstruct_ema
from diffusers_ext.trainer.posthoc_ema import AverageSnapshots
from tiny import tiny_unet
from training.reconstruct_ema import ReconstructConfig
from training.train_ddpm import TrainConfig, main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that saved an average of std 0.07, and snapshots of others."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = TrainConfig(
        output_dir=str(folder),
        block_out_channels=(8, 16),
        layers_per_block=1,
        max_train_samples=40,
        train_batch_size=4,
        max_train_steps=90,
        lr_warmup_steps=5,
        learning_rate=0.01,
        num_inference_steps=1,
        sample_columns=1,
        ema_std=0.07,
        ema_snapshot_steps=8,
    )
    with redirect_stdout(io.StringIO()) as buffer:
        main(config)
    assert "training/reconstruct_ema.py makes averages of other widths" in buffer.getvalue()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return folder


def reconstruct(run, output_dir, std=0.07, **options):
    return reconstruct_ema.main(ReconstructConfig(str(run), std, output_dir=str(output_dir), **options))


def weights(folder):
    return load_file(folder / "denoiser" / "diffusion_pytorch_model.safetensors")


def relative_difference(one, other):
    difference = sum((one[name] - other[name]).square().sum() for name in one)
    return (difference / sum(value.square().sum() for value in other.values())).sqrt()


def test_pipeline_made_afterwards_is_the_one_that_was_trained_with_this_average(run, tmp_path, capsys):
    folder = reconstruct(run, tmp_path / "made")
    error = relative_difference(weights(folder), weights(run))
    assert error < 1e-2
    assert "average of std 0.07 at step 90, made of 24 snapshots" in capsys.readouterr().out
    # In a short run averages differ by little in all: the error must be small beside that too.
    other = reconstruct(run, tmp_path / "other", std=0.1)
    assert error < 0.05 * relative_difference(weights(other), weights(run))

    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels="3", num_inference_steps=1).images[0].size == (8, 8)
    report = json.loads((folder / "reconstruction.json").read_text())
    assert (report["step"], report["ema_std"]) == (90, 0.07) and 0 < report["misfit_of_weighting"] < 0.05
    options = yaml.safe_load((folder / "train_config.yaml").read_text())
    assert (options["ema_std"], options["dataset_name"]) == (0.07, "digits")


def test_an_earlier_step_gives_the_average_of_then(run, tmp_path):
    earlier = reconstruct(run, tmp_path / "made", std=0.1, step=40)
    there = load_file(run / "ema_snapshots" / "step-0000040-std-0.10.safetensors")
    assert relative_difference(there, weights(earlier)) < 1e-5


def test_a_pipeline_is_replaced_only_when_asked_to(run, tmp_path):
    reconstruct(run, tmp_path / "made")
    with pytest.raises(ValueError, match="holds a pipeline or a model: replace it with --overwrite_output_dir"):
        reconstruct(run, tmp_path / "made", std=0.1)
    again = reconstruct(run, tmp_path / "made", std=0.1, overwrite_output_dir=True)
    assert (
        relative_difference(weights(again), load_file(run / "ema_snapshots" / "step-0000090-std-0.10.safetensors"))
        < 1e-5
    )


def test_what_cannot_be_made_is_refused_and_nothing_is_written(run, tmp_path):
    with pytest.raises(ValueError, match="output_dir must be another folder than the run's"):
        reconstruct(run, run, overwrite_output_dir=True)
    with pytest.raises(ValueError, match="finish the run first"):
        reconstruct(tmp_path, tmp_path / "made")
    with pytest.raises(ValueError, match=r"ema_std 0.01 at step 90 cannot be made .* within reach"):
        reconstruct(run, tmp_path / "made", std=0.01)

    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("ema_snapshots"))
    with pytest.raises(ValueError, match="bare holds no snapshots of averages: train with --ema_snapshot_steps"):
        reconstruct(bare, tmp_path / "made")
    (bare / "ema_snapshots").mkdir()
    save_file({"weight": torch.zeros(3)}, bare / "ema_snapshots" / "step-0000010-std-0.10.safetensors")
    with pytest.raises(ValueError, match="the snapshots are of another model than .*bare holds"):
        reconstruct(bare, tmp_path / "made", std=0.1)
    assert not (tmp_path / "made").exists()


def test_a_model_that_was_saved_by_itself(tmp_path, capsys):
    model = tiny_unet()
    model.save_pretrained(tmp_path / "run")
    snapshots = AverageSnapshots(model, (0.05, 0.1), tmp_path / "run")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    snapshots.update(model)
    snapshots.write(1)
    folder = reconstruct(tmp_path / "run", tmp_path / "made", std=0.1)
    made = UNetModel.from_pretrained(folder)
    for name, value in model.named_parameters():
        torch.testing.assert_close(made.get_parameter(name), value, rtol=1e-6, atol=1e-6)
    assert 'UNetModel.from_pretrained("' in capsys.readouterr().out


def test_the_run_may_stand_first_on_the_command_line(capsys):
    from diffusers_ext.options import parse_config

    config = parse_config(ReconstructConfig, ["runs/digits", "--ema_std", "0.07"], first="run")
    assert (config.run, config.ema_std) == ("runs/digits", 0.07)
    assert reconstruct_ema.check_output_dir(config).name == "digits-0.07"
    for words, message in (
        (["--ema_std", "0.07"], "say which run"),
        (["runs/digits"], "ema_std must be given"),
    ):
        with pytest.raises(SystemExit):
            parse_config(ReconstructConfig, words, first="run")
        assert message in capsys.readouterr().err
