"""The scale between the values of sequences, in the data's own units, and what a network sees, in about [-1, 1].

    value = shift + scale x        for each channel by itself

It is measured on the training data, kept with the pipeline, and undone after sampling.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_ext.machine import widest_float


KINDS = ("min_max", "mean_max")

# float32 keeps 7 digits: with the values this many times as large as their half range, 3 are left for what differs.
LARGEST_OFFSET = 1e4


@dataclass(frozen=True)
class ValueScale:
    """Shift and scale of each channel. A scale of 0 is that of a channel whose value never changes.

    Raises:
        ValueError: if they are not finite, not as many, or a scale is negative.
    """

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self):
        if not self.shift or len(self.shift) != len(self.scale):
            raise ValueError(
                f"a value_scale must have a shift and a scale for each channel, got {len(self.shift)} and {len(self.scale)}"
            )
        if not np.isfinite([self.shift, self.scale]).all() or min(self.scale) < 0:
            raise ValueError(
                f"a value_scale must be of finite shifts and of scales from 0 on, got {self.shift} and {self.scale}"
            )

    @classmethod
    def of_range(
        cls, low: Sequence[float], high: Sequence[float], mean: Sequence[float] | None = None
    ) -> "ValueScale":
        """That by which values of this range are within [-1, 1].

        Args:
            low, high: Of each channel.
            mean: Of each channel, which becomes 0; without it the middle of the range does.

        Raises:
            ValueError: if no value differs from another, or float32 cannot tell them apart.
        """
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        shift = (low + high) / 2 if mean is None else np.asarray(mean, np.float64)
        scale = np.maximum(high - shift, shift - low) * (high > low)
        if not scale.any():
            raise ValueError(
                f"all values of a channel are the same ({', '.join(f'{v:g}' for v in low)}): nothing to learn"
            )
        largest = np.maximum(np.abs(low), np.abs(high))
        for channel in np.flatnonzero((scale > 0) & (largest > LARGEST_OFFSET * scale)):
            raise ValueError(
                f"the values of channel {channel} are from {low[channel]:.10g} to {high[channel]:.10g}, and float32, with 7 "
                "digits, hardly tells them apart: subtract an offset from the data"
            )
        return cls(tuple(shift.tolist()), tuple(scale.tolist()))

    @classmethod
    def of_config(cls, config: Mapping[str, Sequence[float]] | None) -> "ValueScale | None":
        """From the `value_scale` of a config, as `to_config` made it; None for None.

        Raises:
            ValueError: if it is none.
        """
        if config is None:
            return None
        if not isinstance(config, Mapping) or set(config) != {"shift", "scale"}:
            raise ValueError(f"value_scale must be a dict of lists, shift and scale, got {config!r}")
        return cls(tuple(map(float, config["shift"])), tuple(map(float, config["scale"])))

    def to_config(self) -> dict[str, list[float]]:
        return {"shift": list(self.shift), "scale": list(self.scale)}

    @property
    def channels(self) -> int:
        return len(self.shift)

    def to_model(self, values: Tensor) -> Tensor:
        """Values in own units to what a network sees, float32, shape `(batch, channels, length)`."""
        shift, scale = self._for(values)
        return ((values - shift) / torch.where(scale > 0, scale, torch.inf)).float()

    def to_values(self, x: Tensor) -> Tensor:
        """What a network makes to values in own units, float32, shape `(batch, channels, length)`."""
        shift, scale = self._for(x)
        return (x * scale + shift).float()

    def normalized(self, values: np.ndarray) -> np.ndarray:
        """`to_model` of an array with the channels last, shape `(..., length, channels)`."""
        scale = np.asarray(self.scale)
        return ((values - np.asarray(self.shift)) / np.where(scale > 0, scale, np.inf)).astype(np.float32)

    def _for(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """In float64, where the device has it: the shift may be large beside the scale."""
        dtype = widest_float(values.device)
        return tuple(
            torch.tensor(each, dtype=dtype, device=values.device)[:, None] for each in (self.shift, self.scale)
        )
