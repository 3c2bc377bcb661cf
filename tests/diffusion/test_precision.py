"""Devices without float64, which is what `FakeTensorMode` makes of MPS here: it knows devices and dtypes, and no values."""

import ast
import re
from pathlib import Path

import pytest
import torch
from diffusers.utils import torch_utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import diffusers_ext
from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.diffusion.paths import ContinuousTime
from diffusers_ext.diffusion.precision import to_float64
from diffusers_ext.machine import WITHOUT_FLOAT64, widest_float
from diffusers_ext.metrics.reconstruction import psnr, ssim
from diffusers_ext.models.vae_likelihood import DiagonalGaussian, estimate_likelihood, log_likelihood


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 on MPS, as torch does there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "mps" and leaf.dtype == torch.float64:
                raise TypeError(f"{func} gives float64 on MPS")
        return result


PATH = ContinuousTime(NoiseSchedule(torch.linspace(1e-4, 0.02, 10)))


@pytest.fixture
def mps():
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutFloat64():
        yield torch.device("mps")


def test_the_device_is_left_only_where_it_has_no_float64(mps):
    with pytest.raises(TypeError, match="gives float64 on MPS"):
        torch.zeros(2, device=mps).double()
    assert to_float64(torch.zeros(2, device=mps)).device.type == "cpu"
    assert to_float64(torch.zeros(2, device="cuda")).device.type == "cuda"
    for device in (mps, "cpu", "cuda"):
        assert to_float64(torch.zeros(2, device=device)).dtype == torch.float64


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_closeness_of_images_is_measured_without_float64_on_the_device(mps, measure):
    x = torch.zeros(2, 3, 8, 8, device=mps)
    assert measure(x, x).shape == (2,)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot fake random numbers on MPS")
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "laplace"])
def test_bounds_of_an_autoencoder_are_taken_without_float64_on_the_device(mps, likelihood):
    x, log_scale = torch.zeros(2, 7, device=mps), torch.zeros((), device=mps)
    posterior = DiagonalGaussian(torch.zeros(2, 3, device=mps), torch.zeros(2, 3, device=mps))

    def log_prob(z, copies):
        assert z.device.type == "mps"
        return log_likelihood(likelihood, x.repeat(copies, 1), z.sum(1, True).expand(-1, 7), log_scale, levels=256)

    estimate = estimate_likelihood(posterior, log_prob, num_samples=5, chunk_size=2)
    for value in (*estimate.bound, estimate.importance_weighted, estimate.elbo_of_draws):
        assert value.shape == (2,) and value.dtype == torch.float64


def test_times_of_the_flow_are_read_without_float64_on_the_device(mps):
    time = torch.zeros(2, device=mps)
    assert PATH.angle(time).dtype == PATH.timestep(time).dtype == torch.float64


@pytest.mark.skipif(
    not hasattr(torch_utils, "maybe_adjust_dtype_for_device"), reason="an older diffusers has no such list"
)
def test_the_widest_type_of_a_device_is_diffusers():
    kinds = ("cpu", "cuda", "mps", *(["npu"] if hasattr(torch, "npu") else []))
    for kind in kinds:
        theirs = torch_utils.maybe_adjust_dtype_for_device(torch.float64, torch.device(kind))
        assert widest_float(torch.device(kind)) == widest_float(f"{kind}:0") == theirs
    assert set(WITHOUT_FLOAT64) == torch_utils._FP64_UNSUPPORTED_DEVICES
    assert widest_float(None) == torch.float64


def test_no_module_makes_float64_on_a_device_that_it_does_not_know():
    """By its source: neither `.double().cpu()`, which is float64 on the device first, nor `dtype=torch.float64` on one."""
    for path in Path(diffusers_ext.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            assert not re.search(r"\.double\(\)\.cpu\(\)$", ast.unparse(node)), f"{path.name}: {ast.unparse(node)}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if keywords.get("dtype") == "torch.float64":
                assert keywords.get("device") in (None, "'cpu'"), f"{path.name}: {ast.unparse(node)}"
