"""Mean and standard deviation of the data, between samples as a denoiser knows them and images or latents.

    x = (y - mean) / std

for images in [-1, 1], or latents at their VAE's scale, y. The mean is that of each pixel, of all data or of those of a
label; the standard deviation is one number, or one for each channel. `training/train_ddpm.py --data_mean --data_scale`
measures them, and a pipeline keeps them as its component `statistics`.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.models.network import Network, check_num_classes
from diffusers_ext.sizes import as_size


DATA_MEANS = ("none", "overall", "class")
DATA_SCALES = ("none", "overall", "channel")


class Float32Network(Network):
    """A model whose numbers stay in float32 whatever a pipeline is cast to: half precision would be seen in each image."""

    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["mean", "std"]

    def _apply(self, fn, recurse: bool = True):
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self


class DataStatisticsModel(Float32Network):
    """Subtracts the mean of the data and divides by their standard deviation, and undoes it.

    Buffers: `mean`, float32, shape `(1, channels, *size)`, or `(num_classes + 1, channels, *size)` with a row for each label
    and, for images without a label, that of all of them; `std`, float32, shape `(1,)` or `(channels,)`.

    Args:
        sample_size: Side of the samples, or `(height, width)`; for 1-D data the length.
        in_channels: Channels of the samples.
        num_classes: Number of labels with a mean of their own; `None` for one mean.
        data_mean: "none", "overall" or "class": what `mean` is of.
        data_scale: "none", "overall" or "channel": what `std` is of.
        dims: 2 for images, 1 for series.

    Raises:
        ValueError: if the options contradict one another.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, ...],
        in_channels: int,
        num_classes: int | None = None,
        data_mean: Literal[DATA_MEANS] = "overall",  # type: ignore[valid-type]
        data_scale: Literal[DATA_SCALES] = "overall",  # type: ignore[valid-type]
        dims: int = 2,
    ):
        super().__init__()
        check_num_classes(num_classes)
        for name, value, known in (("data_mean", data_mean, DATA_MEANS), ("data_scale", data_scale, DATA_SCALES)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if (data_mean == "class") != (num_classes is not None):
            raise ValueError(
                f"num_classes must be given with data_mean 'class' and with no other, got {num_classes} with {data_mean!r}"
            )
        rows = 1 if num_classes is None else num_classes + 1
        self.register_buffer("mean", torch.zeros(rows, in_channels, *as_size(sample_size, dims)))
        self.register_buffer("std", torch.ones(in_channels if data_scale == "channel" else 1))

    @classmethod
    def of(cls, mean: Tensor, std: Tensor, **config) -> "DataStatisticsModel":
        """From the numbers.

        Args:
            mean, std: Of the shapes of the buffers.
            config: Arguments of the class.

        Raises:
            ValueError: if they have other shapes, are not finite, or a standard deviation is not above 0.
        """
        model = cls(**config)
        for name, value, expected in (("mean", mean, model.mean), ("std", std, model.std)):
            if value.shape != expected.shape:
                raise ValueError(f"{name} must have shape {tuple(expected.shape)}, got {tuple(value.shape)}")
            if not value.isfinite().all():
                raise ValueError(f"{name} must be finite")
        if not (std > 0).all():
            raise ValueError(f"std must be above 0, got {std.tolist()}")
        model.mean.copy_(mean)
        model.std.copy_(std)
        return model

    def units(self, labels: Tensor | None, like: Tensor) -> DataUnits:
        """What makes data of samples with these labels: `mean` and `std`, in the precision and on the device of `like`.

        Args:
            labels: int64, shape `(batch,)`, where `num_classes` or `None` stand for no label; or weights of labels, shape
                `(batch, num_classes)`, to which belongs the mean of all data and its weighted differences to those of the
                labels. With one mean they are not looked at.

        Raises:
            ValueError: if they are sets of labels, which have no mean of their own, or there is no such label.
        """
        mean = self.mean.to(like)
        std = self.std.to(like).view(-1, *[1] * (mean.ndim - 2))
        if self.config.num_classes is None:
            return DataUnits(mean, std)
        last = self.config.num_classes
        if labels is None:
            return DataUnits(mean[last:], std)
        if labels.dtype == torch.bool:
            raise ValueError(
                "the data have a mean for each label, and a set of labels has none: give one label an image"
            )
        if labels.is_floating_point():
            rest = (mean[:last] - mean[last]).flatten(1)
            return DataUnits(mean[last] + (labels.to(mean) @ rest).view(-1, *mean.shape[1:]), std)
        # Those of a batch on an accelerator are not waited for.
        if labels.device.type == "cpu" and ((labels < 0) | (labels > last)).any():
            raise ValueError(f"labels must be in [0, {last}], of which {last} is none, got {labels.tolist()}")
        return DataUnits(mean[labels.to(mean.device)], std)

    def normalise(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images or latents to samples of the denoiser, shape `(batch, channels, *size)`, labels as for `units`."""
        mean, std = self.units(labels, x)
        return (x - mean) / std

    def restore(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Samples of the denoiser to images or latents; `normalise` backwards."""
        return self.units(labels, x).data(x)

    forward = normalise

    def fingerprint(self) -> str:
        """A digest of the numbers."""
        digest = hashlib.sha256()
        for buffer in (self.mean, self.std):
            digest.update(buffer.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    @property
    def largest(self) -> float:
        """The least bound of |x| over all images in [-1, 1]: what a sampler may clip the predicted x_0 to.

        A range of one number for all pixels and labels is wider than that of most of them, but cuts off no image.
        """
        std = self.std.view(-1, *[1] * (self.mean.ndim - 2))
        return ((1 + self.mean.abs()) / std).max().item()


def check_statistics(
    statistics: DataStatisticsModel | None, in_channels: int, size: Sequence[int], num_classes: int | None
) -> None:
    """Refuses statistics of other data than a denoiser's.

    Args:
        in_channels, size, num_classes: Of the denoiser.

    Raises:
        ValueError: with what differs.
    """
    if statistics is None:
        return
    if not hasattr(statistics, "normalise"):
        raise ValueError(f"statistics must be a DataStatisticsModel, got {type(statistics).__name__}")
    channels, *got = statistics.mean.shape[1:]
    if (channels, *got) != (in_channels, *size):
        theirs, ours = ("x".join(map(str, shape)) for shape in ((channels, *got), (in_channels, *size)))
        raise ValueError(
            f"statistics must be of the denoiser's samples, {ours} (channels first), got those of {theirs}: they are of other "
            "data"
        )
    labels = statistics.config.num_classes
    if labels is not None and labels != num_classes:
        knows = "none" if num_classes is None else num_classes
        raise ValueError(
            f"statistics must have means of the denoiser's labels, of which it has {knows}, got those of {labels}: they are of "
            "other data"
        )
