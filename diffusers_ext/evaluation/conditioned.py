"""Images that are asked for by condition images: which these are, and how close what comes is to the images that they are of."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffusers_ext.command_names import name_commands
from diffusers_ext.conditions import GIVEN, ImageCondition
from diffusers_ext.evaluation.labelled_images import convert_channels, drawn_in_turn
from diffusers_ext.evaluation.perceptual_distance import PerceptualDistance
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.figures import labelled_grid
from diffusers_ext.metrics.reconstruction import multi_scale_ssim, rmse, ssim


COLUMNS = 8  # of the picture
AT_ONCE = 256  # images, of which the measures need some times the memory


@dataclass(frozen=True, eq=False)
class ConditionedImages:
    """Real images whose condition images are asked for, in turn; held-out ones if there are some.

    Attributes:
        condition: How their condition images are made.
        truth: uint8, shape `(number, channels, height, width)`, with the channels of the pipeline.
        conditions: In [0, 1], of the same number, as the pipeline takes them.
        labels: Of the images, int64; -1 without.
        held_out: Whether the pipeline was not trained on them.
    """

    condition: ImageCondition
    truth: Tensor
    conditions: Tensor
    labels: Tensor
    held_out: bool

    @classmethod
    def of(cls, condition: ImageCondition, real: RealImages, number: int, seed: int) -> "ConditionedImages":
        """`number` of the real images, in the order in which `Evaluator.measure_held_out` and `Captions.draw` take them.

        Raises:
            ValueError: if the real images are not what the condition is made from, or have no column of it.
        """
        held_out = real.held_out is not None
        if real.captions is not None:  # whose texts go with the condition images
            held_out = held_out and len(real.captions.texts) == len(real.held_out)
        source = real.held_out if held_out else real.train
        rows = drawn_in_turn(len(source), number, seed)
        truth = convert_channels(source.images, condition.image_channels)[rows]
        column = real.held_out_conditions if held_out else real.train_conditions
        conditions = condition_images(condition, truth, None if column is None else column[rows])
        return cls(condition, truth, conditions, source.labels[rows], held_out)

    @property
    def bicubic(self) -> Tensor | None:
        """The images of low resolution, enlarged by bicubic interpolation, uint8; None for other conditions."""
        if self.condition.kind != "lowres":
            return None
        enlarged = F.interpolate(self.conditions, size=self.condition.image_size, mode="bicubic", align_corners=False)
        return enlarged.clamp(0, 1).mul(255).round().to(torch.uint8)

    def measure(self, images: Tensor, lpips: PerceptualDistance | None = None) -> dict[str, float | int | bool | str]:
        """How close images, uint8, one for each condition image, are to the true ones.

        Returns:
            What `closeness` does; the same with `bicubic_` before each name for bicubic interpolation of a low resolution;
            `num_images`; `held_out`; the `condition` in words.
        """
        result = {"condition": self.condition.describe(), "num_images": len(images), "held_out": self.held_out}
        result |= closeness(convert_channels(images, self.truth.shape[1]), self.truth, lpips)
        if self.bicubic is not None:
            result |= {f"bicubic_{name}": value for name, value in closeness(self.bicubic, self.truth, lpips).items()}
        return result

    def draw(self, images: Tensor) -> Image.Image:
        """A grid: condition, result, bicubic interpolation if there is one, and truth, side by side for the first images."""
        shown = self.condition.shown(self.conditions[:COLUMNS])
        rows = {"condition": shown}
        if self.bicubic is not None:
            rows["bicubic"] = self.bicubic[:COLUMNS] / 255
        rows |= {"result": images[:COLUMNS] / 255, "truth": self.truth[:COLUMNS] / 255}
        return labelled_grid(list(rows.values()), list(rows))


def condition_images(condition: ImageCondition, images: Tensor, column: Tensor | None) -> Tensor:
    """The condition images of these images, in [0, 1], as a pipeline takes them.

    Args:
        images: uint8, shape `(number, channels, height, width)`, with any channels that `convert_channels` knows.
        column: The condition images of the data set, uint8, of the same number, for a condition that is given; else None.

    Raises:
        ValueError: for a condition that is given, without them.
    """
    if condition.kind != GIVEN:
        images = convert_channels(images, condition.image_channels)
        parts = (condition.of_images(part.float() / 127.5 - 1) for part in images.split(AT_ONCE))
        return (torch.cat([*parts]) / 2 + 0.5).clamp(0, 1)
    if column is None:
        raise ValueError(
            name_commands(
                "the pipeline's condition images are a column of its data set, and none is named: see --condition_column of "
                "training/evaluate.py"
            )
        )
    return column.float() / 255


def closeness(images: Tensor, truth: Tensor, lpips: PerceptualDistance | None = None) -> dict[str, float]:
    """How close images are to others, both uint8, of one shape.

    Returns:
        `rmse` of 256 values and `psnr` in dB, both of the mean squared error of all images; `ssim`, `ms_ssim` and, with a
        network, `lpips`, their means over the images.
    """
    values: dict[str, list[Tensor]] = {}
    for one, other in zip(images.split(AT_ONCE), truth.split(AT_ONCE), strict=True):
        measured = {
            "error": rmse(one, other).square(),
            "ssim": ssim(one / 255, other / 255),
            "ms_ssim": multi_scale_ssim(one / 255, other / 255),
            **({} if lpips is None else {"lpips": lpips.measure(one, other)}),
        }
        for name, each in measured.items():
            values.setdefault(name, []).append(each)
    means = {name: torch.cat(each).mean().item() for name, each in values.items()}
    error = means.pop("error")
    return {"rmse": error**0.5, "psnr": 20 * math.log10(255 / error**0.5) if error else math.inf} | means
