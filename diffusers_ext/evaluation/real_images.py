"""The real images that generated ones are measured against, prepared as the trainer prepares them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor

from diffusers_ext.data.captions import count_missing, refuse_missing
from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.label_columns import find_label_column
from diffusers_ext.data.prepare import Sample, prepare_images
from diffusers_ext.data.sequences import SequenceData
from diffusers_ext.data.sources import load_source, split_names
from diffusers_ext.evaluation.labelled_images import LabelledImages, drawn_in_turn
from diffusers_ext.pixels import DEFAULT_WHITES, IMAGE_MODES, Whites, to_range
from diffusers_ext.value_scale import ValueScale


HELD_OUT_SPLITS = ("validation", "test", "valid", "val")


def is_test_split(name: str) -> bool:
    """Whether a split is one that nothing may be chosen by."""
    return name.startswith("test")


# PIL's mode of images of 1, 2, 3 and 4 channels.
CHANNEL_MODES = tuple(IMAGE_MODES)


@dataclass(frozen=True)
class Captions:
    """Texts of the images of a split.

    Attributes:
        texts: One for each image.
        labels: Of the same images, int64, shape `(images,)`; None where there are no labels.
        column, split: Source of the texts.
    """

    texts: tuple[str, ...]
    labels: Tensor | None
    column: str
    split: str

    def draw(self, count: int, seed: int) -> tuple[list[str], Tensor | None]:
        """`count` texts and their labels: each text once in an order that the seed draws, then again in this order.

        It is the order in which `Evaluator.measure_held_out` takes the images.
        """
        rows = drawn_in_turn(len(self.texts), count, seed)
        return [self.texts[row] for row in rows.tolist()], None if self.labels is None else self.labels[rows]

    def describe(self) -> dict[str, str | int]:
        """The source of the texts, for JSON."""
        return {"column": self.column, "split": self.split, "number": len(self.texts)}


@dataclass(frozen=True)
class RealImages:
    """A data set's images.

    Attributes:
        train: What the model was trained on. Where the data set has no labels, its `label_names` are empty.
        held_out: Images that it was not trained on, or None.
        name: What the user called the data set.
        resize_mode: How images get to their size, of the modes of `fit`.
        notes: What the user may want to know about the preparation.
        whites: Which values are white.
        white: What is white in the images' own range, which the value of a border is in.
        train_captions, held_out_captions: Texts of the images; None where there are none, or if not asked for.
        train_conditions, held_out_conditions: Condition images of a column, uint8, `(images, channels, height, width)`; None if
            not asked for.
        train_sets, held_out_sets: Which labels each image has, bool, `(images, labels)`, where it can have several; None
            otherwise, or if not asked for. The images are then without labels.
    """

    train: LabelledImages
    held_out: LabelledImages | None
    name: str
    resize_mode: str
    notes: tuple[str, ...]
    train_captions: Captions | None = None
    held_out_captions: Captions | None = None
    whites: Whites = DEFAULT_WHITES
    white: int = 255
    train_conditions: Tensor | None = None
    held_out_conditions: Tensor | None = None
    train_sets: Tensor | None = None
    held_out_sets: Tensor | None = None

    @property
    def value_scale(self) -> ValueScale | None:
        """Of sequences, between own units, in which they are, and [-1, 1]; None for images."""
        return self.train.value_scale

    @property
    def captions(self) -> Captions | None:
        """Of the held-out images, or of the training images where those have none; None if not asked for."""
        return self.held_out_captions or self.train_captions

    @property
    def image_shape(self) -> tuple[int, ...]:
        """`(channels, height, width)`, or `(channels, length)` of sequences."""
        return tuple(self.train.images.shape[1:])

    @property
    def has_labels(self) -> bool:
        return len(self.train.label_names) > 0

    @property
    def can_be_classified(self) -> bool:
        """Whether there are images of at least two labels, which a classifier takes."""
        return self.has_labels and len(self.train.labels.unique()) > 1


def describe_reference(real: RealImages, split: str, num_images: int, num_neighbours: int) -> dict:
    """Which real images a set of `num_images` is measured against: all of them by the Fréchet distance, as many by the others."""
    return {
        "dataset_name": real.name,
        "dataset_split": split,
        "image_shape": list(real.image_shape),
        "num_images": len(real.train),
        "num_compared": min(len(real.train), num_images),
        "num_neighbours": num_neighbours,
    }


class _Split(NamedTuple):
    """A split of the data set: as it was prepared, and as it is measured."""

    name: str
    prepared: ImageData
    images: LabelledImages


def load_real_images(
    config: DataConfig,
    held_out_split: str | None = None,
    *,
    caption_column: str | None = None,
    condition_column: str | None = None,
    label_names: Sequence[str] | None = None,
    sample: Sample | None = None,
    streaming: bool = False,
    label_sets: bool = False,
    only_train: bool = False,
) -> RealImages:
    """Both splits of a data set, in memory.

    Args:
        config: Of the images that a model was trained on.
        held_out_split: Of images that it was not trained on; by default see `find_held_out_split`.
        caption_column: Read the captions of this column too. Free texts are then no labels, and neither are several labels
            an image.
        condition_column: Read the condition images of this column too.
        label_names: Of a model's labels 0, 1, 2, ..., by which the images' labels are numbered if all of them are among
            these.
        sample: Of each split some images, which stand for all of them.
        streaming: Read the sample from a stream, and no more of the data set than it takes.
        label_sets: Read several labels an image too, which are refused otherwise.
        only_train: Read no held-out split, whatever there is.

    Raises:
        ValueError: see `prepare_images`; for captions of a stream; and if the held-out images have labels that the training
            images have not.
    """
    if streaming and caption_column is not None:
        raise ValueError("captions are read from all rows, of which streaming reads some: leave it out")
    if caption_column is not None and not _has_labels_beside(config, caption_column):
        config = dataclasses.replace(config, unconditional=True)
    how = {"share_by": caption_column, "condition_column": condition_column}
    how |= {"sample": sample, "read_ahead": streaming, "label_sets": label_sets}
    train = _load_split(config, **how)
    if label_names is not None and set(train.images.label_names) <= set(label_names):
        train = train._replace(images=_numbered_by(label_names, train.images))
    held_out = None
    if not only_train and (name := held_out_split or find_held_out_split(config)) is not None:
        held_out = _load_like(train, dataclasses.replace(config, dataset_split=name), **how)
    captions, notes = {}, train.prepared.notes
    if caption_column is not None:
        splits = [train] if held_out is None else [held_out, train]
        captions = _find_captions(config, caption_column, splits)
        first = next(iter(captions))
        notes += (f"images are asked for by the captions of the split {first}, column {caption_column}",)
    return RealImages(
        train.images,
        None if held_out is None else held_out.images,
        config.dataset_name,
        train.prepared.resize_mode,
        notes,
        captions.get(train.name),
        None if held_out is None else captions.get(held_out.name),
        train.prepared.whites,
        train.prepared.white,
        *(None if split is None else _conditions_of(split.prepared) for split in (train, held_out)),
        *(None if split is None else _sets_of(split.prepared, label_names) for split in (train, held_out)),
    )


def find_held_out_split(config: DataConfig) -> str | None:
    """The first split of `HELD_OUT_SPLITS` that the model was not trained on, or None."""
    used = [part.split("[")[0] for part in config.dataset_split.split("+")]
    names = split_names(config.dataset_name, config.dataset_config_name)
    return next((name for name in HELD_OUT_SPLITS if name in names and name not in used), None)


def _conditions_of(data: ImageData) -> Tensor | None:
    """The condition images in memory, as `to_labelled_images` has the images."""
    if data.conditions is None:
        return None
    pixels = to_range(data.conditions[np.arange(len(data))], np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _sets_of(data: ImageData, label_names: Sequence[str] | None) -> Tensor | None:
    """Which of a model's labels, or else of their own, images have that can have several; None for others.

    Raises:
        ValueError: for a label that is none of the model's.
    """
    if not data.has_label_sets:
        return None
    own = [data.id2label[label] for label in range(len(data.id2label))]
    names = own if label_names is None else list(label_names)
    if unknown := sorted(set(own) - set(names)):
        raise ValueError(f"{data.name} has labels that the model does not know: {', '.join(unknown[:5])}")
    sets = torch.zeros(len(data), len(names), dtype=torch.bool)
    sets[:, [names.index(name) for name in own]] = torch.from_numpy(data.labels).bool()
    return sets


def _load_split(config: DataConfig, *, label_sets: bool, **how: Any) -> _Split:
    prepared = prepare_images(config, **how)
    without = label_sets and prepared.has_label_sets
    labelled = dataclasses.replace(prepared, labels=None, id2label=None) if without else prepared
    return _Split(config.dataset_split, prepared, to_labelled_images(labelled))


def _load_like(train: _Split, config: DataConfig, **how: Any) -> _Split:
    """All images of another split, prepared as the training images are, whatever its own pictures would suggest."""
    like = train.prepared
    config = dataclasses.replace(
        config,
        max_train_samples=None,
        resolution=like.size,
        resize_mode=like.resize_mode,
        white_value=config.white_value or like.whites.integers,
    )
    held_out = _load_split(config, **how)
    if isinstance(like, SequenceData) and isinstance(held_out.prepared, SequenceData):
        scaled = dataclasses.replace(held_out.prepared, value_scale=like.value_scale)
        held_out = held_out._replace(prepared=scaled, images=to_labelled_images(scaled))
    elif held_out.prepared.channels != like.channels <= len(CHANNEL_MODES):
        held_out = _load_split(dataclasses.replace(config, image_mode=CHANNEL_MODES[like.channels - 1]), **how)
    return held_out._replace(images=_with_labels_of(train.images, held_out.images, held_out.name))


def to_labelled_images(data: ImageData) -> LabelledImages:
    """All images in memory, in 8 bits, channels first; sequences in own units. Without labels, `label_names` are empty."""
    pixels, scale = data.pixels[np.arange(len(data))], getattr(data, "value_scale", None)
    pixels = to_range(pixels, np.uint8) if scale is None else pixels
    images = torch.from_numpy(pixels).movedim(-1, 1).contiguous()
    if data.labels is None:
        return LabelledImages(images, torch.full([len(images)], -1), [], scale)
    names = [data.id2label[label] for label in range(len(data.id2label))]
    if data.has_label_sets:
        raise ValueError(
            f"{data.name} has several labels an image, and what is measured by label takes one: name a column of single "
            "labels with --label_column"
        )
    return LabelledImages(images, torch.from_numpy(data.labels), names, scale)


def _with_labels_of(train: LabelledImages, held_out: LabelledImages, split: str) -> LabelledImages:
    """The held-out images with the ids that the training images' labels have: one split may lack some of the names."""
    unknown = set(held_out.label_names) - set(train.label_names)
    if unknown or bool(train.label_names) != bool(held_out.label_names):
        raise ValueError(
            f"the split {split} must have the labels of the training images, {_names(train)}, got {_names(held_out)}:"
            " give another one by --held_out_split"
        )
    return _numbered_by(train.label_names, held_out)


def _numbered_by(label_names: Sequence[str], images: LabelledImages) -> LabelledImages:
    """The images with the ids that these names have."""
    if not images.label_names:
        return images
    ids = {name: label for label, name in enumerate(label_names)}
    numbers = torch.tensor([ids[name] for name in images.label_names])
    return LabelledImages(images.images, numbers[images.labels], list(label_names), images.value_scale)


def _has_labels_beside(config: DataConfig, caption_column: str) -> bool:
    """Whether the images have labels too, of which the captions are none."""
    if any(given is not None for given in (config.label_column, config.num_classes, config.label_names)):
        return True
    source = _open(config, config.dataset_split)
    try:
        column = find_label_column(source)
    except ValueError:  # there are several, of which none is named
        return False
    if column is None:
        return False
    feature = source.features[column]
    return isinstance(feature, datasets.ClassLabel) or isinstance(feature, datasets.Value) and column != caption_column


def _find_captions(config: DataConfig, column: str, splits: Sequence[_Split]) -> dict[str, Captions]:
    """The captions of those of these splits that have some, in their order.

    Raises:
        ValueError: if none has, or the first that has some has them for a part of its images.
    """
    found: dict[str, Captions] = {}
    for split in splits:
        source = _open(config, split.name)
        if column not in source.features or count_missing(source, column) == len(source):
            continue
        rows = source.select(split.prepared.rows)
        if found and count_missing(rows, column):  # the first are those that images are asked for by
            continue
        refuse_missing(rows, column, split.name)
        feature, values = rows.features[column], rows[column][:]
        if isinstance(feature, datasets.ClassLabel):
            values = [feature.names[value] for value in values]
        labels = split.images.labels if split.images.label_names else None
        found[split.name] = Captions(tuple(map(str, values)), labels, column, split.name)
    if not found:
        raise ValueError(
            f"the split {config.dataset_split} of {config.dataset_name} has no text in the column {column}"
        )
    return found


def _open(config: DataConfig, split: str) -> datasets.Dataset:
    return load_source(config.dataset_name, config.dataset_config_name, split, cache_dir=config.cache_dir)


def _names(data: LabelledImages) -> str:
    return ", ".join(data.label_names[:10]) or "none"
