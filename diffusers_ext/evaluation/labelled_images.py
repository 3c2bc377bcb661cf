"""Images in 8 bits, or sequences in their own units, with their labels, as all measures take them."""

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from diffusers_ext.value_scale import ValueScale


class LabelledImages(TensorDataset):
    """8-bit images `(number, channels, height, width)`, their labels `(number,)`, and the labels' names.

    Images without labels have the label -1 and no names. With a `value_scale` they are sequences in own units, float32,
    `(number, channels, length)`, and that is the scale of those trained on.

    Raises:
        TypeError, ValueError: if the images are not uint8 of that shape, or a label is missing or out of range.
    """

    def __init__(self, images: Tensor, labels: Tensor, label_names: list[str], value_scale: ValueScale | None = None):
        if value_scale is not None and (images.ndim != 3 or not images.is_floating_point()):
            raise ValueError(
                f"sequences must be floating point, (number, channels, length), got {images.dtype} {tuple(images.shape)}"
            )
        if value_scale is None and images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 in [0, 255], got {images.dtype}")
        if value_scale is None and images.ndim != 4:
            raise ValueError(f"images must have shape (number, channels, height, width), got {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be one for each of the {len(images)} images, got {tuple(labels.shape)}")
        if len(label_names) == 0:
            if not labels.eq(-1).all():
                raise ValueError("images without label_names must have the label -1")
        elif len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(label_names):
            raise ValueError(
                f"labels must be in [0, {len(label_names) - 1}], got {int(labels.min())} to {int(labels.max())}"
            )
        super().__init__(images, labels)
        self.label_names, self.value_scale = list(label_names), value_scale

    def take(self, rows: Tensor) -> "LabelledImages":
        """Those of these numbers."""
        return LabelledImages(self.images[rows], self.labels[rows], self.label_names, self.value_scale)

    def flat(self, images: Tensor) -> Tensor:
        """Images like these as float64, shape `(number, values)`: in [0, 1], or for sequences in about that range."""
        if self.value_scale is None:
            return images.flatten(1).double() / 255
        return (self.value_scale.to_model(images).flatten(1).double() + 1) / 2

    @property
    def images(self) -> Tensor:
        return self.tensors[0]

    @property
    def labels(self) -> Tensor:
        return self.tensors[1]


def drawn_order(count: int, seed: int) -> Tensor:
    """The order in which `count` examples are taken, which the seed draws: int64, shape `(count,)`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def drawn_in_turn(count: int, number: int, seed: int) -> Tensor:
    """Numbers of `number` of `count` examples: each once in the order that the seed draws, then again in this order; int64."""
    order = drawn_order(count, seed)
    return order.repeat(-(-number // count))[:number]


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Colour to grey by its luma (ITU-R BT.601, as in Pillow's mode L), grey to colour by copies; else unchanged.

    Args:
        images: uint8, shape `(number, 1 or 3 or channels, height, width)`.
        channels: Channels of the result.
    """
    given = images.shape[1]
    if given == channels:
        return images
    if (given, channels) == (3, 1):
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        return (images.float() * luma).sum(1, keepdim=True).round().to(torch.uint8)
    if (given, channels) == (1, 3):
        return images.expand(-1, 3, -1, -1)
    raise ValueError(f"images of {given} channels cannot be compared with a data set of {channels} channels")
