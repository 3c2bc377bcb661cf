"""What the networks of this package share: normalisation, attention, and embeddings of timesteps and labels.

The layers are written for the order in which memory is walked. Convolutions are fastest in channels_last, on CPUs and
GPUs alike, so feature maps stay in that layout from the first layer to the last, and a feature map `(batch, channels,
height, width)` is a sequence of tokens `(batch, height * width, channels)` without a copy.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
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
    """A feature map in the layout that CPUs convolve fastest, on CPUs; vmap knows no layouts."""
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
    """Whether the backward passes below are for x: eagerly, on CPUs."""
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
            for whole, part in zip(grads, parts, strict=True):
                whole[rows] = part.view(whole[rows].shape)
        return grads


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ops.aten._scaled_dot_product_attention_math(query, key, value, mask)[0]


def _token_major(x: Tensor) -> Tensor:
    """An empty tensor like `(batch, heads, tokens, head_dim)`, whose heads lie side by side as linear layers have them."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    backend: AttentionBackendName | None = None,
) -> Tensor:
    """Scaled dot-product attention, by whichever kernel is fastest where it runs.

    Args:
        query: Shape `(batch, heads, tokens, head_dim)`.
        key, value: Shape `(batch, heads, other_tokens, head_dim)`.
        mask: Added to the logits, broadcasting against `(batch, heads, tokens, other_tokens)`.
        backend: Of diffusers, set by `model.set_attention_backend`; `None` for the one that is active there. "native",
            diffusers' default, leaves the choice to this function.
    """
    backend = _AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
    if backend != AttentionBackendName.NATIVE:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend).transpose(1, 2)
    if needs_plain_operators(query, key, value):
        return _plain_attention(query, key, value, mask)
    if _takes_own_backward(query) and any(x.requires_grad for x in (query, key, value)):
        mask = None if mask is None else mask.expand(*query.shape[:-1], key.shape[-2])
        if torch._fused_sdp_choice(query, key, value, mask) == SDPBackend.FLASH_ATTENTION.value:
            return _Attention.apply(query, key, value, mask)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def attention_bias(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What masked attention adds to its logits: `(batch, tokens)`, true where to attend, to `(batch, 1, 1, tokens)`."""
    if mask is None:
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask.bool(), torch.finfo(dtype).min)[:, None, None]


class AttentionProcessor:
    """How `Attention` goes from feature map to feature map; diffusers' hooks tell the kind of a layer by it."""

    _attention_backend = None  # set by diffusers' `set_attention_backend`

    def __call__(
        self, attn: "Attention", hidden_states: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        shape = hidden_states.shape
        tokens = attn.norm(hidden_states).flatten(2).transpose(1, 2)  # (batch, height * width, channels)
        context = tokens if context is None else context
        query = attn.to_q(tokens).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
        key, value = attn.to_kv(context).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
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

    def __init__(self, channels: int, head_dim: int = 64, context_dim: int | None = None):
        super().__init__()
        self.num_heads = next(n for n in range(max(channels // head_dim, 1), 0, -1) if channels % n == 0)
        self.is_cross_attention = context_dim is not None
        self.norm = AffineGroupNorm(channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_kv = nn.Linear(channels if context_dim is None else context_dim, 2 * channels)
        self.to_out = nn.Linear(channels, channels)
        self.set_processor(AttentionProcessor())

    def forward(self, hidden_states: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Feature map `(batch, channels, height, width)` and context `(batch, tokens, context_dim)` to a feature map."""
        return self.processor(self, hidden_states, context, mask)


# What diffusers' guiders that skip layers or perturb attention look up. Written without `register`, which imports every
# transformer of diffusers.
def register_skippable(block_class: type[nn.Module]) -> None:
    """Says that a block may be left out: called `block(hidden_states, ...)`, it returns their like."""
    TransformerBlockRegistry._registry[block_class] = TransformerBlockMetadata(
        return_hidden_states_index=0, _cls=block_class
    )


def register_attention(processor_class: type) -> None:
    """Says what comes out where attention is left out: what went in."""
    AttentionProcessorRegistry._registry[processor_class] = AttentionProcessorMetadata(
        skip_processor_output_fn=lambda attn, hidden_states, *args, **kwargs: hidden_states
    )


register_attention(AttentionProcessor)
register_skippable(Attention)


def timestep_of_each(timestep: Tensor | float | int, sample: Tensor) -> Tensor:
    """The timestep of each sample on its device, shape `(batch,)`, from one number for all or one for each.

    A number is written by the device itself: it would have to wait for a copy from the host, which no CUDA graph can hold.
    """
    if isinstance(timestep, Tensor):
        return timestep.to(sample.device).expand(len(sample))
    return torch.full((len(sample),), timestep, device=sample.device)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0, endpoint: bool = False) -> Tensor:
    """Cosines and sines of the timestep at `dim // 2` frequencies from 1 down to `1 / max_period`.

    Args:
        timesteps: Shape `(batch,)`, integers or, for samplers between them, floats.
        dim: Even width of the embedding.
        endpoint: Whether `1 / max_period` is the last of the frequencies, or the one that would come next.

    Returns:
        float32, shape `(batch, dim)`.
    """
    # Rounded in the order in which diffusers rounds, since a large timestep makes much of the last digit.
    exponents = -math.log(max_period) * torch.arange(dim // 2, dtype=torch.float32, device=timesteps.device)
    angles = timesteps.float()[:, None] * torch.exp(exponents / (dim // 2 - endpoint))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


# Of networks that were not trained without labels.
NO_NULL_LABEL = (
    "class_labels must be given: the model has no null label, since it was trained with a label on each image"
)


class TimestepEmbedding(nn.Module):
    """Embeds timesteps and, added to them, class labels and texts; timesteps `(batch,)` to `(batch, dim)`.

    Args:
        dim: Width of the result.
        frequency_dim: Width of the sinusoidal embedding.
        num_classes: Labels are in `[0, num_classes]`, the last one the null label, which stands for "no label".
        endpoint: Of `timestep_embedding`.
        pooled_dim: Width of a context whose mean over the tokens is embedded too; `None` for none.
    """

    def __init__(
        self,
        dim: int,
        frequency_dim: int,
        num_classes: int | None = None,
        endpoint: bool = False,
        pooled_dim: int | None = None,
    ):
        super().__init__()
        self.frequency_dim, self.endpoint = frequency_dim, endpoint
        self.linear_1 = nn.Linear(frequency_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes + 1, dim)
        self.context_embedding = None if pooled_dim is None else nn.Linear(pooled_dim, dim)

    def forward(
        self,
        timesteps: Tensor,
        class_labels: Tensor | None,
        dtype: torch.dtype,
        context: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Context `(batch, tokens, pooled_dim)` and mask `(batch, tokens)`, not 0 where there is a token, are pooled."""
        embedding = timestep_embedding(timesteps, self.frequency_dim, endpoint=self.endpoint).to(dtype)
        embedding = self.linear_2(F.silu(self.linear_1(embedding)))
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = timesteps.new_full(
                    timesteps.shape, self.class_embedding.num_embeddings - 1, dtype=torch.long
                )
            embedding = embedding + self.embed_labels(class_labels).to(embedding.dtype)
        if self.context_embedding is not None:
            embedding = embedding + self.context_embedding(mean_of_tokens(context, mask))
        return embedding

    def embed_labels(self, class_labels: Tensor) -> Tensor:
        """Embeddings `(batch, dim)` of labels `(batch,)`, or of sets of them, multi-hot `(batch, num_classes)`.

        That of a set is the sum of its labels', and that of the empty set is the null label's.
        """
        if class_labels.ndim == 1:
            return self.class_embedding(class_labels)
        weight = self.class_embedding.weight
        if class_labels.shape[1] != len(weight) - 1:
            raise ValueError(
                f"class_labels must have shape (batch,), or (batch, {len(weight) - 1}) for sets of labels, got "
                f"{tuple(class_labels.shape)}"
            )
        members = class_labels.to(weight.dtype)
        none = 1 - members.amax(1, keepdim=True)
        return torch.cat([members, none], dim=1) @ weight


def mean_of_tokens(context: Tensor, mask: Tensor | None) -> Tensor:
    """Mean `(batch, dim)` of tokens `(batch, tokens, dim)`, of those whose mask `(batch, tokens)` is not 0."""
    if mask is None:
        return context.mean(1)
    weight = mask.to(context.dtype)
    return torch.einsum("btd,bt->bd", context, weight) / weight.sum(1, keepdim=True).clamp(min=1)


def pooled_dim(pool_context: bool, cross_attention_dim: int | None) -> int | None:
    """Width of the context that `TimestepEmbedding` pools, for the options of a model.

    Raises:
        ValueError: if there is no context to pool.
    """
    if pool_context and cross_attention_dim is None:
        raise ValueError("pool_context needs a context: give cross_attention_dim, or leave pool_context out")
    return cross_attention_dim if pool_context else None
