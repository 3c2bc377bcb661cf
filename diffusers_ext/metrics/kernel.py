"""The squared maximum mean discrepancy between two sets of features (Bińkowski et al. 2018, arXiv 1801.01401).

With the features of a particular InceptionV3 this number is known as KID. Unlike the Fréchet distance its estimate is
unbiased at every number of samples, so it may be compared between sets of unequal size, and below 0 by chance.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_ext.diffusion.precision import to_float64
from diffusers_ext.metrics.feature_sets import CHUNK_ELEMENTS, check_feature_sets


class KernelDistance(NamedTuple):
    """The estimate, and its standard error by leaving out a tenth of both sets in turn (the jackknife)."""

    value: float
    standard_error: float


def kernel_distance(
    real: Tensor, generated: Tensor, *, degree: int = 3, num_folds: int = 10, real_weights: Tensor | None = None
) -> KernelDistance:
    """E k(x, x') + E k(y, y') - 2 E k(x, y), x real and y generated, with the kernel k(x, y) = (x y / dim + 1)^degree.

    All pairs of different samples count, in float64 and in chunks of bounded memory; the paper's code takes the mean over
    drawn subsets, which estimates the same.

    Args:
        real: Features of real images, shape `(num_real, dim)`.
        generated: Features of generated images, shape `(num_generated, dim)`.
        degree: Of the polynomial, 3 in the paper.
        num_folds: Parts that the standard error leaves out in turn; at most half the samples of a set.
        real_weights: How much each real sample counts, shape `(num_real,)`, none negative; None for all alike.

    Raises:
        ValueError: if the features differ in number or are not finite, a set has fewer than 4 samples (of positive weight),
            or `degree` is below 1.
    """
    check_feature_sets(real, generated)
    if degree < 1:
        raise ValueError(f"degree must be at least 1, got {degree}")
    weights = []
    for name, features, given in (("real", real, real_weights), ("generated", generated, None)):
        each = torch.ones(len(features)) if given is None else given.detach()
        if each.shape != features.shape[:1] or (each < 0).any():
            raise ValueError(f"weights must be one for each of {len(features)} samples and none negative")
        if int((each > 0).sum()) < 4:
            raise ValueError(f"the kernel distance needs at least 4 {name} images, got {int((each > 0).sum())}")
        weights.append(each)
    x = to_float64(real.detach())
    y = to_float64(generated.detach().to(real.device))
    weights = [each.to(x.device, x.dtype) for each in weights]
    kept = weights[0] > 0
    sets, weights = (x[kept], y), (weights[0][kept], weights[1])
    num_folds = max(2, min(num_folds, len(sets[0]) // 2, len(sets[1]) // 2))
    folds = [torch.arange(len(features), device=features.device) % num_folds for features in sets]

    # Sums over pairs of samples by the folds of the two, of the kernel and of the products of weights.
    sums = {
        (i, j): _fold_sums(sets[i], sets[j], weights[i], weights[j], folds[i], folds[j], num_folds, degree, i == j)
        for i, j in ((0, 0), (1, 1), (0, 1))
    }

    def estimate(left_out: int | None) -> float:
        rows = torch.ones(num_folds, dtype=torch.bool)
        if left_out is not None:
            rows[left_out] = False
        mean = {
            pair: (kernel[rows][:, rows].sum() / mass[rows][:, rows].sum()) for pair, (kernel, mass) in sums.items()
        }
        return float(mean[0, 0] + mean[1, 1] - 2 * mean[0, 1])

    parts = torch.tensor([estimate(fold) for fold in range(num_folds)], dtype=torch.float64)
    variance = (num_folds - 1) / num_folds * (parts - parts.mean()).square().sum()
    return KernelDistance(estimate(None), float(variance.sqrt()))


def _fold_sums(
    x: Tensor, y: Tensor, wx: Tensor, wy: Tensor, fx: Tensor, fy: Tensor, num_folds: int, degree: int, same: bool
) -> tuple[Tensor, Tensor]:
    """Sums of w_x w_y k(x, y) and of w_x w_y over the pairs of each two folds, without a sample beside itself."""
    kernel = x.new_zeros(num_folds, num_folds)
    columns = torch.nn.functional.one_hot(fy, num_folds).to(x) * wy[:, None]
    mass = (torch.nn.functional.one_hot(fx, num_folds).to(x) * wx[:, None]).sum(0)[:, None] * columns.sum(0)
    for rows, values in _kernel_rows(x, y, degree):
        if same:
            index = torch.arange(len(values), device=x.device)
            values[index, index + rows.start] = 0
        kernel.index_add_(0, fx[rows], wx[rows, None] * (values @ columns))
    if same:
        mass = mass - torch.diag(torch.zeros_like(mass[0]).index_add_(0, fx, wx * wy))
    return kernel.cpu(), mass.cpu()


def _kernel_rows(x: Tensor, y: Tensor, degree: int) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of the kernel's matrix, each with the rows that it holds."""
    num_rows = max(1, CHUNK_ELEMENTS // max(1, len(y)))
    for start in range(0, len(x), num_rows):
        rows = slice(start, min(start + num_rows, len(x)))
        yield rows, (x[rows] @ y.T).div_(x.shape[1]).add_(1).pow_(degree)
