"""A step of second order from two predictions of x_0, that of the step and that of the one before.

DDIM takes the predicted x_0 to stay as it is over a step. DPM-Solver++(2M) takes it to go on in a straight line, over half the
log of the signal-to-noise ratio, through the predictions of this step and of the last one (Lu et al. 2022, arXiv 2211.01095,
Algorithm 2), for no more calls of the network. What it adds to DDIM's step is a multiple of the difference of the two.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_ext.diffusion.noising import Factor, NoiseLevel, Transition


# How far two levels have to be apart to be two: timesteps of the linear path are float32, and some pipelines round them.
LEVEL_ROUNDING = 1e-6


@dataclass
class LastStep:
    """The step that was made last, from the level t down to s, and its predicted x_0, shape `(batch, ...)`."""

    t: NoiseLevel
    s: NoiseLevel
    x0: Tensor

    def __deepcopy__(self, memo) -> "LastStep":
        # Levels are never written to, and torch copies no tensor that has a gradient's history.
        return LastStep(self.t, self.s, self.x0.detach().clone())


def second_order_factor(last: LastStep, at: Transition) -> Factor:
    """The k for which DDIM's step, plus k (x_0 - the last step's x_0), is that of DPM-Solver++(2M).

    With lambda = log(alpha / sigma) it is alpha_s (1 - exp(-h)) h / (2 h'), where h is the length of the step in lambda and h'
    that of the last one. It is 0, and the step of first order, where the last step did not end where this one starts, and where
    lambda is infinite: of a step to the data, which takes the predicted x_0 itself, or after one from pure noise, which lies
    infinitely far back.

    Returns: a float if all levels are of floats, or a tensor that broadcasts against x_t; no value is read from a device.
    """
    before, t, s = last.t, at.t, at.s
    length, last_length = _log_ratio(t, s), _log_ratio(before, t)
    ends_here = (abs(last.s.alpha - t.alpha) <= LEVEL_ROUNDING) & (abs(last.s.sigma - t.sigma) <= LEVEL_ROUNDING)
    usable = ends_here & (before.alpha > 0) & (t.sigma > 0) & (s.sigma > 0) & (last_length > LEVEL_ROUNDING)
    if not isinstance(usable, Tensor):
        return _of_step(t, s) * length / (2 * last_length) if usable else 0.0
    last_length = torch.where(usable, last_length, 1.0)
    return torch.where(usable, _of_step(t, s) * length / (2 * last_length), 0.0)


def _of_step(t: NoiseLevel, s: NoiseLevel) -> Factor:
    """alpha_s (1 - exp(-h)), the factor that a step of first order has x_0 with."""
    return s.alpha - t.alpha * s.sigma / _positive(t.sigma)


def _log_ratio(a: NoiseLevel, b: NoiseLevel) -> Factor:
    """lambda_b - lambda_a; large and finite where it is infinite."""
    logs = [_log(factor) for factor in (b.alpha, a.sigma, a.alpha, b.sigma)]
    return (logs[0] + logs[1]) - (logs[2] + logs[3])


def _log(x: Factor) -> Factor:
    return _positive(x).log() if isinstance(x, Tensor) else math.log(_positive(x))


def _positive(x: Factor) -> Factor:
    tiny = torch.finfo(torch.float32).tiny
    return x.clamp(min=tiny) if isinstance(x, Tensor) else max(x, tiny)
