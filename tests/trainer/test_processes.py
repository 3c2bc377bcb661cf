"""Two processes, joined by gloo, against one: one start for all of it."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext.trainer.checkpoints import find_checkpoint
from processes import in_ranks
from runs import assert_same_run, forget_accelerate, metrics, saved


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    """The folders of what two_processes.py does in one process, which is this one, and in two."""
    folder = tmp_path_factory.mktemp("processes")
    sys.path.insert(0, str(HERE))
    import two_processes

    in_ranks(lambda: two_processes.run_all(folder / "two"))
    forget_accelerate()
    two_processes.main(folder / "one", resume=False)
    forget_accelerate()
    return folder / "one", folder / "two"


def test_two_processes_with_half_the_batch_each_make_the_run_of_one(one_and_two):
    """Weights, averages, optimizers, objective and adversary; float32 sums in another order, hence the tolerance."""
    one, two = (saved(folder / "whole", 12) for folder in one_and_two)
    assert one[0].keys() == two[0].keys()
    for name in one[0]:
        torch.testing.assert_close(
            one[0][name], two[0][name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert one[1]["position"] == two[1]["position"] == 12 * 8
    logs = [metrics(folder / "whole") for folder in one_and_two]
    for mine, theirs in zip(*logs, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_muon_makes_the_run_of_one_too(one_and_two):
    """Each process makes the averaged gradients orthogonal; that raises what their sums differ by."""
    one, two = (saved(folder / "muon", 6) for folder in one_and_two)
    assert one[0].keys() == two[0].keys() and sum("momentum_buffer" in name for name in one[0]) == 1
    for name in one[0]:
        torch.testing.assert_close(one[0][name], two[0][name], rtol=1e-2, atol=1e-4)


def test_the_loss_on_held_out_images_is_that_of_one_process(one_and_two):
    """11 images in batches of 4, or of 2 in two processes, of which the one has one batch more."""
    one, two = (
        {record["step"]: record["val_loss"] for record in metrics(folder / "whole") if "val_loss" in record}
        for folder in one_and_two
    )
    assert sorted(one) == [4, 8, 12] and one == pytest.approx(two, rel=1e-5)


def test_the_loss_on_held_out_images_counts_a_process_that_has_none(one_and_two):
    one, two = one_and_two
    loss = float((one / "few-0.txt").read_text())
    assert loss > 0
    for index in (0, 1):
        assert float((two / f"few-{index}.txt").read_text()) == pytest.approx(loss, rel=1e-6)


def test_one_process_checks_the_checkpoint_for_both(one_and_two):
    """To which it opens the manifest, that nothing else reads."""
    first, second = ((one_and_two[1] / f"manifests-{index}.txt").read_text().split() for index in (0, 1))
    assert first[0].endswith("parts/checkpoint-7/manifest.json") and second == []


def test_a_checkpoint_that_one_process_does_not_find_ends_both(one_and_two):
    folder = one_and_two[1] / "failed"
    for index in (0, 1):
        missing = (folder / f"missing-{index}.txt").read_text()
        assert missing == f"there is no checkpoint checkpoint-5; {folder} holds: checkpoint-3"
        unseen = (folder / f"unseen-{index}.txt").read_text()
        assert "process 1: FileNotFoundError: checkpoint-3, which the main process sees, is not seen here" in unseen


def test_a_run_of_two_processes_resumes_bit_for_bit(one_and_two):
    """In the middle of an epoch, with dropout, accumulation, workers before and none after, objective and adversary."""
    _, two = one_and_two
    assert_same_run(two / "undisturbed", two / "parts", 12)
    for index in (0, 1):
        states = [
            torch.load(two / run / "checkpoint-12" / f"random_states_{index}.pkl", weights_only=False)
            for run in ("undisturbed", "parts")
        ]
        assert torch.equal(*(state["torch_manual_seed"] for state in states))
    assert not torch.equal(
        *(
            torch.load(two / "parts" / "checkpoint-12" / f"random_states_{index}.pkl", weights_only=False)[
                "torch_manual_seed"
            ]
            for index in (0, 1)
        )
    )


def test_the_learning_rate_of_two_processes_ends_where_it_should(one_and_two):
    rates = [record["learning_rate"] for record in metrics(one_and_two[1] / "whole")]
    cosine = [0.005 * (1 + math.cos(math.pi * (step - 2) / 10)) for step in range(2, 12)]
    assert rates == pytest.approx([0.005, 0.01, *cosine])


def test_processes_whose_clocks_differ_keep_the_same_weights_in_a_run_by_time(one_and_two):
    """Also right after a checkpoint, where each of them looks at its clock."""
    first, second = (load_file(one_and_two[1] / f"by-time-{index}.safetensors") for index in (0, 1))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def spread(folder, name="spread"):
    """The weights of a run, of which FSDP2 keeps a file of its own, and their averages."""
    checkpoint = folder / name / "checkpoint-12"
    if (checkpoint / "model.safetensors").exists():
        model = load_file(checkpoint / "model.safetensors")
    else:
        model = torch.load(checkpoint / "pytorch_model_fsdp.bin", weights_only=True)
    return model | {f"average {name}": value for name, value in load_file(checkpoint / "average.safetensors").items()}


def test_parameters_spread_over_two_processes_learn_what_those_of_one_do(one_and_two):
    one, two = map(spread, one_and_two)
    assert one.keys() == two.keys() and len(one) == 9
    assert not (one_and_two[1] / "spread" / "checkpoint-12" / "model.safetensors").exists()
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for mine, theirs in zip(*(metrics(folder / "spread") for folder in one_and_two), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_a_run_with_spread_parameters_resumes_bit_for_bit(one_and_two):
    _, two = one_and_two
    whole, parts = spread(two), spread(two, "spread-parts")
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name
    assert metrics(two / "spread") == metrics(two / "spread-parts")
    optimizers = [
        torch.load(two / name / "checkpoint-12" / "optimizer.bin", weights_only=True)["state"]
        for name in ("spread", "spread-parts")
    ]
    assert optimizers[0].keys() == optimizers[1].keys() and len(optimizers[0]) == 4
    for name, state in optimizers[0].items():
        assert all(torch.equal(value, optimizers[1][name][key]) for key, value in state.items())


@pytest.mark.parametrize("with_labels", [False, True])
def test_sample_grids_are_shared_and_are_those_of_one_process(one_and_two, with_labels):
    one, two = (np.asarray(Image.open(folder / f"samples-{with_labels}.png")).astype(int) for folder in one_and_two)
    assert one.shape == two.shape and abs(one - two).max() <= 1
    assert len(np.unique(one)) > 20


def test_a_process_that_cannot_write_ends_all_of_them(one_and_two):
    folder = one_and_two[1] / "failed"
    for index in (0, 1):
        end = (folder / f"end-{index}.txt").read_text()
        assert "checkpoint-6 could not be written" in end and "process 1: OSError: [Errno 28] No space left" in end
        assert "kept: checkpoint-3." in end
    assert find_checkpoint(folder, "latest") == (folder / "checkpoint-3", [])
    assert not list(folder.glob(".checkpoint-*"))
