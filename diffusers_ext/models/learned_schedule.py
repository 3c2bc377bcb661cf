"""A noise schedule whose numbers are trained with the network (Variational Diffusion Models: Kingma et al. 2021).

    gamma(t) = -log snr(t) = gamma_0 + (gamma_1 - gamma_0) s(t),    s from 0 at t = 0 to 1 at t = 1

The bound in continuous time depends on the endpoints gamma_0 and gamma_1 alone, and not on s. So the endpoints
are learned by the bound, and s by what it does change, the variance of the bound's estimate.

Reference: Kingma, Salimans, Poole, Ho 2021, Variational Diffusion Models, arXiv 2107.00630.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusers_ext.diffusion.noising import NoiseLevel, NoiseSchedule
from diffusers_ext.machine import widest_float


# These few numbers move so many times as fast as the weights of the network, whose optimizer they share.
RATE = 10.0

# Slopes of the steps that t(s) is made of, from one that spans all of [0, 1] to one that spans a few hundredths of it.
SLOPES = (4.0, 64.0)

# The share of the times that stays evenly spread over s, whatever is learned: no level is drawn less than so often beside a
# linear interior, and no sample weighs more than 1 / UNIFORM_SHARE times as much. Without it levels that are hardly ever
# drawn have weights so large that the schedule, and the network with it, runs away. Of the best interior the second moment
# is at most 1 / (1 - UNIFORM_SHARE) times as large for it (a defensive mixture: Hesterberg 1995).
UNIFORM_SHARE = 0.1

# Of [0, 1], in which t(s) is inverted, and the steps in each, which leave only rounding.
NUM_INTERVALS, NEWTON_STEPS = 512, 10


class Interior(NamedTuple):
    """s(t) and ds/dt, of the shape of t."""

    share: Tensor
    slope: Tensor


class LearnedSchedule(nn.Module):
    """gamma(t) with two trained endpoints and a trained or a linear interior.

    The interior is the inverse of a monotone network of one hidden layer with positive weights (that of Kingma et al. 2021,
    there not inverted): t(s), a sum of a line and of sigmoids, whose derivative is the density of the levels that are drawn,
    and has a floor (`UNIFORM_SHARE`). All trained numbers are offsets from what they start at, which is next to linear.

    Args:
        gamma_0, gamma_1: Where the endpoints start. At gamma_0 = -13.3 the noise is a sixth of the distance of two values
            of 8 bits; at gamma_1 = 5 next to nothing is left of the signal.
        num_features: Width of the hidden layer; 0 for a linear interior.

    Raises:
        ValueError: if gamma_0 is not below gamma_1, or `num_features` is negative.
    """

    def __init__(self, gamma_0: float = -13.3, gamma_1: float = 5.0, num_features: int = 256):
        super().__init__()
        if not -math.inf < gamma_0 < gamma_1 < math.inf:
            raise ValueError(f"gamma_0 must be less than gamma_1, got {gamma_0} and {gamma_1}")
        if num_features < 0:
            raise ValueError(f"num_features must be at least 0, got {num_features}")
        self.first_endpoints = (float(gamma_0), float(gamma_1))
        self.num_features = num_features
        self.endpoint_offsets = nn.Parameter(torch.zeros(2))
        if num_features:
            # Of the log slopes, the centres and the log weights of the sigmoids.
            self.offsets = nn.Parameter(torch.zeros(3, num_features))

    @property
    def endpoints(self) -> Tensor:
        """gamma_0 and gamma_1, with gradients."""
        return self.endpoint_offsets.new_tensor(self.first_endpoints) + RATE * self.endpoint_offsets

    def interior(self, t: Tensor) -> Interior:
        """s and its derivative at times in [0, 1], float32 or wider, shape `(batch,)`."""
        if not self.num_features:
            return Interior(t, torch.ones_like(t))
        start = self._invert(t.detach())
        time, density = self._time(start)
        # The value of `start`, with the gradients of the inverse function.
        share = start + (t - t.detach() - (time - time.detach())) / density.detach()
        return Interior(share, 1 / self._time(share)[1])

    def _time(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """t of these s, and dt/ds, the density in which uniform times fall on s."""
        ends = share.new_tensor([0.0, 1.0])
        value, slope = self._unscaled(torch.cat([share, ends]))
        low, height = value[-2], value[-1] - value[-2]
        time, density = (value[:-2] - low) / height, slope[:-2] / height
        return torch.lerp(time, share, UNIFORM_SHARE), UNIFORM_SHARE + (1 - UNIFORM_SHARE) * density

    @torch.no_grad()
    def _invert(self, t: Tensor) -> Tensor:
        """s of these t: the interval of a grid that it is in, from its chord Newton's method, and bisection where that leaves."""
        grid = torch.linspace(0, 1, NUM_INTERVALS + 1, dtype=t.dtype, device=t.device)
        times = self._time(grid)[0].contiguous()
        last = torch.searchsorted(times, t).clamp(1, NUM_INTERVALS)
        low, high = grid[last - 1], grid[last]
        share = torch.lerp(low, high, (t - times[last - 1]) / (times[last] - times[last - 1]))
        for _ in range(NEWTON_STEPS):
            time, density = self._time(share)
            low, high = torch.where(time < t, share, low), torch.where(time < t, high, share)
            newton = share - (time - t) / density
            share = torch.where((low <= newton) & (newton <= high), newton, (low + high) / 2)
        return share

    def _unscaled(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """A monotone function and its derivative: a line and sigmoids."""
        number, like = self.num_features, {"dtype": share.dtype, "device": share.device}
        log_slope, centre, log_weight = (RATE * self.offsets.to(share)).unbind()
        spread = torch.arange(number, **like) / max(number - 1, 1)
        # Neighbours in place have slopes far apart: multiples of the golden ratio fill the range evenly.
        of_slopes = (torch.arange(number, **like) * ((5**0.5 - 1) / 2)) % 1
        slope = SLOPES[0] * (SLOPES[1] / SLOPES[0]) ** of_slopes * log_slope.exp()
        weight = log_weight.exp() / number
        step = (slope * (share[:, None] - spread - 0.1 * centre)).sigmoid()
        return share + (weight * step).sum(1), 1 + (weight * slope * step * (1 - step)).sum(1)

    def forward(self, t: Tensor) -> Tensor:
        """gamma at times in [0, 1], shape `(batch,)`."""
        gamma_0, gamma_1 = self.endpoints.to(t)
        return gamma_0 + (gamma_1 - gamma_0) * self.interior(t).share

    @torch.no_grad()
    def log_snr_table(self, num_timesteps: int) -> Tensor:
        """Log snr of T timesteps that are even in it between the endpoints, the cleanest first; float64, on the CPU.

        They are the timesteps that the network is given, and depend on the endpoints alone.
        """
        gamma_0, gamma_1 = self.endpoints.cpu().double()
        return -torch.lerp(gamma_0, gamma_1, torch.linspace(0, 1, num_timesteps, dtype=torch.float64))

    @torch.no_grad()
    def timesteps(self, num_timesteps: int, num_times: int = 101) -> list[float]:
        """The timestep, in [0, T - 1], that each of evenly spaced times from 0 to 1 is at: the interior as a table."""
        device = self.endpoint_offsets.device
        times = torch.linspace(0, 1, num_times, dtype=widest_float(device), device=device)
        return ((num_timesteps - 1) * self.interior(times).share).tolist()


def level_of(gamma: Tensor, like: Tensor) -> NoiseLevel:
    """alpha and sigma of variance-preserving levels with log snr -gamma, shape `(batch,)`, broadcasting against `like`."""
    gamma = gamma.view(-1, *[1] * (like.ndim - 1))
    return NoiseLevel((-gamma).sigmoid().sqrt(), gamma.sigmoid().sqrt())


def schedule_of_log_snr(log_snr: Tensor) -> NoiseSchedule:
    """The variance-preserving levels of a log signal-to-noise ratio, shape `(T,)`, the cleanest first."""
    return NoiseSchedule.from_levels(log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt())


def learned_betas(noise_schedule: LearnedSchedule, num_timesteps: int) -> dict[str, list[float]]:
    """The schedule as entries of a scheduler's config: `trained_betas`, and the interior as `_learned_timesteps`.

    These are the timesteps of the times 0, .01, ..., 1; `diffusers_ext.schedulers.levels.learned_timesteps` makes of them
    what a sampler is to visit. (Of a key that begins so the classes of diffusers keep what they do not know.)
    """
    schedule = schedule_of_log_snr(noise_schedule.log_snr_table(num_timesteps))
    timesteps = [round(timestep, 4) for timestep in noise_schedule.timesteps(num_timesteps)]
    return {"trained_betas": schedule.betas.tolist(), "_learned_timesteps": timesteps}
