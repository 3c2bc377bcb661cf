"""How close pairs of images are: pixel measures over many images, and LPIPS by the network that is given."""

import importlib.util

import numpy as np
import pytest
import torch

from diffusers_ext.evaluation import conditioned
from diffusers_ext.evaluation.perceptual_distance import PerceptualDistance, load_distance, load_lpips
from diffusers_ext.evaluation.report import describe_conditioned, figures_of_conditioned
from diffusers_ext.metrics.reconstruction import multi_scale_ssim, ssim


class Brightness(torch.nn.Module):
    """The difference of the means of RGB images in [-1, 1], shaped as the package lpips shapes distances."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x, y):
        assert x.shape[1] == 3 and x.min() >= -1 and x.max() <= 1
        return (x - y).mean((2, 3)).abs().matmul(self.weight).view(-1, 1, 1, 1) / 3


def draw(number, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (number, channels, 12, 12), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_the_network_s_distance_of_each_pair(channels):
    x, y = draw(9, channels), draw(9, channels, seed=1)
    distance = PerceptualDistance("brightness", Brightness())
    expected = np.abs((x.double() - y.double()).mean((2, 3)).numpy()).mean(1) / 127.5
    assert distance.measure(x, y, batch_size=4).tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert not distance.measure(x, x).any()


def test_pairs_are_measured_over_all_images(monkeypatch):
    monkeypatch.setattr(conditioned, "AT_ONCE", 4)  # of 9, so that the last part is smaller
    x, y = draw(9), draw(9, seed=1)
    measured = conditioned.closeness(x, y, PerceptualDistance("brightness", Brightness()))
    error = ((x.double() - y.double()) ** 2).mean().item()
    assert measured["rmse"] == pytest.approx(error**0.5) and measured["psnr"] == pytest.approx(
        10 * np.log10(255**2 / error)
    )
    assert measured["ssim"] == pytest.approx(ssim(x / 255, y / 255).mean().item())
    assert measured["ms_ssim"] == pytest.approx(multi_scale_ssim(x / 255, y / 255).mean().item())
    assert measured["lpips"] == pytest.approx(
        ((x.double() - y.double()).mean((1, 2, 3)).abs() / 127.5).mean().item(), abs=1e-6
    )
    equal = conditioned.closeness(x, x)
    assert equal["rmse"] == 0 and equal["psnr"] == float("inf") and "lpips" not in equal


def test_they_are_named_with_their_network():
    measures = {"condition": "a mask", "held_out": True, "num_images": 8, "lpips_network": "alex"}
    measures |= {"rmse": 12.5, "psnr": 26.2, "ssim": 0.8, "ms_ssim": 0.9, "lpips": 0.125}
    assert "RMSE 12.5, PSNR in dB 26.2, SSIM 0.8, MS-SSIM 0.9, LPIPS 0.125;" in describe_conditioned(measures)
    figures = figures_of_conditioned(measures, "DDIM", {"num_inference_steps": 5}, "digits", "command")
    assert len(figures) == 5 and figures[-1].metric.startswith("LPIPS by alex to held-out images of digits")


def test_what_it_does_not_take_is_refused():
    distance = PerceptualDistance("alex", Brightness(), smallest=31)
    for shape in ((4, 32, 32), (3, 32, 30), (3, 40)):
        with pytest.raises(ValueError, match="images of 1 or 3 channels and at least 31 pixels a side, got"):
            distance.check(shape)
    with pytest.raises(ValueError, match="lpips must be one of alex, vgg, squeeze, got 'dino'"):
        load_lpips("dino")
    assert load_distance(None, (9, 9), None) is None
    if importlib.util.find_spec("lpips") is None:
        with pytest.raises(ValueError, match=r"LPIPS needs the package lpips.*pip install 'diffusers_ext\[lpips\]'"):
            load_lpips("alex")


@pytest.mark.parametrize(
    "name, file", [("alex", "alexnet-owt-7be5be79.pth"), ("squeeze", "squeezenet1_1-b8a52dc0.pth")]
)
def test_weights_that_are_in_the_cache_of_torch_are_taken(name, file, tmp_path, monkeypatch):
    """By the package itself, of a file with weights as torchvision names it; those of the layers are the package's."""
    pytest.importorskip("lpips", exc_type=Exception)
    from torchvision import models

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    trunk = {"alex": models.alexnet, "squeeze": models.squeezenet1_1}[name](weights=None)
    torch.save(trunk.state_dict(), tmp_path / "hub/checkpoints" / file)
    distance = load_lpips(name)
    assert torch.equal(distance.network.net.slice1[0].weight, trunk.features[0].weight)
    x = torch.randint(256, (2, 1, 40, 40)).to(torch.uint8)
    assert not distance.measure(x, x).any() and (distance.measure(x, 255 - x) > 0).all()
