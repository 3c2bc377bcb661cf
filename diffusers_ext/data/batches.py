"""Batches as a function of the seed and the position in the run.

Position p is the p-th image that the run looks at, over all processes. Which image that is, whether it is flipped or
loses its label, its noise and its timestep follow from (seed, p) alone: not from the number of processes or workers,
nor from the batch the image is in, nor from what was drawn before. So a run resumes by going on at a position, and
nothing random needs to be saved.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from diffusers_ext.data.image_table import ImageData
from diffusers_ext.draws import PositionRandom


if TYPE_CHECKING:
    from diffusers_ext.data.stream import StreamData


TIMESTEP_SAMPLINGS = ("uniform", "stratified")

# Independent streams of random numbers: of one image, of one optimizer step, of the order of one epoch, of the order of
# one window of a stream; of one image's augmentation; and of one image's text.
_IMAGE, _STEP, EPOCH, WINDOW, _AUGMENTATION, _TEXT = range(6)
# Order of the uniform numbers of an image; room is left so that a new use changes no old one.
_FLIP, _DROP, _TIME, _CROP, _LEVEL, _CONDITION, _NUM_UNIFORM = 0, 1, 2, slice(3, 5), 5, 6, 8

NUM_AUGMENTATION = 14  # numbers that an image's augmentation follows from

# Of the images that lose their condition image, the share that loses its label or text too, so that a network learns to predict
# without both, which guidance leads away from.
BOTH_DROPPED = 0.5


@dataclass(frozen=True)
class BatchOptions:
    """Size, order and augmentation of a run's batches.

    Args:
        seed: Of the order, the noise and all else that is random.
        batch_size: Images of one process in one forward pass.
        num_processes, process_index: Number of processes, and which of them this is.
        accumulation: Forward passes of an optimizer step.
        random_flip: Whether each image is mirrored left to right with probability 1/2.
        label_dropout: Probability that an image gets the null label `num_classes`, or loses all of its labels.
        own_labels: Whether a batch keeps the labels as they were before that too.
        timestep_sampling: "uniform" draws each image's time by itself. "stratified" spreads the times of an optimizer
            step evenly over [0, 1) from one random start (Kingma et al. 2021), which keeps each time uniform and
            makes the loss less noisy.
        latent_shape: Shape of the latents of an image that need noise of their own, or None.
        noise_shape: (height, width, channels), or (length, channels), of the noise that a denoiser is trained on, where it
            is not that of the images.
        condition_dropout: Probability that an image loses its condition image, and with `BOTH_DROPPED` its label too where
            labels are dropped; None without condition images.
        condition_noise: The largest level of the noise in condition images, in [0, 1].
        condition_shape: (channels, height, width) of a condition image, which has noise of its own.
        augmentation: Whether images come with numbers for their augmentation.
        text_dropout: Whether images come with a number for the division of their text into tokens.
    """

    seed: int
    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    accumulation: int = 1
    random_flip: bool = False
    label_dropout: float = 0.0
    own_labels: bool = False
    timestep_sampling: str = "stratified"
    latent_shape: tuple[int, ...] | None = None
    noise_shape: tuple[int, ...] | None = None
    condition_dropout: float | None = None
    condition_noise: float = 0.0
    condition_shape: tuple[int, int, int] | None = None
    augmentation: bool = False
    text_dropout: bool = False

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.num_processes * self.accumulation

    @property
    def of_held_out(self) -> dict[str, Any]:
        """The options that hold for held-out images too, none of which loses its condition image."""
        shapes = ("latent_shape", "noise_shape", "condition_noise", "condition_shape")
        without = {"condition_dropout": None if self.condition_dropout is None else 0.0}
        return {name: getattr(self, name) for name in shapes} | without


class BatchMaker:
    """Makes batches of images that are at hand: adds noise and times, flips, drops labels, says where to crop.

    A batch is a dict: `pixels`, uint8 or uint16, and `noise`, float32, both of shape `(batch, channels, height, width)` in
    channels_last; of sequences both float32, `(batch, channels, length)`, and the pixels already in about [-1, 1]; `time`, float64 in [0, 1), and `labels`, int64, both of shape `(batch,)`. With several labels an image
    `labels` are bool, shape `(batch, num_classes)`, and none of them is the null label. Without labels there is no
    `labels`. With the option `own_labels` there are those before any was dropped. With a `latent_shape` there is `latent_noise`, float32, shape `(batch, *latent_shape)`. Instead of pixels
    there can be what a VAE made of them (see `diffusers_ext.data.latent_cache`).

    With condition images there is `condition_given`, bool, shape `(batch,)`, false where it is dropped; with noise in them
    `condition_level`, float32, shape `(batch,)`, and `condition_noise`, float32, shape `(batch, *condition_shape)`; and
    `condition_pixels`, like `pixels`, where they are a column of the data.

    With augmentation there is `augmentation_uniform`, float32 in [0, 1), shape `(batch, NUM_AUGMENTATION)`; with dropout in
    texts `text_uniform`, float64 in [0, 1), shape `(batch,)`.

    Args:
        shape: (height, width, channels) of an image, and of the noise unless the options say otherwise.
        num_classes: The null label, or None without labels.
        first_position: Of batch 0; it starts an optimizer step.
    """

    def __init__(
        self, options: BatchOptions, shape: tuple[int, int, int], num_classes: int | None, first_position: int = 0
    ):
        self.options, self.shape, self.num_classes, self.first_position = options, shape, num_classes, first_position
        self._random = None

    def positions(self, number: int) -> range:
        """Positions in the run of the images of this process's batch with this number."""
        options = self.options
        batch = number * options.num_processes + options.process_index
        start = self.first_position + batch * options.batch_size
        return range(start, start + options.batch_size)

    def make(
        self,
        positions: range,
        images: Callable[[np.ndarray, np.ndarray], np.ndarray],
        labels: np.ndarray | None,
        conditions: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
    ) -> dict[str, Tensor]:
        """The batch at these positions.

        Args:
            images: Takes the top and left of a crop of each image, in [0, 1), shape `(batch, 2)`, and whether to flip it,
                shape `(batch,)`; gives the pixels, shape `(batch, *shape)`.
            labels: int64, shape `(batch,)`; or bool, shape `(batch, num_classes)`; or None.
            conditions: Gives the pixels of the condition images, as `images` does; None where they are made of these.
        """
        options = self.options
        uniform = np.empty((len(positions), _NUM_UNIFORM))
        noise = np.empty((len(positions), *(options.noise_shape or self.shape)), np.float32)
        latent_noise = np.empty((len(positions), *(options.latent_shape or (0,))), np.float32)
        condition_shape = options.condition_shape if options.condition_noise else None
        condition_noise = np.empty((len(positions), *(condition_shape or (0,))), np.float32)
        normal = (noise, latent_noise, condition_noise)
        for position, uniform_out, *noise_out in zip(positions, uniform, *normal, strict=True):
            generator = self.at(_IMAGE, position)
            generator.random(out=uniform_out)
            for out in noise_out:
                generator.standard_normal(dtype=np.float32, out=out)

        how = uniform[:, _CROP], uniform[:, _FLIP] < (0.5 if options.random_flip else 0.0)
        pixels = images(*how)
        time = self._stratified(positions) if options.timestep_sampling == "stratified" else uniform[:, _TIME]
        items = {
            "pixels": _channels_first(pixels),
            "noise": _channels_first(noise),
            "time": torch.from_numpy(time.copy()),
        }
        if options.augmentation:
            numbers = [self.at(_AUGMENTATION, one).random(NUM_AUGMENTATION, np.float32) for one in positions]
            items["augmentation_uniform"] = torch.from_numpy(np.stack(numbers))
        if options.text_dropout:
            numbers = [self.at(_TEXT, one).random() for one in positions]
            items["text_uniform"] = torch.tensor(numbers, dtype=torch.float64)
        if options.latent_shape:
            items["latent_noise"] = torch.from_numpy(latent_noise)
        if conditions is not None:
            items["condition_pixels"] = _channels_first(conditions(*how))
        dropped = uniform[:, _DROP] < options.label_dropout
        if options.condition_dropout is not None:
            without = uniform[:, _CONDITION] < options.condition_dropout
            items["condition_given"] = torch.from_numpy(~without)
            if options.label_dropout:
                dropped |= without & (uniform[:, _DROP] < BOTH_DROPPED)
        if condition_shape:
            items["condition_level"] = torch.from_numpy(
                (uniform[:, _LEVEL] * options.condition_noise).astype(np.float32)
            )
            items["condition_noise"] = torch.from_numpy(condition_noise)
        if labels is not None:
            if options.own_labels:
                items["own_labels"] = torch.from_numpy(np.array(labels))
            if labels.ndim == 1:
                labels = np.where(dropped, self.num_classes, labels)
            else:
                labels = labels & ~dropped[:, None]
            items["labels"] = torch.from_numpy(labels)
        return items

    def _stratified(self, positions: range) -> np.ndarray:
        size = self.options.images_per_step
        step, index = np.divmod(np.asarray(positions) - self.first_position, size)
        first = self.first_position + int(step[0]) * size  # a batch lies within one optimizer step
        return (self.at(_STEP, first).random() + index / size) % 1.0

    def at(self, stream: int, position: int, part: int = 0) -> np.random.Generator:
        """See `PositionRandom.at`."""
        if self._random is None:
            self._random = PositionRandom(self.options.seed)
        return self._random.at(stream, position, part)

    def __getstate__(self):
        return self.__dict__ | {"_random": None}  # each worker makes its own


class TrainingBatches(Dataset):
    """Item k is the k-th batch of this process, counted from `first_position`, which starts an optimizer step.

    What a batch holds is said in `BatchMaker`.
    """

    def __init__(self, data: ImageData, options: BatchOptions, first_position: int = 0):
        self.data, self._orders = data, {}
        self._maker = BatchMaker(options, data.pixels.shape, data.num_classes, first_position)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        data, positions = self.data, self._maker.positions(number)
        rows = self._rows(positions)

        images, labels = partial(data.read, rows), None if data.labels is None else data.labels[rows]
        conditions = None if data.conditions is None else partial(data.read_conditions, rows)
        batch = self._maker.make(positions, images, labels, conditions)
        return data.with_condition(batch)

    def _rows(self, positions: range) -> np.ndarray:
        """The images at these positions: each epoch is a new permutation of all of them."""
        epochs, offsets = np.divmod(np.asarray(positions), len(self.data))
        rows = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            rows[here] = self._order(int(epoch))[offsets[here]]
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            # Epochs come one after the other, so that one order at a time suffices.
            self._orders = {epoch: self._maker.at(EPOCH, epoch).permutation(len(self.data))}
        return self._orders[epoch]


def _channels_first(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).movedim(-1, 1)


class Batches(Iterator[dict[str, Tensor]]):
    """The batches of one process, without end, and where it stands if it reads a stream.

    Args:
        batches: As the loader gives them.
        state: Of a stream, before the first of them; see `StreamData.batches`.
    """

    def __init__(self, batches: Iterator[dict[str, Any]], state: dict[str, Any] | None = None):
        self._batches, self._state = batches, state
        if state is not None:  # the readers' states come with the batches as JSON
            self._state = state | {"readers": [reader and json.dumps(reader) for reader in state["readers"]]}

    def __next__(self) -> dict[str, Tensor]:
        batch = next(self._batches)
        if self._state is not None:
            if "error" in batch:
                self._batches = iter(())  # ends the workers now and not when the error is forgotten
                raise ValueError(batch["error"])
            self._state["readers"][self._state["next_reader"]] = batch.pop("reader")
            self._state["next_reader"] = (self._state["next_reader"] + 1) % len(self._state["readers"])
        return batch

    @property
    def state(self) -> dict[str, Any] | None:
        """JSON-able, for `make_batches` to resume after the batches taken so far. None without a stream."""
        if self._state is None:
            return None
        readers = [state and json.loads(state) for state in self._state["readers"]]
        return self._state | {"readers": readers}

    @property
    def passes(self) -> int | None:
        """Times that all readers of this process have gone through their share of the stream. None without a stream."""
        state = self.state
        return None if state is None else min(reader["epoch"] if reader else 0 for reader in state["readers"])


def make_batches(
    data: "ImageData | StreamData",
    options: BatchOptions,
    *,
    position: int = 0,
    state: dict[str, Any] | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Batches:
    """The batches of one process of a run, from a position on, which starts an optimizer step.

    Args:
        state: Of a stream, as `Batches.state` was there; None for its beginning.

    Raises:
        ValueError: if the state is of another number of processes, workers or shards.
    """
    if isinstance(data, ImageData):
        batches, state = TrainingBatches(data, options, first_position=position), None
    else:
        batches, state = data.batches(options, position, state, num_readers=max(1, num_workers))
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=None if isinstance(batches, IterableDataset) else itertools.count(),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )
    return Batches(iter(loader), state)
