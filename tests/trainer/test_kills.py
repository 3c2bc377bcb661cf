"""Runs that are killed, or whose disk fills up, and what is left of them.

Each part of a run is a fork of this process, which has imported everything: so a restart costs milliseconds.
"""

import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
import torch

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer.checkpoints import (
    CheckpointError,
    find_checkpoint,
    find_fault,
    list_checkpoints,
    step_from_name,
)
from processes import fork
from runs import CountedError, assert_same_run, forget_accelerate, trainer


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the forks compute, see `conftest.py`: sums in several parts would be other ones in the last bit."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def data():
    data = prepare_images("digits", max_samples=20)
    data.pixels[[0]]  # maps the file, which the forks then share
    return data


def wait_for_its_work(child, seconds):
    """Until the process has computed for so long: by its own clock, which stands still while other processes run."""
    process = psutil.Process(child)
    while process.status() != psutil.STATUS_ZOMBIE and sum(process.cpu_times()[:2]) < seconds:
        time.sleep(0.001)


def on_each_call(note):
    """Calls `note` whenever this process calls or leaves a function, of Python or of C."""
    sys.setprofile(lambda frame, event, argument: note())


SETTINGS = {
    "max_train_steps": 60,
    "checkpointing_steps": 3,
    "checkpoints_keep_every": 15,
    "logging_steps": 2,
    "gradient_accumulation_steps": 2,
}


def go_on(data, folder, on_save=None, **settings):
    """Trains to the end, from the newest checkpoint if there is one. `on_save` is called with how many were written."""
    run = trainer(data, folder, CountedError(), resume_from_checkpoint="latest", **SETTINGS | settings)
    if on_save:
        save, numbers = run.save_checkpoint, itertools.count()

        def save_checkpoint():
            on_save(next(numbers))
            save()

        run.save_checkpoint = save_checkpoint
    run.train()


def calls_of_a_save(data, folder):
    run, number = trainer(data, folder, CountedError(), **SETTINGS | {"max_train_steps": 1}), itertools.count()
    save = run.save_checkpoint

    def save_checkpoint():
        on_each_call(lambda: next(number))
        save()
        sys.setprofile(None)

    run.save_checkpoint = save_checkpoint
    run.train()
    return next(number)


def test_a_run_that_is_killed_at_20_random_moments_is_the_undisturbed_one(data, tmp_path):
    """Half of the kills fall on random moments of the whole, half on random moments of a save."""
    start = time.process_time()
    go_on(data, tmp_path / "whole")
    seconds = time.process_time() - start
    forget_accelerate()
    calls = calls_of_a_save(data, tmp_path / "measured")
    forget_accelerate()

    def die_while_saving(generator):
        saves, left = generator.randrange(2), generator.randrange(1, calls)

        def on_save(number):
            if number == saves:
                on_each_call(lambda: next(countdown) or os.kill(os.getpid(), signal.SIGKILL))

        countdown = iter(range(left, -1, -1))
        go_on(data, tmp_path / "parts", on_save)

    torn, newest = 0, []
    for number in range(20):
        generator = random.Random(number)
        if number % 2:
            child = fork(lambda generator=generator: die_while_saving(generator))
        else:
            child = fork(lambda: go_on(data, tmp_path / "parts"))
            wait_for_its_work(child, generator.uniform(0, seconds / 15))  # so that 20 kills do not reach the end
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        torn += any((tmp_path / "parts").glob(".checkpoint-*"))
        newest.append(max(map(step_from_name, list_checkpoints(tmp_path / "parts")), default=0))
    assert newest == sorted(newest) and 0 < newest[-1] < 60
    assert torn >= 5, "too few kills fell into a save"
    assert os.waitpid(fork(lambda: go_on(data, tmp_path / "parts")), 0)[1] == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 60)
    for folder in ("whole", "parts"):
        assert [step_from_name(path) for path in list_checkpoints(tmp_path / folder)] == [15, 30, 45, 57, 60]


@contextmanager
def small_disk(folder, size):
    """A file system of so many bytes in memory, mounted at the folder."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_the_run_and_keeps_its_checkpoints(data, tmp_path):
    with small_disk(tmp_path / "disk", 160 * 1024) as disk:
        with pytest.raises(CheckpointError) as error:
            go_on(data, disk / "run", checkpoints_total_limit=None, max_train_steps=30)
        there = list_checkpoints(disk / "run")
        assert len(there) >= 2 and not any(map(find_fault, there))
        names = ", ".join(path.name for path in there)
        assert f"The checkpoints before it are kept: {names}. Where there is room" in str(error.value)
        assert "0.0 MB are free there" in str(error.value)
        forget_accelerate()
        shutil.copytree(disk / "run", tmp_path / "larger")
    go_on(data, tmp_path / "larger", max_train_steps=30)
    forget_accelerate()
    go_on(data, tmp_path / "whole", max_train_steps=30)
    assert_same_run(tmp_path / "whole", tmp_path / "larger", 30)


def test_files_that_cannot_grow_end_the_run_and_keep_its_checkpoints(data, tmp_path):
    """As on a full disk, which needs no mounting: from the third save on no file may have more than 4096 bytes."""

    def on_save(number):
        if number == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    def work():
        with pytest.raises(
            CheckpointError, match=r"checkpoint-9 could not be .* kept: checkpoint-3, checkpoint-6\. Where"
        ):
            go_on(data, tmp_path / "run", on_save, max_train_steps=30)

    assert os.waitpid(fork(work), 0)[1] == 0
    assert not list((tmp_path / "run").glob(".checkpoint-*"))
    assert find_checkpoint(tmp_path / "run", "latest") == (tmp_path / "run" / "checkpoint-6", [])
    go_on(data, tmp_path / "run", max_train_steps=30)
    forget_accelerate()
    go_on(data, tmp_path / "whole", max_train_steps=30)
    assert_same_run(tmp_path / "whole", tmp_path / "run", 30)
