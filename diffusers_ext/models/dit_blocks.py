"""The blocks of `DiTModel`: attention and feed-forward layers, modulated by the embedding of timestep and label."""

import math

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from torch import Tensor, nn

from diffusers_ext.models.derivatives import needs_plain_operators
from diffusers_ext.models.dit_parts import FirstValues, gated_width, learned_norm, normalise, rotate
from diffusers_ext.models.layers import attention, project_heads, register_attention, register_skippable


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, norm: str = "layer") -> Tensor:
    """Normalisation, then `(1 + scale) * x + shift`; tokens `(batch, tokens, dim)`, the others `(batch, dim)`."""
    return torch.addcmul(shift[:, None], normalise(x, norm, eps), 1 + scale[:, None])


class DiTFeedForward(FeedForward):
    """Two linear layers with an activation between them, tokens `(batch, tokens, dim)` to tokens.

    Args:
        mlp: "gelu", in its tanh form; or "swiglu", whose first layer has two halves, of which the second, through SiLU, is
            the gate of the first, at a width at which there are as many parameters.
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float = 0.0, mlp: str = "gelu"):
        gated = mlp == "swiglu"
        width, activation = (gated_width(hidden_dim), "swiglu") if gated else (hidden_dim, "gelu-approximate")
        super().__init__(dim, inner_dim=width, dropout=dropout, activation_fn=activation)
        self.gated = gated
        if gated:
            self.net[0]._fused_layers = {"proj": 2}  # two matrices, one above the other, each an optimizer's by itself

    def forward(self, hidden_states: Tensor) -> Tensor:
        linear_in, dropout, linear_out = self.net[0].proj, self.net[1], self.net[2]
        x = linear_in(hidden_states)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            return linear_out(dropout(x * F.silu(gate)))
        return linear_out(dropout(gelu(x, in_training=self.training)))


def gelu(x: Tensor, *, in_training: bool = False) -> Tensor:
    """GELU in its tanh form, x / 2 (1 + tanh u) = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3).

    Args:
        in_training: Whether a network in training takes it, which learns with either form.
    """
    if x.device.type != "cpu" or (torch.compiler.is_compiling() and x.dtype != torch.bfloat16):
        return F.gelu(x, approximate="tanh")
    # The CPU's kernel of the tanh form takes 2.5 to 6 times as long as that of the form with erf. They differ by less than
    # 5e-4: in bfloat16 so does their input by its rounding.
    if x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and in_training):
        return F.gelu(x)
    if torch.is_grad_enabled() or needs_plain_operators(x):
        return F.gelu(x, approximate="tanh")
    # By the sigmoid, in place: 1.9 ms for 4.3 of 2048 x 512 values (one core of an AMD Zen 3).
    slope = 2 * math.sqrt(2 / math.pi)
    return (x * x).mul_(0.044715 * slope).add_(slope).mul_(x).sigmoid_().mul_(x)


class DiTAttentionProcessor:
    """The computation of `DiTAttention`, as diffusers' hooks expect it."""

    _attention_backend = None  # set by diffusers' `set_attention_backend`
    _parallel_config = None  # set by diffusers' `enable_parallelism`

    def __call__(
        self,
        attn: "DiTAttention",
        hidden_states: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        rotation: Tensor | None = None,
        first_values: FirstValues | None = None,
    ) -> Tensor:
        query, key, value = project_heads(attn, hidden_states, hidden_states if context is None else context)
        if attn.norm_q is not None and attn.norm_k is not None:
            query, key = attn.norm_q(query).to(value.dtype), attn.norm_k(key).to(value.dtype)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if first_values is not None:
            value = first_values.mixed(value, attn.own_share)
        # Where tokens are spread over processes, each process has the whole of a context.
        parallel = self._parallel_config if context is None else None
        out = attention(query, key, value, mask, self._attention_backend, parallel)
        return attn.to_out(out.transpose(1, 2).flatten(2))


class DiTAttention(nn.Module, AttentionModuleMixin):
    """Attention of tokens to one another, or to a context (Vaswani et al. 2017).

    Args:
        dim: Width of the tokens.
        heads: Number of heads.
        qk_norm: Normalise queries and keys, which bounds the logits (Dehghani et al. 2023).
        context_dim: Width of the context's tokens; `None` for self-attention.
        norm: How queries and keys are normalised, "layer" or "rms".
        mixes_values: Learn which share of the values is the layer's own; the rest are those of the first block.
    """

    _supports_qkv_fusion = False
    _fused_layers = {"to_kv": 2}

    def __init__(
        self,
        dim: int,
        heads: int,
        qk_norm: bool = False,
        context_dim: int | None = None,
        *,
        norm: str = "layer",
        mixes_values: bool = False,
    ):
        super().__init__()
        self.num_heads, self.is_cross_attention = heads, context_dim is not None
        self.to_q = nn.Linear(dim, dim)
        self.to_kv = nn.Linear(dim if context_dim is None else context_dim, 2 * dim)
        self.norm_q = learned_norm(dim // heads, norm, eps=1e-5, bias=False) if qk_norm else None
        self.norm_k = learned_norm(dim // heads, norm, eps=1e-5, bias=False) if qk_norm else None
        self.own_share = nn.Parameter(torch.full((1,), 0.5)) if mixes_values else None
        self.to_out = nn.Linear(dim, dim)
        self.set_processor(DiTAttentionProcessor())

    def forward(
        self, hidden_states: Tensor, context: Tensor | None = None, mask: Tensor | None = None, **options
    ) -> Tensor:
        """Tokens `(batch, tokens, dim)` and context `(batch, other_tokens, context_dim)` to tokens.

        Args:
            options: `rotation` of the positions (`dit_parts.rotary_table`) and `first_values`, in networks that have them.
        """
        return self.processor(self, hidden_states, context, mask, **options)


class DiTBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, and a feed-forward layer (the paper's adaLN-Zero block).

    The embedding sets scale and shift of the normalisations, and gates of the residual branches that start at zero.
    `takes_skip`: whether the output of an earlier block is joined to the tokens first, by a linear layer that begins as the
    tokens alone. The other arguments are options of `DiTModel`.
    """

    _fused_layers = {"modulation": 6}

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        qk_norm: bool = False,
        context_dim: int | None = None,
        mlp_norm_eps: float = 1e-6,
        norm: str = "layer",
        mlp: str = "gelu",
        mixes_values: bool = False,
        takes_skip: bool = False,
    ):
        super().__init__()
        self.mlp_norm_eps, self.norm = mlp_norm_eps, norm
        self.skip_in = nn.Linear(2 * dim, dim) if takes_skip else None
        self.modulation = nn.Linear(dim, 6 * dim)
        self.attn = DiTAttention(dim, heads, qk_norm, norm=norm, mixes_values=mixes_values)
        self.dropout = nn.Dropout(dropout)
        self.cross_norm = None if context_dim is None else learned_norm(dim, norm, eps=1e-6, bias=True)
        self.cross_attn = None if context_dim is None else DiTAttention(dim, heads, qk_norm, context_dim, norm=norm)
        self.ff = DiTFeedForward(dim, int(dim * mlp_ratio), dropout, mlp)

    def forward(
        self,
        hidden_states: Tensor,
        embedding: Tensor,
        encoder_hidden_states: Tensor | None = None,
        mask: Tensor | None = None,
        skip: Tensor | None = None,
        rotation: Tensor | None = None,
        first_values: FirstValues | None = None,
    ) -> Tensor:
        """Tokens `(batch, tokens, dim)` to tokens, given an embedding `(batch, dim)` of timestep and label.

        Args:
            skip: Tokens that an earlier block put out, if the block takes them.
            rotation, first_values: Of self-attention, in networks that have them.
        """
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.modulation(embedding).chunk(6, dim=-1)
        x = hidden_states if skip is None else self.skip_in(torch.cat([hidden_states, skip], dim=-1))
        h = modulated_norm(x, scale, shift, 1e-6, self.norm)
        given = {"rotation": rotation, "first_values": first_values}  # which processors of others do not know
        given = {name: value for name, value in given.items() if value is not None}
        x = torch.addcmul(x, gate[:, None], self.dropout(self.attn(h, **given)))
        if self.cross_attn is not None and self.cross_norm is not None:
            x = x + self.dropout(self.cross_attn(self.cross_norm(x).to(x.dtype), encoder_hidden_states, mask))
        h = modulated_norm(x, scale_ff, shift_ff, self.mlp_norm_eps, self.norm)
        return torch.addcmul(x, gate_ff[:, None], self.ff(h))


register_attention(DiTAttentionProcessor)
register_skippable(DiTBlock)
