import io

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.run import make_accelerator
from diffusers_ext.trainer.trackers import installed_trackers, log_picture, log_saved_pictures, tracker_names
from runs import forget_accelerate
from training.train_ddpm import TrainConfig, main


INSTALLED = [str(name) for name in get_available_trackers()]
MISSING = [str(name) for name in LOGGER_TYPE_TO_CLASS if str(name) not in INSTALLED]


@pytest.mark.parametrize(
    "report_to, names",
    [
        (None, []),
        ("tensorboard", ["tensorboard"]),
        ("all", ["all"]),
        ("wandb, tensorboard,wandb", ["wandb", "tensorboard"]),
    ],
)
def test_trackers_are_named_with_commas_between(report_to, names):
    assert tracker_names(report_to) == names
    TrainerConfig(report_to=report_to)


@pytest.mark.parametrize(
    "report_to, message",
    [
        ("tensorbord", "report_to must be of aim, .*, or all, got 'tensorbord'"),
        ("tensorboard,mine", "or all, got 'mine'"),
        ("", "got ''"),
        ("all,tensorboard", "report_to all stands for all trackers, so it stands alone"),
    ],
)
def test_unknown_trackers_are_refused_by_the_config(report_to, message):
    with pytest.raises(ValueError, match=message):
        TrainerConfig(report_to=report_to)


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="takes tensorboard")
def test_all_are_those_that_are_installed(tmp_path):
    assert installed_trackers("all") == INSTALLED and installed_trackers("tensorboard") == ["tensorboard"]
    accelerator = make_accelerator(TrainerConfig(report_to="tensorboard", output_dir=str(tmp_path)))
    assert [str(name) for name in accelerator.log_with] == ["tensorboard"]


@pytest.mark.skipif(not MISSING, reason="all trackers are installed")
@pytest.mark.parametrize("more", ["", "tensorboard,"])
def test_a_tracker_that_is_not_installed_ends_the_script_before_the_data_are_read(tmp_path, more):
    config = TrainConfig(report_to=more + MISSING[0], dataset_name="no/such/data", output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=f"needs what is not installed: pip install .*{MISSING[0]}, or leave it out"):
        main(config)
    assert not (tmp_path / "run").exists()


PICTURE = Image.new("LA", (6, 4), (200, 255))


def tracking(name, tmp_path):
    forget_accelerate()
    accelerator = make_accelerator(TrainerConfig(report_to=name, output_dir=str(tmp_path), mixed_precision="no"))
    accelerator.init_trackers("pictures")
    return accelerator


@pytest.mark.skipif("tensorboard" not in INSTALLED, reason="takes tensorboard")
def test_tensorboard_gets_pictures_with_their_captions(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = tracking("tensorboard", tmp_path)
    Image.new("RGBA", (6, 4), (0, 0, 0, 55)).save(tmp_path / "loss.png")  # as matplotlib writes, on white 200
    log_picture(accelerator, "samples", PICTURE, 7, "a row each of cat, dog")
    log_picture(accelerator, "samples", None, 7, "of a process that has none")
    log_saved_pictures(accelerator, tmp_path, {"loss.png": "the loss", "missing.png": "nothing"}, 8)
    accelerator.end_training()
    events = EventAccumulator(str(next(tmp_path.rglob("events.out*")).parent)).Reload()
    for name, step, caption in (("samples", 7, b"a row each of cat, dog"), ("loss", 8, b"the loss")):
        (image,), (text,) = events.Images(name), events.Tensors(f"{name}/caption/text_summary")
        assert (image.step, image.width, image.height) == (step, 6, 4)
        assert text.step == step and text.tensor_proto.string_val == [caption]
        shown = Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")
        assert shown.getpixel((0, 0)) == (200, 200, 200)


@pytest.mark.skipif("wandb" not in INSTALLED, reason="takes wandb")
def test_wandb_gets_pictures_with_their_captions(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    accelerator = tracking("wandb", tmp_path)
    log_picture(accelerator, "samples", PICTURE, 7, "a row each of cat, dog")
    accelerator.end_training()
    assert [Image.open(path).size for path in tmp_path.rglob("samples_*.png")] == [(6, 4)]
    wandb.teardown()  # ends the process that writes the log
    (log,) = tmp_path.rglob("run-*.wandb")
    assert b"a row each of cat, dog" in log.read_bytes()


@pytest.mark.skipif("trackio" not in INSTALLED, reason="takes trackio")
def test_trackio_takes_pictures_with_their_captions(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    accelerator = tracking("trackio", tmp_path)
    log_picture(accelerator, "samples", PICTURE, 7, "a row each of cat, dog")
    accelerator.end_training()
    assert [Image.open(path).size for path in tmp_path.rglob("*.png")] == [(6, 4)]
