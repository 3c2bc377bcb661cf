"""Images that training does not see, with the noise and the time at which the loss on them is taken each time."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusers_ext.data.batches import EPOCH, BatchMaker, BatchOptions
from diffusers_ext.data.config import TrainingDataConfig
from diffusers_ext.data.identity import DIGEST_BYTES
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.prepare import prepare_data
from diffusers_ext.data.sequences import SequenceData
from diffusers_ext.data.stream import StreamData


# Of its own and the same in every run, so that the curves of two runs can be compared.
SEED = 7_640_891_576_956_012_809


def prepare_validation(
    config: TrainingDataConfig, data: ImageData | StreamData, prepare: Callable[..., ImageData] = prepare_data
) -> ImageData | None:
    """The held-out images that the options ask for, brought to the shape and the labels of the training's; or None.

    Args:
        config: As `data` were made by: what it leaves open is as in `data`.
        prepare: As `data` were made: `prepare_data`, or what takes the same arguments.

    Raises:
        ValueError: if they are other images: of another size or number of channels, or with labels that `data` does not have;
            or if all of them are trained on.
    """
    if config.validation_split is None:
        return None
    held_out = prepare(
        dataclasses.replace(
            config,
            dataset_split=config.validation_split,
            max_train_samples=config.max_validation_samples,
            validation_split=None,
            validation_steps=None,
            max_validation_samples=None,
            resolution=data.resolution,
            random_flip=False,  # nothing of them is random, so that latents need no mirrored ones
            resize_mode="crop" if data.resize_mode == "random_crop" else data.resize_mode,
            white_value=config.white_value or data.whites.integers,
        ),
        read_ahead=True,
    )
    if isinstance(held_out, SequenceData):
        held_out = dataclasses.replace(held_out, value_scale=data.value_scale)
    what = f"the images of the split {config.validation_split!r}"
    mine, theirs = (held_out.channels, held_out.dtype), (data.channels, data.dtype)
    if mine != theirs:
        raise ValueError(
            f"{what} must be of {theirs[0]} channels in {theirs[1]}, as those trained on, got {mine[0]} in {mine[1]}; "
            "--image_mode makes them the same"
        )
    if held_out.size != data.size:
        sides = ["x".join(map(str, each.size)) for each in (data, held_out)]
        raise ValueError(f"{what} must have the size of those trained on, {sides[0]}, got {sides[1]}")
    if held_out.conditions is not None and held_out.conditions.shape != data.conditions.shape:
        sizes = [" x ".join(map(str, each.conditions.shape)) for each in (data, held_out)]
        raise ValueError(
            f"{what} must have condition images of (height, width, channels) {sizes[0]}, as those trained on, got {sizes[1]}"
        )
    if (held_out.id2label is None) != (data.id2label is None):
        with_labels, without = ("training", "validation") if held_out.id2label is None else ("validation", "training")
        raise ValueError(
            f"the {with_labels} images have labels and the {without} images have none; see --unconditional"
        )
    if held_out.has_label_sets != data.has_label_sets:
        with_sets = "validation" if held_out.has_label_sets else "training"
        raise ValueError(f"the {with_sets} images alone have several labels each; see --label_column")
    held_out = _told_from(data, held_out, config)
    if held_out.id2label in (None, data.id2label) or data.texts is not None:  # captions need not be known ones
        return held_out
    # Where labels are names, each split numbers those that it has.
    label2id = {name: label for label, name in data.id2label.items()}
    if unknown := sorted(set(held_out.id2label.values()) - label2id.keys()):
        raise ValueError(f"{what} have labels that are not trained on: {', '.join(unknown[:5])}")
    numbers = [label2id[held_out.id2label[label]] for label in sorted(held_out.id2label)]
    return renumbered(held_out, data.id2label, numbers)


def _told_from(data: ImageData | StreamData, held_out: ImageData, config: TrainingDataConfig) -> ImageData:
    """The held-out images with a note on those that are trained on too.

    Raises:
        ValueError: if all are, and are of the same split. In another one there may be reasons for the same images.
    """
    known = _also_in(data, held_out, same_split=config.validation_split == config.dataset_split)
    if known == len(held_out) and _names_in(config.validation_split) <= _names_in(config.dataset_split):
        raise ValueError(
            f"the images of the split {config.validation_split!r} must be others than those trained on, and all {known} are "
            f"among them: give another --validation_split, or train on the rest of {config.dataset_split!r} "
            "(--dataset_split 'train[:90%]' beside 'train[90%:]')"
        )
    if not known:
        return held_out
    note = f"{known} of {len(held_out)} are trained on too, by which the loss on them is too low"
    return dataclasses.replace(held_out, notes=(*held_out.notes, note))


def _names_in(split: str) -> set[str]:
    """Of splits that an expression speaks of, such as `train[:90%]+extra`."""
    return {part.split("[")[0].strip() for part in split.split("+")}


def _also_in(data: ImageData | StreamData, held_out: ImageData, same_split: bool) -> int:
    """How many held-out images are among `data`, as far as that is known: by their contents, or by their rows in a split."""
    if isinstance(data, StreamData):  # of which no part can be asked for
        return len(held_out) if same_split else 0
    ours, theirs = held_out.digests(), data.digests()
    if isinstance(ours, str):  # of latents, whose images are not there any more
        return int(np.isin(held_out.rows, data.rows).sum()) if same_split else 0
    ours, theirs = (np.ascontiguousarray(each).view(f"V{DIGEST_BYTES}").ravel().tolist() for each in (ours, theirs))
    return sum(map(set(theirs).__contains__, ours))


def describe_held_out(held_out: ImageData | None, split: str | None) -> list[str]:
    """Lines on the held-out images of a run; none without."""
    if held_out is None:
        return []
    noun = "sequences" if isinstance(held_out, SequenceData) else "images"
    first = f"the loss is taken on {len(held_out)} {noun} of the split {split} too"
    return [first, *(f"of these {noun}: {note}" for note in held_out.notes)]


def renumbered(data: ImageData, id2label: dict[int, str], numbers: Sequence[int]) -> ImageData:
    """The images with other ids of their labels.

    Args:
        id2label: Names of all labels by the new ids.
        numbers: The new id of each label.
    """
    numbers = np.array(numbers)
    if data.labels.ndim == 1:
        labels = numbers[data.labels]
    else:
        labels = np.zeros((len(data), len(id2label)), bool)
        labels[:, numbers] = data.labels
    return dataclasses.replace(data, labels=labels, id2label=id2label)


class ValidationBatches:
    """Batches of held-out images, like those of `TrainingBatches`: each image once, in order, nothing of it random.

    The times are evenly spread over [0, 1), in an order that has nothing to do with that of the images.

    Args:
        batch_size: Images at a time. The batches are the same for any number of processes, which share them out.
        shapes: `latent_shape`, `noise_shape` and what is said of condition images, as for `BatchOptions`.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        **shapes: Any,
    ):
        self.data, self.batch_size = data, batch_size
        options = BatchOptions(seed=SEED, batch_size=batch_size, timestep_sampling="uniform", **shapes)
        self._maker = BatchMaker(options, data.pixels.shape, data.num_classes)

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def share(self, process_index: int = 0, num_processes: int = 1) -> Iterator[dict[str, Tensor]]:
        """One batch in `num_processes`; the last of all may be smaller than the others."""
        order = self._maker.at(EPOCH, 0).permutation(len(self.data))
        for number in range(process_index, len(self), num_processes):
            positions = range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.data)))
            yield self._batch(positions) | {"time": torch.from_numpy((order[positions] + 0.5) / len(self.data))}

    def _batch(self, positions: range) -> dict[str, Tensor]:
        data, rows = self.data, np.asarray(positions)

        def images(crops, flipped):
            return data.read(rows, np.full_like(crops, 0.5), flipped)

        def conditions(crops, flipped):
            return data.read_conditions(rows, np.full_like(crops, 0.5), flipped)

        labels = None if data.labels is None else data.labels[rows]
        batch = self._maker.make(positions, images, labels, None if data.conditions is None else conditions)
        return data.with_condition(batch)
