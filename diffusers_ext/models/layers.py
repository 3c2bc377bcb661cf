"""The layers that the networks share: normalisation, convolution and attention.

They are written for the order in which memory is read. Convolutions are fastest in channels_last, on CPUs and
GPUs alike, so feature maps stay in that layout from the first layer to the last, and a feature map `(batch, channels,
height, width)` is a sequence of tokens `(batch, height * width, channels)` without a copy.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.models._modeling_parallel import ParallelConfig
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from diffusers_ext.models.derivatives import (
    backward_is_differentiated,
    is_batched,
    needs_plain_operators,
    plain_gradients,
)


def channels_last(x: Tensor) -> Tensor:
    """A feature map in channels_last, which is fastest to convolve on CPUs; on other devices, or under vmap, as it is."""
    if x.device.type != "cpu" or is_batched(x):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def num_groups(channels: int) -> int:
    """The number of groups for normalisation: about 16 channels in each, but not below 4 groups nor above 32.

    16 channels fill a vector register in bfloat16: the CPU's kernel takes 4 to 15 times as long with 4 in channels_last.
    """
    for groups in range(min(32, max(4, channels // 16), channels), 0, -1):
        if channels % groups == 0:
            return groups
    raise ValueError(f"channels must be at least 1, got {channels}")


def _takes_own_backward(x: Tensor) -> bool:
    """Whether the hand-written backward passes below apply to x: in eager mode on CPUs."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _GroupNorm(torch.autograd.Function):
    """Group normalisation whose backward pass stays in channels_last.

    PyTorch's forward pass is fast in this layout; its backward pass is several times slower than what it takes: two
    sums over positions, and one weighted sum of the gradient and the input.
    """

    @staticmethod
    def forward(ctx, x, scale, shift, groups, eps):
        batch, channels, height, width = x.shape
        shared = len(scale) == 1
        ones = torch.ones(channels, dtype=torch.promote_types(x.dtype, torch.float32))  # and so are the statistics
        weight, bias = (scale[0].to(ones), shift[0].to(ones)) if shared else (ones, torch.zeros_like(ones))
        y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, height * width, groups, eps)
        ctx.save_for_backward(x, scale, shift, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return y if shared else _affine(y, scale, shift)

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, mean, rstd = ctx.saved_tensors
        if backward_is_differentiated(grad):
            plain = partial(_plain_group_norm, groups=ctx.groups, eps=ctx.eps)
            return *plain_gradients(plain, (x, scale, shift), ctx.needs_input_grad[:3], grad), None, None
        batch, channels, height, width = x.shape
        groups = rstd.shape[1]
        grad = grad.contiguous(memory_format=torch.channels_last)
        mean, rstd = mean.unsqueeze(-1), rstd.unsqueeze(-1)  # (batch, groups, 1)

        # y = scale * (x - mean) * rstd + shift, so the gradients of scale and shift are sums over positions; by group:
        grad_shift = _sum_over_positions(grad).to(mean).view(batch, groups, -1)
        grad_scale = rstd * (_sum_over_positions(grad * x).to(mean).view(batch, groups, -1) - mean * grad_shift)

        # The gradient of x is that of the normalised x less its projections on the two statistics, times rstd.
        wide = scale.to(mean).expand(batch, channels).view(batch, groups, -1)
        count = height * width * channels // groups
        along_mean = (wide * grad_shift).sum(-1, keepdim=True) / count
        along_std = (wide * grad_scale).sum(-1, keepdim=True) / count
        of_x = -rstd.square() * along_std
        of_one = -rstd * along_mean - mean * of_x
        of_grad, of_x, of_one = [
            factor.expand_as(wide).reshape(batch, channels, 1, 1).to(x.dtype) for factor in (rstd * wide, of_x, of_one)
        ]
        grad_x = torch.addcmul(of_one, x, of_x).addcmul_(grad, of_grad)
        return (
            grad_x,
            *[total.flatten(1).sum_to_size(scale.shape).to(scale.dtype) for total in (grad_scale, grad_shift)],
            None,
            None,
        )


def _sum_over_positions(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2).sum(1)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift[:, :, None, None].to(x.dtype), x, scale[:, :, None, None].to(x.dtype))


def _plain_group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> Tensor:
    """Written out, since derivatives of PyTorch's group normalisation fail in channels_last: forward-mode, under vmap."""
    grouped = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.shape[0], groups, -1)
    variance, mean = torch.var_mean(grouped, dim=-1, correction=0, keepdim=True)
    normed = (grouped - mean) * (variance + eps).rsqrt()
    return _affine(normed.reshape(x.shape).to(x.dtype), scale, shift)


def group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """Group normalisation (Wu & He 2018), then `scale * x + shift`, in the dtype and layout of `x`.

    Args:
        x: Feature map, shape `(batch, channels, height, width)`.
        scale, shift: Shape `(batch, channels)`, or `(1, channels)` for an affine map that all samples share.
        groups: Number of groups; divides `channels`.
    """
    if needs_plain_operators(x, scale, shift):
        return _plain_group_norm(x, scale, shift, groups, eps)
    if _takes_own_backward(x) and x.is_contiguous(memory_format=torch.channels_last):
        return _GroupNorm.apply(x, scale, shift, groups, eps)
    return _affine(F.group_norm(x, groups, eps=eps).to(x.dtype), scale, shift)


class _Concatenate(torch.autograd.Function):
    """Concatenation of channels whose gradients are compact, so that no later layer has to copy them again."""

    @staticmethod
    def forward(ctx, x, skip):
        ctx.split = x.shape[1], skip.shape[1]
        return torch.cat([x, skip], dim=1)

    @staticmethod
    def backward(ctx, grad):
        return tuple(channels_last(part) for part in grad.split(ctx.split, dim=1))


def concatenate(x: Tensor, skip: Tensor) -> Tensor:
    """Joins the channels of two feature maps `(batch, *, height, width)`."""
    if _takes_own_backward(x) and not needs_plain_operators(x, skip):
        return _Concatenate.apply(x, skip)
    return torch.cat([x, skip], dim=1)


class AffineGroupNorm(nn.Module):
    """Group normalisation with a learned scale and shift for each channel, shape `(batch, channels, *)` to the same."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.groups, self.eps = num_groups(channels), eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.weight[None], self.bias[None], self.groups, self.eps)


def convolution(in_channels: int, out_channels: int, dims: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution over 3 positions of each of `dims` axes, padded by 1; series have a height of 1."""
    kernel, strides, padding = ((3, 3), (stride, stride), (1, 1)) if dims == 2 else ((1, 3), (1, stride), (0, 1))
    return nn.Conv2d(in_channels, out_channels, kernel, strides, padding, bias=bias)


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        self.conv = convolution(channels, channels, dims, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles the resolution by repetition, followed by a convolution to the channels of that resolution."""

    def __init__(self, channels: int, out_channels: int, dims: int):
        super().__init__()
        self.factor = (2.0, 2.0) if dims == 2 else (1.0, 2.0)
        self.conv = convolution(channels, out_channels, dims)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.factor, mode="nearest"))


class _Attention(torch.autograd.Function):
    """The CPU's fused attention, with a backward pass of matrix products in bfloat16.

    The products run in tile registers, and the fused kernel's backward pass takes 1.5 to 9 times as long. They are
    made for a few samples at once, so that the weights of all pairs of tokens stay in the cache.
    """

    pairs_at_once = 2**20

    @staticmethod
    def forward(ctx, query, key, value, mask):
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)
        kept = (None, None) if query.dtype == torch.bfloat16 else (out, log_sum)
        ctx.save_for_backward(query, key, value, mask, *kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, mask, out, log_sum = ctx.saved_tensors
        inputs = (query, key, value)
        if backward_is_differentiated(grad):
            return *plain_gradients(partial(_plain_attention, mask=mask), inputs, ctx.needs_input_grad[:3], grad), None
        if out is None:
            return *_Attention.gradients_by_products(*inputs, mask, grad), None
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return *fused(grad, *inputs, out, log_sum, 0.0, False, attn_mask=mask), None

    @staticmethod
    def gradients_by_products(query, key, value, mask, grad):
        grads = [_token_major(tensor) for tensor in (query, key, value)]
        unit, scale = query.new_empty(()), query.shape[-1] ** -0.5
        num_samples = max(1, _Attention.pairs_at_once // (query.shape[1] * query.shape[2] * key.shape[2]))
        for start in range(0, len(query), num_samples):
            rows = slice(start, start + num_samples)
            q, k, v, g = (tensor[rows].flatten(0, 1) for tensor in (query, key, value, grad))
            logits = torch.baddbmm(unit, q, k.mT, beta=0, alpha=scale)
            if mask is not None:
                logits = (logits.unflatten(0, (-1, query.shape[1])) + mask[rows]).flatten(0, 1)
            weights = logits.softmax(-1).to(q.dtype)
            of_logits = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.mT), weights, -1, q.dtype)
            parts = (
                torch.baddbmm(unit, of_logits, k, beta=0, alpha=scale),
                torch.baddbmm(unit, of_logits.mT, q, beta=0, alpha=scale),
                torch.bmm(weights.mT, g),
            )
            for full, part in zip(grads, parts, strict=True):
                full[rows] = part.view(full[rows].shape)
        return grads


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask)[0]


def _attention_by_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """For compiled code in bfloat16 on CPUs: what lies between the products is one kernel then, also in the backward pass, where
    the fused attention's is 1.5 to 9 times as slow."""
    logits = (query * query.shape[-1] ** -0.5) @ key.mT
    return (logits if mask is None else logits + mask).softmax(-1).to(value.dtype) @ value


# Of tokens, in all heads and samples: the weights of each are kept for the backward pass, 64 MiB in bfloat16.
MOST_PAIRS_KEPT = 2**25


def _token_major(x: Tensor) -> Tensor:
    """An empty tensor like `(batch, heads, tokens, head_dim)`, whose heads lie side by side as linear layers have them."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    backend: AttentionBackendName | None = None,
    parallel_config: ParallelConfig | None = None,
) -> Tensor:
    """Scaled dot-product attention, by whichever kernel is fastest where it runs.

    Args:
        query: Shape `(batch, heads, tokens, head_dim)`.
        key, value: Shape `(batch, heads, other_tokens, head_dim)`.
        mask: Added to the logits, broadcasting against `(batch, heads, tokens, other_tokens)`.
        backend: Of diffusers, set by `model.set_attention_backend`; `None` for the one that is active there. "native",
            diffusers' default, leaves the choice to this function.
        parallel_config: Of diffusers, set by `model.enable_parallelism`; the tokens are then those of this process.
    """
    backend = _AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
    if backend != AttentionBackendName.NATIVE or parallel_config is not None:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        options = {"attn_mask": mask, "backend": backend, "parallel_config": parallel_config}
        return dispatch_attention_fn(query, key, value, **options).transpose(1, 2)
    if needs_plain_operators(query, key, value):
        return _plain_attention(query, key, value, mask)
    if torch.compiler.is_compiling() and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        if torch.is_grad_enabled() and query.shape[:-1].numel() * key.shape[-2] <= MOST_PAIRS_KEPT:
            return _attention_by_products(query, key, value, mask)
    if _takes_own_backward(query) and any(x.requires_grad for x in (query, key, value)):
        mask = None if mask is None else mask.expand(*query.shape[:-1], key.shape[-2])
        if torch._fused_sdp_choice(query, key, value, mask) == SDPBackend.FLASH_ATTENTION.value:
            return _Attention.apply(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def num_heads(channels: int, head_dim: int) -> int:
    """The number of attention heads of `head_dim` channels, or of the next larger size that divides `channels`."""
    return next(n for n in range(max(channels // head_dim, 1), 0, -1) if channels % n == 0)


def project_heads(layer: nn.Module, tokens: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of an attention layer, shape `(batch, heads, tokens, head_dim)` each.

    Args:
        layer: With `num_heads` and the linear layers `to_q` and `to_kv`.
        tokens: Those that attend, shape `(batch, tokens, channels)`.
        context: Those that are attended to, shape `(batch, other_tokens, context_dim)`.
    """
    query = layer.to_q(tokens).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
    key, value = layer.to_kv(context).unflatten(-1, (2, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return query, key, value


def attention_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias of masked attention's logits: `(batch, tokens)`, true where to attend, to `(batch, 1, 1, tokens)`."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask.bool(), torch.finfo(dtype).min)[:, None, None]


class AttentionProcessor:
    """The computation of `Attention`; diffusers' hooks identify the kind of a layer by its processor."""

    _attention_backend = None  # set by diffusers' `set_attention_backend`

    def __call__(
        self, attn: "Attention", hidden_states: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        shape = hidden_states.shape
        tokens = attn.norm(hidden_states).flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        context = tokens if context is None else context
        query, key, value = project_heads(attn, tokens, context)
        out = attention(query, key, value, mask, self._attention_backend).transpose(1, 2).flatten(2)
        return hidden_states + attn.to_out(out).transpose(1, 2).unflatten(2, shape[2:])


class Attention(nn.Module, AttentionModuleMixin):
    """Residual attention over the positions of a feature map, or from them to a context (Vaswani et al. 2017).

    Args:
        channels: Channels of the feature map.
        head_dim: Channels of a head; rounded up to the next size that divides `channels`.
        context_dim: Width of the context's tokens; `None` for self-attention.
    """

    _supports_qkv_fusion = False
    _fused_layers = {"to_kv": 2}

    def __init__(self, channels: int, head_dim: int = 64, context_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads(channels, head_dim)
        self.is_cross_attention = context_dim is not None
        self.norm = AffineGroupNorm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels if context_dim is None else context_dim, 2 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.set_processor(AttentionProcessor())

    def forward(self, hidden_states: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Feature map `(batch, channels, height, width)` and context `(batch, tokens, context_dim)` to a feature map."""
        return self.processor(self, hidden_states, context, mask)


# Registries in which diffusers' guiders look up the layers that they skip or perturb. Written without `register`, which imports every
# transformer of diffusers.
def register_skippable(block_class: type[nn.Module]) -> None:
    """Lets guiders skip a block that maps `hidden_states`, its first argument, to a tensor of the same shape."""
    TransformerBlockRegistry._registry[block_class] = TransformerBlockMetadata(
        return_hidden_states_index=0, _cls=block_class
    )


def register_attention(processor_class: type) -> None:
    """Lets guiders skip attention, which then returns its `hidden_states` unchanged."""
    AttentionProcessorRegistry._registry[processor_class] = AttentionProcessorMetadata(
        skip_processor_output_fn=lambda attn, hidden_states, *args, **kwargs: hidden_states
    )


register_attention(AttentionProcessor)
register_skippable(Attention)


def zero_(layer: nn.Module) -> None:
    """Sets the weight and the bias of a layer to 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def zero_residual_branches(network: nn.Module, block_class: type[nn.Module]) -> None:
    """Makes each residual branch start at zero, so that a deep network starts as easy to train as a shallow one.

    Args:
        block_class: Residual blocks, whose last layer is `conv_2`; that of `Attention` is `to_out`.
    """
    for module in network.modules():
        if isinstance(module, block_class):
            zero_(module.conv_2)
        elif isinstance(module, Attention):
            zero_(module.to_out)
