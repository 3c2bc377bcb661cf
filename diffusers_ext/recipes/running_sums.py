"""Sums over the samples of all processes, from one line of the log to the next."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class RunningSums(nn.Module):
    """An objective with sums, in buffers that are the same in all processes after `collect`.

    With several processes each adds to buffers of its own, since reducing at each step would wait for the device.

    Args:
        accelerator: Of the processes; without one there is one process.
        shapes: Of the sums, by the names of their buffers.
    """

    def __init__(self, accelerator: Accelerator | None, **shapes: int | tuple[int, ...]):
        super().__init__()
        self.accelerator, self._names = accelerator, tuple(shapes)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))
            self.register_buffer(f"own_{name}", torch.zeros(shape), persistent=False)

    @property
    def _is_one_of_several(self) -> bool:
        return self.accelerator is not None and self.accelerator.num_processes > 1

    def summand(self, name: str) -> Tensor:
        """The buffer that this process adds to."""
        return getattr(self, f"own_{name}" if self._is_one_of_several else name)

    def collect(self) -> None:
        """Adds up the processes' sums. All of them call it, before the state is saved."""
        if not self._is_one_of_several:
            return
        own = [self.summand(name) for name in self._names]
        added = self.accelerator.reduce(torch.cat([values.flatten() for values in own]), "sum")
        for name, values, more in zip(self._names, own, added.split([one.numel() for one in own]), strict=True):
            getattr(self, name).add_(more.view_as(values))
            values.zero_()

    def clear(self) -> None:
        """Starts the sums again, after `collect`."""
        for name in self._names:
            getattr(self, name).zero_()
