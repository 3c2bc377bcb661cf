import inspect

import pytest
import torch
from torch import nn

from diffusers_ext import HierarchicalVAEModel, UNetModel, VAEModel


WIDTHS = (8, 12, 16, 20)


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def as_written(graph, example_inputs):
    return graph.forward


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters, reason="torch.compile has no limit to set"
)
@pytest.mark.parametrize(
    "cls, kwargs", [(UNetModel, {"timestep": torch.tensor(3)}), (VAEModel, {}), (HierarchicalVAEModel, {})]
)
@torch.no_grad()
def test_blocks_of_many_widths_are_all_compiled(cls, kwargs):
    """Without a break, which would raise, and to the same result."""
    torch.manual_seed(0)
    model = cls(sample_size=8, in_channels=1, out_channels=1, block_out_channels=WIDTHS, layers_per_block=1).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    sample = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    expected = model(sample, return_dict=False, **kwargs)[0]

    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=as_written)
    torch.testing.assert_close(model(sample, return_dict=False, **kwargs)[0], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_given_limit_of_compilations_is_kept():
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("torch.compile has no limit to set")
    model = UNetModel(sample_size=8, block_out_channels=WIDTHS, layers_per_block=1)
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=as_written, recompile_limit=2)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        model(torch.zeros(1, 3, 8, 8), torch.tensor(3))
