"""The loop with a small network, where every claim can be checked to the last bit."""

import json
import math
import os
import signal

import pytest
import torch
from torch import nn

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer.device_batches import in_float32
from diffusers_ext.trainer.run_folder import read_metrics
from diffusers_ext.trainer.state import load_run
from runs import (
    CountedError,
    assert_same_run,
    metrics,
    saved,
    squared_error,
    stop_before_step,
    trainer,
)


@pytest.fixture(scope="module")
def data():
    return prepare_images("digits", max_samples=20)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(data, tmp_path, accumulation, num_workers):
    """Stopped at step 7, in the middle of an epoch and of the steps between two lines of the log."""
    seen = []

    def loss(model, batch):
        seen.append((batch["images"], batch["noise"], batch["time"], batch["labels"]))
        return squared_error(model, batch)

    settings = {"gradient_accumulation_steps": accumulation, "checkpointing_steps": 7, "random_flip": True}
    trainer(data, tmp_path / "whole", loss, **settings).train()
    whole = seen[7 * accumulation :]
    settings["dataloader_num_workers"] = num_workers
    stop_before_step(trainer(data, tmp_path / "parts", loss, **settings), 10)
    torch.manual_seed(123)  # what ran before does not matter
    seen.clear()
    trainer(data, tmp_path / "parts", loss, resume_from_checkpoint="latest", **settings).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)
    assert len(seen) == len(whole) == 5 * accumulation
    for before, after in zip(whole, seen, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


class Following(CountedError):
    """An objective that writes down how far it is told that the run is."""

    def __init__(self):
        super().__init__()
        self.progress, self.steps, self.told = None, None, []

    def forward(self, model, batch):
        if self.training:
            self.told.append((self.progress(), self.steps()))
        return super().forward(model, batch)


def test_an_objective_that_changes_along_the_run_is_told_how_far_it_is(data, tmp_path):
    objective = Following()
    trainer(data, tmp_path, objective, max_train_steps=4).train()
    assert objective.told == [(step / 4, step) for step in range(4)]
    others = CountedError()
    trainer(data, tmp_path / "others", others, max_train_steps=1).train()
    assert not hasattr(others, "progress") and not hasattr(others, "steps")


def test_steps_that_a_scaled_loss_leaves_out_do_not_spoil_the_log(data, tmp_path):
    """fp16 seeks its scale by steps whose gradients overflow and which change nothing; JSON has no number for their norm."""
    run = trainer(data, tmp_path, max_train_steps=9)
    clip, norms = run._clip, []

    def overflowing():
        norm = clip()
        norms.append(norm.item())
        return norm if run.state.step in (4, 8) else torch.full_like(norm, math.inf)

    run._clip = overflowing
    run.train()
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} is no JSON")}
    lines = [json.loads(line, **refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["grad_norm"] for line in lines] == [None, *map(pytest.approx, (norms[4], norms[8]))]


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8])
def test_the_learning_rate_follows_the_optimizer_steps_to_its_end(data, tmp_path, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "train_batch_size": 1, "logging_steps": 1}
    trainer(data, tmp_path / "run", **settings).train()
    rates = [record["learning_rate"] for record in metrics(tmp_path / "run")]
    cosine = [0.005 * (1 + math.cos(math.pi * (step - 2) / 10)) for step in range(2, 12)]
    assert rates == pytest.approx([0.005, 0.01, *cosine])


def test_an_objective_with_a_state_is_saved_resumed_and_reported(data, tmp_path):
    """Stopped between two lines of the log, so that what is reported comes from before and after."""
    settings = {"checkpointing_steps": 7, "gradient_accumulation_steps": 2}
    trainer(data, tmp_path / "whole", CountedError(), **settings).train()
    stop_before_step(trainer(data, tmp_path / "parts", CountedError(), **settings), 10)
    trainer(data, tmp_path / "parts", CountedError(), resume_from_checkpoint="latest", **settings).train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)
    tensors = saved(tmp_path / "parts", 12)[0]
    assert tensors["objective.safetensors: seen"] == 24 and not tensors["objective.safetensors: since"].any()
    records = metrics(tmp_path / "whole")
    assert [record["seen"] for record in records] == [6, 12, 18, 24]
    for record in records[1:]:  # the weights of a window's losses lie between those of its ends
        assert 1 + 0.1 * (record["seen"] - 6) < record["unweighted"] / record["loss"] < 1 + 0.1 * record["seen"]
    (tmp_path / "whole" / "checkpoint-12" / "objective.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-12 has no objective.safetensors.*: give the same objective"):
        run = trainer(data, tmp_path / "whole", CountedError())
        load_run(tmp_path / "whole" / "checkpoint-12", run.accelerator, warmup_steps=2, **run._parts)


def test_an_objective_with_parameters_to_train_is_refused(data, tmp_path):
    objective = CountedError()
    objective.head = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="must be buffers, got parameters: head.weight and 1 more"):
        trainer(data, tmp_path / "run", objective)
    objective.head.requires_grad_(False)
    trainer(data, tmp_path / "run", objective)


def test_images_made_while_training_change_nothing(data, tmp_path):
    made = []

    def make(trainer):
        with trainer.averaged_model() as model:
            assert not model.training
            made.append((trainer.state.step, model(torch.randn(2, 1, 8, 8)).shape))

    trainer(data, tmp_path / "with", on_images=make, save_images_steps=5).train()
    trainer(data, tmp_path / "without").train()
    assert [step for step, _ in made] == [5, 10]
    assert_same_run(tmp_path / "with", tmp_path / "without", 12)


@pytest.mark.parametrize("accumulation, batch_size", [(2, 4), (4, 2), (8, 1)])
def test_accumulation_gives_the_same_weights_and_learning_rates(data, tmp_path, accumulation, batch_size):
    trainer(data, tmp_path / "whole", dropout=0.0, train_batch_size=8).train()
    settings = {"train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
    trainer(data, tmp_path / "parts", dropout=0.0, **settings).train()
    whole, parts = saved(tmp_path / "whole", 12)[0], saved(tmp_path / "parts", 12)[0]
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-5)
    rates = [[record["learning_rate"] for record in metrics(tmp_path / run)] for run in ("whole", "parts")]
    assert rates[0] == rates[1] and rates[0][-1] < 0.03 * 0.01


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(data, tmp_path):
    def loss(model, batch):
        loss.calls += 1
        return squared_error(model, batch) * (float("nan") if loss.calls >= 8 else 1)

    loss.calls = 0
    run = trainer(data, tmp_path / "run", loss=loss, checkpointing_steps=5, logging_steps=100)
    with pytest.raises(
        FloatingPointError, match=r"not finite \(nan\) at step 8, .* last good checkpoint is .*checkpoint-5"
    ):
        run.train()
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    assert all(torch.isfinite(value).all() for value in saved(tmp_path / "run", 5)[0].values())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_there(data, tmp_path, number, capsys):
    def loss(model, batch):
        loss.calls += 1
        if loss.calls == 5:
            os.kill(os.getpid(), number)
        return squared_error(model, batch)

    loss.calls = 0
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit:
        trainer(data, tmp_path / "parts", loss=loss).train()
    assert exit.value.code == 128 + number and signal.getsignal(number) is before
    assert f"{signal.Signals(number).name} at step 5: saved {tmp_path}/parts/checkpoint-5" in capsys.readouterr().out
    trainer(data, tmp_path / "parts", resume_from_checkpoint="latest").train()
    trainer(data, tmp_path / "whole").train()
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)


def test_a_damaged_checkpoint_is_passed_over_by_name(data, tmp_path, capsys):
    settings = {"checkpointing_steps": 4, "checkpoints_total_limit": None}
    trainer(data, tmp_path / "run", **settings).train()
    (tmp_path / "run" / "checkpoint-12" / "optimizer.bin").write_bytes(b"")
    again = trainer(data, tmp_path / "run", resume_from_checkpoint="latest", **settings)
    again.train()
    out = capsys.readouterr().out
    assert "checkpoint-12 passed over: optimizer.bin has 0 bytes" in out
    assert f"going on from {tmp_path}/run/checkpoint-8 (step 8, 32 images seen)" in out
    trainer(data, tmp_path / "whole", **settings).train()
    assert_same_run(tmp_path / "whole", tmp_path / "run", 12)


def test_a_run_by_time_ends_in_time_with_its_decay_complete(data, tmp_path):
    run = trainer(
        data, tmp_path / "run", max_train_steps=None, max_train_time="1.5s", logging_steps=1, lr_scheduler="linear"
    )
    run.clock.now = lambda: run.state.step / 16  # a clock that no busy machine disturbs
    run.train()
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert run.state.seconds == 1.5
    assert len(records) == run.state.step == 24
    for record, following in zip(records[3:], records[4:], strict=False):
        share = following["learning_rate"] / 0.01
        # The rate of a step is that of the time at which it began, which is about when the step before was logged.
        assert share == pytest.approx(1 - record["seconds"] / 1.5, abs=0.15)
    assert records[-1]["learning_rate"] < 0.1 * 0.01


def test_another_option_of_the_model_or_the_data_is_refused_on_resume(data, tmp_path):
    trainer(data, tmp_path / "run", max_train_steps=3).train()
    with pytest.raises(ValueError, match="is of a run with random_flip False, got True: give the same random_flip"):
        trainer(data, tmp_path / "run", random_flip=True, resume_from_checkpoint="latest").train()
    before = (tmp_path / "run" / "train_config.yaml").read_text()
    assert "random_flip: false" in before


def test_options_that_the_disk_has_no_room_for_leave_those_of_before(data, tmp_path):
    options = tmp_path / "run" / "train_config.yaml"
    trainer(data, tmp_path / "run", max_train_steps=3).train()
    before = options.read_text()
    options.with_name(f".partial-{options.name}").symlink_to("/dev/full")  # answers with the error of a full disk
    with pytest.raises(OSError, match="No space left"):
        trainer(data, tmp_path / "run", max_train_steps=6, resume_from_checkpoint="latest").train()
    assert options.read_text() == before and not list(options.parent.glob(".partial-*"))


def test_other_data_are_refused_on_resume(data, tmp_path):
    trainer(data, tmp_path / "run", max_train_steps=3).train()
    other = prepare_images("digits", max_samples=21)
    with pytest.raises(
        ValueError, match="other data than digits holds: it had 20 images, and has 21. Give the same data"
    ):
        trainer(other, tmp_path / "run", resume_from_checkpoint="latest").train()


def test_resuming_where_there_is_no_checkpoint_starts_and_says_so(data, tmp_path, capsys):
    run = trainer(data, tmp_path / "run", resume_from_checkpoint="latest", max_train_steps=2)
    run.train()
    assert "holds no checkpoint: the run starts at its beginning" in capsys.readouterr().out
    assert run.state.step == 2


def test_without_average_the_models_own_weights_are_used(data, tmp_path):
    run = trainer(data, tmp_path / "run", use_ema=False, max_train_steps=2)
    run.train()
    assert not (tmp_path / "run" / "checkpoint-2" / "average.safetensors").exists()
    with run.averaged_model() as model:
        assert model is run.module


def test_times_stay_below_1_where_there_is_no_float64():
    """A time of 1 would be a timestep beyond the last."""
    batch = {"time": torch.tensor([0.0, 0.5, 1 - 2.0**-40], dtype=torch.float64), "labels": torch.arange(3)}
    moved = in_float32(batch)
    assert moved["time"].dtype == torch.float32 and moved["time"][:2].tolist() == [0.0, 0.5]
    assert (1000 * moved["time"]).long().tolist() == [0, 500, 999]
    assert moved["labels"] is batch["labels"]


def test_16_bits_are_scaled_to_the_range_of_the_model(data, tmp_path):
    run = trainer(data, tmp_path / "run")
    for dtype, top in ((torch.uint8, 255), (torch.uint16, 65535)):
        pixels = torch.tensor([0, top], dtype=torch.int32).to(dtype).view(2, 1, 1, 1)
        images = run.to_device({"pixels": pixels, "noise": torch.zeros(2, 1, 1, 1)})["images"]
        torch.testing.assert_close(images.flatten(), torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_have_the_strides_of_the_memory_layout_asked_for(data, tmp_path, channels_last):
    """Of one channel too, which counts as contiguous in either order, while a convolution goes by the strides."""
    expected = torch.empty(4, 1, 8, 8).stride()
    if channels_last:
        expected = torch.empty(4, 8, 8, 1).permute(0, 3, 1, 2).stride()

    def loss(model, batch):
        assert batch["images"].stride() == batch["noise"].stride() == expected
        return squared_error(model, batch)

    trainer(data, tmp_path / "run", loss=loss, channels_last=channels_last, max_train_steps=1).train()
