import json
import re

import pytest
import torch
from accelerate import Accelerator

from diffusers_ext.trainer.checkpoints import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    remove_old,
    write_checkpoint,
)


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def write(accelerator, output_dir, *steps):
    def save(folder):
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_bytes(bytes(range(256)) * 4)
        (folder / "state.json").write_text("{}")

    for step in steps:
        write_checkpoint(accelerator, output_dir, step, save)


def test_latest_is_the_newest_by_number(accelerator, tmp_path):
    write(accelerator, tmp_path, 9, 100, 20)
    assert find_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-100", [])
    assert find_checkpoint(tmp_path, "checkpoint-9")[0] == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-20"))[0] == tmp_path / "checkpoint-20"
    assert find_checkpoint(tmp_path / "nowhere", "latest") == (None, [])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "part/weights is missing": lambda path: (path / "part" / "weights").unlink(),
    "part/weights has 1000 bytes, not 1024": lambda path: (path / "part" / "weights").write_bytes(bytes(1000)),
    "the contents of part/weights have changed": lambda path: flip_a_bit(path / "part" / "weights"),
    "it has no manifest.json": lambda path: (path / "manifest.json").unlink(),
    "its manifest.json cannot be read": lambda path: (path / "manifest.json").write_text('{"step": 3'),
}


@pytest.mark.parametrize("reason", DAMAGES)
def test_latest_passes_over_a_damaged_checkpoint_and_says_why(accelerator, tmp_path, reason):
    write(accelerator, tmp_path, 10, 20)
    DAMAGES[reason](tmp_path / "checkpoint-20")
    found, passed_over = find_checkpoint(tmp_path, "latest")
    assert found == tmp_path / "checkpoint-10"
    assert passed_over == [f"{tmp_path / 'checkpoint-20'} passed over: {reason}"]
    with pytest.raises(CheckpointError, match=f"checkpoint-20 is not complete: {reason}"):
        find_checkpoint(tmp_path, "checkpoint-20")
    DAMAGES[reason](tmp_path / "checkpoint-10")
    with pytest.raises(CheckpointError, match=f"no checkpoint in .* is complete: .*{reason}.*{reason}"):
        find_checkpoint(tmp_path, "latest")


def test_a_checkpoint_that_is_not_there_names_those_that_are(accelerator, tmp_path):
    write(accelerator, tmp_path, 10, 20)
    with pytest.raises(CheckpointError, match="no checkpoint checkpoint-30; .* holds: checkpoint-10, checkpoint-20"):
        find_checkpoint(tmp_path, "checkpoint-30")


@pytest.mark.parametrize(
    "write_all",
    [
        lambda file, data: file.write_bytes(data),
        lambda file, data: torch.save(torch.frombuffer(data, dtype=torch.uint8), file),
    ],
    ids=["plain", "torch"],
)
def test_a_save_on_a_full_disk_leaves_nothing_and_harms_nothing(accelerator, tmp_path, write_all):
    """/dev/full answers each write with the error of a full disk, which every library reports in its own way."""
    write(accelerator, tmp_path, 10, 15)

    def save(folder):
        (folder / "first").write_bytes(bytes(1000))
        (folder / "weights").symlink_to("/dev/full")
        write_all(folder / "weights", bytearray(100_000))

    with pytest.raises(CheckpointError) as error:
        write_checkpoint(accelerator, tmp_path, 20, save)
    assert re.search(r"checkpoint-20 could not be written .* MB are free there\)", str(error.value))
    assert "The checkpoints before it are kept: checkpoint-10, checkpoint-15. Where there is room" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-15"]
    assert find_checkpoint(tmp_path, "latest")[0] == tmp_path / "checkpoint-15"


def test_what_an_interrupted_save_leaves_is_no_checkpoint(accelerator, tmp_path):
    write(accelerator, tmp_path, 10)
    (tmp_path / ".checkpoint-20.partial").mkdir()
    (tmp_path / ".checkpoint-20.partial" / "weights").write_bytes(b"x")
    assert find_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-10", [])
    write(accelerator, tmp_path, 20)
    assert find_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-20", [])


def test_writing_a_step_again_replaces_it(accelerator, tmp_path):
    write(accelerator, tmp_path, 10, 10)
    assert find_checkpoint(tmp_path, "latest") == (tmp_path / "checkpoint-10", [])
    assert json.loads((tmp_path / "checkpoint-10" / "manifest.json").read_text())["step"] == 10


@pytest.mark.parametrize(
    "limit, keep_every, kept",
    [
        (1, None, [60]),
        (2, None, [50, 60]),
        (9, None, [10, 20, 30, 40, 50, 60]),
        (None, None, [10, 20, 30, 40, 50, 60]),
        (2, 30, [30, 50, 60]),
        (1, 20, [20, 40, 60]),
        (1, 15, [30, 60]),
    ],
)
def test_the_last_and_every_so_many_are_kept(accelerator, tmp_path, limit, keep_every, kept):
    write(accelerator, tmp_path, 10, 20, 30, 40, 50, 60)
    (tmp_path / ".checkpoint-5.partial").mkdir()
    remove_old(tmp_path, 60, limit=limit, keep_every=keep_every)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
    assert not list(tmp_path.glob(".checkpoint-*"))


def test_a_run_that_went_back_keeps_its_own_checkpoints_and_not_those_beyond(accelerator, tmp_path):
    write(accelerator, tmp_path, 10, 20, 30, 15)
    remove_old(tmp_path, 15, limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-15"]
