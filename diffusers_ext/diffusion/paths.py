"""Gaussian paths in continuous time: x_t = alpha(t) x_0 + sigma(t) eps for t in [0, 1], from data to noise.

Each path is the solution of a linear stochastic differential equation

    dx = f(t) x dt + g(t) dw,    f = d log alpha / dt,    g^2 = -sigma^2 d log snr / dt

(Kingma et al. 2021, Appendix; for the three SDEs of Song et al. 2020 these are their Eqs. 30, 32 and 34). Between two of
its levels the formulas of `diffusers_ext.diffusion.noising` hold, whatever the path.

All paths are the same up to scale: with h = sqrt(alpha^2 + sigma^2), x_t / h is on a variance-preserving path of the same
signal-to-noise ratio. So a path is a choice of levels and of the scale at which the network sees them.

References:
    Song et al. 2020, Score-Based Generative Modeling through Stochastic Differential Equations, arXiv 2011.13456.
    Nichol, Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672 (cosine).
    Kingma, Salimans, Poole, Ho 2021, Variational Diffusion Models, arXiv 2107.00630.
    Liu, Gong, Liu 2022, Flow Straight and Fast (rectified flow), arXiv 2209.03003.
    Lipman et al. 2022, Flow Matching for Generative Modeling, arXiv 2210.02747 (linear).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_ext.diffusion.betas import check_integer
from diffusers_ext.diffusion.noising import NoiseLevel, NoiseSchedule


class Path(ABC):
    """A path by its functions of time. Times are tensors in [0, 1]; results have their shape and dtype."""

    @abstractmethod
    def level(self, t: Tensor) -> NoiseLevel:
        """alpha(t) and sigma(t)."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t), which the SDE multiplies x by."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """g(t), the standard deviation of the noise by root of time."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """The t at which the log of the signal-to-noise ratio is `log_snr`: the inverse of `log_snr`."""

    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2), which falls with t."""
        alpha, sigma = self.level(t)
        return 2 * (alpha.log() - sigma.log())


@dataclass(frozen=True)
class VariancePreserving(Path):
    """alpha^2 + sigma^2 = 1, with a beta(t) that rises evenly: DDPM in continuous time (Song et al. 2020, Eqs. 32-33).

    Args:
        beta_min, beta_max: beta at t = 0 and at t = 1, by unit of time: T times those of a chain of T steps.

    Raises:
        ValueError: If not 0 <= beta_min < beta_max.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        if not 0 <= self.beta_min < self.beta_max < math.inf:
            raise ValueError(
                f"beta_min must be at least 0 and less than beta_max, got {self.beta_min} and {self.beta_max}"
            )

    def level(self, t: Tensor) -> NoiseLevel:
        integral = self._integral(t)
        return NoiseLevel((-0.5 * integral).exp(), (-integral).expm1().neg().sqrt())

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * self._beta(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self._beta(t).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return self._time_of(torch.nn.functional.softplus(-log_snr))  # alpha^2 is the sigmoid of log snr

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t: Tensor) -> Tensor:
        """Of beta from 0 to t."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def _time_of(self, integral: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())


@dataclass(frozen=True)
class SubVariancePreserving(VariancePreserving):
    """The alpha of `VariancePreserving` with the smaller noise sigma = 1 - alpha^2 (Song et al. 2020, Eqs. 34-35)."""

    def level(self, t: Tensor) -> NoiseLevel:
        integral = self._integral(t)
        return NoiseLevel((-0.5 * integral).exp(), (-integral).expm1().neg())

    def diffusion(self, t: Tensor) -> Tensor:
        return (self._beta(t) * (-2 * self._integral(t)).expm1().neg()).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        ratio = (0.5 * log_snr).exp()  # alpha / (1 - alpha^2), a quadratic equation for alpha
        return self._time_of(-2 * (2 * ratio / (1 + (1 + 4 * ratio.square()).sqrt())).log())


@dataclass(frozen=True)
class Cosine(Path):
    """alpha^2 + sigma^2 = 1, with alpha a cosine of time (Nichol & Dhariwal 2021, Eq. 17).

    It ends without signal, where drift and diffusion are infinite.

    Args:
        offset: The s of the paper, which keeps the first levels from being all but clean.
    """

    offset: float = 0.008

    def __post_init__(self):
        if not 0 <= self.offset < math.inf:
            raise ValueError(f"offset must be at least 0, got {self.offset}")

    def level(self, t: Tensor) -> NoiseLevel:
        # The cosine of the angle, which at the end is 0 to the last digit.
        alpha = ((1 - t) * self._slope).sin() / math.cos(self._first)
        # sin(a)^2 - sin(a_0)^2 = sin(a + a_0) sin(a - a_0), without the difference of two cosines near 1.
        angle = self._angle(t)
        sigma = ((angle + self._first).sin() * (t * self._slope).sin()).sqrt() / math.cos(self._first)
        return NoiseLevel(alpha, sigma.clamp(max=1))

    def drift(self, t: Tensor) -> Tensor:
        return -self._slope * self._angle(t).tan()

    def diffusion(self, t: Tensor) -> Tensor:
        return (-2 * self.drift(t)).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return ((log_snr.sigmoid().sqrt() * math.cos(self._first)).acos() - self._first) / self._slope

    @property
    def _slope(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    @property
    def _first(self) -> float:
        return self.offset * self._slope

    def _angle(self, t: Tensor) -> Tensor:
        return (t + self.offset) * self._slope


@dataclass(frozen=True)
class VarianceExploding(Path):
    """alpha = 1, with a sigma that rises geometrically (Song et al. 2020, Eqs. 30-31).

    Args:
        sigma_min, sigma_max: sigma at t = 0 and at t = 1. The largest should be as large as the largest distance between
            two images (Song & Ermon 2020, Technique 1): 50 for 32x32 RGB images in [-1, 1].

    Raises:
        ValueError: If not 0 < sigma_min < sigma_max.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"sigma_min must be above 0 and less than sigma_max, got {self.sigma_min} and {self.sigma_max}"
            )

    def level(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel(torch.ones_like(t), self.sigma_min * (t * self._log_ratio).exp())

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.level(t).sigma * (2 * self._log_ratio) ** 0.5

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr - math.log(self.sigma_min)) / self._log_ratio

    @property
    def _log_ratio(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class Linear(Path):
    """alpha = 1 - t and sigma = t: rectified flow, whose velocity eps - x_0 is the same at all times.

    It ends without signal, where drift and diffusion are infinite.
    """

    def level(self, t: Tensor) -> NoiseLevel:
        return NoiseLevel(1 - t, t)

    def drift(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def diffusion(self, t: Tensor) -> Tensor:
        return (2 * t / (1 - t)).sqrt()

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr).sigmoid()


# The paths by their names in configs and options.
PATHS = {
    "vp": VariancePreserving,
    "cosine": Cosine,
    "ve": VarianceExploding,
    "subvp": SubVariancePreserving,
    "linear": Linear,
}


class PathSchedule(NoiseSchedule):
    """T levels of a continuous path, at the times 1/T, 2/T, ..., 1, and the data.

    Args:
        path: The path.
        num_train_timesteps: T; timestep i is at time (i + 1) / T.
        first_label: What a network is given for timestep 0, and so on upwards: 1 where it is given T t.

    Raises:
        ValueError: If a level is the data already.
    """

    def __init__(self, path: Path, num_train_timesteps: int, first_label: int = 0):
        check_integer("num_train_timesteps", num_train_timesteps)
        self.path, self.first_label = path, first_label
        times = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64, device="cpu") / num_train_timesteps
        alpha, sigma = path.level(times)
        clean_end = torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu")
        self._set_levels(torch.cat([alpha, clean_end[:1]]), torch.cat([sigma, clean_end[1:]]))


class ContinuousTime:
    """The levels of a schedule at timesteps that need not be whole, in [0, T - 1].

    Those of a continuous path are exact. Between the timesteps of a table, which must preserve the variance, the log of
    the angle is interpolated linearly.

    Args:
        schedule: Each of its steps must add noise.

    Raises:
        ValueError: If one does not, or the schedule is a table of levels of any scale.
    """

    def __init__(self, schedule: NoiseSchedule):
        self.schedule, self.labels = schedule, schedule.labels
        self._path = schedule.path if isinstance(schedule, PathSchedule) else None
        if self._path is None and not schedule.preserves_variance:
            raise ValueError("between the levels of a table of any scale there is no path: give a PathSchedule")
        self._log_angle = torch.atan2(schedule.sigma[:-1], schedule.alpha[:-1]).log()  # float64, shape (T,)
        if not (self._log_angle.diff() > 0).all():
            raise ValueError("the path must add noise at each of its steps, or time is no function of the noise level")

    def angle(self, timestep: Tensor) -> Tensor:
        """The angle at each timestep, float64, on the CPU."""
        timestep = timestep.cpu().double()
        if self._path is not None:
            level = self._level(timestep)
            return torch.atan2(level.sigma, level.alpha)
        low = timestep.floor().long().clamp(0, max(0, len(self._log_angle) - 2))
        high = (low + 1).clamp(max=len(self._log_angle) - 1)
        return torch.lerp(self._log_angle[low], self._log_angle[high], timestep - low).exp()

    def timestep(self, angle: Tensor) -> Tensor:
        """The timestep of each angle, float64, on the CPU."""
        angle = angle.cpu().double()
        if self._path is not None:
            return len(self.schedule) * self._path.time(-2 * angle.tan().log()) - 1
        log_angle = angle.log()
        high = torch.searchsorted(self._log_angle, log_angle).clamp(1, len(self._log_angle) - 1)
        start, end = self._log_angle[high - 1], self._log_angle[high]
        return high - 1 + (log_angle - start) / (end - start)

    def scale(self, timestep: Tensor) -> Tensor:
        """sqrt(alpha^2 + sigma^2) at each timestep, float64, on the CPU."""
        timestep = timestep.cpu().double()
        return torch.ones_like(timestep) if self._path is None else self._level(timestep).scale

    def _level(self, timestep: Tensor) -> NoiseLevel:
        return self._path.level((timestep + 1) / len(self.schedule))
