import json

import pytest
from accelerate import Accelerator

from diffusers_ext.trainer.checkpoints import (
    CheckpointError,
    find_checkpoint,
    keep_last,
    list_checkpoints,
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
    with pytest.raises(CheckpointError, match=f"checkpoint-20 is not whole: {reason}"):
        find_checkpoint(tmp_path, "checkpoint-20")
    DAMAGES[reason](tmp_path / "checkpoint-10")
    with pytest.raises(CheckpointError, match=f"no checkpoint in .* is whole: .*{reason}.*{reason}"):
        find_checkpoint(tmp_path, "latest")


def test_a_checkpoint_that_is_not_there_names_those_that_are(accelerator, tmp_path):
    write(accelerator, tmp_path, 10, 20)
    with pytest.raises(CheckpointError, match="no checkpoint checkpoint-30; .* holds: checkpoint-10, checkpoint-20"):
        find_checkpoint(tmp_path, "checkpoint-30")


def test_a_save_that_fails_leaves_nothing_and_harms_nothing(accelerator, tmp_path):
    write(accelerator, tmp_path, 10)

    def save(folder):
        (folder / "weights").write_bytes(bytes(1000))
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="checkpoint-20 could not be written .*No space left.* are untouched"):
        write_checkpoint(accelerator, tmp_path, 20, save)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert find_checkpoint(tmp_path, "latest")[0] == tmp_path / "checkpoint-10"


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


@pytest.mark.parametrize("limit, kept", [(1, [30]), (2, [20, 30]), (5, [10, 20, 30]), (None, [10, 20, 30])])
def test_the_last_are_kept(accelerator, tmp_path, limit, kept):
    write(accelerator, tmp_path, 10, 20, 30)
    (tmp_path / ".checkpoint-5.partial").mkdir()
    keep_last(tmp_path, limit)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
    assert not list(tmp_path.glob(".checkpoint-*"))
