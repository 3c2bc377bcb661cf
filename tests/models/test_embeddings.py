import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_ext import DiTModel, UNetModel
from diffusers_ext.models.embeddings import (
    TimestepEmbedding,
    position_embedding,
    timestep_embedding,
    timestep_of_each,
)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def test_a_timestep_given_as_a_number_is_written_by_the_device():
    """A copy from the host would stall it, and no CUDA graph can hold one."""
    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    on_a_device = torch.empty(3, 1, device="meta")
    with Record():
        timesteps = timestep_of_each(500, on_a_device)
    assert names == ["aten::full"] and timesteps.shape == (3,) and timesteps.dtype == torch.int64
    each, sample = torch.tensor([1, 2]), torch.empty(2, 1)
    assert timestep_of_each(each, sample).tolist() == [1, 2] and timestep_of_each(0.5, sample).tolist() == [0.5, 0.5]
    assert timestep_of_each(each[1], sample).tolist() == [2, 2]


def test_timestep_embedding_matches_diffusers():
    timesteps = torch.tensor([0, 1, 500, 999])
    theirs = get_timestep_embedding(timesteps, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, 32), theirs)


def test_positions_of_another_size_are_those_of_the_same_points():
    """Twice the grid: every other position is one of the smaller grid, the rest lie halfway."""
    small, large = position_embedding((3, 5), (3, 5), 16), position_embedding((6, 10), (3, 5), 16)
    torch.testing.assert_close(large.view(6, 10, 16)[::2, ::2], small.view(3, 5, 16))
    angles = torch.tensor([2.5, 1.5])  # column, row
    slowest = torch.stack([angles * 10**-3, torch.ones(2)], dim=-1).flatten()
    torch.testing.assert_close(large.view(6, 10, 16)[3, 5][[3, 7, 11, 15]], slowest, rtol=1e-4, atol=1e-7)


def test_a_pooled_context_adds_the_mean_of_its_tokens():
    embed = TimestepEmbedding(6, 4, pooled_dim=3).double()
    timesteps, context = torch.tensor([3, 40]), draw(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    without = embed(timesteps, None, torch.float64, torch.zeros_like(context)) - embed.context_embedding.bias
    means = torch.stack([(context[0, 0] + context[0, 1]) / 2, context[1].sum(0) / 4])
    expected = without + means @ embed.context_embedding.weight.T + embed.context_embedding.bias
    torch.testing.assert_close(embed(timesteps, None, torch.float64, context, mask), expected)
    # No token at all is a mean of 0, and not of 0 / 0.
    nothing = embed(timesteps, None, torch.float64, context, torch.zeros_like(mask))
    torch.testing.assert_close(nothing, without + embed.context_embedding.bias)


MAKERS = {
    "unet": lambda **kwargs: UNetModel(8, 1, 1, (8, 16), 1, cross_attention_dim=6, **kwargs),
    "dit": lambda **kwargs: DiTModel(
        8, 2, 1, hidden_size=16, num_layers=2, num_attention_heads=2, cross_attention_dim=6, **kwargs
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_model_that_pools_its_context_knows_its_mean_without_attention(make):
    torch.manual_seed(0)
    models = [make(pool_context=pooled).double() for pooled in (True, False)]
    for model in models:
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.2)
            if "cross_att" in name and ".to_out." in name:  # what attention finds is left out
                torch.nn.init.zeros_(parameter)
    pooling, other = models
    x, context = draw(2, 1, 8, 8), draw(2, 4, 6)
    expected = pooling(x, 5, None, context).sample
    torch.testing.assert_close(pooling(x, 5, None, context.flip(1)).sample, expected)
    mask = torch.tensor([[1, 1, 1, 0]] * 2)
    masked = pooling(x, 5, None, context, mask).sample
    torch.testing.assert_close(masked, pooling(x, 5, None, context[:, :3]).sample)
    assert (masked - expected).abs().max() > 1e-3
    assert torch.equal(other(x, 5, None, context).sample, other(x, 5, None, 2 * context).sample)


@pytest.mark.parametrize("model", [UNetModel, DiTModel])
def test_pooling_without_a_context_is_refused(model):
    with pytest.raises(ValueError, match="pool_context needs a context: give cross_attention_dim"):
        model(pool_context=True)
