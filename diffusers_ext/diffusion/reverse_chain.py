"""The reverse chain of a sampler: its transitions t -> s, and what it says of x_s at each of them.

    p(x_s | x_t) = N(mean of q(x_s | x_t, x0_hat), std^2)

with the standard deviation fixed, learned or measured (`REVERSE_VARIANCES`).

References:
    DDPM: Ho, Jain, Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    Nichol, Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672.
    Bao et al. 2022, Analytic-DPM, arXiv 2201.06503 (optimal variances).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_ext.diffusion.noising import (
    LEARNED_VARIANCES,
    NoiseLevel,
    NoiseSchedule,
    Normal,
    learned_log_std,
    posterior,
    posterior_std,
    transition_std,
)
from diffusers_ext.diffusion.tables import DeviceTable
from diffusers_ext.diffusion.timesteps import check_timesteps


# "optimal" needs a chain with variances of its own, as `optimal_variances` measures them.
REVERSE_VARIANCES = ("fixed_small", "fixed_large", *LEARNED_VARIANCES, "optimal")


class ReverseStep(NamedTuple):
    """The transition t -> s as far as it does not depend on the model; each entry broadcasts against x_t.

    The log standard deviations are those of the posterior, of the noising transition, and the chain's own.
    """

    t_alpha: Tensor
    t_sigma: Tensor
    s_alpha: Tensor
    s_sigma: Tensor
    log_std_small: Tensor
    log_std_large: Tensor
    log_std_optimal: Tensor

    @property
    def t(self) -> NoiseLevel:
        return NoiseLevel(self.t_alpha, self.t_sigma)

    @property
    def s(self) -> NoiseLevel:
        return NoiseLevel(self.s_alpha, self.s_sigma)


class ReverseChain:
    """The transitions t -> s of a sampler, from the noisiest timestep of a list down to the data.

    Transition i goes from `timesteps[i]` to the one before it, and transition 0 to the data; over all timesteps,
    transition t is that from timestep t. The posterior of transition 0 has no variance of its own; its place in the
    table takes that of transition 1, as in the code of DDPM (of a chain of one, that of the noising transition).

    Args:
        schedule: The noising path; it must end at the data, without noise.
        timesteps: Strictly descending, as a scheduler lists them; all of them by default.
        variances: The reverse variances of "optimal", one for each transition, that of transition 0 first.

    Attributes:
        timesteps: Ascending, int64, shape `(n,)`.

    Raises:
        ValueError: If the list is none that a sampler can visit, the path ends in noise, or the variances do not fit.
    """

    def __init__(
        self, schedule: NoiseSchedule, timesteps: Sequence[int] | None = None, variances: Tensor | None = None
    ):
        if schedule.sigma[-1] != 0:
            raise ValueError(
                "the likelihood is that of data, at which the path must end: final_alpha_bar must be 1, got "
                f"{schedule.alpha_bar[-1]:.6g} (set_alpha_to_one=True makes it 1)"
            )
        self.schedule = schedule
        length = len(schedule)
        timesteps = range(length - 1, -1, -1) if timesteps is None else timesteps
        self.timesteps = torch.tensor(check_timesteps(timesteps, length)[::-1].copy(), device="cpu")
        like = torch.zeros(1, dtype=torch.float64, device="cpu")
        t = schedule.level(self.timesteps, like)
        s = schedule.level(torch.cat([torch.tensor([-1], device="cpu"), self.timesteps[:-1]]), like)
        small, large = posterior_std(t, s), transition_std(t, s)
        small[0] = small[1] if len(small) > 1 else large[0]
        optimal = torch.full_like(small, math.nan)
        if variances is not None:
            variances = torch.as_tensor(variances, dtype=torch.float64, device="cpu")
            if variances.shape != small.shape or not (variances > 0).all():
                raise ValueError(
                    f"variances must be positive and of shape ({len(small)},), one for each transition, got "
                    f"{tuple(variances.shape)} from {variances.min():.3g} up"
                )
            optimal = variances.sqrt()
        self.has_variances = variances is not None
        columns = ReverseStep(*t, *s, small.log(), large.log(), optimal.log())
        self._table = DeviceTable(torch.stack(columns, dim=-1))

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, index: Tensor, like: Tensor) -> ReverseStep:
        """Transitions `index`, int64, one or one for each sample, broadcasting against `like` and on its device."""
        return ReverseStep(*self._table.gather(index, like))

    def at_noise(self, like: Tensor) -> NoiseLevel:
        """The noisiest level, where sampling starts from N(0, h^2), h its scale."""
        return self.schedule.level(int(self.timesteps[-1]), like)


def split_output(output: Tensor, variance: str) -> tuple[Tensor, Tensor | None]:
    """A model's output as its prediction and, if the variance is learned, the second half of its channels."""
    if variance not in LEARNED_VARIANCES:
        return output, None
    prediction, variance_output = output.chunk(2, dim=1)
    return prediction, variance_output


def reverse_log_std(step: ReverseStep, variance: str, variance_output: Tensor | None = None) -> Tensor:
    """Log standard deviation of p(x_s | x_t), for each of `REVERSE_VARIANCES`.

    Args:
        variance_output: Second half of the model's channels, for the learned ones (`learned_log_std`).
    """
    match variance:
        case "fixed_small":
            return step.log_std_small
        case "fixed_large":
            return step.log_std_large
        case "learned" | "learned_range":
            return learned_log_std(variance, variance_output, step.log_std_small, step.log_std_large)
        case "optimal":
            return step.log_std_optimal
    raise ValueError(f"variance must be one of {', '.join(REVERSE_VARIANCES)}, got {variance!r}")


def reverse_transition(x0_hat: Tensor, x_t: Tensor, step: ReverseStep, log_std: Tensor) -> Normal:
    """p(x_s | x_t), with the mean of the posterior of the predicted x_0."""
    return Normal(posterior(x0_hat, x_t, step.t, step.s).mean, log_std.exp())


def check_variance(chain: ReverseChain, variance: str) -> None:
    """Refuses a kind of variance that there is none of, or that this chain has no table for."""
    if variance not in REVERSE_VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(REVERSE_VARIANCES)}, got {variance!r}")
    if variance == "optimal" and not chain.has_variances:
        raise ValueError("the variance 'optimal' needs a chain with variances: measure them with optimal_variances")
