"""Two runs in one folder, folders that nothing may be written to, disks without room, and clocks that jump."""

import os
import random
import resource
import signal
import time
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.atomic_files import LOCK, SAVED, SAVING, FolderInUse, finish_replacing, lock_folder, replace_files
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.evaluation.image_folder import is_image_folder
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.run import make_accelerator, open_run, save_atomically
from diffusers_ext.trainer.run_folder import check_output_dir, read_metrics
from every_write import finish, start
from runs import trainer
from tiny import tiny_unet


def held_by_another(folder):
    """A process that holds the folder until it is killed; its id."""
    reading, writing = os.pipe()

    def hold():
        with lock_folder(folder):
            os.write(writing, b"1")
            time.sleep(900)

    child = start(hold)
    assert os.read(reading, 1) == b"1"
    return child


def pipeline(bias):
    model = tiny_unet()
    model.conv_out.bias.data.fill_(bias)
    return GuidedDiffusionPipeline(model, ExtDDIMScheduler())


def claim(folder, **options):
    config = TrainerConfig(output_dir=str(folder), mixed_precision="no", max_train_steps=1, **options)
    with open_run(config, make_accelerator(config)) as open_folder:
        open_folder(config)
        assert (folder / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "run"
    child = held_by_another(folder)
    try:
        for options in ({}, {"overwrite_output_dir": True}):
            with pytest.raises(
                FolderInUse, match=rf"run is being written to by another run \(process {child} on .*\): "
            ):
                claim(folder, **options)
        (folder / SAVED).mkdir()
        finish_replacing(folder)  # as a reader does, who leaves it to the other
        assert (folder / SAVED).is_dir()
        with pytest.raises(FolderInUse):
            save_atomically(tiny_unet(), folder)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert (folder / LOCK).exists()  # of the one that is no more
    claim(folder)
    assert os.listdir(folder) == []


def test_a_folder_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyError), lock_folder(tmp_path):
        with lock_folder(tmp_path / "." / ""):  # of the same process, and the same folder
            pass
        assert (tmp_path / LOCK).exists()
        assert finish(start(lambda: lock_folder(tmp_path).__enter__())) == 1
        raise KeyError
    assert finish(start(lambda: lock_folder(tmp_path).__enter__())) == 0


def test_a_folder_that_nothing_may_be_written_to_is_refused_before_the_training(tmp_path):
    if os.getuid() == 0:  # to whom no folder of a disk is read-only
        folder = Path("/proc")
        if not folder.is_dir():
            pytest.skip("there is no folder that root may not write to")
    else:
        folder = tmp_path / "run"
        folder.mkdir(mode=0o555)
    for each in (folder, folder / "below"):
        with pytest.raises(OSError, match=rf"{each} cannot be written to \("):
            claim(each)


def test_a_save_without_room_leaves_the_old_pipeline(tmp_path):
    save_atomically(pipeline(1.0), tmp_path)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"could not be written to, and is as it was \("):
            save_atomically(pipeline(2.0), tmp_path)

    assert finish(start(work)) == 0
    weights = load_file(tmp_path / "denoiser" / "diffusion_pytorch_model.safetensors")
    assert weights["conv_out.bias"].item() == 1.0 and (tmp_path / "model_index.json").is_file()
    assert not list(tmp_path.glob(".*"))


def test_files_that_were_complete_when_the_process_was_killed_are_moved(tmp_path):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "train_config.yaml").touch()
    (tmp_path / SAVED / "part").mkdir(parents=True)
    (tmp_path / SAVED / "config.json").write_text("new")
    (tmp_path / f"{SAVING}ab" / "new").mkdir(parents=True)  # in which it was written
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "stale").touch()
    check_output_dir(TrainerConfig(output_dir=str(tmp_path), overwrite_output_dir=True))
    assert (tmp_path / "config.json").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["config.json", "part", "train_config.yaml"]
    assert os.listdir(tmp_path / "part") == []
    with pytest.raises(ValueError, match=r"features.json must be among"):
        replace_files(tmp_path, "features.json", lambda folder: None)


def test_whatever_loads_a_folder_finds_what_a_killed_process_had_saved_there(tmp_path):
    """By diffusers too, once this package is imported; and it is no folder of images, though it holds those of the pipeline."""
    loaders = {
        "DiffusionPipeline": lambda folder: DiffusionPipeline.from_pretrained(folder).denoiser,
        "UNetModel": lambda folder: UNetModel.from_pretrained(folder, subfolder="denoiser"),
        "images": lambda folder: (
            is_image_folder(str(folder)) or UNetModel.from_pretrained(folder, subfolder="denoiser")
        ),
    }
    for name, load in loaders.items():
        folder = tmp_path / name
        pipeline(2.0).save_pretrained(folder / SAVED)
        Image.new("L", (8, 8)).save(folder / "samples.png")
        assert load(folder).conv_out.bias.item() == 2.0, name
        assert not list(folder.glob(".*"))


def test_a_clock_that_jumps_changes_no_budget_and_no_log(tmp_path, monkeypatch):
    jumps, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + jumps.uniform(-1e6, 1e6))
    start_of_it = time.monotonic()
    data = prepare_images("digits", max_samples=20)
    run = trainer(data, tmp_path, max_train_steps=None, max_train_time="1", logging_steps=1, checkpointing_steps=10**6)
    run.train()
    seconds = [record["seconds"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert seconds == sorted(seconds) and 0 <= seconds[0]
    assert 1 <= run.state.seconds <= time.monotonic() - start_of_it
