"""DDIM run backwards, from data to noise, as diffusers' pipelines call it (DDIM: arXiv 2010.02502, Section 4.3)."""

from collections.abc import Sequence

import numpy as np
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from diffusers_ext.schedulers.coefficients import Path
from diffusers_ext.schedulers.gaussian import GaussianSchedulerMixin
from diffusers_ext.schedulers.scheduling_ddim import InversionMixin


class ExtDDIMInverseScheduler(InversionMixin, GaussianSchedulerMixin, DDIMInverseScheduler):
    """`DDIMInverseScheduler` whose steps undo those of `ExtDDIMScheduler` with the same config.

    The timesteps are those of the sampler in ascending order, for every spacing and number of steps. It takes the
    config keys of diffusers' class and differs from it where the previous timestep is not `t - T // n`, and for v and
    x_0 predictions, whose output is read at the timestep that the model was given rather than at the one before.

    Args: as `ExtDDIMScheduler`.
    """

    _compatibles = DDIMScheduler._compatibles
    _deprecated_kwargs = ()  # diffusers' class lists a key that it takes by **kwargs, which there are none of here

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
        self.initial_alpha_cumprod = self.final_alpha_cumprod

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_s up to x_t with t = `timestep`; see `reverse_step`."""
        return self.reverse_step(model_output, timestep, sample, return_dict)

    def _prepare(self, path: Path) -> None:
        self._prepare_inversion(path)

    def _ordered(self, descending: np.ndarray) -> list[int]:
        return descending[::-1].tolist()
