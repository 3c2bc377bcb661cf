"""The condition images of a training run: what the options mean, and the way from a batch to what the network sees."""

import torch
from torch import Tensor

from diffusers_ext.conditions import GIVEN, ImageCondition, add_condition_noise
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import LatentData, LatentEncoder, SampleSpace
from diffusers_ext.data.sequences import SequenceData
from diffusers_ext.data.stream import StreamData
from diffusers_ext.pixels import to_images
from diffusers_ext.recipes.denoising import DenoisingConfig


def condition_of_run(
    config: DenoisingConfig, data: ImageData | StreamData, space: SampleSpace
) -> ImageCondition | None:
    """The condition that the options ask for, of these images; None without.

    Raises:
        ValueError: if these images have none such.
    """
    if config.condition is None and config.condition_column is None:
        return None
    if isinstance(data, SequenceData):
        raise ValueError(f"condition images are made of images, and {data.name} holds sequences: leave them out")
    if isinstance(data, LatentData):
        raise ValueError(
            f"condition images are made at each batch, of images that {data.name} has only the latents of: give the data set of "
            "the images, which --vae encodes at each batch"
        )
    if config.condition_column is None:
        return ImageCondition.parse(config.condition, data.channels, space.resolution, config.condition_noise)
    channels = data.conditions.shape[2]
    return ImageCondition(GIVEN, channels, data.channels, tuple(space.resolution), noise=config.condition_noise)


def network_options(config: DenoisingConfig, condition: ImageCondition | None, space: SampleSpace) -> dict:
    """Keywords of a network that sees the condition."""
    if condition is None:
        return {}
    return {
        "condition_channels": condition.network_channels(space.shape[1:]),
        "condition_level": condition.noise > 0,
        "learned_without_image": config.condition_dropout > 0,
    }


def batch_options(
    config: DenoisingConfig, space: SampleSpace, condition: ImageCondition | None, *, label_dropout: float
) -> dict:
    """Keywords of `BatchOptions` of a run: what is drawn for each sample, of its label, level, condition and augmentation."""
    options = space.batch_options | {
        "label_dropout": label_dropout,
        "timestep_sampling": config.time_sampling,
        "augmentation": config.augmentation_probability > 0,
    }
    if condition is not None:
        options |= {
            "condition_dropout": config.condition_dropout,
            "condition_noise": condition.noise,
            "condition_shape": (condition.channels, *condition.size),
        }
    return options


class ConditionMaker:
    """Gives a batch on its device a `condition_image`, made of its images or of the column of condition images.

    Args:
        space: Of the network's samples.
        encoder: Of the images, applied afterwards; None for pixels.
    """

    def __init__(self, condition: ImageCondition, space: SampleSpace, encoder: LatentEncoder | None):
        self.condition, self.sample_size, self.encoder = condition, space.shape[1:], encoder

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = dict(batch)
        with torch.autocast(batch["images"].device.type, enabled=False):  # as the pipeline makes them
            if "condition_pixels" in batch:
                made = to_images(batch.pop("condition_pixels"))
            else:
                made = self.condition.of_images(batch["images"].float())
            if "condition_noise" in batch:
                made = add_condition_noise(made, batch.pop("condition_noise"), batch["condition_level"])
            batch["condition_image"] = self.condition.for_network(made, self.sample_size)
        return batch if self.encoder is None else self.encoder(batch)


def batch_maker(condition: ImageCondition | None, space: SampleSpace, device: torch.device):
    """What prepares a batch on its device: makes the condition image, encodes the images; None if neither is done."""
    encoder = space.encoder(device)
    return encoder if condition is None else ConditionMaker(condition, space, encoder)
