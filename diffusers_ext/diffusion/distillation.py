"""What a student of few steps is trained towards: the x_0 of two steps at once, and the x_0 of a cleaner level.

    t, u, s    three noise levels, each cleaner than the one before
    tau        sigma / alpha, the noise level of a path without scaling
    phi        angle of a level, atan(sigma / alpha), from 0 at the data to pi / 2 at pure noise

A progressive student makes one DDIM step of two of its teacher's. A consistency model has one predicted x_0 for all points of
a trajectory of the probability flow, so that its prediction at t is trained towards its own at a cleaner r; as r comes to t
during the training, a denoiser, for which r is the data, becomes such a model.

References:
    Salimans, Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
    Song et al. 2023, Consistency Models, arXiv 2303.01469.
    Geng et al. 2024, Consistency Models Made Easy, arXiv 2406.14548 (easy consistency tuning, ECT).
"""

import torch
from torch import Tensor

from diffusers_ext.diffusion.noising import Factor, NoiseLevel, NoiseSchedule, posterior
from diffusers_ext.diffusion.timesteps import check_number_of_steps


# The weight of the distance between predictions at t and r: one over how far apart x_t and x_r are, by scale of the path.
CONSISTENCY_WEIGHTINGS = ("unit_scale", "noise")

# Of n(tau) in `partner_noise`.
NEAR_THE_DATA, FALL = 8.0, 1.0


def ddim_step(x0: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """x_s of the deterministic step with the noise that `x0` leaves in `x_t` (DDIM, arXiv 2010.02502, Eq. 12 with eta 0)."""
    return posterior(x0, x_t, t, s, eta=0.0).mean


def two_steps_in_one(x0_t: Tensor, x0_u: Tensor, t: NoiseLevel, u: NoiseLevel, s: NoiseLevel) -> Tensor:
    """The x_0 with which one DDIM step from t to s ends where two end, by way of u (Salimans & Ho 2022).

    The step of an x_0 from t to s is x_s / sigma_s = x_t / sigma_t + (alpha_s / sigma_s - alpha_t / sigma_t) x_0, linear in
    alpha / sigma, so that the x_0 of two steps is the mean of theirs, weighted by the lengths of the steps in alpha / sigma.
    It stays within the range that theirs are in.

    Args:
        x0_t: Predicted at x_t.
        x0_u: Predicted at the x_u to which the first step leads.
        t, u, s: The levels, from the noisiest; s may be the data.
    """
    return torch.lerp(x0_u, x0_t, share_of_first_step(t, u, s).to(x0_t.dtype))


def share_of_first_step(t: NoiseLevel, u: NoiseLevel, s: NoiseLevel) -> Tensor:
    """The weight of the first of two steps in `two_steps_in_one`, in [0, 1): 0 if the second one ends at the data."""
    signal = t.alpha / t.sigma
    return s.sigma * (u.alpha / u.sigma - signal) / (s.alpha - s.sigma * signal)


def noise_ratio(schedule: NoiseSchedule) -> Tensor:
    """tau of each timestep, float64, shape `(T,)`; infinite where there is no signal."""
    return schedule.sigma[:-1] / schedule.alpha[:-1]


def angle(level: NoiseLevel) -> Factor:
    """phi of a level, also of one without signal."""
    return torch.atan2(level.sigma, level.alpha)


def partner_noise(noise: Tensor, doublings: int, factor: float = 2.0) -> Tensor:
    """tau of the cleaner level r that one at `noise` is paired with (ECT's mapping function).

        r / t = 1 - n(t) / factor^(doublings + 1),    n(t) = 1 + 8 sigmoid(-t)

    and 0, the data, where that is negative. n is larger near the data, where levels close in tau are far apart in what they
    show.

    Args:
        noise: tau of t, any shape; infinite ones give infinite ones.
        doublings: How often the two came nearer by `factor`, since the start of the training.
    """
    nearness = 1 + NEAR_THE_DATA * torch.sigmoid(-FALL * noise)
    return noise * (1 - nearness / factor ** (doublings + 1)).clamp(min=0)


def partner_timesteps(schedule: NoiseSchedule, doublings: int, factor: float = 2.0) -> Tensor:
    """The timestep r of each timestep t: the nearest to `partner_noise` that is not noisier, and at most t - 1.

    Returns: int64 in [-1, T - 2], shape `(T,)`; -1 is the data.
    """
    noise = noise_ratio(schedule)
    partners = torch.searchsorted(noise, partner_noise(noise, doublings, factor), right=True) - 1
    return partners.minimum(torch.arange(len(noise), device="cpu") - 1)


def doublings_until_neighbours(schedule: NoiseSchedule, factor: float = 2.0, most: int = 64) -> int:
    """The least number of doublings at which each timestep is paired with its neighbour, but no more than `most`."""
    neighbours = torch.arange(len(schedule), device="cpu") - 1
    for doublings in range(most):
        if torch.equal(partner_timesteps(schedule, doublings, factor), neighbours):
            return doublings
    return most


def consistency_weights(schedule: NoiseSchedule, partners: Tensor, weighting: str) -> Tensor:
    """The weight of each timestep's distance from its partner: one over the distance of x_t and x_r, in units of their noise.

    | weighting | weight | x_t and x_r have the scale of |
    |---|---|---|
    | noise | 1 / (tau_t - tau_r), ECT's | the path without scaling, x_0 + tau eps, which ECT's networks are for |
    | unit_scale | 1 / (sigma_t - alpha_t tau_r) | this path at t |

    They are the same near the data. At pure noise, where a single step starts, the first is 0 and the second is not.

    Args:
        partners: Of `partner_timesteps`.

    Returns: float64, shape `(T,)`.

    Raises:
        ValueError: if `weighting` is none of `CONSISTENCY_WEIGHTINGS`.
    """
    like = torch.zeros(1, dtype=torch.float64, device="cpu")
    t, r = schedule.level(torch.arange(len(schedule), device="cpu"), like), schedule.level(partners, like)
    match weighting:
        case "unit_scale":
            return 1 / (t.sigma - t.alpha * (r.sigma / r.alpha))
        case "noise":
            return 1 / (t.sigma / t.alpha - r.sigma / r.alpha)
    raise ValueError(f"weighting must be one of {', '.join(CONSISTENCY_WEIGHTINGS)}, got {weighting!r}")


def pseudo_huber(difference: Tensor, bend: float) -> Tensor:
    """sqrt(|difference|^2 / d + bend^2) - bend of each sample of d coordinates, shape `(batch,)`.

    It is the root mean square of a coordinate where that is large, and half its square over `bend` where it is small.

    Args:
        bend: Above 0; with 0 the slope at no difference would have no value.
    """
    return (difference.square().flatten(1).mean(1) + bend**2).sqrt() - bend


def angle_timesteps(schedule: NoiseSchedule, number: int) -> list[int]:
    """`number` timesteps from the noisiest down whose angles are evenly apart, as far as timesteps are; descending.

    With two, the second is where signal and noise are equal.

    Raises:
        ValueError: if `number` is not in [1, T].
    """
    check_number_of_steps(number, len(schedule))
    level = schedule.level(
        torch.arange(len(schedule), device="cpu"), torch.zeros(1, dtype=torch.float64, device="cpu")
    )
    angles = angle(level)
    wanted = angles[-1] * torch.arange(number, 0, -1, dtype=torch.float64, device="cpu") / number
    nearest = (angles[:, None] - wanted).abs().argmin(0)
    # No two the same, by as little as it takes.
    index = torch.arange(number, device="cpu")
    ascending = (nearest.flip(0) - index).cummax(0).values + index
    ascending = ascending.minimum(len(angles) - number + index)
    return ascending.flip(0).tolist()
