"""Embeddings of what a network is given beside the sample: timesteps, labels, contexts, and positions of patches."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_ext.machine import widest_float


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


def position_embedding(size: tuple[int, int], base_size: tuple[int, int], dim: int, device=None) -> Tensor:
    """Sines and cosines of columns, then of rows, at `dim // 4` frequencies each, from 1 down to nearly 1/10000.

    Args:
        size: Rows and columns of the grid of patches.
        base_size: Rows and columns of the grid that the network was made for. Positions of another grid lie between
            those of this one, so that a point of the image keeps its position.
        dim: Width, a multiple of 4.

    Returns:
        float32, shape `(rows * columns, dim)`.
    """
    like = {"dtype": widest_float(device), "device": device}
    frequencies = 10000.0 ** -(torch.arange(dim // 4, **like) / (dim // 4))
    row, column = (
        (torch.arange(n, **like) * (base / n))[:, None] * frequencies for n, base in zip(size, base_size, strict=True)
    )
    row = torch.cat([row.sin(), row.cos()], dim=-1)[:, None].expand(-1, size[1], -1)
    column = torch.cat([column.sin(), column.cos()], dim=-1)[None].expand(size[0], -1, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1).float()


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
        self.frequency_dim, self.endpoint, self.num_classes = frequency_dim, endpoint, num_classes
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
                class_labels = timesteps.new_full(timesteps.shape, self.num_classes, dtype=torch.long)
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
        if class_labels.shape[1] != self.num_classes:
            raise ValueError(
                f"class_labels must have shape (batch,), or (batch, {self.num_classes}) for sets of labels, got "
                f"{tuple(class_labels.shape)}"
            )
        # Looked up by the module, for whatever hooks, adapters or casts there are in it.
        table = self.class_embedding(torch.arange(self.num_classes + 1, device=class_labels.device))
        members = class_labels.to(table.dtype)
        none = 1 - members.amax(1, keepdim=True)
        return torch.cat([members, none], dim=1) @ table


def embed_augmentation(layer: nn.Linear | None, augmentation: Tensor | None, sample: Tensor) -> Tensor | float:
    """The embedding `(batch, dim)` of what was done to images, to be added to that of the timestep; 0 for nothing.

    Args:
        layer: Of the network, without a bias; `None` for one that is not given it.
        augmentation: Shape `(batch, augmentation_dim)`; `None` for images that were not changed.

    Raises:
        ValueError: if it is given to a network without, or of another shape.
    """
    if augmentation is None:
        return 0.0
    if layer is None:
        raise ValueError("augmentation was given to a model that takes none: it was built with augmentation_dim=0")
    if augmentation.shape != (len(sample), layer.in_features):
        raise ValueError(
            f"augmentation must have shape {(len(sample), layer.in_features)}, got {tuple(augmentation.shape)}"
        )
    return layer(augmentation.to(sample.dtype))


def augmentation_layer(augmentation_dim: int, dim: int) -> nn.Linear | None:
    """The layer of `embed_augmentation` for the option of a network; 0 is none.

    Raises:
        ValueError: if the option is negative.
    """
    if augmentation_dim < 0:
        raise ValueError(f"augmentation_dim must be at least 0, got {augmentation_dim}")
    return nn.Linear(augmentation_dim, dim, bias=False) if augmentation_dim else None


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
