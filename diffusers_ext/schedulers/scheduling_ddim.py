"""Implicit sampling of a Gaussian noising path, and its inversion (DDIM: Song, Meng, Ermon 2020, arXiv 2010.02502).

The paper's alpha is our alpha_bar.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from diffusers_ext.diffusion.noising import NoiseLevel, posterior, predict_x0
from diffusers_ext.schedulers.coefficients import (
    CoefficientTable,
    Factor,
    Path,
    Prediction,
    Transition,
    clip_x0,
    weighted_sum,
    wide,
)
from diffusers_ext.schedulers.gaussian import GaussianSchedulerMixin, check_output, draw_noise


# Tables for so many values of eta are kept.
MAX_TABLES = 8


class Inversion(NamedTuple):
    """Coefficients of the way back, from s to t.

    eps = eps_sample model_input + eps_output output
    x_0 = x0_sample x_s + x0_eps eps
    x_t = alpha x_0 + sigma eps
    """

    eps_sample: Factor
    eps_output: Factor
    x0_sample: Factor
    x0_eps: Factor
    alpha: Factor
    sigma: Factor


class InversionMixin:
    """The step from the cleaner to the noisier level, common to the sampler and to the inverse scheduler."""

    def reverse_step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        return_dict: bool = True,
        model_input: Tensor | None = None,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_s up to x_t: what `step` at `timestep` and `eta=0` undoes.

        The model is evaluated at `timestep`, the level that is reached, as in diffusers' `DDIMInverseScheduler`. Its
        input should be x_t; x_s stands in for it, and the error of that falls with the number of steps. If
        `model_input` is x_t itself, `step` returns to x_s exactly as long as nothing is clipped.

        Args:
            model_output: The model's output, of the shape of `sample` or with twice the channels (the variance).
            timestep: The level t to reach, one or one for each sample; s is the next lower timestep of the list, or
                the clean end.
            sample: x_s, shape `(batch, channels, ...)`.
            model_input: What the model saw; `sample` by default.

        Returns: `prev_sample` is x_t, `pred_original_sample` the predicted x_0.

        Raises:
            ValueError: If a shape does not fit or a timestep is out of range.
        """
        output, _ = check_output(model_output, sample, takes_variance=True)
        path = self._current_path()
        c, _ = self._coefficients_at(path, path.tables["inversion"], timestep, sample)
        dtype = torch.promote_types(sample.dtype, output.dtype)
        x_s, output = wide(sample), wide(output)
        eps = weighted_sum((c.eps_output, output), (c.eps_sample, x_s if model_input is None else wide(model_input)))
        x0 = clip_x0(weighted_sum((c.x0_sample, x_s), (c.x0_eps, eps)), path, owned=True)
        x_t, x0 = weighted_sum((c.alpha, x0), (c.sigma, eps)).to(dtype), x0.to(dtype)
        if not return_dict:
            return x_t, x0
        return DDIMSchedulerOutput(prev_sample=x_t, pred_original_sample=x0)

    def invert(self, denoise: Callable[[Tensor, Tensor], Tensor], sample: Tensor, num_refinements: int = 0) -> Tensor:
        """The x_T that deterministic sampling over `timesteps` takes to `sample`, up to the error of the steps.

        Args:
            denoise: The model, from x_t and a timestep to its output.
            sample: Clean data, shape `(batch, channels, ...)`.
            num_refinements: How often each step is repeated with its own result as the model's input (a fixed-point
                iteration); each costs one more evaluation of the model and makes the round trip more exact.
        """
        for timestep in self.timesteps.sort().values:
            x_t = sample
            for _ in range(num_refinements + 1):
                output = denoise(x_t, timestep)
                x_t = self.reverse_step(output, timestep, sample, return_dict=False, model_input=x_t)[0]
            sample = x_t
        return sample

    def _prepare_inversion(self, path: Path) -> None:
        t, s = path.t, path.s
        one, zero = torch.ones_like(t.alpha), torch.zeros_like(t.alpha)
        output = Prediction.at(t, path.prediction_type)
        x0 = [predict_x0(*pair, s, "epsilon") for pair in ((zero, one), (one, zero))]
        path.tables["inversion"] = CoefficientTable(
            Inversion(output.eps_sample, output.eps_output, *x0, t.alpha, t.sigma)
        )


class ExtDDIMScheduler(InversionMixin, GaussianSchedulerMixin, DDIMScheduler):
    """`DDIMScheduler` that reads the next timestep from its list, with inversion and a step without a host sync.

    Takes every config key of diffusers' class, with its meaning and default. Where that class is right the result is
    the same with the same generator, to float32 rounding. It differs here:

    - The previous timestep is the next of the list for every spacing and number of steps (upstream it is computed as
      `t - T // n`, wrong for "linspace" and for "trailing" or "leading" lists that it does not describe).
    - The last step draws no noise if it ends at the clean level. (With `set_alpha_to_one` off the path ends at the
      level of timestep 0, and at `eta > 0` the last transition has the noise of that, as upstream.)
    - `steps_offset` is cut where it would leave the path, and "trailing" never lists a timestep below 0.
    - Outputs with twice the channels (a learned variance) are sampled too; DDIM has no use for the second half.
    - Levels are exact to float64, and data in half precision round once, at the end.

    Args:
        num_train_timesteps: Length of the noising path the model was trained on.
        beta_start, beta_end: Ends of the schedules that are given by beta.
        beta_schedule: One of `diffusers_ext.diffusion.betas.BETA_SCHEDULES`.
        trained_betas: The betas themselves, shape `(num_train_timesteps,)`; they go before `beta_schedule`.
        clip_sample: Whether to clip the predicted x_0.
        set_alpha_to_one: Whether the clean end has alpha_bar 1, or that of timestep 0.
        steps_offset: Added to the timesteps of "leading".
        prediction_type: One of `diffusers_ext.diffusion.noising.PREDICTION_TYPES`.
        thresholding: Whether to threshold the predicted x_0 dynamically; goes before `clip_sample`.
        dynamic_thresholding_ratio: Quantile of the magnitudes of x_0, for `thresholding`.
        clip_sample_range: Bound on |x_0|, for `clip_sample`.
        sample_max_value: Largest bound, for `thresholding`.
        timestep_spacing: One of `diffusers_ext.diffusion.timesteps.TIMESTEP_SPACINGS`.
        rescale_betas_zero_snr: Whether to rescale the path so that its last level holds no signal.
        beta_reference_timesteps: Length of the path that `beta_start` and `beta_end` were chosen for (1000 in the
            papers). If given, a path of another length keeps the range of noise levels of that one.

    Raises:
        ValueError: If a value is unknown or out of range, or the prediction type is undefined at zero terminal SNR.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        beta_reference_timesteps: int | None = None,
    ):
        self._setup()

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_t to x_s, s the next timestep of the list (DDIM, Eq. 12).

        Args:
            model_output: The model's output at `sample`, of its shape or with twice the channels (the variance).
            timestep: In [0, num_train_timesteps), one or one for each sample, shape `(batch,)`. One between the
                listed ones steps to the next lower listed one.
            sample: x_t, shape `(batch, channels, ...)`.
            eta: Share of the posterior's standard deviation that is drawn, in [0, 1]: 0 deterministic, 1 DDPM.
            use_clipped_model_output: Whether the noise in x_t is taken to be what the clipped x_0 leaves, rather than
                what the model says.
            generator: Source of the noise. With a list, that of sample i comes from generator i alone.
            variance_noise: The unit noise itself, of the shape of `sample`, instead of a generator.

        Returns: `prev_sample` is x_s, `pred_original_sample` the predicted x_0.

        Raises:
            ValueError: If a shape does not fit, or `eta` or a timestep is out of range.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {eta}")
        output, _ = check_output(model_output, sample, takes_variance=True)
        path = self._current_path()
        reuse = path.clips and bool(use_clipped_model_output)
        c, last = self._coefficients_at(path, self._table(path, eta, reuse), timestep, sample)
        noise = None
        if eta > 0 and not (last and path.ends_clean):
            noise = draw_noise(output, generator, variance_noise)
        prev_sample, x0 = self._advance(path, c, self._terms(path, reuse), output, sample, noise)
        if not return_dict:
            return prev_sample, x0
        return DDIMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _terms(self, path: Path, reuse: bool) -> tuple[str, ...]:
        if not path.clips:
            return "sample", "output"
        if reuse:
            return "x0", "sample"
        return ("x0", "output") if path.prediction_type == "epsilon" else ("x0", "sample", "output")

    def _prepare(self, path: Path) -> None:
        self._table(path, 0.0, False)
        self._prepare_inversion(path)

    def _table(self, path: Path, eta: float, reuse: bool) -> CoefficientTable:
        table = path.tables.get((eta, reuse))
        if table is None:
            table = CoefficientTable(self._transitions(path, eta, reuse))
            if not torch.compiler.is_compiling():
                if len(path.tables) > MAX_TABLES:
                    path.tables.clear()
                    self._prepare(path)
                path.tables[(eta, reuse)] = table
        return table

    def _transitions(self, path: Path, eta: float, reuse: bool) -> Transition:
        """The coefficients at every timestep: `posterior`, which is linear, at unit inputs."""
        t, s = path.t, path.s
        one, zero = torch.ones_like(t.alpha), torch.zeros_like(t.alpha)
        output = Prediction.at(t, path.prediction_type)
        std = posterior(zero, zero, t, s, eta).std
        if reuse:
            weights = posterior(one, zero, t, s, eta).mean, posterior(zero, one, t, s, eta).mean, zero
        else:
            of_x0 = posterior(one, zero, t, s, eta, eps=zero).mean
            of_eps = posterior(zero, zero, t, s, eta, eps=one).mean
            weights = of_x0, of_eps * output.eps_sample, of_eps * output.eps_output
            if not path.clips:
                weights = self._unclipped(t, s, eta, output, *weights)
        return Transition(output.x0_sample, output.x0_output, *weights, std, zero, zero)

    def _unclipped(
        self, t: NoiseLevel, s: NoiseLevel, eta: float, output: Prediction, of_x0: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The coefficients of x_0, x_t and the output, where x_0 is linear in the other two."""
        of_sample, of_output = rest
        return torch.zeros_like(of_x0), of_x0 * output.x0_sample + of_sample, of_x0 * output.x0_output + of_output

    def _get_variance(self, timestep: Tensor | int, prev_timestep: Tensor | int) -> Tensor:
        """The variance at `eta=1` of the transition between two timesteps; below 0 stands for the clean end."""
        like = torch.zeros((), device=timestep.device if isinstance(timestep, Tensor) else None)
        prev_timestep = prev_timestep.clamp(min=-1) if isinstance(prev_timestep, Tensor) else max(prev_timestep, -1)
        t, s = self.schedule.level(timestep, like), self.schedule.level(prev_timestep, like)
        zero = torch.zeros_like(t.alpha)
        return posterior(zero, zero, t, s).std.square().squeeze()
