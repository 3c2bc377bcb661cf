"""Batches on the device, as an objective takes them."""

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_ext.machine import widest_float
from diffusers_ext.pixels import to_images


class ToDevice:
    """Moves a batch to the device, scales its `pixels` to `images` in [-1, 1], and prepares it for the objective.

    Args:
        prepare_batch: Applied on the device, such as encoding the images; without gradients, in the run's precision.
        channels_last: Leave the memory layout of images and noise as it is; otherwise they become contiguous.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        prepare_batch: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
        *,
        channels_last: bool = True,
    ):
        self._accelerator, self._channels_last = accelerator, channels_last
        self.prepare_batch = prepare_batch

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.prepare(self.move(batch))

    def move(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch on the device, with `images` instead of `pixels`."""
        device = self._accelerator.device
        batch = batch if widest_float(device) == torch.float64 else in_float32(batch)
        batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        if "pixels" in batch:
            images = batch.pop("pixels")
            batch["images"] = images if images.is_floating_point() else to_images(images)
        return batch

    def prepare(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch of `move` after `prepare_batch`, in the memory layout of the run."""
        if self.prepare_batch:
            with torch.no_grad(), self._accelerator.autocast():
                batch = self.prepare_batch(batch)
        if not self._channels_last:
            # Not contiguous(): it leaves one channel with the strides of channels_last, and the network follows them.
            order = torch.contiguous_format
            batch |= {name: batch[name].clone(memory_format=order) for name in ("images", "noise")}
        return batch


def in_float32(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch for devices without float64, such as MPS. Times stay below 1, which rounding would reach."""
    return batch | {"time": batch["time"].float().clamp(max=1 - 2**-24)}
