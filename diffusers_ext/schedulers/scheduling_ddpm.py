"""Ancestral sampling of a Gaussian noising path (DDPM: Ho, Jain, Abbeel 2020, arXiv 2006.11239)."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from diffusers_ext.diffusion.noising import interpolated_log_std, posterior, transition_std
from diffusers_ext.schedulers.coefficients import CoefficientTable, Path, Prediction, Transition, wide
from diffusers_ext.schedulers.gaussian import (
    COMMON_BETA_SCHEDULES,
    GaussianSchedulerMixin,
    check_choice,
    check_output,
    draw_noise,
)


VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")
LEARNED_VARIANCE_TYPES = ("learned", "learned_range")


class ExtDDPMScheduler(GaussianSchedulerMixin, DDPMScheduler):
    """`DDPMScheduler` with exact levels, every variance type right, and a step without a host sync.

    Takes every config key of diffusers' class, with its meaning and default. Where that class is right the result is
    the same with the same generator, to float32 rounding. It differs here:

    - No noise is added at the last step, whatever its timestep ("trailing" with "fixed_large" or "learned_range").
    - "fixed_large_log" is "fixed_large" and "fixed_small_log" is "fixed_small": the same variance (upstream: NaN for
      the first). "learned" reads the output as a log variance (upstream: as a variance, NaN if negative).
    - `steps_offset` is cut where it would leave the path, and "trailing" never lists a timestep below 0.
    - Levels are exact to float64, and data in half precision round once, at the end.

    Args:
        num_train_timesteps: Length of the noising path the model was trained on.
        beta_start, beta_end: Ends of the schedules that are given by beta.
        beta_schedule: One of `diffusers_ext.diffusion.betas.BETA_SCHEDULES`.
        trained_betas: The betas themselves, shape `(num_train_timesteps,)`; they go before `beta_schedule`.
        variance_type: Variance of the reverse transition: "fixed_small" is that of the posterior (beta tilde),
            "fixed_large" that of the noising transition (beta), "learned" a log variance from the model, in a second
            half of channels, "learned_range" an interpolation between the two by the model, in log, from -1 to 1.
        clip_sample: Whether to clip the predicted x_0.
        prediction_type: One of `diffusers_ext.diffusion.noising.PREDICTION_TYPES`.
        thresholding: Whether to threshold the predicted x_0 dynamically; goes before `clip_sample`.
        dynamic_thresholding_ratio: Quantile of the magnitudes of x_0, for `thresholding`.
        clip_sample_range: Bound on |x_0|, for `clip_sample`.
        sample_max_value: Largest bound, for `thresholding`.
        timestep_spacing: One of `diffusers_ext.diffusion.timesteps.TIMESTEP_SPACINGS`.
        steps_offset: Added to the timesteps of "leading".
        rescale_betas_zero_snr: Whether to rescale the path so that its last level holds no signal.
        beta_reference_timesteps: Length of the path that `beta_start` and `beta_end` were chosen for (1000 in the
            papers). If given, a path of another length keeps the range of noise levels of that one.

    Raises:
        ValueError: If a value is unknown or out of range, or the prediction type is undefined at zero terminal SNR.
    """

    _stock_beta_schedules = (*COMMON_BETA_SCHEDULES, "sigmoid")  # "laplace" only in some versions

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        beta_reference_timesteps: int | None = None,
    ):
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        self.variance_type = variance_type
        self._setup()

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Draws x_s ~ p(x_s | x_t), s the next timestep of the list (DDPM, Algorithm 2).

        Args:
            model_output: The model's output at `sample`, of its shape, or with twice the channels if the variance is
                learned.
            timestep: In [0, num_train_timesteps), one or one for each sample, shape `(batch,)`. One between the
                listed ones steps to the next lower listed one.
            sample: x_t, shape `(batch, channels, ...)`.
            generator: Source of the noise. With a list, that of sample i comes from generator i alone.
            variance_noise: The unit noise itself, of the shape of `sample`, instead of a generator.

        Returns: `prev_sample` is x_s, `pred_original_sample` the predicted x_0.

        Raises:
            ValueError: If a shape does not fit or a timestep is out of range.
        """
        learned = self.variance_type in LEARNED_VARIANCE_TYPES
        output, variance_output = check_output(model_output, sample, learned, self.variance_type)
        path = self._current_path()
        c, last = self._coefficients_at(path, path.tables["step"], timestep, sample)
        noise, log_std = None, None
        if not last:
            noise = draw_noise(output, generator, variance_noise)
            if learned:
                log_std = self._log_std(wide(variance_output), c.log_std_small, c.log_std_large)
        terms = ("x0", "sample") if path.clips else ("sample", "output")
        prev_sample, x0 = self._advance(path, c, terms, output, sample, noise, log_std)
        if not return_dict:
            return prev_sample, x0
        return DDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=x0)

    def _prepare(self, path: Path) -> None:
        t, s = path.t, path.s
        one, zero = torch.ones_like(t.alpha), torch.zeros_like(t.alpha)
        x0 = Prediction.at(t, path.prediction_type)
        of_x0, of_sample = posterior(one, zero, t, s).mean, posterior(zero, one, t, s).mean
        small, large = posterior(zero, zero, t, s).std, transition_std(t, s)
        noisy = (path.next >= 0).double()
        std = {"fixed_small": small, "fixed_large": large}.get(self.variance_type.removesuffix("_log"), one) * noisy
        # The bounds only matter where noise is drawn, so a finite value may stand for the log of 0.
        logs = [bound.clamp(min=1e-10).log() for bound in (small, large)]
        if path.clips:
            weights = of_x0, of_sample, zero
        else:
            weights = zero, of_x0 * x0.x0_sample + of_sample, of_x0 * x0.x0_output
        path.tables["step"] = CoefficientTable(Transition(x0.x0_sample, x0.x0_output, *weights, std, *logs))

    def _log_std(self, output: Tensor, log_std_small: Tensor | float, log_std_large: Tensor | float) -> Tensor:
        if self.variance_type == "learned":
            return 0.5 * output
        return interpolated_log_std(output, log_std_small, log_std_large)

    def _get_variance(
        self, t: Tensor | int, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor:
        """The variance of the transition from `t`, always as a variance.

        Args:
            t: A timestep.
            predicted_variance: The model's variance output, for the learned types.
            variance_type: Instead of the scheduler's own.
        """
        variance_type = variance_type or self.variance_type
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        like = predicted_variance if predicted_variance is not None else torch.zeros(())
        t, s = self.schedule.level(t, like), self.schedule.level(self.previous_timestep(t), like)
        zero = torch.zeros_like(t.alpha)
        small, large = posterior(zero, zero, t, s).std, transition_std(t, s)
        if variance_type in LEARNED_VARIANCE_TYPES:
            if predicted_variance is None:
                raise ValueError(f"predicted_variance must be given for variance_type {variance_type!r}, got None")
            if variance_type == "learned":
                return predicted_variance.exp()
            return (2 * interpolated_log_std(predicted_variance, small.clamp(min=1e-10).log(), large.log())).exp()
        return (large if "large" in variance_type else small).square().squeeze()
