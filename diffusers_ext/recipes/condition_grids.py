"""The pictures whose condition images the sample grids of a run are made of."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_ext.conditions import ImageCondition
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.stream import StreamData
from diffusers_ext.pixels import to_images
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.trainer.run import DENOISING_PICTURES


SAMPLES_OF_EACH = 2  # rows of samples between the conditions and the images
NAMES = ["condition", "sample", "another", "image"]


@dataclass(frozen=True, eq=False)
class ConditionPictures:
    """Pictures in [0, 1], one for each column of a grid, each of shape `(columns, channels, height, width)`.

    Attributes:
        conditions: As the pipeline takes them.
        shown: The same at the size of the images.
        images: That the conditions are of.
    """

    conditions: Tensor
    shown: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.images)


def condition_rows(
    config: DenoisingConfig, condition: ImageCondition, held_out: ImageData | None, data: ImageData | StreamData
) -> dict:
    """The rows of a run's sample grid, of the first held-out images, or the first images where none are held out.

    Returns:
        `names`, `conditions` (`ConditionPictures`), and `labels` of the images, or their `prompts` where labels are captions.

    Raises:
        ValueError: for a stream without held-out images.
    """
    source = data if held_out is None else held_out
    if not isinstance(source, ImageData):
        raise ValueError(
            "the sample grids show the conditions of held-out images, which a stream has none of: give --validation_split and "
            "--max_validation_samples"
        )
    rows = np.arange(min(config.sample_columns, len(source)))
    how = rows, np.full((len(rows), 2), 0.5), np.zeros(len(rows), bool)
    images = _to_tensor(source.read(*how))
    made = condition.of_images(images) if source.conditions is None else _to_tensor(source.read_conditions(*how))
    pictures = [each / 2 + 0.5 for each in (made, condition.shown(made), images)]
    return {"names": NAMES, "conditions": ConditionPictures(*pictures)} | _named(source, rows)


def described_run(condition: ImageCondition | None) -> dict:
    """Keywords of `finish_run` for a run with condition images; none without."""
    if condition is None:
        return {}
    pictures = DENOISING_PICTURES | {
        "samples.png": f"{condition.describe()}, two samples of each, and the images they are of"
    }
    return {"pictures": pictures, "pipeline_tag": "image-to-image"}


def _to_tensor(pixels: np.ndarray) -> Tensor:
    return to_images(torch.from_numpy(pixels)).movedim(-1, 1).contiguous()


def _named(source: ImageData, rows: np.ndarray) -> dict[str, list]:
    """The labels or texts of these images."""
    if source.labels is None:
        return {}
    labels = source.labels[rows]
    if source.texts is not None:
        return {"prompts": [source.id2label[label] for label in labels.tolist()]}
    return {"labels": [np.flatnonzero(each).tolist() for each in labels] if labels.ndim == 2 else labels.tolist()}
