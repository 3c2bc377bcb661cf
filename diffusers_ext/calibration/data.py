"""The real images of a calibration: all that there are, or as many as suffice of a data set that is too large for that."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from diffusers_ext.calibration.subject import Subject
from diffusers_ext.data.captions import find_caption_column
from diffusers_ext.evaluation.options import AskedOptions, take_options_of_run
from diffusers_ext.evaluation.pipeline_facts import image_size_of, label_names_of
from diffusers_ext.evaluation.real_images import RealImages, find_held_out_split, load_real_images
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.options import option


# Values of all images of a split that are read into memory; where there are more, or of a stream, so many values are, of a number
# of images within these bounds.
MOST_VALUES = 2_000_000_000
SAMPLED_VALUES, FEWEST_SAMPLED, MOST_SAMPLED = 120_000_000, 2000, 10_000


@dataclass(frozen=True)
class CalibrationOptions(AskedOptions):
    """The options of the data of a calibration."""

    streaming: bool | None = option(
        None,
        "read as many images as it takes, from all over the data set, and not all of them; by default as the run did, which did so if "
        "it trained on a stream",
    )

    OF_ASKING: ClassVar[tuple[str, ...]] = (*AskedOptions.OF_ASKING, "streaming")

    def of_run(self, folder: str, pipe, others: tuple[str, ...] = ()) -> "CalibrationOptions":
        """The options, with what was left open as the training run or the pipeline has it.

        Args:
            others: Names of options beside those of the data.
        """
        options = take_options_of_run(self, folder, others, of_data=self.OF_ASKING, hold_out_validation=True)
        return dataclasses.replace(options, resolution=options.resolution or image_size_of(pipe))


@dataclass(frozen=True)
class Data:
    """Images to calibrate with.

    Attributes:
        real: A data set.
        held_out_name: The split that `real.held_out` is, or None.
        features: To measure images in, or None.
    """

    real: RealImages
    held_out_name: str | None
    features: FeatureClassifierModel | None = None

    @classmethod
    def load(cls, options: CalibrationOptions, subject: Subject) -> "Data":
        """What the options, completed by `of_run`, name; with the captions and condition images that the pipeline is asked by.

        Raises:
            ValueError: see `load_real_images`.
        """
        pipe, config, caption_column = subject.pipe, options.for_data(), None
        streaming = bool(options.streaming)
        if subject.of_texts and not streaming:
            caption_column = find_caption_column(config, options.caption_column)
        real = load_real_images(
            config,
            options.held_out_split,
            caption_column=caption_column,
            condition_column=options.condition_column,
            label_names=label_names_of(pipe),
            sample=most_images(subject, streaming),
            streaming=streaming,
            label_sets=True,
        )
        return cls(real, options.held_out_split or find_held_out_split(config))


def most_images(subject: Subject, streaming: bool) -> int:
    """Of a split, to be read."""
    channels = (subject.pipe.vae or subject.pipe.denoiser).config.in_channels
    values = channels * math.prod(image_size_of(subject.pipe))
    sampled = min(max(SAMPLED_VALUES // values, FEWEST_SAMPLED), MOST_SAMPLED)
    return sampled if streaming else max(MOST_VALUES // values, sampled)
