"""DDIM run backwards, from data to noise, as diffusers' pipelines call it (DDIM: arXiv 2010.02502, Section 4.3)."""

import numpy as np
from diffusers import DDIMInverseScheduler, DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

from diffusers_ext.schedulers.inversion import ReversibleMixin


class ExtDDIMInverseScheduler(ReversibleMixin, DDIMInverseScheduler):
    """`DDIMInverseScheduler` whose steps undo those of `ExtDDIMScheduler` with the same config.

    The timesteps are those of the sampler in ascending order, for every spacing and number of steps. It takes the
    config keys of diffusers' class and differs from it where the previous timestep is not `t - T // n`, and for v and
    x_0 predictions, whose output is read at the timestep that the model was given rather than at the one before.

    Args: as `ExtDDIMScheduler`; `multistep_order` is the sampler's alone, and steps back are of first order.
    """

    _compatibles = DDIMScheduler._compatibles
    _deprecated_kwargs = ()  # diffusers' class lists a key that it takes by **kwargs, which there are none of here

    def _setup(self) -> None:
        super()._setup()
        self.initial_alpha_cumprod = self.final_alpha_cumprod

    def step(
        self, model_output: Tensor, timestep: Tensor | int, sample: Tensor, return_dict: bool = True
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_s up to x_t with t = `timestep`; see `reverse_step`."""
        return self.reverse_step(model_output, timestep, sample, return_dict)

    def _ordered(self, descending: np.ndarray) -> list[int]:
        return descending[::-1].tolist()
