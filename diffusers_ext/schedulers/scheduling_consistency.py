"""Sampling of consistency models on a Gaussian path (Song et al. 2023, Consistency Models, arXiv 2303.01469)."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from diffusers_ext.diffusion.noising import weighted_sum
from diffusers_ext.schedulers.gaussian import (
    GaussianSchedulerMixin,
    as_output,
    check_output,
    draw_noise,
    has_no_noise,
    wide,
)


class ConsistencyScheduler(GaussianSchedulerMixin, SchedulerMixin, ConfigMixin):
    """Predicts x_0, adds new noise of the next level to it, and predicts again.

    It is the multistep sampling of consistency models, for a model on a table of betas whose prediction type has the boundary
    condition of itself, such as "v_prediction". diffusers' `LCMScheduler` does the same but near the data, where it mixes
    x_t into x_0 by a rule of its own, and visits no timesteps but those of an even list; `CMStochasticIterativeScheduler` is for
    models with the preconditioning of another path. Of a model that was not trained so each step has too little variance:
    it makes blurred images.

    Args:
        num_train_timesteps: Length of the noising path the model was trained on.
        beta_start, beta_end: Ends of the schedules that are given by beta.
        beta_schedule: One of `diffusers_ext.diffusion.betas.BETA_SCHEDULES`.
        trained_betas: The betas themselves, shape `(num_train_timesteps,)`; they go before `beta_schedule`.
        clip_sample, clip_sample_range: Whether to clip the predicted x_0, and to which magnitude.
        prediction_type: One of `diffusers_ext.diffusion.noising.PREDICTION_TYPES`.
        thresholding, dynamic_thresholding_ratio, sample_max_value: Dynamic thresholding, as in `ExtDDIMScheduler`.
        timestep_spacing: One of `diffusers_ext.diffusion.timesteps.TIMESTEP_SPACINGS`.
        steps_offset: Added to the timesteps of "leading".
        rescale_betas_zero_snr: Whether to rescale the path so that its last level holds no signal.
        beta_reference_timesteps: Length of the path that `beta_start` and `beta_end` were chosen for, see
            `ExtDDIMScheduler`.
        optimal_timesteps: Timesteps chosen for this model, by their number, see `ExtDDIMScheduler`.

    Raises:
        ValueError: If a value is unknown or out of range, or the prediction type is undefined at zero terminal SNR.
    """

    _compatibles = [each.name for each in KarrasDiffusionSchedulers]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        prediction_type: str = "v_prediction",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        beta_reference_timesteps: int | None = None,
        optimal_timesteps: dict | None = None,
    ):
        # Other classes have other defaults for these, so `from_config` must hand them on.
        self._register_explicitly(
            **{key: self.config[key] for key in ("prediction_type", "clip_sample", "timestep_spacing")}
        )
        self._setup()

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_t to x_s, s the next timestep of the list: the predicted x_0 with new noise of that level.

        Args:
            model_output: The model's output at `sample`, of its shape or with twice the channels (the variance).
            timestep: In [0, num_train_timesteps), one or one for each sample, shape `(batch,)`.
            sample: x_t, shape `(batch, channels, ...)`.
            generator: Source of the noise. With a list, that of sample i comes from generator i alone.
            variance_noise: The unit noise itself, of the shape of `sample`, instead of a generator.

        Returns: `prev_sample` is x_s, `pred_original_sample` the predicted x_0.

        Raises:
            ValueError: If a shape does not fit, or a timestep is out of range.
        """
        output, _ = check_output(model_output, sample, takes_variance=True)
        at = self._transition(timestep, sample)

        x0 = self._predict_x0(at, wide(output), wide(sample))
        noise = None if has_no_noise(at.s) else wide(draw_noise(output, generator, variance_noise))
        x_s = weighted_sum((at.s.alpha, x0), (at.s.sigma, noise))

        return as_output(DDIMSchedulerOutput, x_s, x0, torch.promote_types(sample.dtype, output.dtype), return_dict)
