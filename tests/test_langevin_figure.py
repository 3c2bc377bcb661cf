"""The walk-through of Langevin dynamics and the weights of modes, small."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffusers_ext.diffusion.noising import NoiseLevel


SCRIPT = Path(__file__).parents[1] / "docs" / "figures" / "make_langevin.py"


@pytest.fixture(scope="module")
def walkthrough():
    spec = importlib.util.spec_from_file_location("make_langevin", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_langevin_gets_the_weights_wrong_and_the_others_get_them_right(walkthrough, tmp_path):
    """The weight of the smaller mode is 0.2; 1000 samples know it to 0.013."""
    results = walkthrough.sample_all(num_samples=1000, num_calls=400)
    assert {result.num_calls for result in results.values()} == {0, 400}
    assert results["Langevin"].weight == pytest.approx(0.5, abs=0.06)
    assert results["annealed Langevin"].weight == pytest.approx(0.2, abs=0.09)
    assert results["reverse SDE"].weight == pytest.approx(0.2, abs=0.05)
    for result in results.values():
        assert result.std == pytest.approx(1.0, abs=0.15)
    assert f"| Langevin | 400 | {results['Langevin'].weight:.3f} |" in walkthrough.table_of(results)
    walkthrough.draw(results, str(tmp_path / "langevin.png"))
    picture = Image.open(tmp_path / "langevin.png")
    assert picture.size[0] > 900 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_the_score_is_the_gradient_of_the_log_density(walkthrough):
    level = NoiseLevel(0.6, 1.5)
    x = torch.tensor([[-1.0, 0.5], [2.0, 3.0]], dtype=torch.float64).requires_grad_()
    away = (x[:, None] - 0.6 * walkthrough.MEANS).square().sum(2) / (2 * (0.6**2 + 1.5**2))
    (expected,) = torch.autograd.grad((walkthrough.WEIGHTS * (-away).exp()).sum(1).log().sum(), x)
    torch.testing.assert_close(walkthrough.score(x.detach(), level), expected, rtol=1e-5, atol=1e-6)
