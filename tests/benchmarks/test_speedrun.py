"""The script's rows are recipes that train_ddpm.py takes, and its table says what was measured."""

from types import SimpleNamespace

import pytest
import torch

from diffusers_ext.commands.train_ddpm import TrainConfig
from diffusers_ext.options import parse_config


@pytest.fixture(scope="module")
def speedrun(script):
    return script("speedrun")


def test_each_row_is_a_recipe_that_differs_from_the_base(speedrun):
    configs = {
        name: parse_config(TrainConfig, ["--model", "dit", *speedrun.options_of(name)]) for name in speedrun.ROWS
    }
    base = configs.pop("base")
    assert all(config != base for config in configs.values())


def test_the_table_has_the_nearest_first_beside_the_base(speedrun):
    def of(*distances):
        return {
            str(seed): {"distance": {"1.0": value, "1.5": value / 2}, "steps": 100 + seed, "seconds": 240.2}
            for seed, value in enumerate(distances)
        }

    arguments = SimpleNamespace(rows=["base", "cosine", "batch_16"], scales=["1.0", "1.5"])
    results = {"base": of(10.0, 12.0), "cosine": of(6.0, 5.0), "batch_16": of(22.0), "flip": of(1.0)}
    rows = speedrun.table(results, arguments).splitlines()
    assert rows[2:] == [
        "| cosine | `--path cosine` | 100, 101 | 240, 240 | 6, 5 | 3, 2.5 | 0.50 |",
        "| base | `--path linear --optimizer muon` | 100, 101 | 240, 240 | 10, 12 | 5, 6 | 1.00 |",
        "| batch_16 | `--train_batch_size 16` | 100 | 240 | 22 | 11 | 2.00 |",
    ]


def test_each_row_of_the_picture_is_a_recipe(speedrun):
    pictures = {name: torch.full((3, 1, 2, 4), value, dtype=torch.uint8) for name, value in (("base", 7), ("rope", 9))}
    whole = speedrun.rows_image(pictures)
    assert whole.size == (12, 4) and whole.getpixel((11, 1)) == 7 and whole.getpixel((0, 2)) == 9
