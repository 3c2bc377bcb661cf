"""Inpainting with any sampler: known pixels are resampled at each noise level (RePaint: arXiv 2201.09865)."""

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor

from diffusers_ext.diffusion.noising import transition
from diffusers_ext.schedulers.gaussian import draw_noise
from diffusers_ext.schedulers.levels import add_noise_at


class KnownPixels:
    """The known part of a sample: clean values where `mask` is 0.

    Args:
        x0: Clean samples, shape `(batch, channels, *spatial)`; only what is known of them counts.
        mask: 1 where the sample is to be made, 0 where it is known, shape `(batch or 1, 1, *spatial)`.
        scheduler: With its timesteps set.
        generator: Source of the noise. With a list, that of sample i comes from generator i alone.
    """

    def __init__(
        self, x0: Tensor, mask: Tensor, scheduler: SchedulerMixin, generator: Generator | list[Generator] | None
    ):
        self.x0, self.mask, self.scheduler, self.generator = x0, mask, scheduler, generator

    def put_into(self, x: Tensor, timestep: Tensor | None) -> Tensor:
        """`x` with a draw of q(x_t | x_0) where x_0 is known; `None` stands for the clean end."""
        known = self.x0
        if timestep is not None:
            known = add_noise_at(self.scheduler, known, draw_noise(x, self.generator, None), timestep.reshape(1))
        return torch.where(self.mask.bool(), x, known)

    def renoise(self, x: Tensor, timestep: Tensor) -> Tensor:
        """From the level after `timestep` back up to it, by a draw of q(x_t | x_s)."""
        t = self.scheduler.level(timestep, x)
        s = self.scheduler.level(self.scheduler.previous_timestep(timestep), x)
        return transition(x, t, s).sample(draw_noise(x, self.generator, None))


def check_resampling(num_resample_steps: int, has_mask: bool, scheduler: SchedulerMixin) -> None:
    """Refuses a `num_resample_steps` that is out of range, has no meaning or that the scheduler cannot do."""
    if num_resample_steps < 1:
        raise ValueError(f"num_resample_steps must be at least 1, got {num_resample_steps}")
    if num_resample_steps > 1 and not has_mask:
        raise ValueError(f"num_resample_steps must be 1 without a mask_image, got {num_resample_steps}")
    if num_resample_steps > 1 and not hasattr(scheduler, "level"):
        raise ValueError(
            f"num_resample_steps must be 1 for {type(scheduler).__name__}, which cannot go back a step, got "
            f"{num_resample_steps}; take ExtDDPMScheduler, ExtDDIMScheduler or FlowScheduler"
        )
    if num_resample_steps > 1 and scheduler.order > 1:
        raise ValueError(
            f"num_resample_steps must be 1 for {type(scheduler).__name__} with {scheduler.order} calls of the network at a "
            f"level, not each of which ends at the next, got {num_resample_steps}"
        )


def mask_of_latents(mask: Tensor, spatial: tuple[int, ...]) -> Tensor:
    """The mask on a grid of latents: a latent is known if all of its pixels are."""
    pool = F.adaptive_max_pool2d if len(spatial) == 2 else F.adaptive_max_pool1d
    return pool(mask, spatial if len(spatial) == 2 else spatial[0])
