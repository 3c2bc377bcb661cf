"""Langevin dynamics over the levels of a Gaussian path (Song & Ermon 2019, arXiv 1907.05600)."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from diffusers_ext.diffusion.betas import check_integer
from diffusers_ext.diffusion.noising import predict_eps
from diffusers_ext.diffusion.reverse_sde import langevin
from diffusers_ext.schedulers.any_path import AnyPathSchedulerMixin
from diffusers_ext.schedulers.gaussian import as_output, check_output, draw_noise, has_no_noise, wide


# Of sigma_L^2: the paper's step_size 2e-5 at its cleanest level, 0.01.
DEFAULT_RELATIVE_STEP_SIZE = 0.2


class AnnealedLangevinScheduler(AnyPathSchedulerMixin):
    """Annealed Langevin dynamics on the VP, VE, sub-VP or cosine path (Song & Ermon 2019, Algorithm 1).

    At each listed level, from the noisiest to the cleanest, `num_langevin_steps` steps

        x <- x + step / 2 score + sqrt(step) z,    step = step_size sigma^2 / sigma_L^2

    with sigma_L that of timestep 0; x is carried over from level to level. `timesteps` lists each level once for each
    step, so n levels take n num_langevin_steps calls of the network, and the loop must go through them in order. With a
    timestep for each sample, all samples must be at the same call.

    Nothing but the dynamics itself takes noise away, so there must be enough steps for the distances of the levels: the
    variance beyond that of a level falls by the factor (1 - step_size / (2 sigma_L^2))^2 in a step. `ScoreSDEScheduler`
    with a corrector needs far fewer.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: As in `ScoreSDEScheduler`.
        path, sigma_min, sigma_max, beta_min, beta_max, unit_scale_input, prediction_type: As there.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: As there.
        steps_offset, rescale_betas_zero_snr, beta_reference_timesteps: As there.
        num_langevin_steps: Steps at a level, T of the paper, which has 100 for 10 levels.
        step_size: epsilon of the paper, above 0 and below 2 sigma_L^2; 0.2 sigma_L^2 by default, which is the paper's
            2e-5 at its sigma_L of 0.01.
        final_denoising: Whether the last call gives the predicted x_0 (Tweedie's formula) instead of a step, as Song et
            al. 2020, Appendix G, advise; without it the samples keep the noise of the last level.
        timestep_spacing: One of `diffusers_ext.diffusion.timesteps.TIMESTEP_SPACINGS`; "linspace" has both ends.

    Raises:
        ValueError: If a value is unknown or out of range, or the prediction type is undefined at a level without signal.
    """

    _predictor = "ode"  # whose numbers are not used

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: np.ndarray | Sequence[float] | None = None,
        path: str = "vp",
        sigma_min: float | None = 0.01,
        sigma_max: float | None = 50.0,
        beta_min: float | None = 0.1,
        beta_max: float | None = 20.0,
        unit_scale_input: bool = False,
        num_langevin_steps: int = 10,
        step_size: float | None = None,
        final_denoising: bool = True,
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        beta_reference_timesteps: int | None = None,
    ):
        check_integer("num_langevin_steps", num_langevin_steps)
        self.calls = ("step",) * (num_langevin_steps - 1) + ("last",)
        self._setup()
        levels = self.schedule.sigma[:-1]  # without the clean end
        if not levels.min() > 0:
            raise ValueError(
                "each level must have noise, by which Langevin dynamics scales its steps, got sigma 0 at timestep "
                f"{int(levels.argmin())}: raise beta_start"
            )
        largest = 2 * float(self.schedule.sigma[0]) ** 2
        if step_size is not None and not 0 < step_size < largest:
            raise ValueError(
                f"step_size must be above 0 and below 2 sigma^2 of timestep 0, {largest:.3g}, got {step_size}"
            )
        # In units of sigma^2, and of the steps k score + sqrt(2 k) z.
        self._step_size = DEFAULT_RELATIVE_STEP_SIZE / 2 if step_size is None else step_size / largest

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        variance_noise: Tensor | None = None,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """A step of Langevin dynamics at the level of `timestep`, or with the last call the predicted x_0.

        Args:
            model_output: The model's output at `scale_model_input(sample, timestep)`, of its shape or with twice the
                channels (a learned variance, which is not used).
            timestep: In [0, num_train_timesteps), one or one for each sample, shape `(batch,)`.
            sample: x_t, shape `(batch, channels, ...)`.
            generator: Source of the noise. With a list, that of sample i comes from generator i alone.
            variance_noise: The unit noise itself, of the shape of `sample`, instead of a generator.

        Returns: `prev_sample` is x_t after the step, `pred_original_sample` the predicted x_0.

        Raises:
            ValueError: If a shape does not fit or a timestep is out of range.
        """
        output, _ = check_output(model_output, sample, takes_variance=True)
        at = self._transition(timestep, sample)
        x_t = wide(sample)
        x0 = self._predict_x0(at, wide(output), x_t)

        may_end = self._next_call() == "last" and self.config.final_denoising
        if may_end and has_no_noise(at.s):
            x = x0.clone()  # what is returned may be written to, and x_0 may be the network's own output
        else:
            noise = wide(draw_noise(output, generator, variance_noise))
            x = langevin(x_t, predict_eps(x0, x_t, at.t), at.t, self._step_size, noise)
            if may_end and isinstance(at.s.sigma, Tensor):
                x = torch.where(at.s.sigma > 0, x, x0)

        return as_output(DDIMSchedulerOutput, x, x0, torch.promote_types(sample.dtype, output.dtype), return_dict)
