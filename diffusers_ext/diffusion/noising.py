"""The Gaussian noising path, x_t = alpha_t x_0 + sigma_t eps, and what follows from it.

Schedulers, training losses and likelihood bounds all speak through the names in this file, so each formula of the
package is written once.

    alpha_t, sigma_t   scales of the signal and of the noise
    alpha_bar_t        alpha_t ** 2 / (alpha_t ** 2 + sigma_t ** 2), the table that diffusers calls `alphas_cumprod`
    beta_t             variance that the single step from t - 1 to t adds
    snr_t              alpha_t ** 2 / sigma_t ** 2
    t, s               two noise levels, s the cleaner: snr_s >= snr_t
    h_t                scale of the path, sqrt(alpha_t ** 2 + sigma_t ** 2), 1 where it preserves the variance
    phi_t              angle of the path, alpha_t = h_t cos(phi_t), sigma_t = h_t sin(phi_t)

Levels are float32 or wider whatever the data, so half-precision data promote and are to be cast back last.

References:
    DDPM: Ho, Jain, Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    DDIM: Song, Meng, Ermon 2020, Denoising Diffusion Implicit Models, arXiv 2010.02502 (its alpha is our alpha_bar).
    Nichol, Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672.
    Salimans, Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
    Saharia et al. 2022, Photorealistic Text-to-Image Diffusion Models (Imagen), arXiv 2205.11487.
    Song et al. 2020, Score-Based Generative Modeling through Stochastic Differential Equations, arXiv 2011.13456.
    Lipman et al. 2022, Flow Matching for Generative Modeling, arXiv 2210.02747.
"""

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_ext.diffusion.tables import DeviceTable, dtype_beside


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "score", "flow")

# Variances of the reverse transition that a model says, in a second half of channels.
LEARNED_VARIANCES = ("learned", "learned_range")


# What scales a tensor: a number, or a tensor that broadcasts against it.
Factor = float | Tensor


class NoiseLevel(NamedTuple):
    """One point on the path: floats, or tensors that broadcast against x_t."""

    alpha: Factor
    sigma: Factor

    @property
    def snr(self) -> Factor:
        return (self.alpha / self.sigma) ** 2

    @property
    def scale(self) -> Factor:
        """sqrt(alpha^2 + sigma^2), the standard deviation of x_t for data of unit variance."""
        return (self.alpha**2 + self.sigma**2) ** 0.5


class Normal(NamedTuple):
    """A Gaussian with independent coordinates, N(mean, std ** 2)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise


class NoiseSchedule:
    """A discrete variance-preserving path, given by the variances of its single steps (DDPM, Eq. 4).

    `from_levels` makes one of any levels, and `diffusers_ext.diffusion.paths.PathSchedule` one of a continuous path.

    Args:
        betas: Variance added by each step, shape `(T,)`, each finite and in [0, 1].
        final_alpha_bar: `alpha_bar` at the clean end of the path, which timestep -1 names; in (0, 1].

    Attributes:
        alpha, sigma: Float64 tables on the CPU, shape `(T + 1,)`; index -1 is the clean end.
        preserves_variance: Whether alpha^2 + sigma^2 = 1 at all levels.
        first_label: See `labels`.

    Raises:
        ValueError: If `betas` is no such table.
    """

    first_label = 0

    def __init__(self, betas: Tensor, final_alpha_bar: float = 1.0):
        betas = check_betas(betas)
        # Logs in float64: in float32, 1 - cumprod(1 - betas) is off by 2e-4 at t = 0 for the DDPM betas.
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        clean_end = torch.tensor([final_alpha_bar], dtype=torch.float64, device="cpu").log()
        log_alpha_bar = torch.cat([log_alpha_bar, clean_end])  # last, so that index -1 finds it
        self._set_levels(log_alpha_bar.mul(0.5).exp(), log_alpha_bar.expm1().neg().sqrt(), preserves_variance=True)

    @classmethod
    def from_levels(cls, alpha: Tensor, sigma: Tensor) -> "NoiseSchedule":
        """A path through given levels, each noisier than the one before it, and from there to the data.

        Args:
            alpha, sigma: Shape `(T,)`, finite and not negative; sigma above 0.

        Raises:
            ValueError: If they are no such tables.
        """
        alpha, sigma = (torch.as_tensor(table, dtype=torch.float64, device="cpu") for table in (alpha, sigma))
        if alpha.ndim != 1 or not len(alpha) or alpha.shape != sigma.shape:
            raise ValueError(
                f"alpha and sigma must have shape (T,) with T >= 1, got {tuple(alpha.shape)} and {tuple(sigma.shape)}"
            )
        if not ((alpha >= 0) & alpha.isfinite() & (sigma > 0) & sigma.isfinite()).all():
            raise ValueError("alpha must be finite and at least 0, and sigma finite and above 0, at all levels")
        if not (alpha / sigma).diff().lt(0).all():
            raise ValueError("levels must be from the cleanest to the noisiest: alpha / sigma must fall")
        clean_end = torch.tensor([1.0, 0.0], dtype=torch.float64, device="cpu")
        schedule = cls.__new__(cls)
        schedule._set_levels(torch.cat([alpha, clean_end[:1]]), torch.cat([sigma, clean_end[1:]]))
        return schedule

    def _set_levels(self, alpha: Tensor, sigma: Tensor, preserves_variance: bool = False) -> None:
        self.alpha, self.sigma, self.preserves_variance = alpha, sigma, preserves_variance
        # Rolled so that row t + 1 is timestep t: every valid index is then >= 0 and `index_select` refuses the rest.
        self._table = DeviceTable(torch.stack([self.alpha, self.sigma], 1).roll(1, 0))

    def __len__(self) -> int:
        return len(self.alpha) - 1

    @property
    def alpha_bar(self) -> Tensor:
        """alpha ** 2 of the path at unit scale, shape `(T + 1,)`."""
        return self.alpha.square() if self.preserves_variance else (self.alpha / self.scale).square()

    @property
    def scale(self) -> Tensor:
        """sqrt(alpha^2 + sigma^2), shape `(T + 1,)`."""
        return torch.ones_like(self.alpha) if self.preserves_variance else torch.hypot(self.alpha, self.sigma)

    @property
    def betas(self) -> Tensor:
        """Variances of the single steps of the path at unit scale, shape `(T,)`; they make the path at that scale again.

        With them as `trained_betas` every scheduler of a variance-preserving path samples a network that sees x_t / h_t.
        """
        log_alpha_bar = self.alpha_bar[:-1].log()
        return -torch.cat([log_alpha_bar[:1], log_alpha_bar.diff()]).expm1()

    def labels(self, timesteps: Tensor) -> Tensor:
        """What a network is given for these timesteps: they themselves, or on some paths counted from 1."""
        return timesteps + self.first_label if self.first_label else timesteps

    def level(self, timesteps: Tensor | int, like: Tensor) -> NoiseLevel:
        """The noise level at each timestep, broadcasting against `like`.

        Args:
            timesteps: Integers in [-1, T), one or a tensor with one for each sample; -1 names the clean end. (A
                float tensor on the CPU will do if its values are whole: some pipelines of diffusers make one.)
            like: Gives the device and, if it is wider than float32, the dtype. Tables are copied there once.

        Raises:
            ValueError: If a timestep is out of range (on an accelerator the kernel itself asserts it).
            TypeError: If `timesteps` are not integers.
        """
        if isinstance(timesteps, Tensor):
            if timesteps.is_floating_point() and (timesteps.device.type != "cpu" or (timesteps % 1 != 0).any()):
                raise TypeError(f"timesteps must be integers, got a tensor of {timesteps.dtype}")
            try:
                return NoiseLevel(*self._table.gather(timesteps.long() + 1, like))
            except IndexError:
                low, high = timesteps.min().item(), timesteps.max().item()
                raise ValueError(f"timesteps must be in [-1, {len(self) - 1}], got {low} to {high}") from None
        if not -1 <= timesteps < len(self):
            raise ValueError(f"timesteps must be in [-1, {len(self) - 1}], got {timesteps}")
        pair = self._table.on(like.device, dtype_beside(like)).narrow(0, timesteps + 1, 1)
        return NoiseLevel(*pair.view(1, *[1] * (like.ndim - 1), 2).unbind(-1))


def check_betas(betas: Tensor) -> Tensor:
    """`betas` as a float64 tensor on the CPU.

    Raises:
        ValueError: If they are no table of variances.
    """
    betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"betas must have shape (T,) with T >= 1, got {tuple(betas.shape)}")
    wrong = ~((betas >= 0) & (betas <= 1))  # true for NaN too
    if wrong.any():
        index = int(wrong.nonzero()[0])
        raise ValueError(f"betas must be finite and in [0, 1], got {betas[index].item()} at index {index}")
    return betas


def add_noise(x0: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """x_t ~ q(x_t | x_0) for the standard normal draw `eps` (DDPM, Eq. 4)."""
    return weighted_sum((level.alpha, x0), (level.sigma, eps))


def weighted_sum(*terms: tuple[Factor, Tensor | None]) -> Tensor:
    """The sum of factor times tensor over `terms`, with one pass over each and one new tensor.

    For large batches allocation costs more than arithmetic. Factors are rounded to the precision of their tensors, but
    to no less than float32. A term without a tensor is left out.
    """
    (factor, tensor), *rest = terms
    total = in_precision_of(tensor, factor) * tensor
    for factor, tensor in rest:
        if tensor is None:
            continue
        factor = in_precision_of(tensor, factor)
        if isinstance(factor, Tensor):
            fits = total.shape == tensor.shape and total.dtype == tensor.dtype == factor.dtype
            total = total.addcmul_(tensor, factor) if fits else total + factor * tensor
        else:
            total = total.add_(tensor, alpha=factor)
    return total


def in_precision_of(tensor: Tensor, factor: Factor) -> Factor:
    """`factor` in the precision of `tensor`, but in no less than float32; a number as it is."""
    if isinstance(factor, Tensor) and factor.dtype != dtype_beside(tensor):
        return factor.to(dtype_beside(tensor))
    return factor


def output_coefficients(level: NoiseLevel, prediction_type: str) -> tuple[Factor, Factor]:
    """The pair (a, b) for which a model of this prediction type outputs a x_0 + b eps.

    Every conversion between prediction types follows from this table, so a new type is one new line.
    """
    match prediction_type:
        case "epsilon":
            return 0.0, 1.0
        case "sample":
            return 1.0, 0.0
        case "v_prediction":  # Salimans & Ho 2022, Appendix D: the derivative by the angle, of the path at unit scale
            return -level.sigma / level.scale, level.alpha / level.scale
        case "score":  # gradient of log q(x_t | x_0)
            return 0.0, -1.0 / level.sigma
        case "flow":  # Lipman et al. 2022: the derivative by the time of the linear path
            return -1.0, 1.0
    names = ", ".join(repr(name) for name in PREDICTION_TYPES[:-1])
    raise ValueError(f"prediction_type must be {names} or {PREDICTION_TYPES[-1]!r}, got {prediction_type!r}")


def training_target(x0: Tensor, eps: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """The output that the model is trained towards at `add_noise(x0, eps, level)`."""
    a, b = output_coefficients(level, prediction_type)
    return a * x0 + b * eps


def predict_x0(output: Tensor, x_t: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """The clean sample that a model means by its output at `x_t`."""
    a, b = output_coefficients(level, prediction_type)
    return (b * x_t - level.sigma * output) / (b * level.alpha - a * level.sigma)


def output_eps(output: Tensor, x_t: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """The noise that a model means by its output at `x_t`."""
    a, b = output_coefficients(level, prediction_type)
    return (level.alpha * output - a * x_t) / (b * level.alpha - a * level.sigma)


def tweedie(x_t: Tensor, score: Tensor, level: NoiseLevel) -> Tensor:
    """E[x_0 | x_t] by Tweedie's formula, (x_t + sigma^2 score) / alpha.

    Args:
        score: The gradient of log p(x_t), of the shape of `x_t`.
        level: Of x_t, with a signal.
    """
    return (x_t + level.sigma**2 * score) / level.alpha


def predict_eps(x0: Tensor, x_t: Tensor, level: NoiseLevel) -> Tensor:
    """The noise that takes `x0` to `x_t`; 0 where the level has none and `x_t = alpha x0`."""
    return (x_t - level.alpha * x0) / _nonzero(level.sigma)


def x0_error_scale(level: NoiseLevel, prediction_type: str) -> Tensor:
    """The k for which |x0 - x0_hat|^2 = k |target - output|^2: 1/snr, 1 and 1/(snr + 1) for eps, x0 and v."""
    a, b = output_coefficients(level, prediction_type)
    return (level.sigma / (b * level.alpha - a * level.sigma)).square()


def posterior(
    x0: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel, eta: float | Tensor = 1.0, *, eps: Tensor | None = None
) -> Normal:
    """The reverse transition q(x_s | x_t, x_0) under which x_s ~ q(x_s | x_0) again (DDIM, Eqs. 7 and 16).

    Args:
        x0: Clean sample, or a model's prediction of it.
        x_t: Noisy sample, of the shape of `x0`.
        t, s: Noise levels of `x_t` and of the result.
        eta: In [0, 1]. At 1 this is the posterior of the noising chain, with variance beta tilde (DDPM, Eqs. 6-7);
            at 0 it is the deterministic DDIM step.
        eps: The noise in `x_t`, where it is not to be the one that `x0` leaves (DDIM with a clipped `x0`).
    """
    std = posterior_std(t, s, eta)
    if eps is None:
        eps = predict_eps(x0, x_t, t)
    return Normal(s.alpha * x0 + (s.sigma**2 - std**2) ** 0.5 * eps, std)


def posterior_std(t: NoiseLevel, s: NoiseLevel, eta: float | Tensor = 1.0) -> Factor:
    """Standard deviation of `posterior`, for `eta=1` the square root of beta tilde (DDPM, Eq. 7; DDIM, Eq. 16)."""
    # A factor of at most 1 on sigma_s keeps sigma_s^2 - std^2 from going negative in floating point.
    return s.sigma * (eta * new_noise_share(t, s) ** 0.5)


def transition_std(t: NoiseLevel, s: NoiseLevel) -> Factor:
    """Standard deviation of the noising transition q(x_t | x_s), for neighbours sqrt(beta_t) (DDPM, Eq. 2).

    Its square is sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2, on any path.
    """
    return t.sigma * new_noise_share(t, s) ** 0.5


def new_noise_share(t: NoiseLevel, s: NoiseLevel) -> Factor:
    """The share of the noise at t that comes after s, 1 - snr_t / snr_s, also where s is clean."""
    return _at_least(0.0, 1 - (t.alpha * s.sigma / _nonzero(s.alpha * t.sigma)) ** 2)


def transition(x_s: Tensor, t: NoiseLevel, s: NoiseLevel) -> Normal:
    """The noising transition q(x_t | x_s) from the cleaner level s up to t (DDPM, Eq. 2)."""
    return Normal(t.alpha / _nonzero(s.alpha) * x_s, transition_std(t, s))


def add_to_score(output: Tensor, gradient: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """The output that means the score of `output` plus `gradient`, whatever the prediction type.

    By x_0 = (x_t - sigma eps) / alpha and score = -eps / sigma, a shift of the score by g is one of eps by -sigma g and
    of x_0 by sigma^2 / alpha g (classifier guidance: Dhariwal & Nichol 2021, arXiv 2105.05233). At a level without any
    signal x_t says nothing of x_0, and the output stays as it is.
    """
    a, b = output_coefficients(level, prediction_type)
    of_x0 = torch.where(level.alpha > 0, level.sigma.square() / _nonzero(level.alpha), 0.0)
    of_eps = torch.where(level.alpha > 0, -level.sigma, 0.0)
    return output + (a * of_x0 + b * of_eps) * gradient


def interpolated_log_std(output: Tensor, log_std_small: Tensor, log_std_large: Tensor) -> Tensor:
    """Log standard deviation that a model's variance output means (Nichol & Dhariwal 2021, Eq. 15).

    Args:
        output: The model's second half of channels, -1 for the lower and 1 for the upper bound.
        log_std_small: Log standard deviation of the posterior (log sqrt(beta tilde)).
        log_std_large: Log standard deviation of the noising transition (log sqrt(beta)).
    """
    return 0.5 * (log_std_large - log_std_small) * output + 0.5 * (log_std_large + log_std_small)


def learned_log_std(variance: str, output: Tensor, log_std_small: Factor, log_std_large: Factor) -> Tensor:
    """Log standard deviation of p(x_s | x_t) that a model means by its variance output, for `LEARNED_VARIANCES`.

    Args:
        output: The second half of the model's channels: a log variance for "learned", else as in `interpolated_log_std`.
    """
    return 0.5 * output if variance == "learned" else interpolated_log_std(output, log_std_small, log_std_large)


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """`x0` clipped to a quantile of each sample's magnitudes and scaled back to [-1, 1] (Imagen, Section 2.3).

    Args:
        ratio: The quantile, in [0, 1].
        max_value: Upper bound on the clipping range, whose lower bound is 1.
    """
    largest = min(max_value, torch.finfo(x0.dtype).max)
    bound = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, largest)
    bound = bound.view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-bound, bound) / bound


def kl_weight(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """The w for which KL(q(x_s | x_t, x0) || q(x_s | x_t, x0_hat)) = w |x0 - x0_hat|^2, in nats (at eta = 1)."""
    return 0.5 * (s.snr - t.snr)


def normal_log_prob(x: Tensor, mean: Tensor | float = 0.0, log_std: Tensor | None = None) -> Tensor:
    """log N(x; mean, exp(log_std) ** 2) of each coordinate in nats; by default of the standard normal."""
    z = x - mean if log_std is None else (x - mean) * torch.exp(-log_std)
    log_prob = -0.5 * (z.square() + math.log(2 * math.pi))
    return log_prob if log_std is None else log_prob - log_std


def normal_kl(q: Normal, p: Normal) -> Tensor:
    """KL(q || p) of each coordinate in nats, from standard deviations that are not 0; at least 0."""
    log_ratio = (q.std / p.std).log()
    # With expm1 two equal normals cost 0 to the square of the rounding, which a thousand small terms need.
    return 0.5 * ((2 * log_ratio).expm1() - 2 * log_ratio + ((q.mean - p.mean) / p.std).square())


class Transition(NamedTuple):
    """A step from the level t down to s in numbers: floats, or tensors that broadcast against x_t.

    The formulas of this file are linear in x_t, x_0 and the model's output. Their factors are their values at unit
    inputs, with which a step is a few sums:

        x_0  = x0_of_x_t x_t + x0_of_output output        `predict_x0`
        eps  = eps_of_x_t x_t + eps_of_output output      `output_eps`
        eps  = left_of_x_t x_t + left_of_x0 x_0           `predict_eps`, the noise that an x_0 leaves
        mean = mean_of_x0 x_0 + mean_of_x_t x_t           `posterior`
    """

    t: NoiseLevel
    s: NoiseLevel
    x0_of_x_t: Factor
    x0_of_output: Factor
    eps_of_x_t: Factor
    eps_of_output: Factor
    left_of_x_t: Factor
    left_of_x0: Factor
    mean_of_x0: Factor
    mean_of_x_t: Factor
    posterior_std: Factor
    transition_std: Factor
    x0_variance: Factor = 0.0  # of the predicted x_0, where it was measured
    largest_std: Factor = math.inf  # of the noise, where that has a limit

    @classmethod
    def between(cls, t: NoiseLevel, s: NoiseLevel, prediction_type: str) -> "Transition":
        one, zero = torch.ones_like(t.alpha), torch.zeros_like(t.alpha)
        eps = output_eps(zero, one, t, prediction_type), output_eps(one, zero, t, prediction_type)
        left = predict_eps(zero, one, t), predict_eps(one, zero, t)
        return cls(
            t,
            s,
            predict_x0(zero, one, t, prediction_type),
            predict_x0(one, zero, t, prediction_type),
            *[torch.where(t.sigma > 0, factor, 0.0) for factor in (*eps, *left)],  # finite at a level without noise
            posterior(one, zero, t, s).mean,
            posterior(zero, one, t, s).mean,
            posterior_std(t, s),
            transition_std(t, s),
            zero,
            torch.full_like(t.alpha, math.inf),
        )

    @classmethod
    def of(cls, numbers: Sequence[Factor]) -> "Transition":
        """From the numbers in the order that `flatten` gives them."""
        return cls(NoiseLevel(*numbers[:2]), NoiseLevel(*numbers[2:4]), *numbers[4:])

    def flatten(self) -> list[Factor]:
        return [*self.t, *self.s, *self[2:]]


def _nonzero(x: Factor) -> Factor:
    # Products with an exact 0 stay 0 where a division by 0 would make them NaN.
    return _at_least(torch.finfo(x.dtype).tiny if isinstance(x, Tensor) else sys.float_info.min, x)


def _at_least(bound: float, x: Factor) -> Factor:
    return x.clamp(min=bound) if isinstance(x, Tensor) else max(bound, x)
