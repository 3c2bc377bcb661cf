"""Images that training does not see, with the noise and the time at which the loss on them is taken each time."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diffusers_ext.trainer.batches import EPOCH, BatchMaker, BatchOptions
from diffusers_ext.trainer.data import ImageData


# Of its own and the same in every run, so that the curves of two runs can be compared.
SEED = 7_640_891_576_956_012_809


class ValidationBatches:
    """Batches of held-out images, like those of `TrainingBatches`: each image once, in order, nothing of it random.

    The times are evenly spread over [0, 1), in an order that has nothing to do with that of the images.

    Args:
        batch_size: Images at a time. The batches are the same for any number of processes, which share them out.
        latent_shape: As for `BatchOptions`.
    """

    def __init__(self, data: ImageData, batch_size: int, latent_shape: tuple[int, ...] | None = None):
        self.data, self.batch_size = data, batch_size
        options = BatchOptions(
            seed=SEED, batch_size=batch_size, timestep_sampling="uniform", latent_shape=latent_shape
        )
        self._maker = BatchMaker(options, data.pixels.shape, data.num_classes)

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def share(self, process_index: int = 0, num_processes: int = 1) -> Iterator[dict[str, Tensor]]:
        """Every so-manieth batch; the last of all may be smaller than the others."""
        order = self._maker.at(EPOCH, 0).permutation(len(self.data))
        for number in range(process_index, len(self), num_processes):
            positions = range(number * self.batch_size, min((number + 1) * self.batch_size, len(self.data)))
            yield self._batch(positions) | {"time": torch.from_numpy((order[positions] + 0.5) / len(self.data))}

    def _batch(self, positions: range) -> dict[str, Tensor]:
        data, rows = self.data, np.asarray(positions)

        def images(places):
            centres = np.full_like(places, 0.5)
            return data.pixels.crop(rows, centres) if data.resize_mode == "random_crop" else data.pixels[rows]

        return self._maker.make(positions, images, None if data.labels is None else data.labels[rows])
