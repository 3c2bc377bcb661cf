import pytest
import torch
import torch.nn.functional as F

from diffusers_ext.models import layers
from diffusers_ext.models.layers import attention, concatenate, group_norm, num_groups


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


@pytest.mark.parametrize("shape", [None, (5, 1, 1, 7)], ids=str)
@pytest.mark.parametrize("most_pairs", [2**25, 1], ids=["by products", "fused"])
def test_compiled_attention_in_bfloat16_and_its_gradients_are_as_close_as_their_rounding(
    monkeypatch, most_pairs, shape
):
    """Written out for the compiler where its weights are few, which then are no fused kernel's."""
    monkeypatch.setattr(layers, "MOST_PAIRS_KEPT", most_pairs)
    torch.compiler.reset()
    leaves = [draw(5, n, 3, 16).bfloat16().transpose(1, 2).requires_grad_() for n in (10, 7, 7)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    mask = None if shape is None else torch.where(draw(*shape) > 1, -1e4, draw(*shape)).bfloat16()
    out_grad, kernels = draw(5, 3, 10, 16).bfloat16(), []

    def as_written(graph, inputs):
        kernels.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    query, key, value = exact
    logits = query @ key.mT / 4
    expected = (logits if mask is None else logits + mask.double()).softmax(-1) @ value
    ours = torch.compile(attention, backend=as_written, fullgraph=True)(*leaves, mask)
    torch.compiler.reset()
    assert any("softmax" in name for name in kernels) == (most_pairs > 1)
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
