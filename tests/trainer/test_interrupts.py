"""Signals before the training and after it, when they are no request to save but end the work at once."""

import os
import signal
import time
from pathlib import Path

import pytest

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer.config import TrainerConfig, resolve_for_machine
from diffusers_ext.trainer.run import make_accelerator, open_run, save_atomically
from diffusers_ext.trainer.signals import Interrupted
from runs import trainer


def interrupted(folder, work):
    settings = {"mixed_precision": "no", "resume_from_checkpoint": "latest"}  # that of `trainer`, on any machine
    config = resolve_for_machine(TrainerConfig(output_dir=str(folder), **settings))
    with pytest.raises(Interrupted) as interrupt, open_run(config, make_accelerator(config)) as open_folder:
        work(lambda: open_folder(config))
    return interrupt.value


def test_while_the_data_are_prepared_nothing_is_written(tmp_path):
    def work(open_folder):
        raise KeyboardInterrupt

    error = interrupted(tmp_path / "run", work)
    assert str(error) == (
        f"interrupted before the training; nothing was written to {tmp_path}/run, and the same command starts again"
    )
    assert error.signal_number == signal.SIGINT and not (tmp_path / "run").exists()


def test_before_the_first_checkpoint_it_says_that_there_is_none(tmp_path):
    def work(open_folder):
        open_folder()
        raise KeyboardInterrupt

    assert "before the first checkpoint, so" in str(interrupted(tmp_path / "run", work))


def test_afterwards_it_names_the_checkpoint_and_a_save_that_it_falls_into_leaves_nothing_torn(tmp_path):
    """By SIGTERM, which is as good as Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    trainer(prepare_images("digits", max_samples=20), tmp_path / "run", max_train_steps=2).train()

    class Slow:
        def save_pretrained(self, folder):
            (Path(folder) / "half").touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    def work(open_folder):
        open_folder()
        save_atomically(Slow(), tmp_path / "run")

    try:
        error = interrupted(tmp_path / "run", work)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert f"{tmp_path}/run keeps checkpoint-2; the same command with --resume_from_checkpoint latest" in str(error)
    assert error.signal_number == signal.SIGTERM
    assert not list((tmp_path / "run").glob(".*"))
