"""A run by time keeps some of it for what follows the training."""

import time

import pytest
import torch

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.recipes.sample_grids import fitting
from diffusers_ext.trainer.ending import FINISHING_SECONDS, MARGIN, EndingCost, seconds_of
from diffusers_ext.trainer.run_folder import read_metrics
from runs import assert_same_run, trainer
from training.train_ddpm import TrainConfig, main


@pytest.fixture(scope="module")
def data():
    return prepare_images("digits", max_samples=20)


@pytest.mark.parametrize(
    "share, steps, columns, expected",
    [
        (1.0, 50, 8, (50, 8)),
        (0.5, 50, 8, (25, 8)),
        (0.2, 50, 8, (10, 8)),
        (0.1, 50, 8, (10, 4)),
        (0.0, 50, 8, (10, 1)),
        (1.0, 2, 3, (2, 3)),
        (0.4, 2, 3, (2, 1)),
    ],
)
def test_the_steps_become_fewer_and_then_the_columns(share, steps, columns, expected):
    assert fitting(share, steps, columns) == expected


def reserved(data, folder, budget, cost, **settings):
    run = trainer(data, folder, max_train_steps=None, max_train_time=budget, ending_cost=lambda run: cost, **settings)
    run.clock.start()
    return run, run.ending.reserve()


def test_what_the_ending_takes_is_kept_free_for_it(data, tmp_path):
    run, lines = reserved(data, tmp_path, "1000s", EndingCost(fixed=8.0, scalable=90.0))
    expected = MARGIN * (FINISHING_SECONDS + 8 + 90)
    assert run.budget.reserved == pytest.approx(expected, abs=0.1)  # the network itself is tiny
    assert lines == [
        f"{run.budget.end_seconds:.0f} s of the 1000 s are for the training, the others for what follows it: saving and "
        "drawing"
    ]
    assert run.ending.share() == 1.0


def test_a_short_run_keeps_a_third_and_does_what_fits_into_it(data, tmp_path):
    run, lines = reserved(data, tmp_path, "300s", EndingCost(fixed=18.0, scalable=1000.0))
    assert run.budget.reserved == 100.0 and len(lines) == 1
    run.clock.start(200)
    fixed = MARGIN * (FINISHING_SECONDS + 18)
    assert run.ending.share() == pytest.approx((100 - fixed) / (MARGIN * 1000), abs=1e-3)
    run.clock.start(1200)  # a run that is at its end already has as much
    assert run.ending.share() == pytest.approx((100 - fixed) / (MARGIN * 1000), abs=1e-3)


def test_a_time_that_is_too_short_for_the_ending_is_said(data, tmp_path):
    run, lines = reserved(data, tmp_path, "3s", EndingCost(fixed=18.0, scalable=10.0))
    assert lines[1].startswith(
        "--max_train_time 3 s is too short for that, which takes 24 s at least: the run takes about 26"
    )
    assert run.ending.share() == 0.0


def test_runs_without_a_limit_of_time_measure_nothing(data, tmp_path):
    run = trainer(data, tmp_path, ending_cost=lambda run: 1 / 0)
    assert run.ending.reserve() == [] and run.ending.share() == 1.0 and run.budget.reserved == 0


def test_the_held_out_loss_at_the_end_is_part_of_it(data, tmp_path):
    settings = {"validation_split": "test", "max_train_steps": None, "max_train_time": "1h"}
    run = trainer(data, tmp_path, validation_data=data, ending_cost=lambda run: EndingCost(), **settings)
    calls, evaluate = [], run.evaluate

    def slow(max_batches=None):
        calls.append(max_batches)
        time.sleep(0.05)
        return evaluate(max_batches)

    run.evaluate = slow
    run.ending.reserve()
    assert calls == [1, 1]  # of the 5 batches of 4 images one is measured, after one that makes things ready
    assert run.budget.reserved >= MARGIN * (FINISHING_SECONDS + 5 * 0.05)


def test_the_loss_of_some_batches_is_that_of_their_images(data, tmp_path):
    run = trainer(data, tmp_path, validation_data=data, validation_split="test")
    whole, first = run.evaluate(), run.evaluate(max_batches=1)
    images = next(run.validation.share())
    with torch.no_grad(), run.averaged_model() as model:
        assert first == pytest.approx(float(run.compute_loss(model, run.to_device(images))), rel=1e-5)
    assert run.evaluate(max_batches=5) == whole != first


def test_measuring_it_changes_nothing_of_the_run(data, tmp_path):
    def cost(run):
        with run.averaged_model() as model:
            return EndingCost(scalable=seconds_of(lambda: model(torch.randn(2, 1, 8, 8))))

    trainer(data, tmp_path / "with", max_train_time="1h", ending_cost=cost).train()
    trainer(data, tmp_path / "without").train()
    assert_same_run(tmp_path / "with", tmp_path / "without", 12)


def test_the_decay_is_complete_when_the_training_ends(data, tmp_path):
    settings = {"max_train_steps": None, "max_train_time": "4.5s", "logging_steps": 1, "lr_scheduler": "linear"}
    run = trainer(data, tmp_path / "run", ending_cost=lambda run: EndingCost(fixed=100.0), **settings)
    run.train()
    assert run.budget.end_seconds == 3.0 <= run.state.seconds
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(records) > 5 and records[-1]["learning_rate"] < 0.15 * 0.01


def test_a_run_by_time_draws_in_fewer_steps_and_says_so(tmp_path, capfd):
    config = TrainConfig(
        output_dir=str(tmp_path / "run"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        max_train_samples=40,
        train_batch_size=4,
        num_inference_steps=1000,
        max_train_time="2s",
    )
    main(config)
    output = capfd.readouterr()
    assert "drawing with 10 of 1000 steps and 1 of 8 columns, to end within --max_train_time" in output.out
    assert "drawing: step" in output.err and (tmp_path / "run" / "denoising.png").stat().st_size > 0


def test_a_run_takes_a_step_even_if_measuring_took_all_of_its_time(data, tmp_path):
    settings = {"max_train_steps": None, "max_train_time": "0.1s"}
    run = trainer(data, tmp_path / "run", ending_cost=lambda run: time.sleep(0.2) or EndingCost(), **settings)
    run.train()
    assert run.state.step == 1 and len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1
