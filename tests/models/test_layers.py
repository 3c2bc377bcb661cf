import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_ext import DiTModel, UNetModel
from diffusers_ext.models import layers
from diffusers_ext.models.layers import (
    TimestepEmbedding,
    attention,
    concatenate,
    group_norm,
    num_groups,
    timestep_embedding,
    timestep_of_each,
)


CHANNELS_LAST = torch.channels_last


def reference_group_norm(x, scale, shift, groups):
    """Written out: each group of channels gets mean 0 and variance 1, then scale and shift."""
    grouped = x.unflatten(1, (groups, -1)).flatten(2)
    normed = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    return normed.view_as(x) * scale[:, :, None, None] + shift[:, :, None, None]


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("samples", [1, 3])
def test_group_norm_and_its_gradients_are_the_formula_s(memory_format, samples):
    """The channels_last backward pass is ours: it must give what autograd gives for the formula, shared map or not."""
    x = (draw(3, 8, 4, 5) * 2 + 1).contiguous(memory_format=memory_format).requires_grad_()
    scale, shift = (draw(samples, 8) + 1).requires_grad_(), draw(samples, 8).requires_grad_()
    out_grad = draw(3, 8, 4, 5)
    ours, expected = group_norm(x, scale, shift, 4), reference_group_norm(x, scale, shift, 4)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # statistics in float32
    for got, wanted in zip(
        torch.autograd.grad(ours, (x, scale, shift), out_grad),
        torch.autograd.grad(expected, (x, scale, shift), out_grad),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_group_norm_in_bfloat16_is_as_close_as_its_rounding():
    x, out_grad = draw(4, 32, 8, 8) * 2 + 1, draw(4, 32, 8, 8)
    scale, shift = draw(4, 32) + 1, draw(4, 32)
    leaves = [v.to(torch.bfloat16) for v in (x, scale, shift)]
    leaves[0] = leaves[0].contiguous(memory_format=CHANNELS_LAST)
    leaves = [v.requires_grad_() for v in leaves]
    exact = [v.detach().double().requires_grad_() for v in leaves]
    grads = torch.autograd.grad(group_norm(*leaves, 8), leaves, out_grad.to(torch.bfloat16))
    wanted = torch.autograd.grad(reference_group_norm(*exact, 8), exact, out_grad.to(torch.bfloat16).double())
    for got, value in zip(grads, wanted, strict=True):
        assert (got.double() - value).norm() < 0.01 * value.norm()


@pytest.mark.parametrize(
    "channels, groups", [(1, 1), (6, 3), (16, 4), (32, 4), (64, 4), (128, 8), (192, 12), (1024, 32)]
)
def test_groups_hold_sixteen_channels_where_they_can(channels, groups):
    assert num_groups(channels) == groups


@pytest.mark.parametrize("shape", [None, (1, 1, 1, 7), (5, 1, 1, 7), (5, 3, 10, 7)], ids=str)
@pytest.mark.parametrize("pairs_at_once", [1, 2 * 3 * 10 * 7, 2**20], ids=["one sample", "two samples", "all samples"])
def test_attention_in_bfloat16_and_its_gradients_are_as_close_as_their_rounding(monkeypatch, pairs_at_once, shape):
    """The backward pass for bfloat16 on CPUs is ours: against autograd's of the formula in double precision."""
    monkeypatch.setattr(layers._Attention, "pairs_at_once", pairs_at_once)
    leaves = [draw(5, n, 3, 16).bfloat16().transpose(1, 2).requires_grad_() for n in (10, 7, 7)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mask = None if shape is None else torch.where(draw(*shape) > 1, float("-inf"), draw(*shape)).bfloat16()
    out_grad = draw(5, 3, 10, 16).bfloat16()

    query, key, value = exact
    logits = query @ key.mT / 4
    expected = (logits if mask is None else logits + mask.double()).softmax(-1) @ value
    ours = attention(*leaves, mask)
    assert type(ours.grad_fn).__name__ == "_AttentionBackward"
    assert (ours - expected).norm() < 0.01 * expected.norm()
    wanted = torch.autograd.grad(expected, exact, out_grad.double())
    for got, value in zip(torch.autograd.grad(ours, leaves, out_grad), wanted, strict=True):
        assert (got - value).norm() < 0.01 * value.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_gradients_is_the_fused_kernel_s(dtype):
    query, key, value = (draw(2, 3, n, 16, dtype=dtype) for n in (10, 7, 7))
    assert torch.equal(attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


def test_concatenate_passes_compact_gradients():
    x, skip = draw(2, 3, 4, 4).requires_grad_(), draw(2, 5, 4, 4).requires_grad_()
    out_grad = draw(2, 8, 4, 4)
    grads = torch.autograd.grad(concatenate(x, skip), (x, skip), out_grad)
    torch.testing.assert_close(torch.cat(grads, 1), out_grad)
    assert all(grad.is_contiguous(memory_format=CHANNELS_LAST) for grad in grads)


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
    from diffusers.models.embeddings import get_timestep_embedding

    timesteps = torch.tensor([0, 1, 500, 999])
    theirs = get_timestep_embedding(timesteps, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(timesteps, 32), theirs)


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
