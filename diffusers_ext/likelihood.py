"""The variational bound of a diffusion model, term by term.

    -log p(x_0) <= L_T + sum of KL(q(x_s | x_t, x_0) || p(x_s | x_t)) - log p(x_0 | x_t1)

over the transitions t -> s of a list of timesteps, the last of which, from t1, ends at the data (DDPM, Section 3.2,
there for all timesteps). The first two parts are the rate, the last is the distortion. All are in nats; `bits_per_dim`
is the only place where they become bits.

Data are in [-1, 1]. Of images in b bits there are 2^b values, evenly spaced from -1 to 1, and the distortion is the
probability of the bin around each: half-way to its neighbours, without end at the two outermost (DDPM, Section 3.3).
Bits per dimension are then those that a lossless code of the images would take. For continuous data, `num_bins=None`,
the distortion is a density, and bits per dimension compare with a differential entropy.

References:
    DDPM: Ho, Jain, Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    Nichol, Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672.
    Bao et al. 2022, Analytic-DPM, arXiv 2201.06503 (optimal variances).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from diffusers_ext.noising import (
    NoiseLevel,
    NoiseSchedule,
    Normal,
    add_noise,
    interpolated_log_std,
    normal_kl,
    posterior,
    predict_x0,
    transition_std,
)
from diffusers_ext.precision import to_float64
from diffusers_ext.schedulers.coefficients import CoefficientTable
from diffusers_ext.timesteps import check_timesteps


# "optimal" needs a chain with variances of its own, as `optimal_variances` measures them.
REVERSE_VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range", "optimal")
LEARNED_VARIANCES = ("learned", "learned_range")

Denoise = Callable[[Tensor, Tensor], Tensor]


class ReverseStep(NamedTuple):
    """What is known of the transition t -> s before the model is asked; each broadcasts against x_t.

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
        self.timesteps = torch.tensor(check_timesteps(timesteps, length)[::-1].copy())
        like = torch.zeros(1, dtype=torch.float64)
        t = schedule.level(self.timesteps, like)
        s = schedule.level(torch.cat([torch.tensor([-1]), self.timesteps[:-1]]), like)
        zero = torch.zeros_like(t.alpha)
        small, large = posterior(zero, zero, t, s).std, transition_std(t, s)
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
        self._table = CoefficientTable(ReverseStep(*t, *s, small.log(), large.log(), optimal.log()))

    def __len__(self) -> int:
        return len(self.timesteps)

    def at(self, index: Tensor, like: Tensor) -> ReverseStep:
        """Transitions `index`, int64, one or one for each sample, broadcasting against `like` and on its device."""
        return self._table.gather(index, like)

    def at_noise(self, like: Tensor) -> NoiseLevel:
        """The noisiest level, where sampling starts from N(0, 1)."""
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
        variance_output: Second half of the model's channels, for the learned ones: a log variance for "learned", -1 to
            1 for the bounds of "learned_range".
    """
    match variance:
        case "fixed_small":
            return step.log_std_small
        case "fixed_large":
            return step.log_std_large
        case "learned":
            return 0.5 * variance_output
        case "learned_range":
            return interpolated_log_std(variance_output, step.log_std_small, step.log_std_large)
        case "optimal":
            return step.log_std_optimal
    raise ValueError(f"variance must be one of {', '.join(REVERSE_VARIANCES)}, got {variance!r}")


def reverse_transition(x0_hat: Tensor, x_t: Tensor, step: ReverseStep, log_std: Tensor) -> Normal:
    """p(x_s | x_t), with the mean of the posterior of the predicted x_0."""
    return Normal(posterior(x0_hat, x_t, step.t, step.s).mean, log_std.exp())


def transition_kl(x0: Tensor, x_t: Tensor, step: ReverseStep, p: Normal) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p) of each coordinate, in nats. Not for transition 0, whose cost is the distortion."""
    return normal_kl(Normal(posterior(x0, x_t, step.t, step.s).mean, step.log_std_small.exp()), p)


def decoder_nats(x0: Tensor, p: Normal, num_bins: int | None = 256) -> Tensor:
    """The distortion -log p(x_0) of each coordinate, in nats, for the normal `p` that the last transition ends in.

    Args:
        x0: In [-1, 1]; with bins, at their centres (see `check_bins`).
        num_bins: Number of values that a coordinate can have, 256 for 8 bits; None for the density of `p`.
    """
    if num_bins is None:
        return 0.5 * ((x0 - p.mean) / p.std).square() + p.std.log() + 0.5 * math.log(2 * math.pi)
    return -binned_log_prob(x0, p.mean, p.std, num_bins)


def binned_log_prob(
    x0: Tensor,
    mean: Tensor,
    scale: Tensor,
    num_bins: int,
    log_cdf: Callable[[Tensor], Tensor] = torch.special.log_ndtr,
) -> Tensor:
    """Log of the mass that a density has in the bin around each coordinate, in nats.

    Args:
        x0: In [-1, 1], at the centres of the bins.
        mean, scale: Of the density.
        log_cdf: Log of the distribution function at mean 0 and scale 1, of a density that is even.
    """
    half = 1 / (num_bins - 1)
    z, half_width = (x0 - mean) / scale, half / scale
    # Differences of the distribution function in its left tail, where they keep their digits.
    left, right = log_cdf(-z.abs() - half_width), log_cdf(-z.abs() + half_width)
    inner = right + (-(left - right).expm1()).log()
    lowest, highest = log_cdf(z + half_width), log_cdf(half_width - z)
    return torch.where(x0 < -1 + half, lowest, torch.where(x0 > 1 - half, highest, inner))


def transition_nats(
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    chain: ReverseChain,
    index: Tensor,
    prediction_type: str,
    variance: str,
    *,
    num_bins: int | None = 256,
    detach_mean: bool = False,
) -> Tensor:
    """What transition `index` of each sample costs, of each coordinate, in nats: the KL, or for index 0 the distortion.

    Args:
        output: The model's output at `x_t`, with twice the channels if the variance is learned.
        index: int64, shape `(batch,)`.
        variance: One of `REVERSE_VARIANCES`.
        detach_mean: Whether gradients reach the variance alone.
    """
    step = chain.at(index, x0)
    prediction, variance_output = split_output(output, variance)
    x0_hat = predict_x0(prediction.detach() if detach_mean else prediction, x_t, step.t, prediction_type)
    p = reverse_transition(x0_hat, x_t, step, reverse_log_std(step, variance, variance_output))
    is_last = (index == 0).view(-1, *[1] * (x0.ndim - 1))
    return torch.where(is_last, decoder_nats(x0, p, num_bins), transition_kl(x0, x_t, step, p))


def prior_nats(x0: Tensor, level: NoiseLevel) -> Tensor:
    """L_T of each coordinate, KL(q(x_T | x_0) || N(0, 1)), in nats; `level` is that of x_T."""
    zero = torch.zeros_like(level.alpha)
    return normal_kl(Normal(level.alpha * x0, level.sigma), Normal(zero, zero + 1))


def bits_per_dim(nats: Tensor | float, num_dims: int) -> Tensor | float:
    """Nats of a whole image as bits of one of its `num_dims` values."""
    return nats / (num_dims * math.log(2))


def check_bins(x0: Tensor, num_bins: int) -> None:
    """Refuses data that are not at the centres of `num_bins` bins in [-1, 1].

    Raises:
        ValueError: If a value is further than a hundredth of a bin from all of them.
    """
    if num_bins < 2:
        raise ValueError(f"num_bins must be at least 2, or None for continuous data, got {num_bins}")
    x0 = to_float64(x0)
    place = (x0 + 1) * (num_bins - 1) / 2
    outside = ~((place - place.round()).abs() < 0.01) | (place.round() < 0) | (place.round() > num_bins - 1)
    if outside.any():
        raise ValueError(
            f"x0 must hold {num_bins} values evenly spaced from -1 to 1, got {x0[outside].flatten()[0].item():.6g}: "
            "give num_bins as the data have them, or None if they are continuous"
        )


@dataclass(frozen=True)
class BoundTerms:
    """The bound of each image, in nats of the whole image.

    Attributes:
        prior: L_T, shape `(batch,)`.
        kl: KL of transition `index`, shape `(batch, terms)`.
        decoder: -log p(x_0 | x_t1), shape `(batch,)`.
        index: Which transitions, int64, shape `(batch, terms)`; never 0.
        weight: How often each counts, shape `(batch, terms)`: 1 if there are all of them, or else what makes `rate` an
            unbiased estimate.
        num_dims: Values of an image.
    """

    prior: Tensor
    kl: Tensor
    decoder: Tensor
    index: Tensor
    weight: Tensor
    num_dims: int

    @property
    def rate(self) -> Tensor:
        return self.prior + (self.weight * self.kl).sum(1)

    @property
    def distortion(self) -> Tensor:
        return self.decoder

    @property
    def total(self) -> Tensor:
        return self.rate + self.distortion


def evaluate_transition(
    denoise: Denoise,
    x0: Tensor,
    eps: Tensor,
    chain: ReverseChain,
    index: Tensor,
    prediction_type: str,
    variance: str,
    clip: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, ReverseStep, Normal]:
    """x_t at transition `index` of each image, these transitions, and the model's p(x_s | x_t).

    Raises:
        ValueError: If the model's output does not have the shape that the variance needs.
    """
    step = chain.at(index, x0)
    x_t = add_noise(x0, eps, step.t)
    output = denoise(x_t, chain.timesteps[index].to(x0.device)).to(x0.dtype)
    channels = x0.shape[1] * (2 if variance in LEARNED_VARIANCES else 1)
    if output.shape != (len(x0), channels, *x0.shape[2:]):
        raise ValueError(
            f"the model's output must have shape {tuple(x0.shape)}, with twice the channels for a learned variance, got "
            f"{tuple(output.shape)} for the variance {variance!r}"
        )
    prediction, variance_output = split_output(output, variance)
    x0_hat = predict_x0(prediction, x_t, step.t, prediction_type)
    x0_hat = x0_hat if clip is None else clip(x0_hat)
    return x_t, step, reverse_transition(x0_hat, x_t, step, reverse_log_std(step, variance, variance_output))


@torch.no_grad()
def variational_bound(
    denoise: Denoise,
    x0: Tensor,
    chain: ReverseChain,
    prediction_type: str,
    variance: str = "fixed_large",
    *,
    num_bins: int | None = 256,
    num_terms: int | None = None,
    clip: Callable[[Tensor], Tensor] | None = None,
    generator: Generator | list[Generator] | None = None,
    noise: Callable[[int], Tensor] | None = None,
) -> BoundTerms:
    """The variational bound of each image under the sampler that visits the timesteps of `chain`.

    Args:
        denoise: The model, from x_t and timesteps of shape `(batch,)` to its output.
        x0: Images in [-1, 1], shape `(batch, channels, ...)`. The terms are computed in its dtype, for a bound to many
            digits float64.
        variance: One of `REVERSE_VARIANCES`.
        num_bins: See `decoder_nats`; None for continuous data.
        num_terms: Number of transitions looked at for each image, in [1, n - 1] for a chain of n, spread over the chain
            at random and more where the log SNR changes more. By default all. The last transition and the prior are
            always counted.
        clip: What the sampler does to the predicted x_0, such as clamping it to [-1, 1].
        generator: Source of the noise. With a list, the terms of image i follow from generator i alone.
        noise: The unit noise of transition i itself, of the shape of `x0`, instead of a generator.

    Raises:
        ValueError: If `x0` does not fit the bins, `num_terms` is out of range or the variance is not known.
    """
    check_variance(chain, variance)
    if num_bins is not None:
        check_bins(x0, num_bins)
    last = len(chain) - 1
    if num_terms is not None and not 1 <= num_terms <= last:
        raise ValueError(f"num_terms must be in [1, {last}], one less than the chain's timesteps, got {num_terms}")
    index = torch.arange(1, len(chain)).expand(len(x0), -1)
    weight = torch.ones(index.shape, dtype=torch.float64)
    if num_terms is not None and num_terms < last:
        index, weight = _spread(len(x0), num_terms, chain, generator)
    draw = noise or (lambda i: randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype))

    def cost(column: int | None) -> Tensor:
        at = torch.zeros(len(x0), dtype=torch.int64) if column is None else index[:, column]
        x_t, step, p = evaluate_transition(denoise, x0, draw(int(at[0])), chain, at, prediction_type, variance, clip)
        nats = decoder_nats(x0, p, num_bins) if column is None else transition_kl(x0, x_t, step, p)
        return nats.flatten(1).sum(1)

    decoder = cost(None)
    kl = [cost(column) for column in range(index.shape[1])]
    return BoundTerms(
        prior=prior_nats(x0, chain.at_noise(x0)).flatten(1).sum(1),
        kl=torch.stack(kl, dim=1) if kl else x0.new_zeros(len(x0), 0),
        decoder=decoder,
        index=index.to(x0.device),
        weight=weight.to(x0),
        num_dims=x0[0].numel(),
    )


@torch.no_grad()
def optimal_variances(
    denoise: Denoise,
    batches: Iterable[Tensor],
    chain: ReverseChain,
    prediction_type: str,
    *,
    clip: Callable[[Tensor], Tensor] | None = None,
    generator: Generator | None = None,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """The reverse variances, one for each transition, under which these images have the smallest bound.

    That is the posterior's variance plus the mean squared error of the predicted mean; for a perfect model it is what
    Analytic-DPM computes from the score. Measure it on training images, since it is fitted to what it is measured on.

    Args:
        batches: Images in [-1, 1], each of shape `(batch, channels, ...)`.

    Returns: float64, shape `(len(chain),)`, for `ReverseChain(schedule, timesteps, variances)`.
    """
    error, count = torch.zeros(len(chain), dtype=torch.float64), 0
    for x0 in batches:
        count += x0.numel()
        for i in range(len(chain)):
            eps = noise(i) if noise else randn_tensor(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
            at = torch.full((len(x0),), i)
            x_t, step, p = evaluate_transition(denoise, x0, eps, chain, at, prediction_type, "fixed_small", clip)
            q = posterior(x0, x_t, step.t, step.s)
            error[i] += (q.mean - p.mean).square().sum().cpu().double()
    if not count:
        raise ValueError("batches must hold at least one image, got none")
    schedule, every = chain.schedule, chain.timesteps
    like = torch.zeros(1, dtype=torch.float64)
    s = schedule.level(torch.cat([torch.tensor([-1]), every[:-1]]), like)
    zero = torch.zeros_like(s.alpha)
    return posterior(zero, zero, schedule.level(every, like), s).std.square() + error / count


def check_variance(chain: ReverseChain, variance: str) -> None:
    """Refuses a kind of variance that there is none of, or that this chain has no table for."""
    if variance not in REVERSE_VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(REVERSE_VARIANCES)}, got {variance!r}")
    if variance == "optimal" and not chain.has_variances:
        raise ValueError("the variance 'optimal' needs a chain with variances: measure them with optimal_variances")


def _spread(
    num_images: int, num_terms: int, chain: ReverseChain, generator: Generator | list[Generator] | None
) -> tuple[Tensor, Tensor]:
    """Transitions but for 0, one from each of `num_terms` even parts of a distribution over them, and their weights.

    Half of it is even. The other half is in proportion to the change of log SNR, and so to the KL of a model whose error
    in x_0 is some share of 1 / SNR: without it the few transitions with the most would make the estimate noisy.

    Returns: int64 and float64, of shape `(images, terms)`.
    """
    if isinstance(generator, list):
        uniform = torch.stack([_uniform(num_terms, generator=one) for one in generator])
    else:
        uniform = _uniform(num_images, num_terms, generator=generator)
    level = chain.schedule.level(chain.timesteps, torch.zeros(1, dtype=torch.float64))
    change = -level.snr.log().diff()
    change = change.nan_to_num(posinf=0.0)  # to zero terminal SNR, which the even half has
    probability = 0.5 / len(change) + 0.5 * change / change.sum().clamp(min=1e-300)
    sums = (probability / probability.sum()).cumsum(0)
    place = (torch.arange(num_terms) + uniform) / num_terms  # evenly distributed over [0, 1) taken together
    drawn = torch.searchsorted(sums, place, right=True).clamp(max=len(change) - 1)
    return 1 + drawn, probability.sum() / (num_terms * probability[drawn])


def _uniform(*shape: int, generator: Generator | None) -> Tensor:
    """Uniform in [0, 1), float64, on the CPU."""
    device = torch.device("cpu") if generator is None else generator.device
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    return torch.rand(*shape, generator=generator, device=device, dtype=dtype).cpu().double()
