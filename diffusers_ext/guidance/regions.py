"""Conditions that hold in parts of an image: their directions, weighted and masked, are added to a prediction."""

from typing import NamedTuple

from torch import Tensor


class Regions(NamedTuple):
    """What holds where.

        base + sum over regions of weight * mask * (prediction of the region - null prediction)

    With masks of 1 it is `ComposedGuidance`'s sum (Liu et al. 2022, arXiv 2206.01714, Section 4), pixel by pixel as in
    Bar-Tal et al. 2023, arXiv 2302.08113. An output of any prediction type may be summed so: at the same x_t all are affine
    functions of x_0, with the same factor.

    Attributes:
        inputs: Of the network under the condition of each region, by name, each of shape `(batch, ...)`.
        null: The same under no condition.
        masks: Of each region, in [0, 1], shape `(batch or 1, 1, *spatial)`.
        weights: Of each region.
    """

    inputs: list[dict[str, Tensor]]
    null: dict[str, Tensor]
    masks: list[Tensor]
    weights: list[float]

    def blend(self, base: Tensor, predictions: list[Tensor], null: Tensor, channels: int) -> Tensor:
        """The sum above. Channels after the first `channels`, of a learned variance, stay those of `base`."""
        blended = base.clone()
        for prediction, mask, weight in zip(predictions, self.masks, self.weights, strict=True):
            blended[:, :channels] += weight * mask * (prediction - null)[:, :channels]
        return blended
