"""The likelihood by the probability flow, the ODE whose marginals are those of the noising path (Song et al. 2020).

Along the angle phi of the path, alpha = h cos(phi) and sigma = h sin(phi), the ODE of u = x / h is

    du / dphi = v(u, phi) = cos(phi) eps_hat - sin(phi) x0_hat

(Salimans & Ho 2022, Appendix D), for every Gaussian path, and the log density of u falls along a solution by the
divergence of v. The model is asked at fractional timesteps, between those of a discrete path at what `ContinuousTime`
interpolates.

A discrete path begins at a level with some noise, below which the model was not trained. So the flow gives the density
of x at that level and, as in the variational bound, the decoder of the last transition the probability of the data
given that x (see `diffusers_ext.diffusion.variational_bound`): a bound whose gap is that of one small step.

Or the data, which are the centres of bins, are spread over their bins first (`DEQUANTIZATIONS`): for x' in the bin of x_0
with density q(x' | x_0), log P(x_0) >= E[log p(x') - log q(x' | x_0)], P the mass of the bin. A uniform q gives the model less
noise than it knows; a normal of the path's own noise, truncated to the bin, as much as the bin allows.

References:
    Song et al. 2020, Score-Based Generative Modeling through Stochastic Differential Equations, arXiv 2011.13456
    (Section 4.3: probability flow; Skilling and Hutchinson's estimate of the divergence; Appendix D.4: adaptive solvers).
    Salimans, Ho 2022, Progressive Distillation for Fast Sampling of Diffusion Models, arXiv 2202.00512.
    Zheng et al. 2023, Improved Techniques for Maximum Likelihood Estimation for Diffusion ODEs, arXiv 2305.03935
    (truncated-normal dequantisation).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.noising import (
    NoiseLevel,
    normal_log_prob,
    output_eps,
    predict_x0,
    training_target,
)
from diffusers_ext.diffusion.paths import ContinuousTime
from diffusers_ext.diffusion.reverse_chain import ReverseChain, check_variance, split_output
from diffusers_ext.diffusion.variational_bound import Denoise, check_bins, decoder_nats, evaluate_transition
from diffusers_ext.draws import draw_normal


DIVERGENCES = ("hutchinson", "exact")

# Where the flow starts: at x_t1 of the noising chain, whose decoder then gives the data, or at a point of the data's own bin.
DEQUANTIZATIONS = ("decoder", "uniform", "truncated_normal")


@dataclass(frozen=True)
class FlowTerms:
    """The bound of each image by the flow, in nats of the whole image, shape `(batch,)`.

    Attributes:
        rate: log q(x_t1 | x_0) - log p(x_t1), t1 the cleanest timestep; the density of the second by the flow.
        distortion: -log p(x_0 | x_t1); 0 where x_t1 is drawn within the bin of x_0, which then follows from it.
        num_dims: Values of an image.
        num_calls: How often the flow called the model, for all of the images together.
    """

    rate: Tensor
    distortion: Tensor
    num_dims: int
    num_calls: int

    @property
    def total(self) -> Tensor:
        return self.rate + self.distortion


def flow_bound(
    denoise: Denoise,
    x0: Tensor,
    chain: ReverseChain,
    prediction_type: str,
    variance: str = "fixed_large",
    *,
    num_bins: int | None = 256,
    num_steps: int = 50,
    tolerance: float | None = None,
    divergence: str = "hutchinson",
    num_probes: int = 1,
    dequantization: str = "decoder",
    generator: Generator | list[Generator] | None = None,
    noise: Tensor | None = None,
    units: DataUnits | None = None,
) -> FlowTerms:
    """The bound of each image by the probability flow from the cleanest timestep of `chain` to its noisiest.

    Args:
        denoise, x0, prediction_type, variance, num_bins, units: As in `variational_bound`; the timesteps that the model is
            asked at are fractional, in the dtype of `x0`. `variance` is that of the last transition, to the data.
        num_steps, tolerance, divergence, num_probes: See `flow_density`.
        dequantization: One of `DEQUANTIZATIONS`.
        generator: Source of the noise and of the probes. With a list, the terms of image i follow from generator i.
        noise: The unit noise in x_t1 itself, of the shape of `x0`; its quantiles are those of the dequantisation.

    Raises:
        ValueError: If `x0` does not fit the bins or an option is not known.
    """
    check_variance(chain, variance)
    if dequantization not in DEQUANTIZATIONS:
        raise ValueError(f"dequantization must be one of {', '.join(DEQUANTIZATIONS)}, got {dequantization!r}")
    if num_bins is not None:
        check_bins(x0 if units is None else units.data(x0), num_bins)
    elif dequantization != "decoder":
        raise ValueError(f"dequantization {dequantization!r} is of data in bins, got num_bins=None")
    if noise is None:
        noise = draw_normal(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
    if dequantization == "decoder":
        with torch.no_grad():
            first = torch.zeros(len(x0), dtype=torch.int64, device="cpu")
            x_t, step, p, _ = evaluate_transition(denoise, x0, noise, chain, first, prediction_type, variance)
            decoder = decoder_nats(x0, p, num_bins, units).flatten(1).sum(1)
            log_q = normal_log_prob(noise) - step.t.sigma.log()
    else:
        level = chain.at(torch.zeros(1, dtype=torch.int64, device="cpu"), x0).t
        half_bin = 1 / (num_bins - 1) / (1.0 if units is None else units.scale.to(x0))
        x_t, log_q = dequantize(x0, level, half_bin, dequantization, noise)
        decoder = x0.new_zeros(len(x0))
    density = flow_density(
        denoise,
        x_t,
        ContinuousTime(chain.schedule),
        (int(chain.timesteps[0]), int(chain.timesteps[-1])),
        prediction_type,
        num_steps=num_steps,
        tolerance=tolerance,
        divergence=divergence,
        num_probes=num_probes,
        learned_variance=variance.startswith("learned"),
        generator=generator,
    )
    return FlowTerms(log_q.flatten(1).sum(1) - density.log_prob, decoder, x0[0].numel(), density.num_calls)


def dequantize(
    x0: Tensor, level: NoiseLevel, half_bin: Tensor | float, kind: str, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """x_t drawn from the bin of each value, and the log density that it is drawn from, of each coordinate.

    Args:
        level: Of x_t; the bin around alpha x_0 has the half width alpha `half_bin`.
        half_bin: Half the width of a bin of x_0.
        kind: "uniform"; or "truncated_normal", alpha x_0 + sigma u with a unit normal u that leaves the bin nowhere.
        noise: Unit normal numbers, of which a draw is the quantile.
    """
    share = torch.special.ndtr(noise) * 2 - 1  # uniform in (-1, 1)
    half = level.alpha * half_bin
    if kind == "uniform":
        return level.alpha * x0 + half * share, (-(2 * half).log()).expand(x0.shape)
    inside = torch.special.erf(half / level.sigma / math.sqrt(2))  # of the mass of a unit normal
    u = math.sqrt(2) * torch.special.erfinv(share * inside)
    return level.alpha * x0 + level.sigma * u, normal_log_prob(u) - inside.log() - level.sigma.log()


class FlowDensity(NamedTuple):
    """log p(x) in nats, shape `(batch,)`, and how often the model was called."""

    log_prob: Tensor
    num_calls: int


def flow_log_density(
    denoise: Denoise, x: Tensor, path: ContinuousTime, timesteps: tuple[int, int], prediction_type: str, **options
) -> Tensor:
    """The log density of `flow_density` alone, with its options."""
    return flow_density(denoise, x, path, timesteps, prediction_type, **options).log_prob


def flow_density(
    denoise: Denoise,
    x: Tensor,
    path: ContinuousTime,
    timesteps: tuple[int, int],
    prediction_type: str,
    *,
    num_steps: int = 50,
    tolerance: float | None = None,
    divergence: str = "hutchinson",
    num_probes: int = 1,
    learned_variance: bool = False,
    generator: Generator | list[Generator] | None = None,
) -> FlowDensity:
    """log p(x) in nats at the first timestep, if at the second p is N(0, h^2), h the scale of the path there.

    The classical Runge-Kutta method of order 4, with steps even in the log of the angle; or with a tolerance SciPy's "RK45",
    whose steps follow from all samples together.

    Args:
        x: Shape `(batch, channels, ...)`.
        timesteps: The one that `x` is at, and where the flow ends.
        num_steps: Each asks the model four times. Without a meaning with a tolerance.
        tolerance: Relative and absolute, of x / h and of the log density in each step.
        divergence: "hutchinson" estimates it without bias from random signs (the probes), the same along the whole
            solution; "exact" asks for one gradient for each value of an image, so for the smallest alone.
        num_probes: Gradients for each evaluation of the model, for "hutchinson".
        learned_variance: Whether the model's output has a second half of channels, for which the flow has no use.
        generator: Source of the probes.

    Returns: The log density in the dtype of `x`.

    Raises:
        ValueError: If an option is not known or out of range.
        ImportError, RuntimeError: With a tolerance, see `solve_flow`.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be {' or '.join(map(repr, DIVERGENCES))}, got {divergence!r}")
    for name, value in (("num_steps", num_steps), ("num_probes", num_probes)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if divergence == "hutchinson":
        probes = [
            draw_normal(x.shape, generator=generator, device=x.device, dtype=x.dtype).sign() for _ in range(num_probes)
        ]
        share = 1 / num_probes
    else:
        units = torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)
        probes, share = [unit.view_as(x[:1]).expand_as(x) for unit in units], 1.0

    def slope(u: Tensor, angle: float) -> tuple[Tensor, Tensor]:
        """v and its divergence."""
        angle = torch.tensor([angle], dtype=torch.float64, device="cpu")
        timestep = path.timestep(angle)
        scale = path.scale(timestep)
        level = NoiseLevel(
            *[value.to(u).view(1, *[1] * (u.ndim - 1)) for value in (scale * angle.cos(), scale * angle.sin())]
        )
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            x = u * scale.to(u)
            output, _ = split_output(
                denoise(x, path.labels(timestep).to(u).expand(len(u))).to(u.dtype),
                "learned" if learned_variance else "fixed_large",
            )
            v = velocity(output, x, level, prediction_type)
            last = len(probes) - 1
            grads = [torch.autograd.grad(v, u, probe, retain_graph=i < last)[0] for i, probe in enumerate(probes)]
        parts = [(grad * probe).flatten(1).sum(1) for grad, probe in zip(grads, probes, strict=True)]
        return v.detach(), share * torch.stack(parts).sum(0)

    times = torch.tensor(timesteps, dtype=torch.float64, device="cpu")
    ends, scale = path.angle(times).log().tolist(), path.scale(times[:1]).item()
    if tolerance is None:
        u, total, num_calls = _fixed_steps(slope, x / scale, ends, num_steps)
    else:
        u, total, num_calls = _adaptive_steps(slope, x / scale, ends, tolerance)
    log_prob = normal_log_prob(u).flatten(1).sum(1) + total - math.log(scale) * x[0].numel()
    return FlowDensity(log_prob, num_calls)


# From u and an angle to du / dphi and its divergence.
Slope = Callable[[Tensor, float], tuple[Tensor, Tensor]]


def _fixed_steps(slope: Slope, u: Tensor, ends: list[float], num_steps: int) -> tuple[Tensor, Tensor, int]:
    """u at the second end, the integral of the divergence, and the calls of the model."""
    angles, total = (
        torch.linspace(*ends, num_steps + 1, dtype=torch.float64, device="cpu").exp().tolist(),
        u.new_zeros(len(u)),
    )
    for start, end in zip(angles[:-1], angles[1:], strict=True):
        width, middle = end - start, (start + end) / 2
        v1, d1 = slope(u, start)
        v2, d2 = slope(u + width / 2 * v1, middle)
        v3, d3 = slope(u + width / 2 * v2, middle)
        v4, d4 = slope(u + width * v3, end)
        u = u + width / 6 * (v1 + 2 * v2 + 2 * v3 + v4)
        total = total + width / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return u, total, 4 * num_steps


def _adaptive_steps(slope: Slope, u: Tensor, ends: list[float], tolerance: float) -> tuple[Tensor, Tensor, int]:
    """The same with SciPy's steps, of u and the integral together."""

    def joint(log_angle: float, values: np.ndarray) -> np.ndarray:
        angle = math.exp(log_angle)
        v, divergence = slope(torch.from_numpy(values[: -len(u)]).view(u.shape).to(u), angle)
        return torch.cat([v.cpu().double().flatten(), divergence.cpu().double()]).mul(angle).numpy()

    start = torch.cat([u.cpu().double().flatten(), torch.zeros(len(u), dtype=torch.float64, device="cpu")]).numpy()
    values, num_calls = solve_adaptively(joint, ends, start, tolerance, tolerance)
    values = torch.from_numpy(values)
    return values[: -len(u)].view(u.shape).to(u), values[-len(u) :].to(u), num_calls


def solve_flow(
    denoise: Denoise,
    x: Tensor,
    path: ContinuousTime,
    timesteps: tuple[int, int],
    prediction_type: str,
    *,
    unit_scale_input: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
) -> tuple[Tensor, int]:
    """x at the second timestep on the solution that goes through `x` at the first, by an adaptive Runge-Kutta method.

    SciPy's "RK45" along the log of the angle, in float64 on the host. The size of its steps follows from all samples
    together, so that a sample is the same in another batch to within the tolerances alone.

    Args:
        x: Shape `(batch, channels, ...)`.
        unit_scale_input: Whether the model sees x / h, and its output is that of the path at unit scale.
        rtol, atol: Tolerances of x / h in each step.

    Returns: x, of the dtype of `x`, and how often the model was called.

    Raises:
        ImportError: If SciPy is not installed.
        RuntimeError: If the tolerances cannot be kept.
    """

    def slope(log_angle: float, values: np.ndarray) -> np.ndarray:
        angle = torch.tensor([log_angle], dtype=torch.float64, device="cpu").exp()
        timestep = path.timestep(angle)
        scale = 1.0 if unit_scale_input else path.scale(timestep).item()
        level = NoiseLevel(
            *[(scale * value).to(x).view(1, *[1] * (x.ndim - 1)) for value in (angle.cos(), angle.sin())]
        )
        seen = torch.from_numpy(values).view(x.shape).to(x) * scale
        with torch.no_grad():
            output = denoise(seen, path.labels(timestep).to(x).expand(len(x))).to(x.dtype)
            v = velocity(output, seen, level, prediction_type)
        return (v.cpu().double() * angle).flatten().numpy()

    times = torch.tensor(timesteps, dtype=torch.float64, device="cpu")
    scales, ends = path.scale(times).tolist(), path.angle(times).log().tolist()
    start = (x.cpu().double() / scales[0]).flatten().numpy()
    values, num_calls = solve_adaptively(slope, ends, start, rtol, atol)
    return (torch.from_numpy(values).view(x.shape) * scales[1]).to(x), num_calls


def solve_adaptively(
    slope: Callable[[float, np.ndarray], np.ndarray], ends: list[float], start: np.ndarray, rtol: float, atol: float
) -> tuple[np.ndarray, int]:
    """Where a solution ends by SciPy's "RK45", and how often it asked for the slope; see `solve_flow` for what it raises."""
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError("an adaptive solver of the flow needs SciPy: pip install scipy") from error
    solution = solve_ivp(slope, ends, start, method="RK45", t_eval=ends[1:], rtol=rtol, atol=atol)
    if not solution.success:
        raise RuntimeError(f"the flow could not be solved with rtol={rtol} and atol={atol}: {solution.message}")
    return solution.y[:, -1], solution.nfev


def velocity(output: Tensor, x_t: Tensor, level: NoiseLevel, prediction_type: str) -> Tensor:
    """The v that a model means by its output."""
    if prediction_type == "v_prediction":
        return output
    x0_hat = predict_x0(output, x_t, level, prediction_type)
    return training_target(x0_hat, output_eps(output, x_t, level, prediction_type), level, "v_prediction")
