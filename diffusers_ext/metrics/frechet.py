"""The Fréchet distance between two Gaussians fitted to features.

With the features of a particular InceptionV3 this number is known as FID (Heusel et al. 2017, arXiv 1706.08500). With
any other features it has another scale: name the features beside the number, and compare only within one evaluator.
"""

import math
import warnings

import torch
from torch import Tensor


class FeatureStatistics:
    """Count, mean and covariance of features, gathered in one pass and in float64.

    Statistics of parts can be merged, in any order, so a data set may be spread over batches, files or processes: they
    pickle, so `accelerate.utils.gather_object` brings them together.

    Args:
        dim: Number of features of an image.
    """

    def __init__(self, dim: int):
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.dim = dim
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        # Sum of the outer products of the deviations from the mean, not of the features themselves: the difference
        # of two large sums would lose the covariance when it is small beside the mean.
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    @property
    def covariance(self) -> Tensor:
        """The unbiased estimate, shape `(dim, dim)`, float64."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> "FeatureStatistics":
        """Adds a batch of features and returns the statistics themselves.

        Args:
            features: Shape `(batch, dim)`, any real dtype, on any device.

        Raises:
            ValueError: if the shape is another one, or a feature is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must have shape (batch, {self.dim}), got {tuple(features.shape)}")
        if not torch.isfinite(features).all():
            raise ValueError("features must be finite, got NaN or infinity: look at the images they were made from")
        if len(features) == 0:
            return self
        features = features.detach().cpu().double()
        mean = features.mean(0)
        deviation = features - mean
        self._combine(len(features), mean, deviation.T @ deviation)
        return self

    @classmethod
    def of_weighted(cls, features: Tensor, weights: Tensor) -> "FeatureStatistics":
        """Statistics in which each sample counts by its weight, as if a set were drawn in these proportions.

        Args:
            features: Shape `(number, dim)`.
            weights: Shape `(number,)`, not negative, with a positive sum, of at least 2 samples. With equal ones, mean and
                covariance are those of `update`; `count` is that of the positive ones.

        Raises:
            ValueError: see `update`; and if the weights are others.
        """
        weights = weights.detach().cpu().double()
        count = int((weights > 0).sum())
        if weights.shape != features.shape[:1] or (weights < 0).any() or count < 2:
            raise ValueError(
                f"weights must be one for each of {len(features)} samples, none negative and at least 2 positive, got "
                f"{count} positive ones of {len(weights)}"
            )
        statistics = cls(features.shape[1]).update(features[weights > 0])
        features, weights = features[weights > 0].detach().cpu().double(), weights[weights > 0] / weights.sum()
        statistics.mean = weights @ features
        deviation = features - statistics.mean
        # Dividing by 1 - sum w^2 makes the estimate unbiased, as dividing by n - 1 does for equal weights.
        covariance = (weights[:, None] * deviation).T @ deviation / (1 - weights.square().sum())
        statistics.scatter = covariance * (count - 1)
        return statistics

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Adds the samples behind other statistics and returns the statistics themselves."""
        if other.dim != self.dim:
            raise ValueError(f"statistics of {self.dim} features cannot be merged with those of {other.dim} features")
        if other.count:
            self._combine(other.count, other.mean, other.scatter)
        return self

    def _combine(self, count: int, mean: Tensor, scatter: Tensor):
        """The pairwise update of Chan, Golub and LeVeque (1983)."""
        total = self.count + count
        difference = mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(difference, difference) * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count = total


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """|mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^(1/2)), the squared distance that FID reports.

    The squared 2-Wasserstein distance between two Gaussians of these means and covariances (Dowson and Landau 1982).
    It is at least 0, and 0 only for equal means and covariances. Its estimate is biased upwards, the more so the fewer
    the samples, so compare numbers made from equally many.

    Warns:
        UserWarning: if there are no more samples than features; the covariance then has no full rank and the
            distance, though defined, mostly depends on the number of samples.

    Raises:
        ValueError: if the numbers of features differ, or there are fewer than 2 samples.
    """
    if a.dim != b.dim:
        raise ValueError(f"both statistics must be of the same features, got {a.dim} and {b.dim} features")
    for statistics in (a, b):
        if statistics.count < 2:
            raise ValueError(f"the Fréchet distance needs at least 2 samples a side, got {statistics.count}")
    count = min(a.count, b.count)
    if count <= a.dim:
        warnings.warn(
            f"the Fréchet distance of {a.dim} features is unreliable from {count} samples: take more than {a.dim},"
            " better ten times as many",
            stacklevel=2,
        )
    # With cov = L L^T, the trace of (cov_a cov_b)^(1/2) is the sum of the singular values of L_a^T L_b. Unlike the
    # root of the product's eigenvalues, it needs no root of a rounding error where a covariance has no full rank.
    root = torch.linalg.svdvals(_factor(a.covariance).T @ _factor(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    return max(distance.item(), 0.0)


def extrapolated_frechet_distance(
    real: FeatureStatistics, features: Tensor, *, num_sizes: int = 8, smallest_share: float = 0.5, seed: int = 0
) -> float:
    """The Fréchet distance of infinitely many generated images (Chong and Forsyth 2020, arXiv 1911.07023).

    To first order the estimate's bias falls as 1 / number of samples. A line through the distances of subsets of several
    sizes, as a function of 1 / size, is read at 0.

    Args:
        real: Statistics of the real images, of so many that their own share of the bias is small.
        features: Of the generated images, shape `(number, dim)`, in no order that matters.
        num_sizes: How many sizes of subsets, evenly spaced in 1 / size; at least 2.
        smallest_share: The smallest size as a share of all images, in (0, 1); its subsets must outnumber the features.
        seed: Of the draw of the subsets.

    Returns:
        The value of the line at 0, which may be negative by chance.

    Raises:
        ValueError: if the smallest subset has no more samples than features, or an option is outside its range.
    """
    if num_sizes < 2 or not 0 < smallest_share < 1:
        raise ValueError(
            f"num_sizes must be at least 2 and smallest_share in (0, 1), got {num_sizes} and {smallest_share}"
        )
    number, dim = features.shape
    inverse = torch.linspace(1 / number, 1 / (smallest_share * number), num_sizes, dtype=torch.float64)
    sizes = (1 / inverse).round().long().clamp(max=number).tolist()
    if sizes[-1] <= dim:
        raise ValueError(
            f"extrapolating the distance of {dim} features needs more than {math.ceil(dim / smallest_share)} images, so that "
            f"the smallest subset has more than {dim}, got {number}"
        )
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for size in sizes:
        # Parts of one shuffle have no image in common, and their mean is less noisy than one subset is.
        order = torch.randperm(number, generator=generator)
        parts = [order[start : start + size] for start in range(0, number - size + 1, size)]
        each = [frechet_distance(real, FeatureStatistics(dim).update(features[part])) for part in parts]
        distances.append(sum(each) / len(each))
    x, y = 1 / torch.tensor(sizes, dtype=torch.float64), torch.tensor(distances, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean())


def _factor(covariance: Tensor) -> Tensor:
    """An L with L L^T = covariance, which may be singular."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    return eigenvectors * eigenvalues.clamp(min=0).sqrt()
