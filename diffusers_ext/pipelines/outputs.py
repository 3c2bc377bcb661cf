"""The result of a call: images of the asked type, and points of the trajectory to them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn

from diffusers_ext.diffusion.noising import predict_x0
from diffusers_ext.latents import decode_latents
from diffusers_ext.schedulers.levels import noise_level, prediction_type_of, start_scale
from diffusers_ext.value_scale import ValueScale


class TrajectoryPoint(NamedTuple):
    """A step: `x_t` and the clean sample predicted from it, each on the scale of the model, [-1, 1] for data.

    `x0_hat` is `None` for a scheduler that works on another scale of x_t and does not say what it predicted.
    """

    timestep: int | float
    x_t: Tensor
    x0_hat: Tensor | None

    @classmethod
    def of_step(cls, scheduler: SchedulerMixin, t: Tensor, x_t: Tensor, output: Tensor, step) -> "TrajectoryPoint":
        """From the network's output at x_t and what the scheduler's `step` made of it."""
        x0_hat = getattr(step, "pred_original_sample", None)
        if x0_hat is None and torch.as_tensor(start_scale(scheduler)).item() == 1:
            level = noise_level(scheduler, t, x_t)
            x0_hat = predict_x0(output[:, : x_t.shape[1]], x_t, level, prediction_type_of(scheduler))
        return cls(t.item(), x_t, x0_hat)


@dataclass
class GuidedDiffusionPipelineOutput(BaseOutput):
    """Images, or sequences, of the asked type and, for the asked steps, points of the trajectory."""

    images: list[Image.Image] | np.ndarray | Tensor
    trajectory: list[TrajectoryPoint] | None = None


def decode_images(
    x: Tensor,
    vae: nn.Module | None,
    output_type: str,
    pixels: Tensor | None = None,
    mask: Tensor | None = None,
    value_scale: ValueScale | None = None,
) -> list[Image.Image] | np.ndarray | Tensor:
    """Samples as the sampler left them to images of the asked type.

    Args:
        vae: Of the samples, if they are latents.
        output_type: As for the call of a pipeline.
        pixels, mask: Images, and where they are to be kept (0), which the way through latents changes.
        value_scale: Of sequences, whose values are then given in own units.
    """
    if output_type == "latent":
        return x
    if vae is not None:
        x = decode_latents(vae, x)
        if mask is not None:
            x = torch.where(mask.bool(), x, pixels)
    x = (x / 2 + 0.5).clamp(0, 1) if value_scale is None else value_scale.to_values(x)
    if output_type == "pt":
        return x
    images = x.movedim(1, -1).cpu().numpy()
    return images if output_type == "np" else VaeImageProcessor.numpy_to_pil(images)
