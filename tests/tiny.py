"""Networks small enough for any test, and the picture that a pipeline makes with them."""

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffusers_ext import UNetModel


def tiny_unet(num_classes: int | None = None) -> UNetModel:
    """One with random weights throughout: as it is made, the last layer is zero and so is the output."""
    torch.manual_seed(0)
    model = UNetModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        num_classes=num_classes,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def image_of(pipeline: DiffusionPipeline) -> np.ndarray:
    """The picture of a fixed seed, shape `(1, 8, 8, 1)`."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=1, num_inference_steps=4, generator=generator, output_type="np").images
