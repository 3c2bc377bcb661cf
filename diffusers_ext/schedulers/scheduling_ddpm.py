"""Ancestral sampling of a Gaussian noising path (DDPM: Ho, Jain, Abbeel 2020, arXiv 2006.11239)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from diffusers_ext.diffusion.analytic_variance import analytic_std
from diffusers_ext.diffusion.noising import (
    LEARNED_VARIANCES,
    Factor,
    Transition,
    in_precision_of,
    learned_log_std,
    posterior_std,
    transition_std,
    weighted_sum,
)
from diffusers_ext.schedulers.gaussian import (
    COMMON_BETA_SCHEDULES,
    GaussianSchedulerMixin,
    as_output,
    check_choice,
    check_output,
    draw_noise,
    has_no_noise,
    wide,
)


VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "analytic", *LEARNED_VARIANCES)

# The lower bound of the standard deviation has no log at the last step, where it has no use either.
SMALLEST_STD = 1e-10


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
            half of channels, "learned_range" an interpolation between the two by the model, in log, from -1 to 1,
            "analytic" the best one for this model, from `analytic_variance`.
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
        analytic_variance: How well the model predicts x_0, as `training/calibrate.py` measures it
            (`diffusers_ext.diffusion.analytic_variance.X0Variances`).
        optimal_timesteps: Timesteps chosen for this model, by their number
            (`diffusers_ext.diffusion.timestep_search.ChosenTimesteps`). They are visited if `timestep_spacing` is "optimal",
            or the spacing that they take the place of, which "optimal" becomes in the config.

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
        analytic_variance: dict | None = None,
        optimal_timesteps: dict | None = None,
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
        analytic = self.variance_type == "analytic"
        takes_variance = (
            analytic or self.variance_type in LEARNED_VARIANCES
        )  # which the analytic one is in the place of
        output, variance_output = check_output(
            model_output, sample, takes_variance, None if analytic else self.variance_type
        )
        at = self._transition(timestep, sample)
        x_t, prediction = wide(sample), wide(output)

        x0 = self._predict_x0(at, prediction, x_t)
        std, noise = 0.0, None
        if not has_no_noise(at.s):
            noise = wide(draw_noise(output, generator, variance_noise))
            std = self._std(at, variance_output)

        # Eq. 6: the mean of q(x_s | x_t, x_0), and new noise.
        x_s = weighted_sum((at.mean_of_x0, x0), (at.mean_of_x_t, x_t), (std, noise))

        return as_output(DDPMSchedulerOutput, x_s, x0, torch.promote_types(sample.dtype, output.dtype), return_dict)

    def _std(self, at: Transition, variance_output: Tensor | None) -> Factor:
        """Standard deviation of p(x_s | x_t); 0 for samples at their last step."""
        if variance_output is not None and self.variance_type != "analytic":
            std = learned_std(self.variance_type, wide(variance_output), at.posterior_std, at.transition_std)
        else:
            std = fixed_std(self.variance_type, at)
        return std * (at.s.sigma > 0) if isinstance(at.s.sigma, Tensor) else std

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
        like = predicted_variance if predicted_variance is not None else torch.zeros((), device="cpu")
        timestep = t
        t, s = self.schedule.level(t, like), self.schedule.level(self.previous_timestep(t), like)
        if variance_type == "analytic":
            return torch.as_tensor(analytic_std(self._transition(timestep, like)) ** 2, device=like.device)
        small, large = posterior_std(t, s), transition_std(t, s)
        if variance_type in LEARNED_VARIANCES:
            if predicted_variance is None:
                raise ValueError(f"predicted_variance must be given for variance_type {variance_type!r}, got None")
            return learned_std(variance_type, predicted_variance, small, large) ** 2
        return ((large if "large" in variance_type else small) ** 2).squeeze()


def fixed_std(variance_type: str, at: Transition) -> Factor:
    """The standard deviation of a step for the types that the model's output does not say."""
    if variance_type == "analytic":
        return analytic_std(at)
    return at.transition_std if "large" in variance_type else at.posterior_std


def learned_std(variance_type: str, output: Tensor, small: Factor, large: Factor) -> Tensor:
    """The standard deviation that a model's variance output means, of its shape; see `learned_log_std`."""
    logs = [
        std.clamp(min=SMALLEST_STD).log() if isinstance(std, Tensor) else math.log(max(std, SMALLEST_STD))
        for std in (small, large)
    ]
    return learned_log_std(variance_type, output, *[in_precision_of(output, log) for log in logs]).exp_()
