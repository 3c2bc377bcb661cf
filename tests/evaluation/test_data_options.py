"""The options of the data in scripts that measure are those of training, each of them open."""

import dataclasses

import pytest

from diffusers_ext.data.config import DataConfig
from diffusers_ext.evaluation.options import DataOptions, left_open, take_options_of_run
from diffusers_ext.options import parse_config, to_command


OPEN = {field.name: field for field in dataclasses.fields(DataOptions)}


def test_every_option_of_the_data_is_there_and_open_but_those_of_training_alone():
    of_training = {field.name for field in dataclasses.fields(DataConfig)}
    assert of_training - OPEN.keys() == {"unconditional", "random_flip"}
    assert OPEN.keys() - of_training == {"held_out_split"}
    assert all(field.default is None for field in OPEN.values())
    for field in dataclasses.fields(left_open(DataConfig)):
        (given,) = [each for each in dataclasses.fields(DataConfig) if each.name == field.name]
        assert field.metadata["help"].startswith(given.metadata["help"])
        assert ("if left open" in field.metadata["help"]) == (given.default is not None)


def test_what_is_left_open_is_as_training_has_it():
    assert DataOptions().for_data() == DataConfig()
    words = ["--resolution", "12", "8", "--pad_value", "0", "--label_names", "a", "b", "--max_bad_share", "0.5"]
    options = parse_config(DataOptions, words)
    assert options.for_data() == DataConfig(resolution=(12, 8), label_names=("a", "b"), max_bad_share=0.5)
    assert options.pad_value == 0 and options.white_value is None
    assert to_command(options, "evaluate.py", launcher="python").startswith(
        "python evaluate.py --label_names a b --resolution 12 8"
    )


def test_options_contradict_one_another_as_in_training(capsys):
    with pytest.raises(ValueError, match="num_classes must be the number of label_names, got 3 and 2"):
        DataOptions(num_classes=3, label_names=("a", "b"))
    with pytest.raises(SystemExit):
        parse_config(DataOptions, ["--resize_mode", "random_crop"])  # images that are measured are the same each time
    assert "invalid choice: 'random_crop'" in capsys.readouterr().err


def test_a_given_option_wins_over_the_run_even_where_it_is_the_default(tmp_path):
    saved = "dataset_name: digits\nresolution: [8, 8]\npad_value: 9\ndataset_split: train[:90%]\nunconditional: true\n"
    saved += "preprocessing_num_workers: 64\n"  # of the machine that trained
    (tmp_path / "train_config.yaml").write_text(saved)
    config = take_options_of_run(DataOptions(pad_value=0), tmp_path).for_data()
    assert config == DataConfig(dataset_name="digits", resolution=(8, 8), dataset_split="train[:90%]")
    other = take_options_of_run(DataOptions(dataset_name="others"), tmp_path).for_data()
    assert other == DataConfig(dataset_name="others")  # another data set, prepared by options of its own
