"""A normal distribution fitted to data, from whose noised draws a truncated chain starts.

For x_0 ~ N(mu, S), x_t ~ N(alpha mu, alpha^2 S + sigma^2), which is what the noised draws of x_0 have at every level; of
other data it is the normal nearest to x_t in Kullback-Leibler divergence, the nearer the more noise there is.
`training/fit_prior.py` fits it, and a pipeline keeps it as its component `prior`.

Reference: Zheng, He, Chen, Zhou 2022, Truncated Diffusion Probabilistic Models and Diffusion-based Adversarial
Auto-Encoders, arXiv 2202.09671, whose priors are implicit ones, trained by a discriminator.
"""

from math import prod

import torch
from diffusers.configuration_utils import register_to_config
from torch import Generator, Tensor

from diffusers_ext.draws import draw_normal
from diffusers_ext.models.network import check_num_classes
from diffusers_ext.models.statistics import Float32Network
from diffusers_ext.sizes import as_size


# Numbers of the covariances by which all of them are kept where no rank is asked for, and the rank where they are more.
MOST_NUMBERS, DEFAULT_RANK = 4_000_000, 64

# Pixels up to which the covariance is made to find its largest eigenvalues; of more, a randomised method finds them.
LARGEST_COVARIANCE = 2048


class GaussianPriorModel(Float32Network):
    """N(mean, F F^T + diag(std^2)) of a denoiser's clean samples, one for all or also one for each label.

    Buffers, float32, with a row for each label and a last one for no label, or with one row: `mean`, shape
    `(rows, channels, *size)`; `factor`, F^T, shape `(rows, rank, channels, *size)`; `std`, shape `(rows, channels, *size)`.

    Args:
        sample_size: Side of the samples, or `(height, width)`; for 1-D data the length.
        in_channels: Channels of the samples.
        rank: Number of directions; as many as a sample has values for any covariance.
        num_classes: Number of labels with a distribution of their own; `None` for one of all.
        dims: 2 for images, 1 for series.

    Raises:
        ValueError: if `rank` is out of range.
    """

    _keep_in_fp32_modules = ["mean", "factor", "std"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, ...],
        in_channels: int,
        rank: int,
        num_classes: int | None = None,
        dims: int = 2,
    ):
        super().__init__()
        check_num_classes(num_classes)
        shape = (in_channels, *as_size(sample_size, dims))
        if not 0 <= rank <= prod(shape):
            raise ValueError(f"rank must be in [0, {prod(shape)}], the number of values of a sample, got {rank}")
        rows = 1 if num_classes is None else num_classes + 1
        self.register_buffer("mean", torch.zeros(rows, *shape))
        self.register_buffer("factor", torch.zeros(rows, rank, *shape))
        self.register_buffer("std", torch.ones(rows, *shape))

    @classmethod
    def fit(
        cls, x0: Tensor, labels: Tensor | None = None, num_classes: int | None = None, rank: int | None = None
    ) -> "GaussianPriorModel":
        """The distribution with the mean and the variances of samples, and of their covariances those along the largest
        principal components; with all of these, any covariance.

        Args:
            x0: Clean samples of the denoiser, shape `(samples, channels, *size)`.
            labels, num_classes: int64, shape `(samples,)`, and how many there are, for a distribution of each.
                Labels without samples have that of all.
            rank: Number of components; by default all up to `MOST_NUMBERS` numbers, or else `DEFAULT_RANK`.

        Raises:
            ValueError: if there are fewer than 2 samples, or they are not finite; or if labels and their number are not both
                given, or do not fit.
        """
        if len(x0) < 2 or not x0.isfinite().all():
            raise ValueError(f"x0 must be at least 2 finite samples, got {len(x0)}")
        if (labels is None) != (num_classes is None):
            raise ValueError("labels and num_classes must be given together, or neither")
        if labels is not None:
            if labels.shape != x0.shape[:1]:
                raise ValueError(f"labels must be one for each of the {len(x0)} samples, got {tuple(labels.shape)}")
            if not ((labels >= 0) & (labels <= num_classes)).all():
                raise ValueError(f"labels must be in [0, {num_classes}], got {labels.min()} to {labels.max()}")
        shape, rows = x0.shape[1:], 1 if num_classes is None else num_classes + 1
        if rank is None:
            rank = x0[0].numel() if rows * x0[0].numel() ** 2 <= MOST_NUMBERS else DEFAULT_RANK
        model = cls(tuple(shape[1:]), shape[0], rank, num_classes, dims=len(shape) - 1)
        overall = _fit(x0, rank)
        for row in range(rows):
            mine = x0 if row == rows - 1 else x0[labels == row]
            parts = overall if row == rows - 1 or not len(mine) else _fit(mine, rank)
            for buffer, part in zip((model.mean, model.factor, model.std), parts, strict=True):
                buffer[row] = part.view_as(buffer[row])
        return model

    def sample(
        self,
        num_samples: int,
        labels: Tensor | None = None,
        generator: Generator | list[Generator] | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draws, float32, shape `(num_samples, channels, *size)`.

        Args:
            labels: int64, shape `(num_samples,)` or `(1,)`, where `num_classes` stands for no label; or `None`.
            generator: Source of the noise. With a list, draw i depends on generator i alone.

        Raises:
            ValueError: for sets or weights of labels, which have no distribution of their own.
        """
        device = self.mean.device if device is None else device
        mean, factor, std = (buffer[self.rows(labels)].to(device) for buffer in (self.mean, self.factor, self.std))
        shape = (num_samples, *self.mean.shape[1:])
        along = draw_normal((num_samples, factor.shape[1]), generator=generator, device=device, dtype=torch.float32)
        rest = draw_normal(shape, generator=generator, device=device, dtype=torch.float32)
        directions = torch.einsum("nr,nrd->nd", along, factor.flatten(2).expand(num_samples, -1, -1))
        return mean + directions.view(shape) + std * rest

    forward = sample

    def rows(self, labels: Tensor | None) -> Tensor:
        """The rows of the buffers for these labels.

        Raises:
            ValueError: as `sample`.
        """
        if self.config.num_classes is None:
            return torch.zeros(1, dtype=torch.int64)
        if labels is None:
            return torch.tensor([self.config.num_classes])
        if labels.dtype != torch.int64:
            raise ValueError("a prior by label needs one label for each image: sets and weights have no distribution")
        return labels.cpu()

    def covariance(self, row: int = 0) -> Tensor:
        """Of all values of a sample, float64, shape `(values, values)`."""
        factor, std = self.factor[row].flatten(1).double(), self.std[row].flatten().double()
        return factor.T @ factor + torch.diag(std.square())


def _fit(x0: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, factor `(rank, values)` and standard deviations of what the factor leaves, float64."""
    x0 = x0.flatten(1).cpu().double()
    mean = x0.mean(0)
    centred = (x0 - mean) / len(x0) ** 0.5
    variance, width = centred.square().sum(0), x0.shape[1]
    if width <= LARGEST_COVARIANCE:
        values, vectors = torch.linalg.eigh(centred.T @ centred)
        values, vectors = values[width - rank :].clamp(min=0), vectors[:, width - rank :].T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            _, roots, vectors = torch.svd_lowrank(centred, q=min(rank + 8, *centred.shape), niter=4)
        values, vectors = roots[:rank].square(), vectors[:, :rank].T
    factor = torch.zeros(rank, width, dtype=torch.float64)
    factor[: len(values)] = values.sqrt()[:, None] * vectors
    return mean, factor, (variance - factor.square().sum(0)).clamp(min=0).sqrt()
