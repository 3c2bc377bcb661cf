"""Condition images: how they are made from an image, and what of them a denoiser sees.

A condition image has one name at each stage of its way:

    condition       as a user gives it: channels and size of its kind, in [-1, 1]; `ImageCondition.of_images` makes it
    noised          the same with noise of a level, for models that were trained so; `add_condition_noise`
    shown           at the size of the images; `ImageCondition.shown`
    condition_image what the network is called with: at the size of the samples; `ImageCondition.for_network`

The same functions make the conditions of training, of evaluation and of a pipeline.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


CONDITIONS = ("lowres", "grey", "edges")
GIVEN = "given"  # the kind of a condition that is no function of the image: a column of the data set

LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (Rec. ITU-R BT.601), as PIL's mode L
EDGE_GAIN = 2.0  # a step of half of black to white, along a straight line, is a black line


def lower_resolution(images: Tensor, factor: int) -> Tensor:
    """Means over squares of `factor` x `factor` pixels."""
    return F.avg_pool2d(images, factor)


def luma(images: Tensor) -> Tensor:
    """Brightness of images of 3 channels; of 4 channels, brightness and alpha."""
    brightness = sum(weight * images[:, i : i + 1] for i, weight in enumerate(LUMA))
    return torch.cat([brightness, images[:, 3:]], dim=1)


def line_art(images: Tensor) -> Tensor:
    """Black lines on white where any channel has an edge: 1 - 2 min(1, 2 |gradient|), one channel.

    The gradient is that of Sobel's operator, in units of the range from black to white for each pixel of a straight edge.
    """
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    across, down = _sobel(padded), _sobel(padded.mT).mT
    gradient = (across.square() + down.square()).sqrt()
    return 1 - 2 * (EDGE_GAIN * gradient.amax(1, keepdim=True)).clamp(max=1)


def _sobel(padded: Tensor) -> Tensor:
    """Along the rows of images in [-1, 1], of slices: a kernel would be copied to the device."""
    difference = (padded[..., 2:] - padded[..., :-2]) / 8
    return difference[..., :-2, :] + 2 * difference[..., 1:-1, :] + difference[..., 2:, :]


def add_condition_noise(condition: Tensor, eps: Tensor, level: Tensor) -> Tensor:
    """sqrt(1 - level^2) condition + level eps: noise augmentation (Ho et al. 2021, arXiv 2106.15282, Section 4).

    Args:
        eps: Standard normal, of the shape of `condition`.
        level: Standard deviation of the noise, in [0, 1], shape `(batch,)`.
    """
    level = level.to(condition).view(-1, *[1] * (condition.ndim - 1))
    return (1 - level.square()).sqrt() * condition + level * eps.to(condition)


@dataclass(frozen=True)
class ImageCondition:
    """A kind of condition image, for images of one size.

    Args:
        kind: "lowres", "grey" or "edges", which are made from an image; "given", which is not.
        channels: Of the condition.
        image_channels, image_size: Of the images, `(height, width)`.
        factor: Of "lowres": the ratio of the sides.
        noise: The largest level of noise that the network was trained with in its condition, in [0, 1]; 0 for none.

    Raises:
        ValueError: if the kind has no such condition of these images.
    """

    kind: str
    channels: int
    image_channels: int
    image_size: tuple[int, int]
    factor: int = 1
    noise: float = 0.0

    def __post_init__(self):
        if self.kind not in (*CONDITIONS, GIVEN):
            raise ValueError(
                f"the kind of image_condition must be {', '.join(CONDITIONS)} or {GIVEN}, got {self.kind!r}"
            )
        if self.kind == "grey" and self.image_channels < 3:
            raise ValueError(
                f"condition grey needs images of colour, of 3 or 4 channels, got {self.image_channels}: see --image_mode"
            )
        if any(side % self.factor for side in self.image_size):
            raise ValueError(
                f"condition lowres:{self.factor} needs images whose sides it divides, got {self._text(self.image_size)}"
            )
        if not 0 <= self.noise <= 1:
            raise ValueError(f"condition_noise must be in [0, 1], got {self.noise}")

    @classmethod
    def parse(
        cls, text: str, image_channels: int, image_size: tuple[int, int], noise: float = 0.0
    ) -> "ImageCondition":
        """From an option: `lowres:4`, `grey` or `edges`.

        Raises:
            ValueError: if it is none of them.
        """
        kind, factor = parse_condition(text)
        channels = {"lowres": image_channels, "grey": max(1, image_channels - 2), "edges": 1}[kind]
        return cls(kind, channels, image_channels, tuple(image_size), factor, noise)

    @property
    def text(self) -> str:
        """The option that `parse` makes it of; "given" for a column."""
        return f"{self.kind}:{self.factor}" if self.kind == "lowres" else self.kind

    @classmethod
    def of_config(cls, config: "Mapping[str, Any] | ImageCondition") -> "ImageCondition":
        """From what `to_config` gives.

        Raises:
            ValueError: if it is not that.
        """
        if isinstance(config, ImageCondition):
            return config
        try:
            return cls(**{**config, "image_size": tuple(config["image_size"])})
        except (TypeError, KeyError) as error:
            raise ValueError(
                "image_condition must be a dict of kind, channels, image_channels, image_size, factor and noise, got "
                f"{config!r}"
            ) from error

    def to_config(self) -> dict[str, Any]:
        """Plain values, as they are saved with a pipeline."""
        return asdict(self) | {"image_size": list(self.image_size)}

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the condition."""
        return tuple(side // self.factor for side in self.image_size)

    def describe(self) -> str:
        """What it is, in words."""
        words = {
            "lowres": "images of low resolution",
            "grey": "grey images",
            "edges": "line art",
            GIVEN: "condition images",
        }
        return f"{words[self.kind]} of {self._text(self.size)} in {self.channels} channel{'s' * (self.channels > 1)}"

    def of_images(self, images: Tensor) -> Tensor:
        """The conditions of images in [-1, 1], shape `(batch, image_channels, *image_size)`.

        Raises:
            ValueError: if they are of another shape, or the condition is no function of the image.
        """
        if self.kind == GIVEN:
            raise ValueError(
                "a condition of this model cannot be made from an image: it was trained with those of a column of its data set"
            )
        expected = (self.image_channels, *self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"a condition is made from images of {self.image_channels} channels of {self._text(self.image_size)}, got "
                f"{images.shape[1]} channels of {self._text(images.shape[2:])}"
            )
        if self.kind == "lowres":
            return lower_resolution(images, self.factor)
        return luma(images) if self.kind == "grey" else line_art(images)

    def shown(self, condition: Tensor) -> Tensor:
        """A condition at the size of the images: one of low resolution with each pixel as a square of them."""
        if self.factor == 1:
            return condition
        return condition.repeat_interleave(self.factor, dim=2).repeat_interleave(self.factor, dim=3)

    def network_channels(self, sample_size: tuple[int, int]) -> int:
        """Channels of what a network of samples of this size sees; see `for_network`.

        Raises:
            ValueError: if the images are no multiple of the samples.
        """
        return self.channels * self._ratio(sample_size) ** 2

    def for_network(self, condition: Tensor, sample_size: tuple[int, int]) -> Tensor:
        """What a network of samples of this size sees of a condition: for latents, of which each stands for f x f pixels,
        these pixels as f^2 channels, so that nothing of them is lost."""
        shown, ratio = self.shown(condition), self._ratio(sample_size)
        return shown if ratio == 1 else F.pixel_unshuffle(shown, ratio)

    def _ratio(self, sample_size: tuple[int, int]) -> int:
        ratios = {side // max(small, 1) for side, small in zip(self.image_size, sample_size, strict=True)}
        ratio = next(iter(ratios))
        if (
            len(ratios) > 1
            or not ratio
            or any(side != ratio * small for side, small in zip(self.image_size, sample_size, strict=True))
        ):
            raise ValueError(
                f"images of {self._text(self.image_size)} must be a multiple of the samples, {self._text(sample_size)}, for a "
                "condition image beside these"
            )
        return ratio

    @staticmethod
    def _text(size: tuple[int, ...]) -> str:
        return "x".join(map(str, size))


def parse_condition(text: str) -> tuple[str, int]:
    """Kind and factor of an option such as `lowres:4`.

    Raises:
        ValueError: if it is none.
    """
    kind, _, factor = text.partition(":")
    if kind == "lowres" and factor.isdecimal() and int(factor) >= 2:
        return kind, int(factor)
    if text in CONDITIONS and text != "lowres":
        return text, 1
    raise ValueError(f"condition must be lowres:K with K of at least 2, grey or edges, got {text!r}")
