"""float64 where a device has none."""

from torch import Tensor


def to_float64(x: Tensor) -> Tensor:
    """`x` in float64, on its own device, or on the CPU where that has no float64, as Apple's GPUs (MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()
