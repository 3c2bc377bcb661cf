"""float64 where a device has none."""

import torch
from torch import Tensor

from diffusers_ext.machine import widest_float


def to_float64(x: Tensor) -> Tensor:
    """`x` in float64, on its own device, or on the CPU where that has no float64, as Apple's GPUs (MPS)."""
    return x.double() if widest_float(x.device) == torch.float64 else x.cpu().double()
