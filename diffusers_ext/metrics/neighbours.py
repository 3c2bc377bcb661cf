"""Precision and recall, density and coverage of generated images by k nearest neighbours.

A set's manifold is estimated as the union of balls around its points, each ball reaching to the point's k-th nearest
neighbour in the set. Precision is the share of generated points in the manifold of the real ones, recall the share of
real points in the manifold of the generated ones (Kynkäänniemi et al. 2019, arXiv 1904.06991). Density and coverage
(Naeem et al. 2020, arXiv 2002.09797) look at the balls of the real points alone, which an outlier among the generated
ones does not change.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_ext.diffusion.precision import to_float64
from diffusers_ext.metrics.feature_sets import CHUNK_ELEMENTS, check_feature_sets


class PrecisionRecall(NamedTuple):
    """Both are shares in [0, 1], and 1 is best."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density is at least 0, and 1 where both sets are of one law; coverage is a share in [0, 1], and 1 is best."""

    density: float
    coverage: float


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
    real, generated, tolerance = _real_and_generated(real, generated, k)
    precision = _share_inside(generated, real, _radii(real, k) + tolerance)
    recall = _share_inside(real, generated, _radii(generated, k) + tolerance, real_weights)
    return PrecisionRecall(precision, recall)


def density_coverage(
    real: Tensor, generated: Tensor, k: int = 5, real_weights: Tensor | None = None
) -> DensityCoverage:
    """Density and coverage, exact, in float64 and in chunks of bounded memory.

    Density counts in how many balls of real points each generated point lies, divided by k; where both sets are of one
    law, it is 1 on average. Coverage is the share of real points whose ball has a generated point in it: with sets of
    equal size and one law, 1 - 2^-k for many points, so .97 for k = 5. A point on the edge of a ball, to rounding, is inside.

    Args:
        real, generated, k, real_weights: As for `precision_recall`. With weights, a ball counts by that of its point, in
            density in proportion to their mean.

    Raises:
        ValueError: see `precision_recall`.
    """
    real, generated, tolerance = _real_and_generated(real, generated, k)
    weights = real.new_ones(len(real)) if real_weights is None else to_float64(real_weights).to(real.device)
    weights = weights / weights.sum()
    radii = _radii(real, k) + tolerance
    inside, covered = real.new_zeros(()), torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for _, distances in _squared_distances(generated, real):
        within = distances <= radii
        inside += (within * weights).sum()
        covered |= within.any(0)
    density = float(inside) * len(real) / (k * len(generated))
    return DensityCoverage(density, float(weights[covered].sum()))


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


def _real_and_generated(real: Tensor, generated: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both sets around one centre in float64, and the rounding of their squared distances."""
    real, generated = _check(real, generated, names=("real", "generated"))
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for name, points in (("real", real), ("generated", generated)):
        if len(points) < k + 1:
            raise ValueError(f"k={k} neighbours need at least {k + 1} {name} images, got {len(points)}")
    # Rounding of |p - q|^2 = |p|^2 + |q|^2 - 2 p q is relative to the norms, which the shared centre keeps small.
    return real, generated, 1e-12 * max(real.square().sum(1).max(), generated.square().sum(1).max())


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
    first, second = sets
    check_feature_sets(first, second, names)
    first, second = to_float64(first.detach()), to_float64(second.detach().to(first.device))
    centre = (second if len(second) else first).mean(0)
    return [first - centre, second - centre]
