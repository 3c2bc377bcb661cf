"""The Gaussian noising path, x_t = alpha_t x_0 + sigma_t eps, and what follows from it.

Schedulers, training losses and likelihood bounds all speak through the names in this file, so each formula of the
package is written once.

    alpha_t, sigma_t   scales of the signal and of the noise
    alpha_bar_t        alpha_t ** 2, the table that diffusers calls `alphas_cumprod`
    beta_t             variance that the single step from t - 1 to t adds
    snr_t              alpha_t ** 2 / sigma_t ** 2
    t, s               two noise levels, s the cleaner: snr_s >= snr_t
    phi_t              angle of the path, alpha_t = cos(phi_t), sigma_t = sin(phi_t)

Levels are float32 or wider whatever the data, so half-precision data promote and are to be cast back last.

References:
    DDPM: Ho, Jain, Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    DDIM: Song, Meng, Ermon 2020, Denoising Diffusion Implicit Models, arXiv 2010.02502 (its alpha is our alpha_bar).
    Nichol, Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672.
    Salimans, Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
    Saharia et al. 2022, Photorealistic Text-to-Image Diffusion Models (Imagen), arXiv 2205.11487.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "score")


class NoiseLevel(NamedTuple):
    """One point on the path. Both scales broadcast against x_t."""

    alpha: Tensor
    sigma: Tensor

    @property
    def snr(self) -> Tensor:
        return (self.alpha / self.sigma).square()


class Normal(NamedTuple):
    """A Gaussian with independent coordinates, N(mean, std ** 2)."""

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        return self.mean + self.std * noise


class NoiseSchedule:
    """A discrete variance-preserving path, given by the variances of its single steps (DDPM, Eq. 4).

    Args:
        betas: Variance added by each step, shape `(T,)`, each finite and in [0, 1].
        final_alpha_bar: `alpha_bar` at the clean end of the path, which timestep -1 names; in (0, 1].

    Attributes:
        alpha, sigma: Float64 tables on the CPU, shape `(T + 1,)`; index -1 is the clean end.

    Raises:
        ValueError: If `betas` is no such table.
    """

    def __init__(self, betas: Tensor, final_alpha_bar: float = 1.0):
        betas = check_betas(betas)
        # Logs in float64: in float32, 1 - cumprod(1 - betas) is off by 2e-4 at t = 0 for the DDPM betas.
        log_alpha_bar = torch.log1p(-betas).cumsum(0)
        clean_end = torch.tensor([final_alpha_bar], dtype=torch.float64).log()
        log_alpha_bar = torch.cat([log_alpha_bar, clean_end])  # last, so that index -1 finds it
        self.alpha = log_alpha_bar.mul(0.5).exp()
        self.sigma = log_alpha_bar.expm1().neg().sqrt()
        # Rolled so that row t + 1 is timestep t: every valid index is then >= 0 and `index_select` refuses the rest.
        self._tables = {(torch.device("cpu"), torch.float64): torch.stack([self.alpha, self.sigma], 1).roll(1, 0)}

    def __len__(self) -> int:
        return len(self.alpha) - 1

    @property
    def alpha_bar(self) -> Tensor:
        """alpha ** 2, shape `(T + 1,)`."""
        return self.alpha.square()

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
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        table = self._tables.get((like.device, dtype))
        if table is None:
            table = self._tables[(torch.device("cpu"), torch.float64)].to(like.device, dtype)
            if type(table) is Tensor and not torch.compiler.is_compiling():  # not what tracing puts in its place
                self._tables[(like.device, dtype)] = table
        trailing = [1] * (like.ndim - 1)
        if isinstance(timesteps, Tensor):
            if timesteps.is_floating_point() and (timesteps.device.type != "cpu" or (timesteps % 1 != 0).any()):
                raise TypeError(f"timesteps must be integers, got a tensor of {timesteps.dtype}")
            rows = timesteps.to(like.device, torch.int64).reshape(-1) + 1
            try:
                pair = table.index_select(0, rows)
            except IndexError:
                low, high = timesteps.min().item(), timesteps.max().item()
                raise ValueError(f"timesteps must be in [-1, {len(self) - 1}], got {low} to {high}") from None
        else:
            if not -1 <= timesteps < len(self):
                raise ValueError(f"timesteps must be in [-1, {len(self) - 1}], got {timesteps}")
            pair = table.narrow(0, timesteps + 1, 1)
        alpha, sigma = pair.view(-1, *trailing, 2).unbind(-1)
        return NoiseLevel(alpha, sigma)


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
    x_t = level.alpha * x0
    # One new tensor rather than three: for large batches allocation costs more than arithmetic.
    fits = x_t.shape == eps.shape and x_t.dtype == eps.dtype == level.sigma.dtype
    return x_t.addcmul_(level.sigma, eps) if fits else x_t + level.sigma * eps


def output_coefficients(level: NoiseLevel, prediction_type: str) -> tuple[Tensor | float, Tensor | float]:
    """The pair (a, b) for which a model of this prediction type outputs a x_0 + b eps.

    Every conversion between prediction types follows from this table, so a new type is one new line.
    """
    match prediction_type:
        case "epsilon":
            return 0.0, 1.0
        case "sample":
            return 1.0, 0.0
        case "v_prediction":  # Salimans & Ho 2022, Appendix D
            return -level.sigma, level.alpha
        case "score":  # gradient of log q(x_t | x_0)
            return 0.0, -1.0 / level.sigma
    names = ", ".join(repr(name) for name in PREDICTION_TYPES[:-1])
    raise ValueError(f"prediction_type must be {names} or {PREDICTION_TYPES[-1]!r}, got {prediction_type!r}")


def training_target(x0: Tensor, eps: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """What the model is trained to output at `add_noise(x0, eps, level)`."""
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
    # A factor of at most 1 on sigma_s keeps the radicand below from going negative in floating point.
    snr_ratio = (t.alpha * s.sigma / _nonzero(s.alpha * t.sigma)).square()  # snr_t / snr_s, also where s is clean
    std = s.sigma * (eta * (1 - snr_ratio).clamp(min=0).sqrt())
    if eps is None:
        eps = predict_eps(x0, x_t, t)
    return Normal(s.alpha * x0 + (s.sigma.square() - std.square()).sqrt() * eps, std)


def rotate(v: Tensor, x_t: Tensor, t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """The DDIM step of a v-prediction: x_t turned back by phi_t - phi_s (Salimans & Ho 2022, Appendix D).

    Equal to `posterior(..., eta=0).mean` for the x_0 that `v` means, and free of divisions, so finite at snr_t = 0.
    """
    cos, sin = t.alpha * s.alpha + t.sigma * s.sigma, t.sigma * s.alpha - t.alpha * s.sigma
    return cos * x_t - sin * v


def transition_std(t: NoiseLevel, s: NoiseLevel) -> Tensor:
    """Standard deviation of the noising transition q(x_t | x_s), for neighbours sqrt(beta_t) (DDPM, Eq. 2)."""
    return (1 - (t.alpha / _nonzero(s.alpha)).square()).clamp(min=0).sqrt()


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


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """`x0` clipped to a quantile of each sample's magnitudes and scaled back to [-1, 1] (Imagen, Section 2.3).

    Args:
        ratio: The quantile, in [0, 1].
        max_value: Upper bound on the clipping range, whose lower bound is 1.
    """
    bound = torch.quantile(x0.abs().flatten(1), ratio, dim=1).clamp(1, max_value)
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


def _nonzero(x: Tensor) -> Tensor:
    # Products with an exact 0 stay 0 where a division by 0 would make them NaN.
    return x.clamp(min=torch.finfo(x.dtype).tiny)
