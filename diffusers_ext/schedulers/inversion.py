"""The step of DDIM backwards, from the cleaner to the noisier level (arXiv 2010.02502, Section 4.3)."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from diffusers_ext.diffusion.noising import weighted_sum
from diffusers_ext.schedulers.gaussian import GaussianSchedulerMixin, as_output, check_output, wide
from diffusers_ext.schedulers.multistep import check_order


class ReversibleMixin(GaussianSchedulerMixin):
    """Common part of DDIM's sampler and of its inverse: the config keys and the step back."""

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
        variance_type: str | None = None,
        analytic_variance: dict | None = None,
        optimal_timesteps: dict | None = None,
        multistep_order: int = 1,
    ):
        self._setup()

    def _check_config(self, config) -> None:
        super()._check_config(config)
        check_order(config.multistep_order)

    def reverse_step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        return_dict: bool = True,
        model_input: Tensor | None = None,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_s up to x_t: what `step` of first order at `timestep` and `eta=0` undoes.

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
        at = self._transition(timestep, sample)
        x_s, prediction = wide(sample), wide(output)

        eps = self._predict_eps(at, prediction, x_s if model_input is None else wide(model_input))
        # x_s = alpha_s x_0 + sigma_s eps gives x_0, and x_t is the same sum at t.
        x0 = self._clip(weighted_sum((1 / at.s.alpha, x_s), (-at.s.sigma / at.s.alpha, eps)))
        x_t = weighted_sum((at.t.alpha, x0), (at.t.sigma, eps))

        return as_output(DDIMSchedulerOutput, x_t, x0, torch.promote_types(sample.dtype, output.dtype), return_dict)

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
