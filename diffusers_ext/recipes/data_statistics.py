"""The mean and the standard deviation of a run's data, measured before its first step.

One pass over the data sums x, by label if asked for, and x^2, in float64. Of latents, which are drawn anew at each look, the
posteriors' means and variances give both without a draw. The first process measures and the others are given its numbers.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import LatentEncoder, SampleSpace
from diffusers_ext.data.sequences import SequenceData
from diffusers_ext.data.stream import StreamData
from diffusers_ext.latents import latent_scale
from diffusers_ext.models.statistics import DataStatisticsModel, check_statistics
from diffusers_ext.pixels import to_images
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.recipes.pretrained import load_statistics, read_pretrained


BATCH = 256

# Of the mean square, below which a variance is what rounding leaves of none.
SMALLEST_SHARE = 1e-10


def with_statistics(
    config: DenoisingConfig, data: ImageData | StreamData, space: SampleSpace, accelerator: Accelerator
) -> SampleSpace:
    """The space with the statistics of the data that the options ask for, or of the pipeline that the run begins with, if any.

    Raises:
        ValueError: if the data have no such statistics: a stream, no labels, sets of labels, or values that do not vary; or if
            those of the pipeline are of other data.
    """
    if (config.data_mean, config.data_scale) == ("none", "none"):
        return space
    if config.pretrained_pipeline is not None:
        known = load_statistics(read_pretrained(config.pretrained_pipeline))
        check_statistics(known, space.shape[0], space.shape[1:], data.num_classes)
        accelerator.print(f"as for {config.pretrained_pipeline}, {describe(known)}")
        return dataclasses.replace(space, statistics=known)
    if isinstance(data, SequenceData):
        raise ValueError(
            f"data_mean and data_scale are of images, and {data.name} holds sequences, whose values sequence_scale scales: leave "
            "them out"
        )
    if not isinstance(data, ImageData):
        raise ValueError(
            "data_mean and data_scale are measured in one pass over all images before the first step, which a stream does not "
            "allow: leave streaming out"
        )
    if config.data_mean == "class" and (data.id2label is None or data.has_label_sets):
        found = "sets of labels" if data.has_label_sets else "no labels"
        raise ValueError(
            f"data_mean class needs one label for each image, {data.name} has {found}: use data_mean overall"
        )
    measured = [None]
    if accelerator.is_main_process:
        try:
            measured = [measure(config, data, space, accelerator.device)]
        except ValueError as error:  # for all processes, which would wait for this one
            measured = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(measured)
    if isinstance(measured[0], ValueError):
        raise measured[0]
    channels, *size = space.shape
    statistics = DataStatisticsModel.of(
        *measured[0],
        sample_size=tuple(size),
        in_channels=channels,
        num_classes=data.num_classes if config.data_mean == "class" else None,
        data_mean=config.data_mean,
        data_scale=config.data_scale,
    )
    accelerator.print(describe(statistics))
    return dataclasses.replace(space, statistics=statistics)


def describe(statistics: DataStatisticsModel) -> str:
    """What is done to the data, in a line."""
    kind = {"none": "no mean", "overall": "the mean of all", "class": "the mean of each label"}
    scale = {"none": "left at their scale", "overall": "scaled", "channel": "scaled by channel"}
    config, std = statistics.config, ", ".join(f"{value:.4g}" for value in statistics.std.tolist())
    return f"the data have {kind[config.data_mean]} subtracted and are {scale[config.data_scale]}, by std {std}"


@torch.no_grad()
def measure(
    config: DenoisingConfig, data: ImageData, space: SampleSpace, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`mean` and `std` of `DataStatisticsModel`, float64, on the CPU.

    The standard deviation is that of all values of what is left after the subtraction, of all pixels or of a channel's.

    Raises:
        ValueError: if one to divide by is 0.
    """
    rows = data.num_classes if config.data_mean == "class" else 1
    sums = torch.zeros(rows, *space.shape, dtype=torch.float64)
    squares, counts = torch.zeros(space.shape[0], dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    for mean, square, labels in _moments(config, data, space, device):
        index = torch.zeros(len(mean), dtype=torch.int64) if rows == 1 else labels
        sums.index_add_(0, index, mean)
        counts += torch.bincount(index, minlength=rows)
        squares += square
    overall = sums.sum(0, keepdim=True) / counts.sum()
    # A label without images has the mean of all, as no label has.
    there = counts.view(-1, *[1] * len(space.shape))
    of_rows = torch.where(there > 0, sums / there.clamp(min=1), overall)
    mean = {"none": torch.zeros_like(overall), "overall": overall, "class": torch.cat([of_rows, overall])}
    std = torch.ones(1, dtype=torch.float64)
    if config.data_scale != "none":
        values = counts.sum() * sums[0, 0].numel()
        std = _standard_deviation(
            config, squares / values, (counts @ of_rows.square().flatten(2).sum(2)) / values, overall[0]
        )
    return mean[config.data_mean], std


def _standard_deviation(config: DenoisingConfig, square: Tensor, square_of_means: Tensor, overall: Tensor) -> Tensor:
    """Of what is left of the data, float64, shape `(channels,)` or `(1,)`.

    Args:
        square: Mean square of x by channel.
        square_of_means: That of what may be subtracted from each image.
        overall: Mean of all images, shape `(channels, *size)`.

    Raises:
        ValueError: if it is 0.
    """
    means = overall.flatten(1).mean(1)
    if config.data_scale == "overall":
        square, square_of_means, means = (each.mean(0, keepdim=True) for each in (square, square_of_means, means))
    # What is left has a mean of 0 in all but the first case.
    variance = square - (means.square() if config.data_mean == "none" else square_of_means)
    constant = (variance <= SMALLEST_SHARE * square).nonzero().flatten().tolist()
    if constant:
        where = "" if config.data_scale == "overall" else f" in channel {', '.join(map(str, constant))}"
        raise ValueError(
            f"data_scale {config.data_scale} needs data that vary, and after data_mean {config.data_mean} nothing is left of "
            f"them{where}: use data_scale none"
        )
    return variance.sqrt()


def _moments(
    config: DenoisingConfig, data: ImageData, space: SampleSpace, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Of each batch: the mean of x for each image, the sum of E x^2 by channel, both float64, and labels; on the CPU.

    Images that are mirrored at random are taken both ways, and those that are cropped at random in their middle.
    """
    encode = None if space.vae is None else LatentEncoder(space.vae, device, space.cached)
    size = BATCH if encode is None else config.train_batch_size
    for flip in (False, True) if config.random_flip else (False,):
        for start in range(0, len(data), size):
            rows = np.arange(start, min(start + size, len(data)))
            pixels = torch.from_numpy(data.read(rows, np.full((len(rows), 2), 0.5), np.full(len(rows), flip)))
            images = pixels.movedim(-1, 1)
            if encode is None:
                mean = to_images(images, torch.float64)
                square = mean.square()
            else:
                images = images if images.is_floating_point() else to_images(images)
                mean, std = encode.moments(images.to(device))
                shift, scale = latent_scale(space.vae, mean)
                mean, std = (each.cpu().double() for each in ((mean - shift) * scale, std * scale))
                square = mean.square() + std.square()
            labels = None if data.labels is None or data.has_label_sets else torch.from_numpy(data.labels[rows])
            yield mean, square.transpose(0, 1).flatten(1).sum(1), labels
