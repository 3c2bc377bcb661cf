"""Whether two sets have their labels in the same proportions."""

from typing import NamedTuple

import torch
from torch import Tensor


class ShareDifference(NamedTuple):
    """How far the shares of labels in two sets are apart.

    Attributes:
        distance: Half the sum of the absolute differences of the shares (total variation), in [0, 1]: the part of one set
            that would have to have other labels.
        p_value: The probability of a difference at least as large between two draws from one distribution, by Pearson's
            chi-squared test of homogeneity.
    """

    distance: float
    p_value: float


def share_difference(first: Tensor, second: Tensor) -> ShareDifference:
    """The difference between two sets, by how many of each label they have.

    Args:
        first, second: Counts of the same labels, shape `(labels,)`, none negative; of a weighted set the shares times
            the number of samples that the weights are worth.

    Raises:
        ValueError: if the shapes differ, a count is negative or a set is empty.
    """
    first, second = first.detach().cpu().double(), second.detach().cpu().double()
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"counts must be of the same labels, got {tuple(first.shape)} and {tuple(second.shape)}")
    if min(first.min(), second.min()) < 0 or min(first.sum(), second.sum()) <= 0:
        raise ValueError("counts must not be negative, and one of each set positive")
    distance = 0.5 * (first / first.sum() - second / second.sum()).abs().sum().item()
    there = first + second > 0
    first, second = first[there], second[there]
    if len(first) < 2:
        return ShareDifference(distance, 1.0)
    n, m = first.sum(), second.sum()
    statistic = ((first * (m / n).sqrt() - second * (n / m).sqrt()).square() / (first + second)).sum()
    # The upper tail of the chi-squared distribution.
    freedom = torch.tensor((len(first) - 1) / 2, dtype=torch.float64)
    return ShareDifference(distance, torch.special.gammaincc(freedom, statistic / 2).item())
