"""What statistics of the data ask of a call: labels, whose means they are, and a scheduler that does not cut off samples."""

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffusers_ext.models.statistics import DataStatisticsModel


if TYPE_CHECKING:
    from diffusers_ext.pipelines.sampling import Condition


def check_clipping(config: Mapping[str, Any], in_latents: bool, statistics: DataStatisticsModel | None) -> None:
    """Looks whether what a scheduler does to the predicted x_0 suits samples that are not images in [-1, 1].

    Raises:
        ValueError: if it scales them into [-1, 1].
    """
    if statistics is not None and config.get("thresholding"):
        raise ValueError(
            "thresholding must be False for a pipeline with statistics: it scales the predicted x_0 into [-1, 1], the range of "
            "images and not of normalised ones; clip_sample=True clips them to clip_sample_range"
        )
    bound = config.get("clip_sample_range", 1.0)
    if not config.get("clip_sample"):
        return
    if in_latents and bound <= 1:
        samples, remedy = "latents", "clip_sample=False"
    elif not in_latents and statistics is not None and bound < (1 - 1e-6) * statistics.largest:
        samples, remedy = "normalised ones", f"clip_sample_range={statistics.largest:.6g}"
    else:
        return
    warnings.warn(
        f"the scheduler clips what it predicts to [-{bound:g}, {bound:g}], which is the range of images and not of "
        f"{samples}: make it with {remedy}",
        stacklevel=6,
    )


def labels_of_data(statistics: DataStatisticsModel | None, condition: "Condition") -> Tensor | None:
    """The labels of a call by which `statistics` know the mean of its images; None if they have one mean for all."""
    if statistics is None or statistics.config.num_classes is None:
        return None
    if condition.labels is None:
        warnings.warn(
            "class_labels were not given, and from the data of this model the mean of each label was subtracted, which is not "
            "known for images of no label: they get the mean of all data",
            stacklevel=5,
        )
    return condition.labels
