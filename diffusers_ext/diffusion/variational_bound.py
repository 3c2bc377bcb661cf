"""The variational bound of a diffusion model, term by term.

    -log p(x_0) <= L_T + sum of KL(q(x_s | x_t, x_0) || p(x_s | x_t)) - log p(x_0 | x_t1)

over the transitions t -> s of a list of timesteps, the last of which, from t1, ends at the data (DDPM, Section 3.2,
there for all timesteps). The first two parts are the rate, the last is the distortion. All are in nats; `bits_per_dim`
is the only place where they become bits.

Data are in [-1, 1]. Of images in b bits there are 2^b values, evenly spaced from -1 to 1, and the distortion is the
probability of the bin around each: half-way to its neighbours, without end at the two outermost (DDPM, Section 3.3).
Bits per dimension are then those that a lossless code of the images would take. For continuous data, `num_bins=None`,
the distortion is a density, and bits per dimension compare with a differential entropy. Of a model of normalised samples,
whose `units` lead back to the data, both are those of the data.

References:
    DDPM: Ho, Jain, Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239.
    Bao et al. 2022, Analytic-DPM, arXiv 2201.06503 (optimal variances).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from diffusers_ext.diffusion.analytic_variance import (
    Denoise,
    X0Variances,
    analytic_variance,
    measure_prediction,
)
from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.noising import (
    NoiseLevel,
    Normal,
    add_noise,
    normal_kl,
    normal_log_prob,
    posterior,
    predict_x0,
)
from diffusers_ext.diffusion.precision import to_float64
from diffusers_ext.diffusion.reverse_chain import (
    LEARNED_VARIANCES,
    ReverseChain,
    ReverseStep,
    check_variance,
    reverse_log_std,
    reverse_transition,
    split_output,
)
from diffusers_ext.diffusion.timestep_search import search_grid
from diffusers_ext.draws import draw_normal
from diffusers_ext.machine import widest_float


def transition_kl(x0: Tensor, x_t: Tensor, step: ReverseStep, p: Normal) -> Tensor:
    """KL(q(x_s | x_t, x_0) || p) of each coordinate, in nats. Not for transition 0, whose cost is the distortion."""
    return normal_kl(Normal(posterior(x0, x_t, step.t, step.s).mean, step.log_std_small.exp()), p)


def decoder_nats(x0: Tensor, p: Normal, num_bins: int | None = 256, units: DataUnits | None = None) -> Tensor:
    """The distortion -log p(x_0) of each coordinate, in nats, for the normal `p` that the last transition ends in.

    Args:
        x0: The data of it are in [-1, 1]; with bins, at their centres (see `check_bins`).
        num_bins: Number of values that a coordinate can have, 256 for 8 bits; None for the density of the data.
        units: From `x0` and `p` to the data; None if these are the data.
    """
    if units is not None:
        x0, p = units.data(x0), units.normal(p)
    if num_bins is None:
        return -normal_log_prob(x0, p.mean, p.std.log())
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
    units: DataUnits | None = None,
) -> Tensor:
    """The cost of transition `index` of each sample, for each coordinate, in nats: the KL, or for index 0 the distortion.

    Args:
        output: The model's output at `x_t`, with twice the channels if the variance is learned.
        index: int64, shape `(batch,)`.
        variance: One of `diffusers_ext.diffusion.reverse_chain.REVERSE_VARIANCES`.
        detach_mean: Whether gradients reach the variance alone.
        units: See `decoder_nats`.
    """
    step = chain.at(index, x0)
    prediction, variance_output = split_output(output, variance)
    x0_hat = predict_x0(prediction.detach() if detach_mean else prediction, x_t, step.t, prediction_type)
    p = reverse_transition(x0_hat, x_t, step, reverse_log_std(step, variance, variance_output))
    is_last = (index == 0).view(-1, *[1] * (x0.ndim - 1))
    return torch.where(is_last, decoder_nats(x0, p, num_bins, units), transition_kl(x0, x_t, step, p))


def prior_nats(x0: Tensor, level: NoiseLevel) -> Tensor:
    """L_T of each coordinate, KL(q(x_T | x_0) || N(0, h_T^2)), in nats; `level` is that of x_T and h_T its scale."""
    return normal_kl(Normal(level.alpha * x0, level.sigma), Normal(torch.zeros_like(level.alpha), level.scale))


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
        error: Mean squared error of the predicted x_0 at these transitions, in the units of the data, `(batch, terms)`.
        decoder_error: The same at x_t1, shape `(batch,)`.
        num_dims: Values of an image.
    """

    prior: Tensor
    kl: Tensor
    decoder: Tensor
    index: Tensor
    weight: Tensor
    error: Tensor
    decoder_error: Tensor
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
) -> tuple[Tensor, ReverseStep, Normal, Tensor]:
    """x_t at transition `index` of each image, these transitions, the model's p(x_s | x_t), and the x_0 that it predicts.

    Raises:
        ValueError: If the model's output does not have the shape that the variance needs.
    """
    step = chain.at(index, x0)
    x_t = add_noise(x0, eps, step.t)
    output = denoise(x_t, chain.schedule.labels(chain.timesteps[index]).to(x0.device)).to(x0.dtype)
    channels = x0.shape[1] * (2 if variance in LEARNED_VARIANCES else 1)
    if output.shape != (len(x0), channels, *x0.shape[2:]):
        raise ValueError(
            f"the model's output must have shape {tuple(x0.shape)}, with twice the channels for a learned variance, got "
            f"{tuple(output.shape)} for the variance {variance!r}"
        )
    prediction, variance_output = split_output(output, variance)
    x0_hat = predict_x0(prediction, x_t, step.t, prediction_type)
    x0_hat = x0_hat if clip is None else clip(x0_hat)
    p = reverse_transition(x0_hat, x_t, step, reverse_log_std(step, variance, variance_output))
    return x_t, step, p, x0_hat


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
    units: DataUnits | None = None,
) -> BoundTerms:
    """The variational bound of each image under the sampler that visits the timesteps of `chain`.

    Args:
        denoise: The model, from x_t and timesteps of shape `(batch,)` to its output.
        x0: Images in [-1, 1], or what `units` make such images of, shape `(batch, channels, ...)`. The terms are computed in
            its dtype, for a bound to many digits float64.
        variance: One of `diffusers_ext.diffusion.reverse_chain.REVERSE_VARIANCES`.
        num_bins: See `decoder_nats`; None for continuous data.
        num_terms: Number of transitions looked at for each image, in [1, n - 1] for a chain of n, spread over the chain
            at random and more where the log SNR changes more. By default all. The last transition and the prior are
            always counted.
        clip: What the sampler does to the predicted x_0, such as clamping it to [-1, 1].
        generator: Source of the noise. With a list, the terms of image i follow from generator i alone.
        noise: The unit noise of transition i itself, of the shape of `x0`, instead of a generator.
        units: See `decoder_nats`.

    Raises:
        ValueError: If `x0` does not fit the bins, `num_terms` is out of range or the variance is not known.
    """
    check_variance(chain, variance)
    if num_bins is not None:
        check_bins(x0 if units is None else units.data(x0), num_bins)
    last = len(chain) - 1
    if num_terms is not None and not 1 <= num_terms <= last:
        raise ValueError(f"num_terms must be in [1, {last}], one less than the chain's timesteps, got {num_terms}")
    index = torch.arange(1, len(chain), device="cpu").expand(len(x0), -1)
    weight = torch.ones(index.shape, dtype=torch.float64, device="cpu")
    if num_terms is not None and num_terms < last:
        index, weight = _spread(len(x0), num_terms, chain, generator)
    draw = noise or (lambda i: draw_normal(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype))

    def cost(column: int | None) -> tuple[Tensor, Tensor]:
        at = torch.zeros(len(x0), dtype=torch.int64, device="cpu") if column is None else index[:, column]
        model = (chain, at, prediction_type, variance, clip)
        x_t, step, p, x0_hat = evaluate_transition(denoise, x0, draw(int(at[0])), *model)
        nats = decoder_nats(x0, p, num_bins, units) if column is None else transition_kl(x0, x_t, step, p)
        error = (x0_hat - x0) if units is None else (units.data(x0_hat) - units.data(x0))
        return nats.flatten(1).sum(1), error.square().flatten(1).mean(1)

    decoder, decoder_error = cost(None)
    each = [cost(column) for column in range(index.shape[1])]
    kl, error = (torch.stack(part, dim=1) if part else x0.new_zeros(len(x0), 0) for part in _unzip(each))
    return BoundTerms(
        prior=prior_nats(x0, chain.at_noise(x0)).flatten(1).sum(1),
        kl=kl,
        decoder=decoder,
        index=index.to(x0.device),
        weight=weight.to(x0),
        error=error,
        decoder_error=decoder_error,
        num_dims=x0[0].numel(),
    )


def _unzip(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [first for first, _ in pairs], [second for _, second in pairs]


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
    num_measured: int | None = None,
) -> Tensor:
    """The reverse variances, one for each transition, under which these images have the smallest bound.

    See `analytic_variance`. Measure them on training images, since they are fitted to what they are measured on.

    Args:
        batches: Images in [-1, 1], each of shape `(batch, channels, ...)`.
        num_measured: Of a longer chain, the error of x_0 is measured at so many timesteps of its path, see `search_grid`, and
            interpolated between them, see `X0Variances`. By default it is measured at all of the chain's.

    Returns: float64, shape `(len(chain),)`, for `ReverseChain(schedule, timesteps, variances)`.
    """
    in_part = num_measured is not None and num_measured < len(chain)
    timesteps = search_grid(chain.schedule, num_measured).flip(0) if in_part else chain.timesteps
    moments = measure_prediction(
        *(denoise, batches, chain.schedule, timesteps, prediction_type), clip=clip, generator=generator, noise=noise
    )
    x0_variance = moments.x0_variance
    if in_part:
        table = {"timesteps": timesteps.tolist(), "x0_variance": x0_variance.tolist()}
        x0_variance = X0Variances(table, chain.schedule).values[chain.timesteps]
    return chain_variances(chain, x0_variance)


def chain_variances(chain: ReverseChain, x0_variance: Tensor) -> Tensor:
    """The reverse variance of each transition for predictions of x_0 that are off by `x0_variance`, both of shape `(n,)`."""
    like = torch.zeros(1, dtype=torch.float64, device="cpu")
    before = torch.cat([torch.tensor([-1], device="cpu"), chain.timesteps[:-1]])
    return analytic_variance(
        chain.schedule.level(chain.timesteps, like), chain.schedule.level(before, like), x0_variance
    )


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
    level = chain.schedule.level(chain.timesteps, torch.zeros(1, dtype=torch.float64, device="cpu"))
    change = -level.snr.log().diff()
    change = change.nan_to_num(posinf=0.0)  # to zero terminal SNR, which the even half has
    probability = 0.5 / len(change) + 0.5 * change / change.sum().clamp(min=1e-300)
    sums = (probability / probability.sum()).cumsum(0)
    place = (
        torch.arange(num_terms, device="cpu") + uniform
    ) / num_terms  # evenly distributed over [0, 1) taken together
    drawn = torch.searchsorted(sums, place, right=True).clamp(max=len(change) - 1)
    return 1 + drawn, probability.sum() / (num_terms * probability[drawn])


def _uniform(*shape: int, generator: Generator | None) -> Tensor:
    """Uniform in [0, 1), float64, on the CPU."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.rand(*shape, generator=generator, device=device, dtype=widest_float(device)).cpu().double()
