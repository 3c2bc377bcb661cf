import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.run import make_accelerator
from diffusers_ext.trainer.trackers import installed_trackers, tracker_names
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
