"""The steps between the timesteps of one list, without a look at a value that is on an accelerator."""

import math

import torch
from torch import Tensor

from diffusers_ext.diffusion.analytic_variance import X0Variances
from diffusers_ext.diffusion.noising import NoiseSchedule, Transition
from diffusers_ext.diffusion.tables import DeviceTable


class Transitions:
    """Every timestep, listed or not, steps to the next lower listed one, and the lowest ones to the clean end.

    The numbers of all these steps are worked out once, in float64: for a timestep that the host knows they are floats,
    for others they are looked up on the device.

    Args:
        timesteps: As listed, noisiest first or last.
        listed: The same on the host; read from `timesteps` if not given.
        schedule: The noising path.
        config: Of the scheduler.
    """

    def __init__(self, timesteps: Tensor, listed: list[int] | None, schedule: NoiseSchedule, config):
        self.timesteps, self.config = timesteps, config
        self._listed = [int(t) for t in timesteps.tolist()] if listed is None else listed
        every, like = torch.arange(len(schedule)), torch.zeros(1, dtype=torch.float64)
        ascending = torch.tensor(sorted(self._listed))
        num_below = torch.searchsorted(ascending, every)
        following = torch.where(num_below > 0, ascending[(num_below - 1).clamp(min=0)], -1)
        self._next = DeviceTable(following)
        t, s = schedule.level(every, like), schedule.level(following, like)
        steps = Transition.between(t, s, config.prediction_type)
        if config.get("variance_type") == "analytic":
            measured = X0Variances(config.analytic_variance, schedule)
            # The last step but one is the last that draws noise, where the path ends without any.
            largest = torch.where(following == ascending[0], measured.largest_last_std, math.inf).double()
            largest = torch.where(s.sigma > 0, largest, 0.0)
            steps = steps._replace(x0_variance=measured.values, largest_std=largest)
        self._table = DeviceTable(torch.stack(steps.flatten(), dim=-1))
        self._on_host: dict[int, Transition] = {}

    def at(self, timestep: Tensor | int, like: Tensor) -> Transition:
        """The step from `timestep`: of floats if the host knows it, or of tensors that broadcast against `like`.

        Raises:
            ValueError: If a timestep is out of range, not an integer, or there are neither one nor `len(like)`.
        """
        if not torch.compiler.is_compiling():
            known = self._host_timestep(timestep)
            if known is not None:
                if known not in self._on_host:
                    self._on_host[known] = Transition.of(self._table.values[self._checked(known)].tolist())
                return self._on_host[known]
        elif not isinstance(timestep, Tensor):
            timestep = torch.full((1,), timestep, device=like.device)
        if timestep.numel() not in (1, len(like)):
            raise ValueError(
                f"timestep must be one or one for each of the {len(like)} samples, got shape {tuple(timestep.shape)}"
            )
        # In float64, as the host's: differences of squares follow. MPS has none.
        dtype = torch.float32 if like.device.type == "mps" else torch.float64
        try:
            return Transition.of(self._table.gather(timestep, like, dtype))
        except IndexError:
            raise ValueError(
                f"timestep must be in [0, {len(self._next.values) - 1}], got {timestep.tolist()}"
            ) from None

    def following(self, timestep: Tensor | int) -> Tensor:
        """The timestep that `timestep` steps to, -1 for the clean end."""
        known = self._host_timestep(timestep)
        if known is None:
            table = self._next.on(timestep.device, torch.int64)
            return table.index_select(0, timestep.reshape(-1)).view(timestep.shape)
        return self._next.values[self._checked(known)]

    def _checked(self, timestep: int) -> int:
        last = len(self._next.values) - 1
        if not 0 <= timestep <= last:
            raise ValueError(f"timestep must be in [0, {last}], got {timestep}")
        return timestep

    def _host_timestep(self, timestep: Tensor | int) -> int | None:
        """The timestep's value if the host can know it without waiting for an accelerator.

        An element of `timesteps` is recognised by where it is in memory.
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
        return self._listed[(timestep.storage_offset() - self.timesteps.storage_offset()) // self.timesteps.stride(0)]


def _integer(timestep) -> int:
    value = int(timestep)
    if value != timestep:
        raise ValueError(f"timestep must be an integer, got {timestep}")
    return value
