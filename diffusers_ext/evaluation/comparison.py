"""Many sets of images of a run, all of the same noise, beside the data that it was trained on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_ext.data.images import fit
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.feature_folders import features_for
from diffusers_ext.evaluation.generate import generate_images
from diffusers_ext.evaluation.options import DataOptions, take_options_of_run
from diffusers_ext.evaluation.pipeline_facts import image_size_of
from diffusers_ext.evaluation.real_images import RealImages, load_real_images
from diffusers_ext.evaluation.reference_cache import reference_features
from diffusers_ext.evaluation.subject import labels_for


SEED = 900  # of the sets of images, far from those that anything is chosen by
NUM_REFERENCE = 1000


@dataclass(frozen=True)
class Comparison:
    """What sets of images are compared with, and what they are asked for.

    Attributes:
        evaluator: Of the run's training images.
        labels: Of each image of a set; None for a pipeline without.
        pad_value: Of the border of images that are smaller than the real ones, 8 bits.
    """

    real: RealImages
    evaluator: Evaluator
    labels: list[int] | None
    num_images: int
    pad_value: int = 0

    @classmethod
    def of(
        cls,
        pipe: DiffusionPipeline,
        run: str | Path,
        num_images: int,
        features: str | None = None,
        resolution: tuple[int, ...] | None = None,
    ) -> "Comparison":
        """Beside the data of a run.

        Args:
            pipe: The run's, or another with the same labels.
            run: Folder, whose `train_config.yaml` names the data.
            features: Folder of the network of features; by default the one that is kept for these data, or is trained.
            resolution: At which images are compared; by default that of the pipeline. Smaller images are centred on a border
                of the data's `pad_value`, as the data are if they are padded.
        """
        data = take_options_of_run(DataOptions(resolution=resolution or image_size_of(pipe)), str(run))
        real = load_real_images(data.for_data())
        network, about = features_for(real, features, PartialState())
        kept = reference_features(network, real.train, about["sha256"])
        evaluator = Evaluator(real.train, network, NUM_REFERENCE, in_pixels=False, train_features=kept)
        labels = None if pipe.num_classes is None else labels_for(real, pipe.num_classes, num_images)[0]
        border = round((data.pad_value or 0) * 255 / real.white)
        return cls(real, evaluator, labels, num_images, border)

    def generate(self, pipe: DiffusionPipeline, num_inference_steps: int, settings: dict[str, Any]) -> Tensor:
        """A set of images, image i always of the same noise, uint8.

        Args:
            settings: Further arguments of the pipeline's call.
        """
        images = generate_images(
            pipe,
            range(self.num_images),
            labels=self.labels,
            num_inference_steps=num_inference_steps,
            settings=settings,
            seed=SEED,
            show_progress=False,
        )
        size = self.real.image_shape[1:]
        if tuple(images.shape[2:]) == size:
            return images
        fitted = [fit(image, size, "pad", self.pad_value) for image in images.movedim(1, -1).numpy()]
        return torch.from_numpy(np.stack(fitted)).movedim(-1, 1)

    def measure(self, images: Tensor) -> dict[str, float | int]:
        """The measures of a set, see `Evaluator.measure`."""
        return self.evaluator.measure(images, None if self.labels is None else torch.tensor(self.labels))

    @property
    def held_out_distance(self) -> float:
        """The Fréchet distance of real images that the run was not trained on, as many as a set has, or all of them.

        Raises:
            ValueError: if the data have no such split.
        """
        if self.real.held_out is None:
            raise ValueError(f"{self.real.name} has no split of images that were not trained on, to compare sets with")
        number = min(self.num_images, len(self.real.held_out))
        return self.evaluator.measure_held_out(self.real.held_out, number)["frechet_distance"]
