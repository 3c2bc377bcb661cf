"""Tables of numbers by timestep, kept on the host and on each device that reads them."""

import torch
from torch import Tensor


class DeviceTable:
    """A table on the host with a copy on each device that asks for it, made there once: a copy stalls the device.

    Args:
        values: One row for each timestep, on the CPU.
    """

    def __init__(self, values: Tensor):
        # Within `torch.inference_mode` too: autograd refuses tensors that were made in it, and tables outlast it.
        if not torch.compiler.is_compiling() and values.is_inference():
            with torch.inference_mode(False):
                values = values.clone()
        self._copies = {(values.device, values.dtype): values}
        self.values = values

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        copy = self._copies.get((device, dtype))
        if copy is None:
            if torch.compiler.is_compiling():
                return self.values.to(device, dtype)
            with torch.inference_mode(False):
                copy = self.values.to(device, dtype)
            if type(copy) is Tensor:  # not what tracing puts in its place
                self._copies[device, dtype] = copy
        return copy

    def gather(self, rows: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The columns at `rows`, each broadcasting against `like` and on its device; no value is read by the host.

        Args:
            rows: Integers of at least 0, one or one for each sample.
            dtype: `dtype_beside(like)` by default.

        Raises:
            IndexError: If a row is out of range (on an accelerator the kernel itself asserts it).
        """
        table = self.on(like.device, dtype or dtype_beside(like))
        picked = table.index_select(0, rows.to(like.device).reshape(-1))
        return picked.view(len(picked), *[1] * (like.ndim - 1), table.shape[1]).unbind(-1)


def is_readable(tensor: Tensor) -> bool:
    """Whether the host can look at the values at once: on the CPU, and neither traced nor within `torch.func`."""
    if torch.compiler.is_compiling() or type(tensor) is not Tensor or tensor.device.type != "cpu":
        return False
    return not torch._C._are_functorch_transforms_active()


def dtype_beside(tensor: Tensor) -> torch.dtype:
    """That of numbers that scale `tensor`: float64 if it is float64, or else float32, whatever its own."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
