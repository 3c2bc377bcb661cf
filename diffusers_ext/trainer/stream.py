"""Images that are read while the run goes on, from data sets that are not worth a copy or do not fit on the disk."""

from collections.abc import Iterator

from torch import Tensor

from diffusers_ext.trainer.batches import BatchOptions, TrainingBatches, batch_stream
from diffusers_ext.trainer.data import ImageData


class Batches(Iterator[dict[str, Tensor]]):
    """The batches of one process, without end, and where it stands in its stream.

    Attributes:
        state: JSON-able; what `make_batches` needs to go on after the batches taken so far. None without a stream.
        passes: Times that this process has gone through its share of a stream. None without a stream.
    """

    def __init__(self, batches: Iterator[dict[str, Tensor]]):
        self._batches, self.state, self.passes = batches, None, None

    def __next__(self) -> dict[str, Tensor]:
        return next(self._batches)


def make_batches(
    data: ImageData,
    options: BatchOptions,
    *,
    position: int = 0,
    state: dict | None = None,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Batches:
    """The batches of one process of a run, from a position on, which starts an optimizer step.

    Args:
        state: Of a stream, as `Batches.state` was there; None for its beginning.
    """
    batches = TrainingBatches(data, options, first_position=position)
    return Batches(batch_stream(batches, num_workers=num_workers, pin_memory=pin_memory))
