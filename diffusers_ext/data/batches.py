"""Batches as a function of the seed and the position in the run.

Position p is the p-th image that the run looks at, over all processes. Which image that is, whether it is flipped or
loses its label, its noise and its timestep follow from (seed, p) alone: not from the number of processes or workers,
nor from the batch the image is in, nor from what was drawn before. So a run resumes by going on at a position, and
nothing random needs to be saved.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from diffusers_ext.data.image_table import ImageData


TIMESTEP_SAMPLINGS = ("uniform", "stratified")

# Independent streams of random numbers: of one image, of one optimizer step, of the order of one epoch, of the order of
# one window of a stream.
_IMAGE, _STEP, EPOCH, WINDOW = range(4)
# Order of the uniform numbers of an image; room is left so that a new use changes no old one.
_FLIP, _DROP, _TIME, _CROP, _NUM_UNIFORM = 0, 1, 2, slice(3, 5), 8


class PositionRandom:
    """Random numbers that depend on (seed, stream, position) only, by the counter of Philox (Salmon et al. 2011)."""

    def __init__(self, seed: int):
        self._philox = np.random.Philox(key=seed)
        self._state = self._philox.state
        self._generator = np.random.Generator(self._philox)

    def at(self, stream: int, position: int, part: int = 0) -> np.random.Generator:
        """The generator at the start of a position's numbers. It is one object: use it up before the next call.

        Args:
            position, part: Two numbers, where one does not say which it is.
        """
        # The lowest word counts the blocks of numbers drawn; the state is set since a new generator takes 6 times as long.
        self._state["state"]["counter"][:] = 0, position, part, stream
        self._philox.state = self._state
        return self._generator


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that depends on every bit of the parts; of a longer one torch's CPU generator drops the rest."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds the default generators: Python's, NumPy's, and torch's for the CPU and for one device.

    As accelerate's `set_seed`; but where there is no GPU, `torch.manual_seed` notes the seed and the stack for each kind
    of them that may appear later, which takes nearly all of its time.

    Args:
        seed: Of 32 bits.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


@dataclass(frozen=True)
class BatchOptions:
    """What a run's batches are made of.

    Args:
        seed: Of the order, the noise and all else that is random.
        batch_size: Images of one process in one forward pass.
        num_processes, process_index: Of how many processes this is which.
        accumulation: Forward passes of an optimizer step.
        random_flip: Whether each image is mirrored left to right with probability 1/2.
        label_dropout: Probability that an image gets the null label `num_classes`, or loses all of its labels.
        timestep_sampling: "uniform" draws each image's time by itself. "stratified" spreads the times of an optimizer
            step evenly over [0, 1) from one random start (Kingma et al. 2021), which keeps each time uniform and
            makes the loss less noisy.
        latent_shape: Shape of the latents of an image that need noise of their own, or None.
        noise_shape: (height, width, channels) of the noise that a denoiser is trained on, where it is not that of the
            images.
    """

    seed: int
    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    accumulation: int = 1
    random_flip: bool = False
    label_dropout: float = 0.0
    timestep_sampling: str = "stratified"
    latent_shape: tuple[int, ...] | None = None
    noise_shape: tuple[int, int, int] | None = None

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.num_processes * self.accumulation


class BatchMaker:
    """Makes batches of images that are at hand: adds noise and times, flips, drops labels, says where to crop.

    A batch is a dict: `pixels`, uint8 or uint16, and `noise`, float32, both of shape `(batch, channels, height, width)` in
    channels_last; `time`, float64 in [0, 1), and `labels`, int64, both of shape `(batch,)`. With several labels an image
    `labels` are bool, shape `(batch, num_classes)`, and none of them is the null label. Without labels there is no
    `labels`. With a `latent_shape` there is `latent_noise`, float32, shape `(batch, *latent_shape)`. In place of pixels
    there can be what a VAE made of them (see `diffusers_ext.data.latent_cache`).

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
        """Of the images of this process's batch with this number."""
        options = self.options
        batch = number * options.num_processes + options.process_index
        start = self.first_position + batch * options.batch_size
        return range(start, start + options.batch_size)

    def make(
        self,
        positions: range,
        images: Callable[[np.ndarray, np.ndarray], np.ndarray],
        labels: np.ndarray | None,
    ) -> dict[str, Tensor]:
        """The batch at these positions.

        Args:
            images: Takes a place to crop at for each image, shape `(batch, 2)` in [0, 1), and whether to flip it, shape
                `(batch,)`; gives the pixels, shape `(batch, *shape)`.
            labels: int64, shape `(batch,)`; or bool, shape `(batch, num_classes)`; or None.
        """
        options = self.options
        uniform = np.empty((len(positions), _NUM_UNIFORM))
        noise = np.empty((len(positions), *(options.noise_shape or self.shape)), np.float32)
        latent_noise = np.empty((len(positions), *(options.latent_shape or (0,))), np.float32)
        for position, uniform_out, *noise_out in zip(positions, uniform, noise, latent_noise, strict=True):
            generator = self.at(_IMAGE, position)
            generator.random(out=uniform_out)
            for out in noise_out:
                generator.standard_normal(dtype=np.float32, out=out)

        pixels = images(uniform[:, _CROP], uniform[:, _FLIP] < (0.5 if options.random_flip else 0.0))
        time = self._stratified(positions) if options.timestep_sampling == "stratified" else uniform[:, _TIME]
        items = {
            "pixels": _channels_first(pixels),
            "noise": _channels_first(noise),
            "time": torch.from_numpy(time.copy()),
        }
        if options.latent_shape:
            items["latent_noise"] = torch.from_numpy(latent_noise)
        if labels is not None:
            dropped = uniform[:, _DROP] < options.label_dropout
            if labels.ndim == 1:
                labels = np.where(dropped, self.num_classes, labels)
            else:
                labels = labels & ~dropped[:, None]
            items["labels"] = torch.from_numpy(labels)
        return items

    def _stratified(self, positions: range) -> np.ndarray:
        size = self.options.images_per_step
        step, place = np.divmod(np.asarray(positions) - self.first_position, size)
        first = self.first_position + int(step[0]) * size  # a batch lies within one optimizer step
        return (self.at(_STEP, first).random() + place / size) % 1.0

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

        images = partial(data.read, rows)
        batch = self._maker.make(positions, images, None if data.labels is None else data.labels[rows])
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
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def batch_stream(
    batches: TrainingBatches | IterableDataset, *, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Batches 0, 1, 2, ... without end, made ahead by the workers."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=None if isinstance(batches, IterableDataset) else itertools.count(),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )
    return iter(loader)
