"""Batches as a function of the seed and the position in the run.

Position p is the p-th image that the run looks at, over all processes. Which image that is, whether it is flipped or
loses its label, its noise and its timestep follow from (seed, p) alone: not from the number of processes or workers,
nor from the batch the image is in, nor from what was drawn before. So a run resumes by going on at a position, and
nothing random needs to be saved.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffusers_ext.trainer.data import ImageData


TIMESTEP_SAMPLINGS = ("uniform", "stratified")

# Independent streams of random numbers: of one image, of one optimizer step, of the order of one epoch.
_IMAGE, _STEP, _EPOCH = range(3)
# Order of the uniform numbers of an image; room is left so that a new use changes no old one.
_FLIP, _DROP, _TIME, _NUM_UNIFORM = 0, 1, 2, 8


class PositionRandom:
    """Random numbers that depend on (seed, stream, position) only, by the counter of Philox (Salmon et al. 2011)."""

    def __init__(self, seed: int):
        self._philox = np.random.Philox(key=seed)
        self._state = self._philox.state
        self._generator = np.random.Generator(self._philox)

    def at(self, stream: int, position: int) -> np.random.Generator:
        """The generator at the start of a position's numbers. It is one object: use it up before the next call."""
        # The lowest word counts the blocks of numbers drawn; the state is set since a new generator takes 6 times as long.
        self._state["state"]["counter"][:] = 0, position, 0, stream
        self._philox.state = self._state
        return self._generator


def derived_seed(*parts: int) -> int:
    """A 32-bit seed that depends on every bit of the parts; of a longer one torch's CPU generator drops the rest."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


@dataclass(frozen=True)
class BatchOptions:
    """What a run's batches are made of.

    Args:
        seed: Of the order, the noise and all else that is random.
        batch_size: Images of one process in one forward pass.
        num_processes, process_index: Of how many processes this is which.
        accumulation: Forward passes of an optimizer step.
        random_flip: Whether each image is mirrored left to right with probability 1/2.
        label_dropout: Probability that an image gets the null label `num_classes`.
        timestep_sampling: "uniform" draws each image's time by itself. "stratified" spreads the times of an optimizer
            step evenly over [0, 1) from one random start (Kingma et al. 2021), which keeps each time uniform and
            makes the loss less noisy.
    """

    seed: int
    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    accumulation: int = 1
    random_flip: bool = False
    label_dropout: float = 0.0
    timestep_sampling: str = "stratified"

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.num_processes * self.accumulation


class TrainingBatches(Dataset):
    """Item k is the k-th batch of this process, counted from `first_position`, which starts an optimizer step.

    A batch is a dict: `pixels`, uint8 or uint16, and `noise`, float32, both of shape `(batch, channels, height, width)` in
    channels_last; `time`, float64 in [0, 1), and `labels`, int64, both of shape `(batch,)`. Without labels there is no
    `labels`.
    """

    def __init__(self, data: ImageData, options: BatchOptions, first_position: int = 0):
        self.data, self.options, self.first_position = data, options, first_position
        self._random, self._orders = None, {}

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        options = self.options
        batch = number * options.num_processes + options.process_index
        start = self.first_position + batch * options.batch_size
        positions = range(start, start + options.batch_size)
        rows = self._rows(positions)

        pixels = self.data.pixels[rows]
        uniform = np.empty((len(rows), _NUM_UNIFORM))
        noise = np.empty(pixels.shape, np.float32)
        for position, uniform_out, noise_out in zip(positions, uniform, noise, strict=True):
            generator = self._at(_IMAGE, position)
            generator.random(out=uniform_out)
            generator.standard_normal(dtype=np.float32, out=noise_out)

        if options.random_flip:
            flipped = uniform[:, _FLIP] < 0.5
            pixels[flipped] = pixels[flipped, :, ::-1]
        time = self._stratified(positions) if options.timestep_sampling == "stratified" else uniform[:, _TIME]
        items = {
            "pixels": _channels_first(pixels),
            "noise": _channels_first(noise),
            "time": torch.from_numpy(time.copy()),
        }
        if self.data.labels is not None:
            dropped = uniform[:, _DROP] < options.label_dropout
            items["labels"] = torch.from_numpy(np.where(dropped, self.data.num_classes, self.data.labels[rows]))
        return items

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
            self._orders = {epoch: self._at(_EPOCH, epoch).permutation(len(self.data))}
        return self._orders[epoch]

    def _stratified(self, positions: range) -> np.ndarray:
        size = self.options.images_per_step
        step, place = np.divmod(np.asarray(positions) - self.first_position, size)
        first = self.first_position + int(step[0]) * size  # a batch lies within one optimizer step
        return (self._at(_STEP, first).random() + place / size) % 1.0

    def _at(self, stream: int, position: int) -> np.random.Generator:
        if self._random is None:
            self._random = PositionRandom(self.options.seed)
        return self._random.at(stream, position)

    def __getstate__(self):
        return self.__dict__ | {"_random": None}  # each worker makes its own


def _channels_first(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def batch_stream(
    batches: TrainingBatches, *, num_workers: int = 0, pin_memory: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Batches 0, 1, 2, ... without end, made ahead by the workers."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=itertools.count(),
        num_workers=num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )
    return iter(loader)
