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
    """A step: `x_t` and the clean sample predicted from it, each on the scale of the model: [-1, 1] for images without
    statistics.

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


def decode_samples(
    x: Tensor, vae: nn.Module | None, statistics: nn.Module | None = None, labels: Tensor | None = None
) -> Tensor:
    """Samples as a denoiser knows them to images, float32, in about [-1, 1].

    Args:
        vae: Of the samples, if they are latents.
        statistics: `DataStatisticsModel` of the denoiser, if it has one.
        labels: Of the samples, or one of all, as for `statistics`.
    """
    if statistics is not None:
        x = statistics.restore(x, labels)
    return x if vae is None else decode_latents(vae, x)


def default_output_type(dims: int) -> str:
    """Pictures of images, and arrays of sequences."""
    return "pil" if dims == 2 else "np"


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_output_type(output_type: str, channels: int, dims: int) -> None:
    """Refuses what is no type of output, and pictures of samples that are none: of other channels, or of a sequence."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    if output_type == "pil" and (channels not in (1, 3, 4) or dims != 2):
        raise ValueError(
            f"output_type must be 'np' or 'pt' for this model: 'pil' is for images of 1, 3 or 4 channels, and its "
            f"samples have {channels} channels and {dims} dimensions"
        )


def decode_images(
    x: Tensor,
    vae: nn.Module | None,
    output_type: str,
    pixels: Tensor | None = None,
    mask: Tensor | None = None,
    statistics: nn.Module | None = None,
    labels: Tensor | None = None,
    value_scale: ValueScale | None = None,
) -> list[Image.Image] | np.ndarray | Tensor:
    """Samples as the sampler left them to images of the asked type.

    Args:
        vae, statistics, labels: As for `decode_samples`.
        output_type: As for the call of a pipeline.
        pixels, mask: Images, and where they are to be kept (0), which the way through latents and statistics changes.
        value_scale: Of sequences, whose values are then given in own units.
    """
    if output_type == "latent":
        return x
    x = decode_samples(x, vae, statistics, labels)
    if mask is not None:
        x = torch.where(mask.bool(), x, pixels)
    x = (x / 2 + 0.5).clamp(0, 1) if value_scale is None else value_scale.to_values(x)
    if output_type == "pt":
        return x
    images = x.movedim(1, -1).cpu().numpy()
    return images if output_type == "np" else VaeImageProcessor.numpy_to_pil(images)
