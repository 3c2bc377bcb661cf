"""A small network whose features the Fréchet distance, precision and recall are measured in: a classifier, or without classes.

Features of a network that was trained on the data set itself separate its classes and styles where those of a network
trained on photographs may not, and there is one for any size and number of channels. What is trained without labels
(`evaluation/self_supervised.py`) is the same network without its last layer.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from diffusers_ext.command_names import name_commands
from diffusers_ext.pixels import to_images
from diffusers_ext.sizes import as_size
from diffusers_ext.untrusted import check_config
from diffusers_ext.value_scale import ValueScale


def _convolution(in_channels: int, out_channels: int, kernel: int, stride: int, dims: int) -> nn.Conv2d:
    """Padded by 1, but for a kernel of 1; sequences have a height of 1."""
    sides = [(kernel, kernel), (stride, stride), (min(1, kernel - 1),) * 2]
    if dims == 1:
        sides = [(neutral, own) for neutral, (_, own) in zip((1, 1, 0), sides, strict=True)]
    return nn.Conv2d(in_channels, out_channels, *sides, bias=False)


class ResidualBlock(nn.Module):
    """Two convolutions of 3 positions along each axis beside a shortcut, the first of them with a stride."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, dims: int = 2):
        super().__init__()
        self.conv1 = _convolution(in_channels, out_channels, 3, stride, dims)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _convolution(out_channels, out_channels, 3, 1, dims)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = _convolution(in_channels, out_channels, 1, stride, dims)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)) + shortcut)


def scaled_samples(images: Tensor, scale: ValueScale | None) -> Tensor:
    """Images in 8 bits, or sequences in own units, to float32 in about [-1, 1], images in channels_last.

    Raises:
        TypeError: if images are not uint8.
    """
    if images.ndim == 3 and images.is_floating_point():
        return images.float() if scale is None else scale.to_model(images)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8 in [0, 255], got {images.dtype}")
    return to_images(images).contiguous(memory_format=torch.channels_last)


class FeatureClassifierModel(ModelMixin, ConfigMixin):
    """A residual convolutional classifier with batch normalisation, or such a network without classes.

    Args:
        sample_size: Side of the images, or `(height, width)`; of sequences the length.
        in_channels: Channels of the images.
        num_classes: Number of labels; None for a network of features alone, whose output they are.
        block_out_channels: Widths of the stages; each but the first halves the image. The last is the number of
            features.
        layers_per_block: Residual blocks in a stage.
        stem_stride: 1 or 2, the stride of the first convolution.
        label_names: Name of each label, for the reader of the saved folder.
        dims: 2 for images, shape `(batch, channels, height, width)`; 1 for sequences, `(batch, channels, length)`.
        value_scale: Of sequences, between [-1, 1] and their own units, in which `measure` takes them; see
            `GuidedDiffusionPipeline`.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, ...],
        in_channels: int,
        num_classes: int | None,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 1,
        stem_stride: int = 1,
        label_names: list[str] | None = None,
        dims: int = 2,
        value_scale: dict | None = None,
    ):
        super().__init__()
        check_config(self.config, FeatureClassifierModel.__init__, finite=True)
        if num_classes is not None and num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 for a classifier, got {num_classes}")
        if label_names is not None and len(label_names) != (num_classes or 0):
            raise ValueError(f"label_names must have {num_classes or 0} names, got {len(label_names)}")

        if stem_stride not in (1, 2):
            raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride}")

        width = block_out_channels[0]
        kernel_size = 3 if stem_stride == 1 else 4  # with a stride of 2, an even kernel sees each pixel equally often
        self.conv_in = _convolution(in_channels, width, kernel_size, stem_stride, dims)
        self.norm_in = nn.BatchNorm2d(width)
        blocks = []
        for stage, out_channels in enumerate(block_out_channels):
            for layer in range(layers_per_block):
                blocks.append(ResidualBlock(width, out_channels, 2 if stage > 0 and layer == 0 else 1, dims))
                width = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.classifier = None if num_classes is None else nn.Linear(width, num_classes)

    @classmethod
    def for_images(
        cls, image_shape: tuple[int, ...], label_names: list[str] | None, value_scale: dict | None = None
    ) -> "FeatureClassifierModel":
        """A classifier of a depth and width that suit images of shape `(channels, height, width)`, or sequences.

        Without `label_names` it has no classes.

        From 16 pixels on, the stem halves the image, and each doubling beyond 64 pixels adds a stage, so that the last
        feature map has between 2 and 8 pixels a side.
        """
        channels, *sides = image_shape
        more_stages = max(0, math.ceil(math.log2(max(sides) / 64)))
        return cls(
            sample_size=tuple(sides),
            in_channels=channels,
            num_classes=None if label_names is None else len(label_names),
            block_out_channels=(32, 64) + (128,) * (1 + more_stages),
            stem_stride=2 if min(sides) >= 16 else 1,
            label_names=None if label_names is None else list(label_names),
            dims=len(sides),
            value_scale=value_scale,
        )

    @property
    def feature_dim(self) -> int:
        """Number of features of an image."""
        return self.config.block_out_channels[-1]

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(channels, height, width)` of the images that the model takes, or `(channels, length)` of the sequences."""
        return self.config.in_channels, *as_size(self.config.sample_size, self.config.dims)

    def fits(self, image_shape: Sequence[int]) -> bool:
        """Whether the model takes images of this shape `(channels, height, width)`."""
        return self.image_shape == tuple(image_shape)

    def ids_among(self, label_names: Sequence[str]) -> Tensor:
        """The id of each class among these names, int64, shape `(num_classes,)`; -1 for a class that is none of them.

        Classes without names are taken to have these, in their order. Without classes it is empty.
        """
        if self.classifier is None:
            return torch.empty(0, dtype=torch.int64)
        if self.config.label_names is None:
            return torch.arange(self.config.num_classes)
        ids = {name: label for label, name in enumerate(label_names)}
        return torch.tensor([ids.get(name, -1) for name in self.config.label_names])

    def feature_maps(self, sample: Tensor) -> list[Tensor]:
        """The activations after the first convolution and after each block, the finest first.

        Args:
            sample: Images in [-1, 1], shape `(batch, channels, height, width)`, or sequences in about the same range,
                `(batch, channels, length)`, whose maps have a height of 1.

        Raises:
            ValueError: if the images have another shape than those that the model was trained on.
        """
        if tuple(sample.shape[1:]) != self.image_shape:
            raise ValueError(
                name_commands(
                    f"this feature classifier takes images of (channels, height, width) {self.image_shape},"
                    f" got {tuple(sample.shape[1:])}: train one on such images with training/train_features.py"
                )
            )
        sample = sample.unsqueeze(2) if self.config.dims == 1 else sample
        maps = [F.relu(self.norm_in(self.conv_in(sample)))]
        for block in self.blocks:
            maps.append(block(maps[-1]))
        return maps

    def extract_features(self, sample: Tensor) -> Tensor:
        """The activations before the last layer, averaged over the image, shape `(batch, feature_dim)`; see `feature_maps`."""
        return self.feature_maps(sample)[-1].mean((2, 3))

    def forward(self, sample: Tensor) -> Tensor:
        """The logits of the labels, shape `(batch, num_classes)`, of images in [-1, 1]; without classes the features."""
        features = self.extract_features(sample)
        return features if self.classifier is None else self.classifier(features)

    def to_sample(self, images: Tensor) -> Tensor:
        """Images in 8 bits, or sequences in own units, to what the network takes; see `measure`."""
        scale = ValueScale.of_config(self.config.value_scale)
        return scaled_samples(images, scale)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor | None:
        """The logits of the labels that features of `measure` have, shape `(number, num_classes)`, on the CPU; or None."""
        if self.classifier is None:
            return None
        return self.classifier(features.to(self.device)).cpu()

    @torch.no_grad()
    def measure(self, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor | None]:
        """Features and predicted labels of 8-bit images, or of sequences, in evaluation mode and batch by batch.

        Args:
            images: uint8, shape `(number, channels, height, width)`; or sequences in own units, floating point, shape
                `(number, channels, length)`.
            batch_size: Images at a time.

        Returns:
            Features, float32, shape `(number, feature_dim)`, and labels, int64, shape `(number,)`, both on the CPU; None in
            their place without classes.
        """
        training = self.training
        # The fastest layout, and always the same one, since rounding depends on it.
        self.eval().to(memory_format=torch.channels_last)
        features = torch.empty(len(images), self.feature_dim)
        labels = None if self.classifier is None else torch.empty(len(images), dtype=torch.int64)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            features[rows] = self.extract_features(self.to_sample(images[rows].to(self.device)))
            if labels is not None:
                labels[rows] = self.classifier(features[rows].to(self.device)).argmax(1).cpu()
        self.train(training)
        return features, labels
