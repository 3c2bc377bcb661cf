"""diffusers' attention backends reach the attention of our networks."""

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from torch import nn

from diffusers_ext import DiTModel, UNetModel, VAEModel


CONTEXT = {"encoder_hidden_states": torch.linspace(-1, 1, 2 * 3 * 6).view(2, 3, 6)}
MASK = {"encoder_attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
TIMESTEP = {"timestep": torch.tensor([3, 500])}


@pytest.fixture(autouse=True)
def native_afterwards():
    """Setting a model's backend also sets the one of all models."""
    with attention_backend("native"):
        yield


def unet() -> nn.Module:
    return UNetModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=6)


def dit() -> nn.Module:
    return DiTModel(8, 2, 1, hidden_size=8, num_layers=2, num_attention_heads=2, cross_attention_dim=6)


def vae() -> nn.Module:
    return VAEModel(8, 1, 1, block_out_channels=(8, 16))


def with_weights(make) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def output(model: nn.Module, **kwargs) -> torch.Tensor:
    sample = torch.linspace(-1, 1, 2 * 64).view(2, 1, 8, 8)
    if not isinstance(model, VAEModel):
        kwargs = TIMESTEP | CONTEXT | kwargs
    return model(sample, return_dict=False, **kwargs)[0]


@pytest.mark.product
@pytest.mark.parametrize("make", [unet, dit, vae])
@pytest.mark.parametrize("backend", ["_native_math", "_native_flash"])
def test_every_backend_computes_the_same(make, backend):
    model = with_weights(make)
    native = output(model)
    with attention_backend(backend):
        torch.testing.assert_close(output(model), native, rtol=1e-4, atol=1e-5)
    model.set_attention_backend(backend)
    torch.testing.assert_close(output(model), native, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [unet, dit])
def test_a_backend_refuses_what_it_cannot_do(make):
    """The flash kernel knows no masks: its complaint says that it, and no other, was asked."""
    model = with_weights(make)
    assert output(model, **MASK).isfinite().all()
    with attention_backend("_native_flash"), pytest.raises(ValueError, match="attn_mask.* is not supported"):
        output(model, **MASK)

    model.set_attention_backend("_native_flash")
    with attention_backend("native"), pytest.raises(ValueError, match="attn_mask.* is not supported"):
        output(model, **MASK)
    model.reset_attention_backend()
    with attention_backend("native"):
        assert output(model, **MASK).isfinite().all()
