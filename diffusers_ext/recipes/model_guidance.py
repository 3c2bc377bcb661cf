"""Guidance that is trained into a network, which then samples as if it were guided, by one call a step (arXiv 2502.12154)."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.stream import StreamData
from diffusers_ext.diffusion.losses import model_guidance


if TYPE_CHECKING:
    from diffusers_ext.recipes.denoising import DenoisingConfig


# Share of a run before the targets are led: until then the two predictions are alike, and a call is saved.
START = 0.3


def check_model_guidance(scale: float, interval: tuple[float, ...]) -> None:
    """Refuses a scale that leads nowhere, and an interval that is no part of the noise levels."""
    if not (math.isfinite(scale) and scale > 1):
        raise ValueError(f"model_guidance_scale must be finite and above 1, which would be none, got {scale}")
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"model_guidance_interval must be two shares of the noise levels, 0 <= from < to <= 1, got {interval}"
        )


def left_to_labels(config: "DenoisingConfig", data: ImageData | StreamData, *, learned: bool) -> "DenoisingConfig":
    """The options without the guidance that a preset gave, where the data have nothing to lead by.

    Args:
        learned: Whether any example is without its label or text.
    """
    of_preset = config.PRESETS.get(config.preset, {})
    is_given = config.leads_targets and config.model_guidance_scale != of_preset.get("model_guidance_scale")
    if is_given or not config.leads_targets or (learned and data.num_classes is not None):
        return config
    return dataclasses.replace(config, model_guidance_scale=None)


def unconditional_inputs(data: ImageData | StreamData, *, learned: bool, dropout: str) -> dict[str, Tensor]:
    """What stands for no condition: the null label, an empty set of labels, or the empty text; each of shape `(1, ...)`.

    Args:
        learned: Whether any example is without its label or text.
        dropout: The option that would see to it.

    Raises:
        ValueError: if none is, or the data have neither labels nor texts.
    """
    if not learned:
        raise ValueError(
            f"model_guidance_scale leads away from predictions without a condition, of which a {dropout} of 0 trains none: "
            "leave one of them out"
        )
    if data.num_classes is None:
        raise ValueError(f"model_guidance_scale needs labels or texts, and {data.name} has none: leave it out")
    if data.has_label_sets:
        return {"class_labels": torch.zeros(1, data.num_classes, dtype=torch.bool)}
    null = torch.tensor([data.num_classes])
    texts = getattr(data, "texts", None)
    return {"class_labels": null} if texts is None else texts.put_into({"labels": null})


class ModelGuidance:
    """What the targets of a batch are led by, from the network's own predictions with and without the condition.

    Args:
        scale: Of the guidance that the network learns, see `diffusers_ext.diffusion.losses.model_guidance`.
        unconditional: The inputs by name that stand for no condition, each of shape `(1, ...)`.
        interval: From which share of the noise levels to which, counted from noise as sampling does; the others are not led.

    Attributes:
        progress: Gives the share of the training that is over, in [0, 1].

    Raises:
        ValueError: if the scale or the interval makes no sense.
    """

    def __init__(self, scale: float, unconditional: dict[str, Tensor], interval: tuple[float, float] = (0.0, 1.0)):
        check_model_guidance(scale, interval)
        self.scale, self.interval, self.unconditional = scale, interval, unconditional
        self.progress: Callable[[], float] = lambda: 1.0

    @torch.no_grad()
    def reference(self, model: nn.Module, x_t: Tensor, timesteps: Tensor, conditions: dict[str, Any]) -> Tensor | None:
        """The prediction to be led away from, to be taken before the one that is trained; None where nothing is led yet.

        Args:
            timesteps: As the network is given them.
            conditions: Its inputs; those that say the condition are replaced.
        """
        if self.progress() < START:
            return None
        # Moved once, since a copy from the host would be waited for in each step.
        self.unconditional = {name: value.to(x_t.device) for name, value in self.unconditional.items()}
        without = {name: value.expand(len(x_t), *value.shape[1:]) for name, value in self.unconditional.items()}
        return model(x_t, timesteps, **conditions | without).sample

    def lead(self, output: Tensor, reference: Tensor, timesteps: Tensor, num_timesteps: int) -> Tensor:
        """What is added to the target of each sample.

        Args:
            output: The network's, given its condition.
            timesteps: int64 in [0, num_timesteps), shape `(batch,)`.
        """
        way = 1 - (timesteps + 0.5) / num_timesteps  # of sampling, from noise
        inside = (way >= self.interval[0]) & (way <= self.interval[1])
        lead = model_guidance(output.detach().to(reference.dtype), reference, self.scale)
        return lead * inside.to(lead.dtype).view(-1, *[1] * (lead.ndim - 1))
