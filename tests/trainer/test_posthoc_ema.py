import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.integrate import quad
from torch import nn

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.ema import WeightAverage, power_function_exponent
from diffusers_ext.trainer.posthoc_ema import (
    MAX_MISFIT,
    AverageSnapshots,
    fit_weighting,
    is_of,
    list_snapshots,
    load_averages,
    reconstruct,
    weighting_product,
)
from runs import assert_same_run, saved, stop_before_step, trainer


NUM_STEPS, SPACING = 600, 25


def weighting(tau, step, gamma):
    """p(tau) of the power-function average of exponent gamma at a step."""
    return np.where(tau <= step, (gamma + 1) / step * (np.minimum(tau, step) / step) ** gamma, 0.0)


def walk(model, num_steps):
    """Random walks with a drift, each parameter's its own: harder to average than weights, which settle."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.zeros_like(parameter) for parameter in model.parameters()]
    drifts = [torch.randn(parameter.shape, generator=generator) * 0.05 for parameter in model.parameters()]
    for step in range(1, num_steps + 1):
        for parameter, value, drift in zip(model.parameters(), values, drifts, strict=True):
            value += drift + 0.1 * torch.randn(value.shape, generator=generator)
            parameter.data.copy_(value)
        yield step


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder of snapshots, and averages of other widths that were tracked beside them at several steps."""
    folder, model = tmp_path_factory.mktemp("run"), nn.Linear(7, 5)
    snapshots = AverageSnapshots(model, (0.05, 0.1), folder)
    direct = {std: WeightAverage(model, std=std) for std in (0.035, 0.05, 0.07, 0.12, 0.2)}
    tracked = {}
    for step in walk(model, NUM_STEPS):
        snapshots.update(model)
        for std, average in direct.items():
            average.update(model)
            if step in (300, 500, 600):
                tracked[step, std] = {name: value.clone() for name, value in average.averages().items()}
        if step % SPACING == 0:
            snapshots.write(step)
    return folder, tracked


@pytest.mark.product
@pytest.mark.parametrize("step", [300, 500, 600])
@pytest.mark.parametrize("std", [0.035, 0.05, 0.07, 0.12, 0.2])
def test_average_made_afterwards_is_the_one_tracked_directly(run, step, std):
    folder, tracked = run
    made, misfit = reconstruct(list_snapshots(folder), step, std)
    assert misfit < MAX_MISFIT
    difference = sum((made[name] - value).square().sum() for name, value in tracked[step, std].items())
    size = sum(value.square().sum() for value in tracked[step, std].values())
    assert (difference / size).sqrt() < 1e-2
    assert made["weight"].dtype == torch.float32


@pytest.mark.parametrize("std", [0.05, 0.1])
def test_average_of_a_snapshot_is_the_snapshot(run, std):
    folder, _ = run
    made, misfit = reconstruct(list_snapshots(folder), 300, std)
    there = load_file(folder / "ema_snapshots" / f"step-0000300-std-{std:.2f}.safetensors")
    torch.testing.assert_close(made, there, rtol=0, atol=1e-6)
    assert misfit < 1e-6


@pytest.mark.parametrize("a, b", [((100, 0.05), (100, 0.1)), ((100, 0.05), (37, 0.2)), ((3, 0.28), (1000, 0.02))])
def test_inner_product_of_weightings_is_their_integral(a, b):
    (step_a, std_a), (step_b, std_b) = a, b
    gamma_a, gamma_b = power_function_exponent(std_a), power_function_exponent(std_b)
    expected, _ = quad(
        lambda tau: weighting(tau, step_a, gamma_a) * weighting(tau, step_b, gamma_b),
        *(0, min(step_a, step_b)),
        epsabs=0,
        epsrel=1e-12,
        limit=200,
    )
    assert weighting_product(step_a, gamma_a, step_b, gamma_b) == pytest.approx(expected, rel=1e-10)
    assert weighting_product(step_b, gamma_b, step_a, gamma_a) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("std", [0.03, 0.07, 0.25])
def test_fit_is_the_least_squares_of_the_weightings_themselves(std):
    """Against a dense solve over points in time, in which the last coefficient is 1 minus the sum of the others."""
    steps, stds = np.repeat(np.arange(10, 101, 10), 2), np.tile([0.05, 0.1], 10)
    points, weights = np.polynomial.legendre.leggauss(60)
    ends = np.arange(0, 101, 10.0)  # the weightings are smooth between the snapshots
    tau = np.concatenate(
        [(high + low) / 2 + (high - low) / 2 * points for low, high in zip(ends, ends[1:], strict=False)]
    )
    root = np.sqrt(np.tile(weights * 5, 10))
    columns = [weighting(tau, step, power_function_exponent(s)) * root for step, s in zip(steps, stds, strict=True)]
    basis, wanted = np.stack(columns, 1), weighting(tau, 100, power_function_exponent(std)) * root
    free = np.linalg.lstsq(basis[:, :-1] - basis[:, -1:], wanted - basis[:, -1], rcond=None)[0]
    expected = np.append(free, 1 - free.sum())

    coefficients, misfit = fit_weighting(steps, stds, 100, std)
    np.testing.assert_allclose(coefficients, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert misfit == pytest.approx(np.linalg.norm(basis @ expected - wanted) / np.linalg.norm(wanted), rel=1e-4)


def test_more_snapshots_fit_better():
    """By about 1/n^2 in the norm, as the paper has 1/n^4 in its square."""
    misfits = []
    for number in (8, 16, 32, 64):
        steps = np.repeat(np.arange(1, number + 1) * 640 // number, 2)
        misfits.append(fit_weighting(steps, np.tile([0.05, 0.1], number), 640, 0.07)[1])
    np.testing.assert_allclose(np.divide(misfits[:-1], misfits[1:]), 4, rtol=0.25)


@pytest.mark.parametrize(
    "step, std, message",
    [
        (
            600,
            0.01,
            r"ema_std 0.01 at step 600 cannot be made of these 48 snapshots: .* off by 2\d.\d%, at most 5% may be",
        ),
        (600, 0.01, r"within reach at this step are 0.025 to 0.25$"),
        (25, 0.07, r"made of these 2 snapshots: .* 0.045 to 0.065, 0.08 to 0.11$"),
        (610, 0.1, "step must be that of a snapshot, such as 575 or 600, got 610"),
        (310, 0.1, "step must be that of a snapshot, such as 300 or 325, got 310"),
        (600, 0.3, r"ema_std must be in \(0, 0.28\], got 0.3"),
    ],
)
def test_what_the_snapshots_do_not_span_is_refused(run, step, std, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(list_snapshots(run[0]), step, std)


def test_a_run_without_snapshots_or_of_two_models_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no snapshots of averages: train with --ema_snapshot_steps"):
        reconstruct(list_snapshots(tmp_path), 1, 0.1)
    AverageSnapshots(nn.Linear(2, 2), (0.1,), tmp_path).write(10)
    AverageSnapshots(nn.Linear(2, 3), (0.05,), tmp_path).write(10)
    with pytest.raises(ValueError, match="std-0.10.safetensors is of another model than step-0000010-std-0.05"):
        reconstruct(list_snapshots(tmp_path), 10, 0.1)


def test_averages_of_a_bf16_model_are_float32_and_go_back_into_it(tmp_path):
    model = nn.Linear(3, 2, dtype=torch.bfloat16)
    snapshots = AverageSnapshots(model, (0.05, 0.1), tmp_path)
    for _ in range(3):
        snapshots.update(model)
    snapshots.write(3)
    own = model.weight.detach().clone()
    made, _ = reconstruct(list_snapshots(tmp_path), 3, 0.1)
    assert made["weight"].dtype == torch.float32
    torch.nn.init.zeros_(model.weight)
    load_averages(model, made)
    assert model.weight.dtype == torch.bfloat16 and torch.equal(model.weight, own)
    assert not is_of(nn.Linear(2, 3), made)
    with pytest.raises(ValueError, match="the averages are of another model"):
        load_averages(nn.Linear(2, 3), made)


def test_the_sampled_average_is_not_tracked_twice(tmp_path):
    model = nn.Linear(2, 2)
    sampled = WeightAverage(model, std=0.1)
    snapshots = AverageSnapshots(model, (0.05, 0.1), tmp_path, sampled)
    alone = WeightAverage(model, std=0.1)
    for _ in walk(model, 5):
        sampled.update(model)
        snapshots.update(model)
        alone.update(model)
    snapshots.write(5)
    written = load_file(tmp_path / "ema_snapshots" / "step-0000005-std-0.10.safetensors")
    assert all(torch.equal(written[name], value) for name, value in alone.averages().items())
    (tmp_path / "checkpoint").mkdir()
    snapshots.save(tmp_path / "checkpoint")
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["average-std-0.05.safetensors"]


def test_snapshots_after_the_step_a_run_goes_on_from_are_dropped(tmp_path):
    snapshots = AverageSnapshots(nn.Linear(2, 2), (0.05, 0.123456), tmp_path)
    for step in (10, 20, 30):
        snapshots.write(step)
    save_file({}, tmp_path / "ema_snapshots" / ".partial-step-0000040-std-0.05.safetensors")
    snapshots.drop_after(20)
    left = list_snapshots(tmp_path)
    assert [(snapshot.step, snapshot.std) for snapshot in left] == [
        (10, 0.05),
        (10, 0.123456),
        (20, 0.05),
        (20, 0.123456),
    ]
    assert sorted((tmp_path / "ema_snapshots").iterdir()) == sorted(snapshot.path for snapshot in left)


def test_a_snapshot_that_cannot_be_written_leaves_nothing(tmp_path):
    snapshots = AverageSnapshots(nn.Linear(2, 2), (0.05,), tmp_path)
    (tmp_path / "ema_snapshots").mkdir()
    (tmp_path / "ema_snapshots" / "step-0000010-std-0.05.safetensors").mkdir()  # in the way
    with pytest.raises(OSError, match="the snapshot .*step-0000010-std-0.05.safetensors could not be written"):
        snapshots.write(10)
    assert not list((tmp_path / "ema_snapshots").glob(".*"))


def test_a_resumed_run_leaves_the_snapshots_of_the_undisturbed_one_bit_for_bit(tmp_path):
    """Stopped at step 11: of the snapshots at 5 and 10 the checkpoint at 7 knows the first."""
    data = prepare_images("digits", max_samples=20)
    settings = {"checkpointing_steps": 7, "ema_snapshot_steps": 5, "ema_stds": (0.05, 0.12), "ema_std": 0.12}
    trainer(data, tmp_path / "whole", **settings).train()
    stop_before_step(trainer(data, tmp_path / "parts", **settings), 11)
    assert {snapshot.step for snapshot in list_snapshots(tmp_path / "parts")} == {5, 10}
    later = tmp_path / "parts" / "ema_snapshots" / "step-0000011-std-0.05.safetensors"
    save_file({}, later)
    trainer(data, tmp_path / "parts", resume_from_checkpoint="latest", **settings).train()

    assert_same_run(tmp_path / "whole", tmp_path / "parts", 12)
    assert "average-std-0.05.safetensors: num_updates" in saved(tmp_path / "whole", 12)[0]
    whole, parts = list_snapshots(tmp_path / "whole"), list_snapshots(tmp_path / "parts")
    names = [snapshot.path.name for snapshot in whole]
    assert [(snapshot.step, snapshot.std) for snapshot in whole] == [(n, s) for n in (5, 10, 12) for s in (0.05, 0.12)]
    assert [snapshot.path.name for snapshot in parts] == names
    for one, other in zip(whole, parts, strict=True):
        tensors, tensors_other = load_file(one.path), load_file(other.path)
        assert all(torch.equal(tensors[name], tensors_other[name]) for name in tensors), one


def test_a_run_that_starts_over_for_want_of_a_checkpoint_drops_all_snapshots(tmp_path):
    data = prepare_images("digits", max_samples=20)
    AverageSnapshots(nn.Linear(2, 2), (0.05,), tmp_path).write(4)
    run = trainer(data, tmp_path, resume_from_checkpoint="latest", max_train_steps=2, ema_snapshot_steps=2)
    run.train()
    assert {(snapshot.step, snapshot.std) for snapshot in list_snapshots(tmp_path)} == {(2, 0.05), (2, 0.1)}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ema_stds": (0.05,)}, "ema_stds has no meaning without ema_snapshot_steps"),
        ({"ema_stds": (0.05, 0.05), "ema_snapshot_steps": 5}, "ema_stds must be different widths, got 0.05 0.05"),
        ({"ema_stds": (0.05, 0.5), "ema_snapshot_steps": 5}, r"ema_std must be in \(0, 0.28\], got 0.5"),
        ({"ema_snapshot_steps": 0}, "ema_snapshot_steps must be at least 1, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(**settings)


def test_a_run_whose_snapshot_cannot_be_written_ends_with_the_reason(tmp_path):
    """A file lies where the folder of the snapshots should be."""
    run = trainer(prepare_images("digits", max_samples=20), tmp_path, ema_snapshot_steps=2)
    (tmp_path / "ema_snapshots").write_text("")
    with pytest.raises(OSError, match="the snapshot .*step-0000002-std-0.05.safetensors could not be written"):
        run.train()
