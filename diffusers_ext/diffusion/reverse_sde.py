"""Steps of the reverse-time SDE and of its probability flow, and of Langevin dynamics at one level (Song et al. 2020).

The SDE dx = f x dt + g dw of a path has the reverse dx = (f x - g^2 score) dt + g dw, and the flow with the same
marginals dx = (f x - g^2 score / 2) dt. With the score that an x_0 means, (alpha x_0 - x_t) / sigma^2, each step from t
down to s is a sum

    x_s = mean_of_x0 x_0 + mean_of_x_t x_t + std z,    z ~ N(0, 1)

of numbers that follow from the two levels. Every step to the clean end is the same: the predicted x_0, which is Tweedie's
formula, without noise (Appendix G, "Denoising").

References:
    Song et al. 2020, Score-Based Generative Modeling through Stochastic Differential Equations, arXiv 2011.13456.
    Song, Ermon 2019, Generative Modeling by Estimating Gradients of the Data Distribution, arXiv 1907.05600.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_ext.diffusion.noising import (
    Factor,
    NoiseLevel,
    NoiseSchedule,
    new_noise_share,
    posterior,
    posterior_std,
    predict_x0,
    weighted_sum,
)
from diffusers_ext.diffusion.paths import PathSchedule


PREDICTORS = ("reverse_diffusion", "euler_maruyama", "ancestral", "ode", "heun")

CORRECTORS = ("langevin", "annealed_langevin")


class SDEStep(NamedTuple):
    """A step from the level t down to s in numbers: floats, or tensors that broadcast against x_t.

        x_0 = x0_of_x_t x_t + x0_of_output output
        x_s = mean_of_x0 x_0 + mean_of_x_t x_t + std z

    `kept` is what the single step of the chain up to t leaves of alpha^2: 1 - beta_t on a variance-preserving path, 1 on
    a variance-exploding one.
    """

    t: NoiseLevel
    s: NoiseLevel
    x0_of_x_t: Factor
    x0_of_output: Factor
    mean_of_x0: Factor
    mean_of_x_t: Factor
    std: Factor
    kept: Factor

    @classmethod
    def between(
        cls,
        schedule: NoiseSchedule,
        timesteps: Tensor,
        following: Tensor,
        prediction_type: str,
        predictor: str,
        unit_scale_input: bool = False,
    ) -> "SDEStep":
        """The steps from `timesteps` to `following`, in float64, of tensors of their shape.

        Args:
            timesteps, following: Integers; -1 stands for the clean end.
            predictor: One of `PREDICTORS`; "heun" has the numbers of "ode".
            unit_scale_input: Whether the model sees x_t / h, and its output is that of the path at unit scale.
        """
        like = torch.zeros(1, dtype=torch.float64, device="cpu")
        t, s = schedule.level(timesteps, like), schedule.level(following, like)
        one, zero = torch.ones_like(t.alpha), torch.zeros_like(t.alpha)
        seen = NoiseLevel(t.alpha / t.scale, t.sigma / t.scale) if unit_scale_input else t
        to_clean = s.sigma == 0
        parts = _predictor_numbers(schedule, timesteps, following, t, s, predictor)
        parts = (torch.where(to_clean, end, part) for part, end in zip(parts, (1.0, 0.0, 0.0), strict=True))
        return cls(
            t,
            s,
            predict_x0(zero, one, seen, prediction_type) / (t.scale if unit_scale_input else 1),
            predict_x0(one, zero, seen, prediction_type),
            *parts,
            (t.alpha / schedule.level(timesteps - 1, like).alpha).square(),
        )

    @classmethod
    def of(cls, numbers: Sequence[Factor]) -> "SDEStep":
        """From the numbers in the order that `flatten` gives them."""
        return cls(NoiseLevel(*numbers[:2]), NoiseLevel(*numbers[2:4]), *numbers[4:])

    def flatten(self) -> list[Factor]:
        return [*self.t, *self.s, *self[2:]]


def _predictor_numbers(
    schedule: NoiseSchedule, timesteps: Tensor, following: Tensor, t: NoiseLevel, s: NoiseLevel, predictor: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What `SDEStep` calls `mean_of_x0`, `mean_of_x_t` and `std`, where s has noise."""
    one, zero = torch.ones_like(t.alpha), torch.zeros_like(t.alpha)
    match predictor:
        case "ancestral":  # Appendix F, Eq. 47 on the VE path: the posterior of the noising chain
            return posterior(one, zero, t, s).mean, posterior(zero, one, t, s).mean, posterior_std(t, s)
        case "ode" | "heun":  # the exact solution for an x_0 that stays as it is (DDIM)
            return posterior(one, zero, t, s, eta=0.0).mean, posterior(zero, one, t, s, eta=0.0).mean, zero
        case "reverse_diffusion":  # Eq. 46, with the transition of the chain for f and G
            # x_t = kept x_s + sqrt(variance) z is x + f(x) + G z with f = kept - 1.
            kept, share = t.alpha / s.alpha, new_noise_share(t, s)
            growth, variance_by_sigma2 = 1 - kept, share
        case "euler_maruyama":
            growth, variance = _rates(schedule, timesteps, following)
            variance_by_sigma2 = variance / t.sigma.square().clamp(min=torch.finfo(torch.float64).tiny)
    std = variance_by_sigma2.sqrt() * t.sigma
    return variance_by_sigma2 * t.alpha, 1 + growth - variance_by_sigma2, std


def _rates(schedule: NoiseSchedule, timesteps: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """-f and g^2 at the timesteps, times the time to the following ones.

    A chain of betas is the SDE with beta(t) = T beta_t (Song et al. 2020, Appendix B).
    """
    steps = (timesteps - following).double()
    if schedule.preserves_variance or not isinstance(schedule, PathSchedule):
        variance = schedule.betas[timesteps] * steps
        return variance / 2, variance
    path, times = schedule.path, (timesteps + 1).double() / len(schedule)
    elapsed = steps / len(schedule)
    return -path.drift(times) * elapsed, path.diffusion(times).square() * elapsed


def corrector_step_size(corrector: str, snr: float, eps: Tensor, kept: Factor) -> Factor:
    """The step size of the Langevin corrector in units of sigma^2: a number, or one for each sample.

    Args:
        corrector: "langevin" is that of Algorithms 4 and 5, 2 kept (snr |z| / |score|)^2, with the root of the number of
            values for |z|, as the paper advises for small batches. It is at most 1, above which steps oscillate.
            "annealed_langevin" puts 1 / sigma for each value of the score, so that the step follows from the
            level alone: the same to a few percent for images, and right for data of few values too, whose score is
            close to 0 at the modes.
        snr: r of the paper.
        eps: The predicted noise in x_t, -sigma score, shape `(batch, ...)`.
        kept: See `SDEStep`.
    """
    step_size = 2 * snr**2 * kept
    if corrector == "annealed_langevin":
        return step_size
    mean_square = eps.flatten(1).square().mean(1).view(-1, *[1] * (eps.ndim - 1))
    return (step_size / mean_square).clamp(max=1)


def langevin(x_t: Tensor, eps: Tensor, level: NoiseLevel, step_size: Factor, noise: Tensor) -> Tensor:
    """One step of Langevin dynamics at a level, x_t + k score + sqrt(2 k) noise for k = step_size sigma^2."""
    return weighted_sum((1.0, x_t), (-step_size * level.sigma, eps), ((2 * step_size) ** 0.5 * level.sigma, noise))
