"""Networks loaded in 8 bits by torchao, which is an extra: without it nothing of this is run."""

import pytest
import torch
from diffusers import TorchAoConfig

from diffusers_ext import DiTModel, UNetModel


pytest.importorskip("torchao", reason="torchao is not installed")

MODELS = {
    "dit": lambda: DiTModel(8, 2, 1, hidden_size=64, num_layers=2, num_attention_heads=2),
    "unet": lambda: UNetModel(8, 1, 1, block_out_channels=(32, 32), layers_per_block=1, attention_resolutions=(8,)),
}


@torch.no_grad()
def output_of(model):
    return model(torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8), 500).sample


@pytest.mark.parametrize("name", MODELS)
def test_linear_layers_in_eight_bits_compute_nearly_the_same_and_are_saved_as_they_are(name, tmp_path):
    """Of a trained DiT the int8 weights move the output by 0.4 %; random ones are no harder to round."""
    from torchao.quantization import Int8WeightOnlyConfig

    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "whole")
    options = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "dtype": torch.float32}
    quantized = type(model).from_pretrained(tmp_path / "whole", **options).eval()
    linear = [each for each in quantized.modules() if isinstance(each, torch.nn.Linear)]
    assert linear and all("Int8" in type(each.weight).__name__ for each in linear)
    expected, got = output_of(model), output_of(quantized)
    assert 0 < (got - expected).norm() < 0.05 * expected.norm()
    quantized.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized", dtype=torch.float32).eval()
    assert torch.equal(output_of(again), got)
