"""The best variance of a reverse transition, from the mean squared error of the predicted x_0 (Analytic-DPM).

Given x_t, the mean of p(x_s | x_t) is that of the posterior of the predicted x_0, and what it cannot know is the x_0:

    variance = std(t, s)^2 + c(t, s)^2 v_t

with the posterior's standard deviation, the factor c that its mean has x_0 with, and v_t = E|x_0 - x_0_hat|^2 of one
coordinate. For the best network v_t = (sigma_t / alpha_t)^2 (1 - E|eps_hat|^2), which makes it the variance of the paper; for any
other v_t as measured gives the least bound (Bao et al. 2022b).

References:
    Bao et al. 2022, Analytic-DPM, arXiv 2201.06503.
    Bao et al. 2022b, Estimating the Optimal Covariance with Imperfect Mean in Diffusion Probabilistic Models,
    arXiv 2206.07309.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from diffusers_ext.diffusion.noising import (
    Factor,
    NoiseLevel,
    NoiseSchedule,
    Transition,
    add_noise,
    posterior_std,
    predict_x0,
)
from diffusers_ext.draws import draw_normal
from diffusers_ext.machine import widest_float


Denoise = Callable[[Tensor, Tensor], Tensor]

# E|n| = MEAN_MAGNITUDE std of a normal n of mean 0.
MEAN_MAGNITUDE = math.sqrt(2 / math.pi)

# Two steps of a pixel in 8 bits, for data in [-1, 1]: more noise than that in the last step that draws any can be seen. The
# paper's bound on its last standard deviation, there of one or two steps by data set.
VISIBLE_NOISE = 2 * 2 / 255

# Standard deviation of a predicted x_0, for which a density is finite.
SMALLEST_ERROR = 1e-6


def analytic_variance(t: NoiseLevel, s: NoiseLevel, x0_variance: Factor, eta: Factor = 1.0) -> Factor:
    """Variance of p(x_s | x_t) for a prediction of x_0 that is off by `x0_variance` (Analytic-DPM).

    Args:
        t, s: Noise levels of x_t and of the result; t has noise.
        x0_variance: v_t, the mean squared error of a coordinate of the predicted x_0.
        eta: Of the posterior, in [0, 1]; at 1 that of the noising chain, at 0 of the paper's Analytic-DDIM.
    """
    std = posterior_std(t, s, eta)
    of_x0 = s.alpha - (s.sigma**2 - std**2) ** 0.5 * t.alpha / t.sigma
    return std**2 + of_x0**2 * x0_variance


def analytic_std(at: Transition, eta: Factor = 1.0) -> Factor:
    """The standard deviation that follows from `analytic_variance` and the limit that the step has."""
    std = analytic_variance(at.t, at.s, at.x0_variance, eta) ** 0.5
    return std.minimum(at.largest_std) if isinstance(std, Tensor) else min(std, at.largest_std)


def within_bounds(x0_variance: Tensor, level: NoiseLevel, largest_x0: float | None = None) -> Tensor:
    """Estimates of v_t clipped to what it can be, whatever the data (Analytic-DPM).

    It is at least 0, at most (sigma / alpha)^2, and for data in [-r, r] at most r^2: the paper's bounds on the variance,
    carried over to v_t. An estimate is off for a network that is, and by chance.

    Args:
        largest_x0: r; None if the data have no end.
    """
    largest = (level.sigma / level.alpha.clamp(min=1e-150)) ** 2
    if largest_x0 is not None:
        largest = largest.clamp(max=largest_x0**2)
    return x0_variance.clamp(min=0).minimum(largest)


@dataclass(frozen=True)
class PredictionMoments:
    """Sums over the coordinates of images of how a network predicts, at each of some timesteps, float64.

    Attributes:
        x0_error: Of |x_0 - x_0_hat|^2, with x_0_hat as the sampler clips it, shape `(timesteps,)`.
        x0_square: Of |x_0|^2.
        count: Number of coordinates.
        last_nats: Of -log p(x_0 | x_t) if the step from here is the last one, shape `(timesteps,)`; NaN if not asked for.
    """

    x0_error: Tensor
    x0_square: float
    count: int
    last_nats: Tensor

    def __add__(self, other: "PredictionMoments") -> "PredictionMoments":
        return PredictionMoments(
            self.x0_error + other.x0_error,
            self.x0_square + other.x0_square,
            self.count + other.count,
            self.last_nats + other.last_nats,
        )

    @property
    def x0_variance(self) -> Tensor:
        """v_t as measured."""
        return self.x0_error / self.count


@torch.no_grad()
def measure_prediction(
    denoise: Denoise,
    batches: Iterable[Tensor],
    schedule: NoiseSchedule,
    timesteps: Tensor,
    prediction_type: str,
    *,
    clip: Callable[[Tensor], Tensor] | None = None,
    generator: Generator | None = None,
    noise: Callable[[int], Tensor] | None = None,
    decoder: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
) -> PredictionMoments:
    """How a network predicts these images at these timesteps.

    Args:
        denoise: The model, from x_t and timesteps of shape `(batch,)` to its output, of the shape of x_t.
        batches: Images in [-1, 1] or latents, each of shape `(batch, channels, ...)`.
        timesteps: int64, on the CPU, shape `(timesteps,)`.
        clip: What the sampler does to the predicted x_0.
        noise: The unit noise for timestep number i, of the shape of the images, instead of a generator.
        decoder: The cost in nats of each coordinate of x_0, given it, a mean and a standard deviation. The latter is taken
            to be the error of x_0 in the batch.

    Raises:
        ValueError: If there are no images, or the model's output has another shape.
    """
    error, last = (torch.zeros(len(timesteps), dtype=torch.float64, device="cpu") for _ in range(2))
    x0_square, count = 0.0, 0
    for x0 in batches:
        count += x0.numel()
        x0_square += x0.to(widest_float(x0.device)).square().sum().item()
        for i, timestep in enumerate(timesteps.tolist()):
            eps = noise(i) if noise else draw_normal(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
            at = torch.full((len(x0),), timestep, device="cpu")
            level = schedule.level(timestep, x0)
            x_t = add_noise(x0, eps, level)
            output = denoise(x_t, schedule.labels(at).to(x0.device)).to(x0.dtype)
            if output.shape != x0.shape:
                raise ValueError(
                    f"the model's output must have shape {tuple(x0.shape)}, got {tuple(output.shape)}: leave its variances out"
                )
            x0_hat = predict_x0(output, x_t, level, prediction_type)
            x0_hat = x0_hat if clip is None else clip(x0_hat)
            squares = (x0 - x0_hat).square()
            error[i] += squares.sum().cpu().double()
            std = squares.mean().sqrt().clamp(min=SMALLEST_ERROR)
            last[i] += math.nan if decoder is None else decoder(x0, x0_hat, std).sum().cpu().double()
    if not count:
        raise ValueError("batches must hold at least one image, got none")
    return PredictionMoments(error, x0_square, count, last)


class X0Variances:
    """v_t of all timesteps, from those at some of them: its log is interpolated over the log SNR.

    Args:
        table: As a scheduler's config has it: "timesteps", ascending, and "x0_variance", of equal length; and perhaps
            "last_noise", the largest mean magnitude of the noise of the last step that draws any, on the scale of the data
            (`VISIBLE_NOISE`).
        schedule: The path that it was measured on.

    Raises:
        ValueError: If it is no such table.
    """

    def __init__(self, table: Mapping[str, Any], schedule: NoiseSchedule):
        unknown = sorted(set(table) - {"timesteps", "x0_variance", "last_noise"})
        if unknown or not {"timesteps", "x0_variance"} <= set(table):
            raise ValueError(
                "analytic_variance must have 'timesteps' and 'x0_variance', and perhaps 'last_noise', got "
                f"{', '.join(map(repr, table)) or 'nothing'}"
            )
        timesteps, values = np.asarray(table["timesteps"]), np.asarray(table["x0_variance"], dtype=np.float64)
        length = len(schedule)
        whole = timesteps.ndim == 1 and len(timesteps) and (timesteps == timesteps.astype(np.int64)).all()
        if not whole or (np.diff(timesteps) <= 0).any() or timesteps[0] < 0 or timesteps[-1] >= length:
            raise ValueError(
                f"the timesteps of analytic_variance must be integers in [0, {length - 1}], ascending, got {timesteps!r}"
            )
        if values.shape != timesteps.shape or not (np.isfinite(values) & (values >= 0)).all():
            raise ValueError(
                f"x0_variance of analytic_variance must have {len(timesteps)} numbers of at least 0, one for each of its "
                f"timesteps, got {values!r}"
            )
        last_noise = table.get("last_noise")
        if last_noise is not None and not last_noise > 0:
            raise ValueError(f"last_noise of analytic_variance must be above 0, got {last_noise!r}")
        self.largest_last_std = math.inf if last_noise is None else last_noise / MEAN_MAGNITUDE
        # Rises with the noise; at levels without signal, infinite, the value of the noisiest one that has some.
        log_nsr = -log_snr(schedule)
        log_nsr = np.minimum(log_nsr, np.finfo(np.float64).max)
        logs = np.log(np.maximum(values, 1e-300))
        self.values = torch.from_numpy(np.exp(np.interp(log_nsr, log_nsr[timesteps.astype(np.int64)], logs)))


def log_snr(schedule: NoiseSchedule) -> np.ndarray:
    """Of all timesteps, minus infinity where there is no signal; float64, shape `(T,)`."""
    with np.errstate(divide="ignore"):
        return 2 * (np.log(schedule.alpha[:-1].numpy()) - np.log(schedule.sigma[:-1].numpy()))
