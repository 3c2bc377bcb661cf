"""The real images of a calibration: all that there are, or as many as suffice of a data set that is too large for that."""

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffusers_ext.calibration.subject import Subject
from diffusers_ext.data.captions import find_caption_column
from diffusers_ext.data.prepare import Sample
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.options import AskedOptions, take_options_of_run
from diffusers_ext.evaluation.pipeline_facts import image_size_of, label_names_of
from diffusers_ext.evaluation.real_images import RealImages, find_held_out_split, load_real_images
from diffusers_ext.evaluation.reference_cache import reference_features
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.options import option


# Values of all images of a split that are read into memory, 2 GB; where there are more, or of a stream, a sample is: so many
# values, of a number of images within these bounds, as far as memory allows.
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
    unconditional: bool | None = option(None, "leave the labels out; by default as the run did")

    OF_ASKING: ClassVar[tuple[str, ...]] = (*AskedOptions.OF_ASKING, "streaming", "unconditional")

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
        features: To measure images in, in the first of several processes; or None.
        keeps_features: Whether the network is one that is kept, so that what it measures of real images is worth keeping too.
        left_out: What was not looked at, and why, in sentences.
    """

    real: RealImages
    held_out_name: str | None
    features: FeatureClassifierModel | None = None
    keeps_features: bool = True
    left_out: tuple[str, ...] = ()

    @property
    def knows_labels(self) -> bool:
        """Whether the network was trained on labels, which features without see next to nothing of."""
        return getattr(self.features, "classifier", None) is not None

    def features_of(self, images: LabelledImages) -> Tensor | None:
        """Of real images; None where there is no network."""
        if self.features is None:
            return None
        return (
            reference_features(self.features, images)
            if self.keeps_features
            else self.features.measure(images.images)[0]
        )

    @classmethod
    def load(cls, options: CalibrationOptions, subject: Subject) -> "Data":
        """What the options, completed by `of_run`, name; with the captions and condition images that the pipeline is asked by.

        Raises:
            ValueError: see `load_real_images`.
        """
        pipe, config, streaming = subject.pipe, options.for_data(), bool(options.streaming)
        how = {"condition_column": options.condition_column, "label_names": label_names_of(pipe), "label_sets": True}
        how |= {"sample": sample_for(subject), "streaming": streaming}
        if subject.of_texts and streaming:
            raise ValueError("captions are read from all rows, of which streaming reads some: leave streaming out")
        if subject.of_texts:
            how["caption_column"] = find_caption_column(config, options.caption_column)
        name, left_out = options.held_out_split or find_held_out_split(config), ()
        try:
            real = load_real_images(config, name, **how)
        except ValueError as error:
            if name is None or options.held_out_split is not None:
                raise
            real = load_real_images(config, None, **how, only_train=True)
            left_out, name = (f"The split {name} was not looked at: {error}.",), None
        classes, known = subject.num_classes, len(real.train.label_names)
        if classes is not None and pipe.null_label is None and known != classes and real.train_sets is None:
            raise ValueError(
                f"the images must have the {classes} labels of the pipeline, which has not learned to do without (its label_dropout "
                f"was 0), got {known} of {real.name}: see --label_column and --label_names"
            )
        return cls(real, name, left_out=left_out)


def sample_for(subject: Subject) -> Sample:
    """How many images of a split are read."""
    values = subject.image_channels * math.prod(image_size_of(subject.pipe))
    number = min(max(SAMPLED_VALUES // values, FEWEST_SAMPLED), MOST_SAMPLED, max(MOST_VALUES // values, 1))
    return Sample(number, MOST_VALUES // values)
