"""Conversion of `DiTModel` from and to diffusers' `DiTTransformer2DModel`, with the same weights.

Where the two differ:

    diffusers                                       here
    patches by a convolution                        by a linear layer of the unfolded patches
    query, key and value by three layers            key and value by one
    each block embeds timestep and label itself     one embedding for all; or one for each, `embedding_per_block`

A model that was published as one embedding for all blocks, as the paper's are, holds a copy in each block of diffusers'.
"""

import warnings
from typing import TYPE_CHECKING

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from diffusers_ext.sizes import as_size


if TYPE_CHECKING:  # that module imports this one
    from diffusers_ext.models.dit import DiTModel


# Names of layers in diffusers and here; those of blocks are within a block.
LAYERS = {
    "pos_embed.proj": "patch_in",
    "proj_out_1": "modulation_out",
    "proj_out_2": "patch_out",
}
LAYERS_OF_BLOCKS = {
    "norm1.linear": "modulation",
    "attn1.to_q": "attn.to_q",
    "attn1.to_out.0": "attn.to_out",
    "ff.net.0.proj": "ff.net.0.proj",
    "ff.net.2": "ff.net.2",
}
LAYERS_OF_EMBEDDINGS = {
    "timestep_embedder.linear_1": "linear_1",
    "timestep_embedder.linear_2": "linear_2",
    "class_embedder.embedding_table": "class_embedding",
}

# Options that a model must have to be convertible.
NEEDED_OF_DIFFUSERS = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
}
NEEDED_OF_OURS = {
    "mlp_ratio": 4.0,
    "cross_attention_dim": None,
    "qk_norm": False,
    "num_registers": 0,
    "pool_context": False,
    "condition_channels": 0,
    "position_embedding": "sincos",
    "norm": "layer",
    "mlp": "gelu",
    "value_residual": False,
    "patch_embedding": "linear",
    "long_skips": False,
    "internal_guidance_layer": None,
}


def from_diffusers(cls: type["DiTModel"], model: DiTTransformer2DModel) -> "DiTModel":
    """The same network as a `cls`, `DiTModel`, in the same dtype, on the same device and in the same mode.

    Raises:
        TypeError: for a model of another kind.
        ValueError: for options that `DiTModel` does not have.
    """
    if not isinstance(model, DiTTransformer2DModel):
        raise TypeError(f"model must be a DiTTransformer2DModel of diffusers, got {type(model).__name__}")
    _check(model.config, NEEDED_OF_DIFFUSERS, "to be converted to a DiTModel")
    config, theirs = model.config, model.state_dict()
    width = config.num_attention_heads * config.attention_head_dim
    embeddings = [
        _renamed(theirs, f"transformer_blocks.{i}.norm1.emb.", LAYERS_OF_EMBEDDINGS) for i in range(config.num_layers)
    ]
    shared = all(torch.equal(other[name], value) for other in embeddings for name, value in embeddings[0].items())

    weights = _renamed(theirs, "", LAYERS)
    weights["patch_in.weight"] = weights["patch_in.weight"].flatten(1)
    weights |= _prefixed("time_embedding.", embeddings[0])
    for i in range(config.num_layers):
        prefix = f"transformer_blocks.{i}."
        weights |= _prefixed(prefix, _renamed(theirs, prefix, LAYERS_OF_BLOCKS))
        for kind in ("weight", "bias"):
            parts = [theirs.get(f"{prefix}attn1.to_{part}.{kind}") for part in "kv"]
            if parts[0] is not None:
                weights[f"{prefix}attn.to_kv.{kind}"] = torch.cat(parts)
        if not config.attention_bias:
            for name, size in (("to_q", width), ("to_kv", 2 * width)):
                weights[f"{prefix}attn.{name}.bias"] = weights[f"{prefix}attn.to_q.weight"].new_zeros(size)
        if i and not shared:
            weights |= _prefixed(f"block_embeddings.{i - 1}.", embeddings[i])

    ours = cls(
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        hidden_size=width,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_classes=config.num_embeds_ada_norm,
        dropout=config.dropout,
        mlp_norm_eps=config.norm_eps,
        embedding_per_block=not shared,
    )
    return _with_weights(ours, weights, model)


def to_diffusers(model: "DiTModel") -> DiTTransformer2DModel:
    """The same network as diffusers' `DiTTransformer2DModel`, in the same dtype, on the same device and in the same mode.

    In training mode, diffusers' model drops a tenth of the labels; in eval mode both compute the same. It has no option
    for a null label that was not trained (`learned_unconditional`), of which a warning is given.

    Raises:
        ValueError: for options that `DiTTransformer2DModel` does not have.
    """
    config, ours = model.config, model.state_dict()
    _check(config, NEEDED_OF_OURS, "to be converted to diffusers' DiTTransformer2DModel")
    if config.num_classes is None:
        raise ValueError(
            "num_classes must be given, since diffusers' DiTTransformer2DModel always has labels, got None"
        )
    height, width = as_size(config.sample_size)
    if height != width:
        raise ValueError(
            "sample_size must be a square, since diffusers' DiTTransformer2DModel has no other, got "
            f"{height} x {width}"
        )

    if not config.learned_unconditional:
        warnings.warn(
            "the model has no null label, which diffusers' DiTTransformer2DModel cannot say: call its pipelines with "
            "guidance_scale=1 alone",
            stacklevel=2,
        )
    weights = _renamed(ours, "", _reversed(LAYERS))
    patches = weights["pos_embed.proj.weight"]
    weights["pos_embed.proj.weight"] = patches.unflatten(1, (config.in_channels, config.patch_size, config.patch_size))
    for i in range(config.num_layers):
        prefix = f"transformer_blocks.{i}."
        weights |= _prefixed(prefix, _renamed(ours, prefix, _reversed(LAYERS_OF_BLOCKS)))
        for kind in ("weight", "bias"):
            for part, value in zip("kv", ours[f"{prefix}attn.to_kv.{kind}"].chunk(2), strict=True):
                weights[f"{prefix}attn1.to_{part}.{kind}"] = value
        embedding = f"block_embeddings.{i - 1}." if i and config.embedding_per_block else "time_embedding."
        weights |= _prefixed(f"{prefix}norm1.emb.", _renamed(ours, embedding, _reversed(LAYERS_OF_EMBEDDINGS)))

    theirs = DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.hidden_size // config.num_attention_heads,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        num_layers=config.num_layers,
        dropout=config.dropout,
        sample_size=height,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
        norm_eps=config.mlp_norm_eps,
    )
    return _with_weights(theirs, weights, model)


def _renamed(weights: dict[str, Tensor], prefix: str, names: dict[str, str]) -> dict[str, Tensor]:
    """The weights and biases of some layers under other names."""
    return {
        f"{new}.{kind}": weights[f"{prefix}{old}.{kind}"]
        for old, new in names.items()
        for kind in ("weight", "bias")
        if f"{prefix}{old}.{kind}" in weights
    }


def _prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def _reversed(names: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _with_weights(model, weights: dict[str, Tensor], like):
    nn.Module.to(model, like.device, like.dtype)  # without the warning that ModelMixin's has for any dtype
    model.load_state_dict(weights)
    return model.train(like.training)


def _check(config, needed: dict, purpose: str):
    for name, value in needed.items():
        if config[name] != value:
            raise ValueError(f"{name} must be {value!r} {purpose}, got {config[name]!r}")
