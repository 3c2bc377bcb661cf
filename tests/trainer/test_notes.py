"""Options that do not fit together are spoken of, before the training or after it."""

import dataclasses
import re

import pytest

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.options import option
from diffusers_ext.trainer.config import TrainerConfig
from runs import forget_accelerate, stop_before_step, trainer
from training.train_vae import TrainVAEConfig


@pytest.fixture(scope="module")
def data():
    return prepare_images("digits", max_samples=20)


def test_options_that_a_run_is_too_short_for():
    config = TrainerConfig(
        save_images_steps=50,
        checkpointing_steps=60,
        ema_snapshot_steps=5,
        validation_split="test",
        validation_steps=10,
    )
    lines = config.too_long_for(40)
    assert lines == [
        "save_images_steps 50 is more than the 40 optimizer steps of the run: no pictures are made while training",
        "checkpointing_steps 60 is more than the 40 optimizer steps of the run: the only checkpoint is that of the end",
    ]
    assert TrainerConfig(validation_split="test").too_long_for(1) == []  # defaults are no reason for a word
    vae = TrainVAEConfig(adversarial_weight=0.5, kl_warmup_steps=500)
    assert [line.split(" ")[0] for line in vae.too_long_for(400)] == ["kl_warmup_steps", "adversarial_start_step"]
    assert vae.too_long_for(501) == []


def test_they_are_said_before_a_run_by_steps_and_after_one_by_time(data, tmp_path, capsys):
    trainer(data, tmp_path / "steps", max_train_steps=2, save_images_steps=5, lr_warmup_steps=9).train()
    out = capsys.readouterr().out
    assert out.index("save_images_steps 5 is more than the 2") < out.index("time: ")
    assert out.index("lr_warmup_steps 9 is more than the 2 optimizer steps") < out.index("time: ")
    assert "ended in the warm-up of its learning rate, at 22% of the peak after 2 of 9 steps: give" in out
    settings = {"max_train_steps": None, "max_train_time": "0.2s", "lr_warmup_steps": 10**6}
    trainer(data, tmp_path / "time", save_images_steps=10**6, **settings).train()
    out = capsys.readouterr().out
    assert out.index("time: ") < out.index("save_images_steps 1000000 is more than the")
    assert "of 1000000 steps: give it a longer --max_train_time" in out
    trainer(data, tmp_path / "enough", max_train_steps=2).train()
    assert "warm-up" not in capsys.readouterr().out


def test_a_warm_up_by_time_goes_on_where_it_was(data, tmp_path):
    """The step at which it ended is part of the state; a state without it is of a run that warmed up by steps."""
    run = trainer(data, tmp_path / "run", max_train_time="1h", lr_warmup_steps=None, max_train_steps=12)
    run.train()
    assert run.state.warmup_steps == 1
    forget_accelerate()
    again = trainer(data, tmp_path / "run", max_train_steps=24, lr_warmup_steps=None, resume_from_checkpoint="latest")
    again.train()
    assert again.learning_rate.warmup_steps == 2 and again.state.warmup_end == run.state.warmup_end


@pytest.mark.parametrize(
    "steps, scheduler, message",
    [
        (12, "cosine", "the run is at its end, with 12 steps .*: nothing is left to train"),
        (13, "cosine", "the learning rate is at the end of its decay, at .* of a peak of 0.01, so that what is left"),
        (24, "cosine", "the learning rate, which was at the end of its decay at .*, rises to .* and decays again"),
        (24, "constant", None),
    ],
)
def test_going_on_beyond_the_end_says_what_the_learning_rate_does(data, tmp_path, capsys, steps, scheduler, message):
    trainer(data, tmp_path / "run", lr_scheduler=scheduler).train()
    forget_accelerate()
    capsys.readouterr()
    settings = {"lr_scheduler": scheduler, "max_train_steps": steps, "resume_from_checkpoint": "latest"}
    trainer(data, tmp_path / "run", **settings).train()
    out = capsys.readouterr().out
    if message is None:
        assert "learning rate" not in out
    else:
        (line,) = [line for line in out.splitlines() if "at its end" in line or "at the end of its decay" in line]
        assert re.match(message, line)
        assert "--pretrained_pipeline" not in line  # which this kind of run does not have


@pytest.mark.parametrize("steps, message", [(13, "--lr_scheduler constant .* to go on at"), (24, "of that height")])
def test_a_run_that_can_begin_with_a_pipeline_is_advised_to(data, tmp_path, capsys, steps, message):
    @dataclasses.dataclass(frozen=True)
    class Config(TrainerConfig):
        pretrained_pipeline: str | None = option(None, "a pipeline")

    trainer(data, tmp_path / "run", config_class=Config).train()
    forget_accelerate()
    capsys.readouterr()
    settings = {"max_train_steps": steps, "resume_from_checkpoint": "latest", "config_class": Config}
    trainer(data, tmp_path / "run", **settings).train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "at the end of its decay" in line]
    assert re.search(
        f"{message}; or begin a new run .*: --pretrained_pipeline {tmp_path}/run and another --output_dir", line
    )


def test_a_run_that_was_stopped_goes_on_without_a_word_of_its_learning_rate(data, tmp_path, capsys):
    stop_before_step(trainer(data, tmp_path / "run", checkpointing_steps=11), 11)
    capsys.readouterr()
    trainer(data, tmp_path / "run", checkpointing_steps=11, resume_from_checkpoint="latest").train()
    assert "learning rate" not in capsys.readouterr().out
