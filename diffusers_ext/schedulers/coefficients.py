"""The coefficients of a step, worked out once for a list of timesteps.

An algorithm is a linear map from (x_t, model output, clipped x_0, noise) to x_s. Its coefficients depend on the noise
levels alone, so they are worked out once for every transition, in float64, by evaluating the formulas of
`diffusers_ext.diffusion.noising` at unit inputs; a step then is two or three fused tensor operations.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_ext.diffusion.noising import NoiseLevel, NoiseSchedule, dynamic_threshold, output_eps, predict_x0


Factor = float | Tensor


class Transition(NamedTuple):
    """Coefficients of the step from t to s, floats or tensors that broadcast against x_t.

    x_0 = x0_sample x_t + x0_output output
    x_s = prev_x0 x_0 + prev_sample x_t + prev_output output + std noise

    With a learned variance `std` is 1, or 0 for the last step, and multiplies what the model says.
    """

    x0_sample: Factor
    x0_output: Factor
    prev_x0: Factor
    prev_sample: Factor
    prev_output: Factor
    std: Factor
    log_std_small: Factor
    log_std_large: Factor


class Prediction(NamedTuple):
    """How x_0 and eps follow from x_t and the model's output: `x0 = x0_sample x_t + x0_output output` and so on."""

    x0_sample: Tensor
    x0_output: Tensor
    eps_sample: Tensor
    eps_output: Tensor

    @classmethod
    def at(cls, level: NoiseLevel, prediction_type: str) -> "Prediction":
        one, zero = torch.ones_like(level.alpha), torch.zeros_like(level.alpha)
        return cls(
            predict_x0(zero, one, level, prediction_type),
            predict_x0(one, zero, level, prediction_type),
            output_eps(zero, one, level, prediction_type),
            output_eps(one, zero, level, prediction_type),
        )


class DeviceCopies:
    """A table of the host on each device that asks for it, copied there once: a copy stalls the device."""

    def __init__(self, table: Tensor):
        self.table = table
        self._copies: dict = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        copy = self._copies.get((device, dtype))
        if copy is None:
            copy = self.table.to(device, dtype)
            if type(copy) is Tensor and not torch.compiler.is_compiling():  # not what tracing puts in its place
                self._copies[device, dtype] = copy
        return copy


class CoefficientTable:
    """The coefficients of every transition, as floats for the host and as tensors for each device.

    Args:
        columns: A named tuple of float64 tensors of shape `(T,)`.
    """

    def __init__(self, columns: NamedTuple):
        self.kind = type(columns)
        self.values = torch.stack(columns, dim=-1)
        self._rows: list | None = None
        self._copies = DeviceCopies(self.values)

    def row(self, timestep: int) -> NamedTuple:
        if self._rows is None:
            self._rows = [self.kind(*row) for row in self.values.tolist()]
        return self._rows[timestep]

    def gather(self, timesteps: Tensor, like: Tensor) -> NamedTuple:
        """Coefficients at `timesteps`, each broadcasting against `like`, without a look at the values of either."""
        table = self._copies.on(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32)
        rows = table.index_select(0, timesteps.to(like.device).reshape(-1))
        return self.kind(*rows.reshape(len(rows), *[1] * (like.ndim - 1), -1).unbind(-1))


class Path:
    """The transitions between the timesteps of one list: every timestep steps to the next lower listed one.

    Attributes:
        timesteps: The tensor this was made from, noisiest first or last.
        listed: The same on the host; read from there if not given.
        clip_range, threshold: Bound on |x_0|, and the two numbers of dynamic thresholding, which goes before; or None.
        next: Lower listed timestep of each of 0..T-1, -1 for the clean end, shape `(T,)`, int64.
        t, s: Levels of each timestep and of its successor, float64, shape `(T,)`.
        ends_clean: Whether the clean end holds no noise at all.
        tables: Coefficient tables by the options of the algorithm.
    """

    def __init__(self, timesteps: Tensor, listed: list[int] | None, schedule: NoiseSchedule, config):
        self.timesteps, self.config = timesteps, config
        self.listed = [int(t) for t in timesteps.tolist()] if listed is None else listed
        self.prediction_type = config.prediction_type
        self.clip_range = config.clip_sample_range if config.clip_sample else None
        self.threshold = None
        if config.get("thresholding", False):
            self.threshold = (config.dynamic_thresholding_ratio, config.sample_max_value)
        every = torch.arange(len(schedule))
        ascending = torch.tensor(sorted(self.listed))
        place = torch.searchsorted(ascending, every)  # number of listed timesteps below each
        self.next = torch.where(place > 0, ascending[(place - 1).clamp(min=0)], -1)
        self.next_rows, self.next_copies = self.next.tolist(), DeviceCopies(self.next)
        like = torch.zeros(1, dtype=torch.float64)
        self.t, self.s = schedule.level(every, like), schedule.level(self.next, like)
        self.ends_clean = float(schedule.sigma[-1]) == 0
        self.tables: dict = {}

    @property
    def clips(self) -> bool:
        return self.threshold is not None or self.clip_range is not None

    def host_timestep(self, timestep: Tensor | int) -> int | None:
        """The timestep's value if the host can know it without waiting for an accelerator.

        An element of `timesteps` is recognised by its place in memory.
        """
        if not isinstance(timestep, Tensor):
            return _integer(timestep)
        if timestep.ndim or type(timestep) is not Tensor:  # fake tensors and the like have no value to read
            return None
        if timestep.device.type == "cpu":
            return _integer(timestep.item())
        ours = self.timesteps.untyped_storage()._cdata == timestep.untyped_storage()._cdata
        if not ours or timestep.device.type != self.timesteps.device.type:
            return None
        return self.listed[(timestep.storage_offset() - self.timesteps.storage_offset()) // self.timesteps.stride(0)]


def clip_x0(x0: Tensor, path: Path, owned: bool) -> Tensor:
    """The predicted x_0 within the range of data; in place if nobody else holds it."""
    if path.threshold is not None:
        return dynamic_threshold(x0, *path.threshold)
    if path.clip_range is not None:
        return x0.clamp_(-path.clip_range, path.clip_range) if owned else x0.clamp(-path.clip_range, path.clip_range)
    return x0


def weighted_sum(*terms: tuple[Factor, Tensor]) -> Tensor:
    """Sum of factor times tensor, in one new tensor; a factor is a float or broadcasts."""
    (factor, tensor), *rest = terms
    total = tensor * factor
    for factor, tensor in rest:
        total = add_weighted(total, factor, tensor)
    return total


def add_weighted(total: Tensor, factor: Factor, tensor: Tensor) -> Tensor:
    """Adds factor times tensor to `total` in place."""
    return total.add_(tensor, alpha=factor) if isinstance(factor, float) else total.addcmul_(tensor, factor)


def wide(tensor: Tensor) -> Tensor:
    """Float32 or wider, so that half precision rounds once, at the end."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _integer(timestep) -> int:
    value = int(timestep)
    if value != timestep:
        raise ValueError(f"timestep must be an integer, got {timestep}")
    return value
