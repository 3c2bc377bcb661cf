"""Implicit sampling of a Gaussian noising path, and its inversion (DDIM: Song, Meng, Ermon 2020, arXiv 2010.02502).

The paper's alpha is our alpha_bar.
"""

import numpy as np
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from diffusers_ext.diffusion.analytic_variance import analytic_std
from diffusers_ext.diffusion.noising import posterior_std, weighted_sum
from diffusers_ext.schedulers.gaussian import as_output, check_output, draw_noise, has_no_noise, wide
from diffusers_ext.schedulers.inversion import ReversibleMixin
from diffusers_ext.schedulers.multistep import MultistepMixin


class ExtDDIMScheduler(MultistepMixin, ReversibleMixin, DDIMScheduler):
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
        variance_type: With "analytic" and `eta` above 0, the noise of a step has the variance that is best for this model
            at that `eta` (Analytic-DDIM, arXiv 2201.06503), from `analytic_variance`. All others, which such a config may
            hold for DDPM, mean that of `eta` alone.
        analytic_variance: How well the model predicts x_0, as `training/calibrate.py` measures it
            (`diffusers_ext.diffusion.analytic_variance.X0Variances`).
        optimal_timesteps: Timesteps chosen for this model, by their number
            (`diffusers_ext.diffusion.timestep_search.ChosenTimesteps`). They are visited if `timestep_spacing` is "optimal",
            or the spacing that they take the place of, which "optimal" becomes in the config.
        multistep_order: At 2 a step without noise is of second order, from the predicted x_0 of the last step too
            (DPM-Solver++(2M), arXiv 2211.01095): in few steps it ends nearer to where many do. The first step of a run, the last
            one to the data and steps with noise, at `eta` above 0, are of first order, DDIM's own.

    Raises:
        ValueError: If a value is unknown or out of range, or the prediction type is undefined at zero terminal SNR.
    """

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
        at = self._transition(timestep, sample)
        x_t, prediction = wide(sample), wide(output)

        x0 = self._predict_x0(at, prediction, x_t)
        if use_clipped_model_output:
            eps = weighted_sum((at.left_of_x_t, x_t), (at.left_of_x0, x0))
        else:
            eps = self._predict_eps(at, prediction, x_t)
        noise = None
        if eta > 0 and not has_no_noise(at.s):
            noise = wide(draw_noise(output, generator, variance_noise))

        more = self._second_order_terms(at, x0, is_noisy=eta > 0)
        # Eq. 12: the predicted x_0, the direction that points to x_t, and new noise; with it what makes the order 2.
        std = eta * at.posterior_std
        direction = (at.s.sigma**2 - std**2) ** 0.5
        if noise is not None and self.config.variance_type == "analytic":
            std = analytic_std(at, eta)
        x_s = weighted_sum((at.s.alpha, x0), (direction, eps), (std, noise), *more)

        return as_output(DDIMSchedulerOutput, x_s, x0, torch.promote_types(sample.dtype, output.dtype), return_dict)

    def _visit(self, descending: np.ndarray, device: str | torch.device | None) -> None:
        self._last_step = None
        super()._visit(descending, device)

    def _get_variance(self, timestep: Tensor | int, prev_timestep: Tensor | int) -> Tensor:
        """The variance at `eta=1` of the transition between two timesteps; below 0 stands for the clean end."""
        like = torch.zeros((), device=timestep.device if isinstance(timestep, Tensor) else "cpu")
        prev_timestep = prev_timestep.clamp(min=-1) if isinstance(prev_timestep, Tensor) else max(prev_timestep, -1)
        t, s = self.schedule.level(timestep, like), self.schedule.level(prev_timestep, like)
        return (posterior_std(t, s) ** 2).squeeze()
