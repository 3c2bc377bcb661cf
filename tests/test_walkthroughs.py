"""The walk-throughs of the documents: each script runs, small, and the code that its page shows is of the script.

That of Langevin dynamics is in `tests/test_langevin_figure.py`.
"""

import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import torch
from PIL import Image


FOLDER = Path(__file__).parents[1] / "docs" / "walkthroughs"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def has_a_picture(path):
    picture = Image.open(path)
    return min(picture.size) > 150 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_code_of_a_page_is_of_its_script(name):
    script = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    page = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert blocks and all(block in script or textwrap.indent(block, " " * 4) in script for block in blocks)
    assert f"docs/walkthroughs/{name}.py" in page and "](../figures/" in page


def test_the_moons_come_nearer_by_training(tmp_path, capsys):
    moons = load("two_moons")
    network = moons.Denoiser(width=32)
    before = moons.measure(network, (10,), num_samples=300)
    losses = moons.train(network, num_steps=150, batch_size=128)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert moons.energy_distance(line, line + torch.tensor([0.0, 10.0])) == pytest.approx(2 * (10 + 101**0.5) / 2 - 2)
    distances = moons.measure(network, (5, 10), num_samples=300)
    assert all(distances[name][1] < before[name][0] / 2 for name in ("DDPM", "DDIM"))
    assert moons.table_of(distances, (5, 10)).count("\n") == 3
    moons.draw(network, str(tmp_path / "moons.png"), num_steps=20, num_samples=100)
    assert has_a_picture(tmp_path / "moons.png")


def test_guidance_moves_samples_further_than_the_sharpened_law(tmp_path):
    guidance = load("guidance")
    plain, *_, strong, middle = guidance.guide_all(num_samples=1000, num_steps=50)
    assert guidance.moments_of_tilted(1.0) == pytest.approx((1.0, 0.8), abs=1e-3)
    x = plain.samples[:, 0]
    assert (x.mean(), x.std()) == (pytest.approx(1.0, abs=0.1), pytest.approx(0.8, abs=0.06))
    assert (plain.num_calls, strong.num_calls, middle.num_calls) == (50, 100, 80)
    assert plain.label_share < 0.93 < 0.99 < strong.label_share
    assert strong.samples[:, 0].mean() > guidance.moments_of_tilted(8.0)[0]
    assert guidance.table_of([plain, middle]).count("\n") == 3
    guidance.draw([plain, middle], str(tmp_path / "guidance.png"))
    assert has_a_picture(tmp_path / "guidance.png")


def test_the_plane_of_an_autoencoder_is_drawn(tmp_path, capsys):
    load("vae").main(str(tmp_path / "vae"), str(tmp_path / "plane.png"), num_steps=20)
    assert has_a_picture(tmp_path / "plane.png") and "rate " in capsys.readouterr().out


def test_digits_are_trained_and_looked_at(tmp_path):
    digits = load("digits")
    pipe = digits.train_digits(str(tmp_path / "run"), max_train_steps=1, hidden_size=16, num_inference_steps=1)
    pipe.set_progress_bar_config(disable=True)
    rows = digits.compare(pipe, columns=3, steps=(1, 2))
    assert [len(row) for row in rows.values()] == [3] * 4
    assert "| DDIM, 2 steps | 0.000 |" in digits.table_of(rows) and "| DDIM, 1 step | 0.000 |" not in digits.table_of(
        rows
    )
