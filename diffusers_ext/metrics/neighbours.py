"""Precision and recall of generated images by k nearest neighbours (Kynkäänniemi et al. 2019, arXiv 1904.06991).

A set's manifold is estimated as the union of balls around its points, each ball reaching to the point's k-th nearest
neighbour in the set. Precision is the share of generated points in the manifold of the real ones, recall the share of
real points in the manifold of the generated ones.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_ext.diffusion.precision import to_float64


# Distances held at a time: 64 MB in float64, whatever the sizes of the sets.
CHUNK_ELEMENTS = 2**23


class PrecisionRecall(NamedTuple):
    """Both are shares in [0, 1], and 1 is best."""

    precision: float
    recall: float


def precision_recall(
    real: Tensor, generated: Tensor, k: int = 5, real_weights: Tensor | None = None
) -> PrecisionRecall:
    """Improved precision and recall, exact, in float64 and in chunks of bounded memory.

    Both depend on the sizes of the sets (larger sets give smaller balls), so compare only between equal sizes. A point
    on the edge of a ball, to rounding, is inside.

    Args:
        real: Features of real images, shape `(num_real, dim)`.
        generated: Features of generated images, shape `(num_generated, dim)`.
        k: The neighbour that a ball reaches to, the point itself not counted.
        real_weights: How much each real point counts in recall, shape `(num_real,)`; None for all alike.

    Raises:
        ValueError: if the features differ in number or are not finite, or a set has fewer than k + 1 points.
    """
    real, generated = _check(real, generated, names=("real", "generated"))
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for name, points in (("real", real), ("generated", generated)):
        if len(points) < k + 1:
            raise ValueError(f"k={k} neighbours need at least {k + 1} {name} images, got {len(points)}")

    # Rounding of |p - q|^2 = |p|^2 + |q|^2 - 2 p q is relative to the norms, which the shared centre keeps small.
    tolerance = 1e-12 * max(real.square().sum(1).max(), generated.square().sum(1).max())
    precision = _share_inside(generated, real, _radii(real, k) + tolerance)
    recall = _share_inside(real, generated, _radii(generated, k) + tolerance, real_weights)
    return PrecisionRecall(precision, recall)


def nearest_distances(points: Tensor, reference: Tensor) -> Tensor:
    """Euclidean distance from each point to the nearest one of `reference`, shape `(num_points,)`, float64.

    Generated images that lie much nearer to the training images than held-out real ones do are copies.

    Args:
        points: Shape `(num_points, dim)`.
        reference: Shape `(num_reference, dim)`, at least one row.
    """
    points, reference = _check(points, reference, names=("points", "reference"))
    if len(reference) == 0:
        raise ValueError("reference must have at least one point, got none")
    nearest = [distances.amin(1) for _, distances in _squared_distances(points, reference)]
    return torch.cat(nearest).sqrt() if nearest else points.new_zeros(0)


def _radii(points: Tensor, k: int) -> Tensor:
    """Squared distance from each point to its k-th nearest neighbour among the others."""
    radii = torch.empty(len(points), dtype=points.dtype, device=points.device)
    for rows, distances in _squared_distances(points, points):
        index = torch.arange(len(distances), device=points.device)
        distances[index, index + rows.start] = torch.inf  # a point is no neighbour of itself
        radii[rows] = distances.topk(k, largest=False).values[:, -1]
    return radii


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, weights: Tensor | None = None) -> float:
    """Share of the points, or of their weights, that lie in at least one ball; `radii` are squared."""
    inside = torch.cat([(distances <= radii).any(1) for _, distances in _squared_distances(points, centres)])
    if weights is None:
        return float(inside.sum()) / len(points)
    weights = weights.to(inside.device)
    return float(weights[inside].sum() / weights.sum())


def _squared_distances(points: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of the matrix of squared distances, each with the rows that it holds."""
    norms = others.square().sum(1)
    num_rows = max(1, CHUNK_ELEMENTS // max(1, len(others)))
    for start in range(0, len(points), num_rows):
        rows = slice(start, min(start + num_rows, len(points)))
        chunk = points[rows]
        distances = torch.addmm(norms, chunk, others.T, alpha=-2).add_(chunk.square().sum(1, keepdim=True))
        yield rows, distances.clamp_(min=0)


def _check(*sets: Tensor, names: tuple[str, str]) -> list[Tensor]:
    """The two sets in float64, moved by one vector to around the origin."""
    for name, points in zip(names, sets, strict=True):
        if points.ndim != 2:
            raise ValueError(f"{name} must have shape (number, dim), got {tuple(points.shape)}")
        if not torch.isfinite(points).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity: look at the images behind the features")
    first, second = sets
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same features, got {first.shape[1]} and {second.shape[1]}"
        )
    first, second = to_float64(first.detach()), to_float64(second.detach().to(first.device))
    centre = (second if len(second) else first).mean(0)
    return [first - centre, second - centre]
