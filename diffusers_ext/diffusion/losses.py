"""Training objectives, stated as weights of |x_0 - x0_hat|^2 at a noise level, whatever the model outputs.

    L = E_t[ w(t) |x_0 - x0_hat|^2 ]

The weights differ between papers only in w; `x0_error_scale` carries each to the model's own output. The variational
bound is such a loss too if the variances are fixed; with learned ones it is `bound_loss`.

References:
    Ho, Jain, Abbeel 2020, Denoising Diffusion Probabilistic Models, arXiv 2006.11239 (L_simple).
    Nichol, Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672 (L_vlb, L_hybrid).
    Hang et al. 2023, Efficient Diffusion Training via Min-SNR Weighting Strategy, arXiv 2303.09556.
    Salimans, Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
    Choi et al. 2022, Perception Prioritized Training of Diffusion Models, arXiv 2204.00227 (P2).
    Song, Durkan, Murray, Ermon 2021, Maximum Likelihood Training of Score-Based Diffusion Models, arXiv 2101.09258.
    Li, He 2025, Back to Basics: Let Denoising Generative Models Denoise, arXiv 2511.13720.
    Kingma, Salimans, Poole, Ho 2021, Variational Diffusion Models, arXiv 2107.00630.
    Tang, Bao, Chen, Guo 2025, Diffusion Models without Classifier-free Guidance, arXiv 2502.12154 (model guidance).
"""

import torch
from torch import Tensor

from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.noising import (
    PREDICTION_TYPES,
    NoiseLevel,
    NoiseSchedule,
    output_coefficients,
    training_target,
    x0_error_scale,
)
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.variational_bound import transition_nats


LOSS_WEIGHTINGS = (
    *("uniform", "simple", "min_snr", "truncated_snr", "snr_plus_one", "p2", "velocity", "sample", "likelihood"),
)

# The smallest sigma that an error of x_0 is divided by, for that of the velocity (Li & He 2025).
SMALLEST_DIVISOR = 0.05

# The weighting of each prediction type where none is given: that under which the model's outputs at all noise levels are of
# one size. For the score, whose size is 1 / sigma, equal weights would train the cleanest levels alone.
DEFAULT_WEIGHTINGS = {name: "simple" if name == "score" else "uniform" for name in PREDICTION_TYPES}

# What is minimised: a weighted squared error; the bound; the first for the mean and the second for the variance.
OBJECTIVES = ("simple", "vlb", "hybrid")


def likelihood_weights(schedule: NoiseSchedule) -> Tensor:
    """The weight of the squared error of x_0 at each level under which the loss is the variational bound.

    That is T `kl_weight` between neighbouring levels, so that the mean over all timesteps is the sum over the chain in nats,
    with the reverse variances beta tilde and up to what no model has an influence on (Kingma et al. 2021). With
    many levels it is -d snr / dt / 2, the likelihood weighting g(t)^2 of the score's error (Song et al. 2021, Theorem 1).
    The KL of the last transition, to data without noise, would be infinite: it has the weight of a step that is as long in
    log snr as the one before it. (What it costs in bits is the distortion, which depends on the variance of the sampler.)

    Returns: float64, shape `(T,)`.
    """
    snr = _every_level(schedule).snr
    before = (2 * snr[:1].log() - snr[1:2].log()).exp() if len(snr) > 1 and snr[1] > 0 else 2 * snr[:1]
    return 0.5 * len(schedule) * (torch.cat([before, snr[:-1]]) - snr)


def loss_weight(
    level: NoiseLevel,
    weighting: str,
    prediction_type: str,
    *,
    snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    x0_weight: Tensor | None = None,
) -> Tensor:
    """The weight of the model's squared error |target - output|^2 at each noise level, of the level's shape.

    | weighting | w, the weight of the squared error of x_0 | source |
    |---|---|---|
    | uniform | what makes the weight of the model's own error 1 | |
    | simple | snr: every error of eps counts the same | L_simple, Ho et al. 2020 |
    | min_snr | min(snr, snr_gamma) | Hang et al. 2023 |
    | truncated_snr | max(snr, 1) | Salimans & Ho 2022 |
    | snr_plus_one | snr + 1: every error of v counts the same | Salimans & Ho 2022 |
    | p2 | snr / (1 + snr)^p2_gamma | Choi et al. 2022, with k = 1 |
    | velocity | 1 / max(sigma, 0.05)^2: every error of the velocity counts the same, which is eps - x_0 on the linear path \
and v where alpha^2 + sigma^2 = 1; but not at the cleanest levels | Li & He 2025, "JiT", for networks that output x_0 |
    | sample | 1: every error of x_0 counts the same | |
    | likelihood | `x0_weight`, of `likelihood_weights`: the bound | Song et al. 2021, Kingma et al. 2021 |

    Args:
        x0_weight: The weights of "likelihood", which are those of a schedule and not of a level, of the level's shape.

    Raises:
        ValueError: if `weighting` is none of `LOSS_WEIGHTINGS`, or lacks `x0_weight`.
    """
    snr = level.snr
    match weighting:
        case "uniform":
            return snr.new_ones(snr.shape)
        case "simple":
            x0_weight = snr
        case "min_snr":
            x0_weight = snr.clamp(max=snr_gamma)
        case "truncated_snr":
            x0_weight = snr.clamp(min=1)
        case "snr_plus_one":
            x0_weight = snr + 1
        case "p2":
            x0_weight = snr / (1 + snr) ** p2_gamma
        case "velocity":
            x0_weight = torch.as_tensor(level.sigma, device=snr.device).clamp(min=SMALLEST_DIVISOR) ** -2
        case "sample":
            x0_weight = snr.new_ones(snr.shape)
        case "likelihood":
            if x0_weight is None:
                raise ValueError("loss_weighting likelihood needs x0_weight: likelihood_weights at these timesteps")
        case _:
            raise ValueError(f"loss_weighting must be one of {', '.join(LOSS_WEIGHTINGS)}, got {weighting!r}")
    return x0_weight * x0_error_scale(level, prediction_type)


def level_weights(
    schedule: NoiseSchedule, weighting: str, prediction_type: str, *, snr_gamma: float = 5.0, p2_gamma: float = 1.0
) -> Tensor:
    """`loss_weight` at each level of a schedule, float64, shape `(T,)`.

    Raises:
        ValueError: if that at a level is no number, as most are where there is no noise: the weight of x_0 is infinite
            there, and its error 0.
    """
    level = _every_level(schedule)
    x0_weight = likelihood_weights(schedule) if weighting == "likelihood" else None
    weight = loss_weight(
        *(level, weighting, prediction_type), snr_gamma=snr_gamma, p2_gamma=p2_gamma, x0_weight=x0_weight
    )
    wrong = weight.isnan().nonzero()
    if len(wrong):
        timestep = int(wrong[0])
        raise ValueError(
            f"loss_weighting {weighting} with prediction_type {prediction_type} must have a weight at each noise level, got "
            f"none at timestep {timestep}, of alpha {level.alpha[timestep]:.3g} and sigma {level.sigma[timestep]:.3g}: take "
            f"a path with noise and signal there, such as one whose first beta is above 0, or another weighting"
        )
    return weight


def trained_share(
    schedule: NoiseSchedule, weighting: str, prediction_type: str, *, snr_gamma: float = 5.0, p2_gamma: float = 1.0
) -> float:
    """The share of the noise levels that the loss of an untrained model comes from, in (0, 1].

    That is (sum L)^2 / (T sum L^2) for the loss L_t at each of T levels of a model that outputs zeros, on data of unit
    variance: 1 if it is the same at all levels, 1 / T if it is all at one. Of a small share, the others learn little.

    Raises:
        ValueError: if the loss at a level is no number; see `level_weights`.
    """
    a, b = output_coefficients(_every_level(schedule), prediction_type)
    weight = level_weights(schedule, weighting, prediction_type, snr_gamma=snr_gamma, p2_gamma=p2_gamma)
    loss = weight * (torch.as_tensor(a, device="cpu").square() + torch.as_tensor(b, device="cpu").square())
    loss = (loss / loss.max()).nan_to_num(1.0)  # what is infinite has it all
    return (loss.sum().square() / (len(schedule) * loss.square().sum())).item()


def model_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """What is added to a network's target, so that it learns its guided prediction: (1 - 1 / s) (f(x_t, c) - f(x_t)).

    With it the best prediction f is that whose distance from the target is (1 - 1 / s) times that from the unconditional u, so
    that f = u + s (target - u): classifier-free guidance of scale s, in one call (model guidance, Tang et al. 2025).

    Args:
        conditional, unconditional: The network's own outputs, without gradients.
        scale: s, at least 1, at which nothing is added.
    """
    return (1 - 1 / scale) * (conditional - unconditional)


def denoising_loss(
    output: Tensor,
    x0: Tensor,
    eps: Tensor,
    level: NoiseLevel,
    prediction_type: str,
    *,
    weighting: str | None = None,
    snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    x0_weight: Tensor | None = None,
    lead: Tensor | None = None,
) -> Tensor:
    """The weighted squared error of each sample, averaged over its elements, at least in float32; shape `(batch,)`.

    The weighting is that of `DEFAULT_WEIGHTINGS` if none is given.

    Args:
        output: What the model gave at `add_noise(x0, eps, level)`.
        x0: Clean samples in [-1, 1], shape `(batch, ...)`, like `eps` and `output`.
        level: Noise level of each sample.
        x0_weight: See `loss_weight`.
        lead: Added to what the model is to output, of the shape of `output`; see `model_guidance`.
    """
    if weighting is None:
        weighting = DEFAULT_WEIGHTINGS[prediction_type]
    target = training_target(x0, eps, level, prediction_type)
    if lead is not None:
        target = target + lead
    wide = torch.promote_types(target.dtype, torch.float32)
    error = (output.to(wide) - target).square().flatten(1).mean(1)
    if weighting == "uniform":
        return error
    options = {"snr_gamma": snr_gamma, "p2_gamma": p2_gamma, "x0_weight": x0_weight}
    return loss_weight(level, weighting, prediction_type, **options).flatten() * error


def bound_loss(
    output: Tensor,
    x0: Tensor,
    x_t: Tensor,
    chain: ReverseChain,
    timesteps: Tensor,
    prediction_type: str,
    variance: str = "learned_range",
    *,
    num_bins: int | None = 256,
    detach_mean: bool = False,
    units: DataUnits | None = None,
) -> Tensor:
    """L_vlb from one timestep of each sample, in nats per dimension, shape `(batch,)` (Nichol & Dhariwal 2021).

    That is the term of the bound at that timestep times their number, so that its mean over all timesteps is the bound
    without the prior term L_T, on which no model has an influence.

    Args:
        output: What the model gave at `x_t`, with twice the channels if the variance is learned.
        chain: Over all timesteps of the noising path.
        timesteps: int64, shape `(batch,)`.
        variance: One of `diffusers_ext.diffusion.reverse_chain.REVERSE_VARIANCES`.
        num_bins: Number of values that the data can have, or None if they are continuous.
        detach_mean: Whether gradients reach the variance alone, as in L_hybrid.
        units: From `x0` to the data; None if these are the data.
    """
    wide = output.to(torch.promote_types(x0.dtype, torch.float32))
    nats = transition_nats(
        *(wide, x0, x_t, chain, timesteps, prediction_type, variance),
        num_bins=num_bins,
        detach_mean=detach_mean,
        units=units,
    )
    return len(chain) * nats.flatten(1).mean(1)


def _every_level(schedule: NoiseSchedule) -> NoiseLevel:
    like = torch.zeros(1, dtype=torch.float64, device="cpu")
    return schedule.level(torch.arange(len(schedule), device="cpu"), like)
