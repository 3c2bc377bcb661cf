"""The options that say which images are read, and how."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusers_ext.data.images import LONGEST, RESIZE_MODES
from diffusers_ext.options import check_options, fixed_option, option
from diffusers_ext.pixels import IMAGE_MODES
from diffusers_ext.value_scale import KINDS as SCALE_KINDS


# Axes of the arrays of sequences of several channels.
SEQUENCE_LAYOUTS = ("length_channels", "channels_length")


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they are read.

    Raises:
        ValueError: if options contradict one another or are out of range.
    """

    dataset_name: str = option(
        "digits",
        "digits, a data set on the Hub, or a local folder or file: images (perhaps zipped), parquet, WebDataset tars, NumPy "
        "arrays, audio, or what save_to_disk wrote",
        "data",
        alias="train_data_dir",
    )
    dataset_config_name: str | None = fixed_option(None, "configuration of a data set that has several")
    dataset_split: str = fixed_option("train", "split to train on, such as train or train[:90%]")
    image_column: str | None = fixed_option(None, "column of the images; by default the only one that holds images")
    sequence_column: str | None = fixed_option(
        None,
        "column of sequences: lists or arrays of numbers, or audio; by default the only one, in a data set without images",
    )
    sequence_layout: Literal[SEQUENCE_LAYOUTS] | None = fixed_option(
        None,
        "axes of sequences of several channels; by default the length is the axis that differs, or the longer one",
    )
    sequence_scale: Literal[SCALE_KINDS] | None = fixed_option(
        None,
        "how the values of each channel become those in [-1, 1] that are trained on: the smallest -1 and the largest 1, the "
        "default; or the mean 0 and what is farthest from it -1 or 1",
    )
    label_column: str | None = fixed_option(
        None,
        "column of the labels; by default the class labels, or else one called label or cls; a column of lists, of labels or of "
        "a 0 or 1 for each label, means several labels an image",
    )
    num_classes: int | None = fixed_option(
        None,
        "how many labels there are, if they are the integers 0, 1, 2, ...; by default those that occur",
        at_least=1,
    )
    label_names: tuple[str, ...] | None = fixed_option(
        None, "names of the labels 0, 1, 2, ..., or the integers that they are; by default the data set's own"
    )
    unconditional: bool = fixed_option(False, "leave the labels out")
    resolution: tuple[int, ...] | None = fixed_option(
        None, "side of the images in pixels, or height and width, or length of sequences; by default their own"
    )
    resize_mode: Literal[("auto", *RESIZE_MODES)] = fixed_option(
        "auto",
        "how images get there: crop and random_crop scale them to cover, and cut in the middle or at random; pad centres "
        "them on a border and never enlarges; stretch scales each side for itself. auto: pad if they are of one size and "
        f"fill at least 3/4 of each side, else crop. Of what is longer random_crop keeps the middle, {LONGEST} times the side. "
        "Sequences are not scaled: pad puts values behind, crop and random_crop cut what is longer too; auto: random_crop if "
        "any is",
    )
    pad_value: int = fixed_option(0, "value of the border and behind transparent pixels, in the images' own range")
    image_mode: Literal[tuple(IMAGE_MODES)] | None = fixed_option(
        None,
        "channels to read, in 8 bits; by default those of the first images: colour if any has it, alpha or more bits if most "
        "have them",
    )
    white_value: int | None = fixed_option(
        None,
        "value that is white in pixels of more than 8 bits; by default 65535 for 16 bits, 1 for floats, and for other integers "
        "the largest of 1, 8, 10, 12, 14 or 16 bits, by the first images",
    )
    random_flip: bool = fixed_option(
        False, "mirror every other image left to right, or turn every other sequence round in time, at random"
    )
    max_train_samples: int | None = fixed_option(
        None,
        "number of images to use, of each label its share, always the same ones; of a stream the first",
        at_least=1,
    )
    max_bad_share: float = option(
        0.01, "share of the images, rounded up to an integer number, that may fail to decode and be left out"
    )
    preprocessing_num_workers: int = option(1, "processes that decode the images, once", at_least=1)
    cache_dir: str | None = option(None, "where `datasets` keeps what it reads and decodes")

    def __post_init__(self):
        check_options(self)
        if self.resolution is not None and (len(self.resolution) > 2 or min(self.resolution) < 1):
            raise ValueError(
                f"resolution must be one side or height and width, got {' '.join(map(str, self.resolution))}"
            )
        if self.white_value is not None and not 1 <= self.white_value <= 65535:
            raise ValueError(f"white_value must be in [1, 65535], got {self.white_value}")
        if not 0 <= self.max_bad_share < 1:
            raise ValueError(f"max_bad_share must be in [0, 1), got {self.max_bad_share:g}")
        names = self.label_names
        if names is not None and (not names or len(set(names)) < len(names)):
            raise ValueError(f"label_names must be different names, got {' '.join(names)}")
        if self.num_classes and names and len(names) != self.num_classes:
            raise ValueError(f"num_classes must be the number of label_names, got {self.num_classes} and {len(names)}")
        if self.unconditional and (self.num_classes or names):
            raise ValueError(
                "num_classes and label_names have no meaning with unconditional, which leaves the labels out"
            )

    @property
    def names_of_labels(self) -> tuple[str, ...] | None:
        """Of 0, 1, 2, ..., if `label_names` or `num_classes` says so."""
        return self.label_names or (tuple(map(str, range(self.num_classes))) if self.num_classes else None)


@dataclass(frozen=True)
class TrainingDataConfig(DataConfig):
    """Which images are trained on, how they are read, and which are held out.

    Raises:
        ValueError: if options contradict one another or are out of range.
    """

    # Column of condition images, which denoisers alone have: there it is an option.
    condition_column: ClassVar[str | None] = None

    streaming: bool = fixed_option(
        False,
        "read the images while training, for data sets too large to decode beforehand; labels must have known names",
    )
    shuffle_buffer: int | None = fixed_option(
        None,
        "images that each reader of a stream holds, undecoded, to shuffle them; by default 1000",
        at_least=1,
        needs="streaming",
    )
    validation_split: str | None = option(None, "split of held-out images to take the loss on")
    max_validation_samples: int | None = option(
        None,
        "number of held-out images to use, of each label its share; of a stream the first",
        at_least=1,
        needs="validation_split",
    )

    def __post_init__(self):
        super().__post_init__()
        if self.streaming and self.preprocessing_num_workers != 1:
            raise ValueError(
                "streaming decodes nothing beforehand: give dataloader_num_workers, not preprocessing_num_workers"
            )
        if self.streaming and self.validation_split and not self.max_validation_samples:
            raise ValueError(
                "validation_split with streaming needs max_validation_samples: so many images are read ahead"
            )
