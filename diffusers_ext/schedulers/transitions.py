"""The steps between the timesteps of one list, without a look at a value that is on an accelerator."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_ext.diffusion.analytic_variance import X0Variances
from diffusers_ext.diffusion.multistep import LEVEL_ROUNDING
from diffusers_ext.diffusion.noising import NoiseLevel, NoiseSchedule, Transition
from diffusers_ext.diffusion.paths import Linear
from diffusers_ext.diffusion.tables import DeviceTable, dtype_beside, is_readable
from diffusers_ext.machine import widest_float


class Transitions:
    """Every timestep, listed or not, steps to the next lower listed one, and the lowest ones to the clean end.

    The numbers of all these steps are worked out once, in float64: for a timestep that the host knows they are floats,
    for others they are looked up on the device.

    Args:
        timesteps: As listed, noisiest first or last.
        listed: The same on the host; read from `timesteps` if not given.
        schedule: The noising path.
        between: The numbers of the steps from timesteps to others, -1 for the clean end; of tensors of their shape.
        config: Of the scheduler.
    """

    def __init__(
        self,
        timesteps: Tensor,
        listed: list[int] | None,
        schedule: NoiseSchedule,
        between: Callable[[Tensor, Tensor], Transition],
        config,
    ):
        self.timesteps, self.config, self._version = timesteps, config, version_of(timesteps)
        self._listed = [int(t) for t in timesteps.tolist()] if listed is None else listed
        every = torch.arange(len(schedule), device="cpu")
        ascending = torch.tensor(sorted(self._listed), device="cpu")
        num_below = torch.searchsorted(ascending, every)
        following = torch.where(num_below > 0, ascending[(num_below - 1).clamp(min=0)], -1)
        self._next = DeviceTable(following)
        steps = between(every, following)
        self._kind = type(steps)
        # Other kinds of steps have no such variance, and a config may come from a scheduler that has it.
        if config.get("variance_type") == "analytic" and "x0_variance" in self._kind._fields:
            measured = X0Variances(config.analytic_variance, schedule)
            # The last step but one is the last that draws noise, where the path ends without any.
            largest = torch.where(following == ascending[0], measured.largest_last_std, math.inf).double()
            largest = torch.where(steps.s.sigma > 0, largest, 0.0)
            steps = steps._replace(x0_variance=measured.values, largest_std=largest)
        self._table = DeviceTable(torch.stack(steps.flatten(), dim=-1))
        self._on_host: dict[int, Transition] = {}

    def is_of(self, timesteps: Tensor, config) -> bool:
        """Whether the steps are still those of this list and config, neither of them replaced or written to."""
        return self.timesteps is timesteps and self.config is config and self._version == version_of(timesteps)

    def at(self, timestep: Tensor | int, like: Tensor) -> Transition:
        """The step from `timestep`: of floats if the host knows it, or of tensors that broadcast against `like`.

        Raises:
            ValueError: If a timestep is out of range, not an integer, or there are neither one nor `len(like)`.
        """
        if not torch.compiler.is_compiling():
            known = self._host_timestep(timestep)
            if known is not None:
                if known not in self._on_host:
                    self._on_host[known] = self._kind.of(self._table.values[self._checked(known)].tolist())
                return self._on_host[known]
        elif not isinstance(timestep, Tensor):
            timestep = torch.full((1,), timestep, device=like.device)
        if timestep.numel() not in (1, len(like)):
            raise ValueError(
                f"timestep must be one or one for each of the {len(like)} samples, got shape {tuple(timestep.shape)}"
            )
        timestep = _integers(timestep)
        try:
            # In float64, as the host's: differences of squares follow.
            return self._kind.of(self._table.gather(timestep, like, widest_float(like.device)))
        except IndexError:
            raise self._out_of_range(timestep.tolist()) from None

    def following(self, timestep: Tensor | int) -> Tensor:
        """The timestep that `timestep` steps to, -1 for the clean end.

        Raises:
            ValueError: If a timestep is out of range or not an integer.
        """
        known = self._host_timestep(timestep)
        if known is not None:
            return self._next.values[self._checked(known)]
        timestep = _integers(timestep)
        try:
            return _picked(self._next.on(timestep.device, torch.int64), timestep)
        except IndexError:
            raise self._out_of_range(timestep.tolist()) from None

    def _checked(self, timestep: int) -> int:
        if not 0 <= timestep < len(self._next.values):
            raise self._out_of_range(timestep)
        return timestep

    def _out_of_range(self, timestep: int | list[int]) -> ValueError:
        return ValueError(f"timestep must be in [0, {len(self._next.values) - 1}], got {timestep}")

    def _host_timestep(self, timestep: Tensor | int) -> int | None:
        value = host_value(timestep, self.timesteps, self._listed)
        return None if value is None else _integer(value)


class FlowTransitions:
    """The same on the linear path, whose timesteps are any numbers in [0, T], with the levels of those that are listed.

    A timestep is at the level timestep / T. If the list says otherwise (some networks are given other timesteps than
    those of their level), timesteps between the listed ones are at levels between those of their neighbours.

    Args:
        timesteps: As listed, from noise to data.
        listed: The same on the host; read from `timesteps` if not given.
        levels: Sigma of each of them, in (0, 1], descending.
        length: T.
        inverted: Whether timestep 0 is noise, and T the data.
        prediction_type: One of `PREDICTION_TYPES`.
    """

    def __init__(
        self,
        timesteps: Tensor,
        listed: list[float],
        levels: list[float],
        length: int,
        inverted: bool,
        prediction_type: str,
    ):
        self.timesteps, self.levels, self.prediction_type = timesteps, levels, prediction_type
        self._listed, self._length, self._inverted = listed, length, inverted
        self._index = {value: index for index, value in enumerate(listed)}
        # Row 0 is the clean end, and row k the k-th of the listed ones from there. Shares are those of noise in time.
        ascending = torch.tensor([self._clean_timestep, *reversed(listed)], dtype=torch.float64, device="cpu")
        shares = self._share(ascending)
        sigmas = torch.tensor([0.0, *reversed(levels)], dtype=torch.float64, device="cpu")
        if not (shares.diff() > 0).all():
            raise ValueError(f"timesteps must be different ones and go from noise to data, got {listed}")
        self._next = DeviceTable(torch.stack([ascending, sigmas]))
        self._shares = DeviceTable(shares)
        self._rounding = min(LEVEL_ROUNDING, shares.diff().min().item() / 2)
        # What a level is read from, where the list has levels of its own.
        self._knots = None
        if (shares - sigmas).abs().max() > LEVEL_ROUNDING:
            end = torch.ones(int(shares[-1] < 1), dtype=torch.float64, device="cpu")
            self._knots = DeviceTable(torch.stack([torch.cat([shares, end]), torch.cat([sigmas, end])]))
        self._on_host: dict[float, Transition] = {}

    def at(self, timestep: Tensor | float, like: Tensor) -> Transition:
        """The step from `timestep`: of floats if the host knows it, or of tensors that broadcast against `like`.

        Args:
            timestep: One, one for each sample, or one for each entry of the first dimensions of `like`; those of a tensor on
                an accelerator are not looked at.

        Raises:
            ValueError: If a timestep is out of range, or there are neither one nor `len(like)`.
        """
        if not torch.compiler.is_compiling():
            known = host_value(timestep, self.timesteps, self._listed)
            if known is not None:
                if known not in self._on_host:
                    numbers = self._between(
                        torch.tensor(self._checked(known), dtype=torch.float64, device="cpu")
                    ).flatten()
                    self._on_host[known] = Transition.of([number.item() for number in numbers])
                return self._on_host[known]
        return self._between(self._beside(timestep, like))

    def level(self, timestep: Tensor | float, like: Tensor) -> NoiseLevel:
        """The level at `timestep`, broadcasting against `like`, in float32 or wider."""
        level = Linear().level(self._sigma(self._beside(timestep, like)))
        return NoiseLevel(*[factor.to(dtype_beside(like)) for factor in level])

    def following(self, timestep: Tensor | float) -> Tensor:
        """The timestep that `timestep` steps to: the next listed one, or that of the clean end."""
        timestep = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, device="cpu")
        self._check_range(timestep)
        values = timestep.to(widest_float(timestep.device))
        return self._after(self._share(values))[0].to(self.timesteps.dtype)

    def index(self, timestep: Tensor | float) -> int | None:
        """Where a timestep that the host knows is in the list."""
        return self._index.get(host_value(timestep, self.timesteps, self._listed))

    @property
    def _clean_timestep(self) -> float:
        return float(self._length) if self._inverted else 0.0

    def _share(self, timestep: Tensor) -> Tensor:
        share = timestep / self._length
        return 1 - share if self._inverted else share

    def _sigma(self, timestep: Tensor) -> Tensor:
        share = self._share(timestep)
        if self._knots is None:
            return share
        shares, sigmas = self._knots.on(share.device, share.dtype)
        high = torch.searchsorted(shares, share.contiguous()).clamp(1, len(shares) - 1)
        (low_share, high_share), (low_sigma, high_sigma) = (
            (_picked(table, high - 1), _picked(table, high)) for table in (shares, sigmas)
        )
        return torch.lerp(low_sigma, high_sigma, (share - low_share) / (high_share - low_share))

    def _after(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """Timestep and sigma of the next listed level below, or of the clean end."""
        shares = self._shares.on(share.device, share.dtype)
        row = torch.searchsorted(shares, (share - self._rounding).contiguous()) - 1
        return tuple(_picked(column, row.clamp(min=0)) for column in self._next.on(share.device, share.dtype))

    def _between(self, timestep: Tensor) -> Transition:
        # At the clean end itself nothing is left to do, and a level that is next to it keeps the factors finite.
        t = self._sigma(timestep).clamp(min=torch.finfo(torch.float32).tiny)
        _, s = self._after(self._share(timestep))
        return Transition.between(Linear().level(t), Linear().level(s.minimum(t)), self.prediction_type)

    def _beside(self, timestep: Tensor | float, like: Tensor) -> Tensor:
        """`timestep` on the device of `like`, in as wide a type as that has, broadcasting against it."""
        dtype = widest_float(like.device)
        if not isinstance(timestep, Tensor):
            return torch.full((1,) * like.ndim, self._checked(timestep), device=like.device, dtype=dtype)
        shape = timestep.shape if timestep.ndim else timestep.shape + (1,)
        if shape != (1,) and shape != like.shape[: len(shape)]:
            raise ValueError(
                f"timestep must be one or one for each of the {len(like)} samples, got shape {tuple(timestep.shape)}"
            )
        self._check_range(timestep)
        return timestep.to(like.device, dtype).view(*shape, *[1] * (like.ndim - len(shape)))

    def _check_range(self, timestep: Tensor) -> None:
        if is_readable(timestep) and not ((timestep >= 0) & (timestep <= self._length)).all():  # NaN too
            raise ValueError(f"timestep must be in [0, {self._length}], got {timestep.tolist()}")

    def _checked(self, timestep: float) -> float:
        if not 0 <= timestep <= self._length:
            raise ValueError(f"timestep must be in [0, {self._length}], got {timestep}")
        return float(timestep)


def _picked(column: Tensor, rows: Tensor) -> Tensor:
    """The entries at `rows`, in their shape."""
    return column.index_select(0, rows.reshape(-1)).view(rows.shape)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to in place, which waits for no device; inference tensors do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def host_value(timestep: Tensor | float, timesteps: Tensor, listed: list) -> int | float | None:
    """The timestep's value if the host can know it without waiting for an accelerator.

    An element of `timesteps` is recognised by where it is in memory.
    """
    if not isinstance(timestep, Tensor):
        return timestep
    if timestep.ndim or type(timestep) is not Tensor:  # fake tensors and the like have no value to read
        return None
    if timestep.device.type == "cpu":
        return timestep.item()
    ours = timesteps.untyped_storage()._cdata == timestep.untyped_storage()._cdata
    if not ours or timestep.device.type != timesteps.device.type:
        return None
    return listed[(timestep.storage_offset() - timesteps.storage_offset()) // timesteps.stride(0)]


def _integers(timestep: Tensor) -> Tensor:
    """Timesteps for each sample as integers, from floats too if the host can see that they are whole."""
    if not timestep.is_floating_point():
        return timestep
    whole = timestep.long()
    if timestep.device.type != "cpu" or is_readable(timestep) and not torch.equal(whole.to(timestep.dtype), timestep):
        got = timestep.tolist() if timestep.device.type == "cpu" else f"a tensor of {timestep.dtype}"
        raise ValueError(f"timestep must be an integer, got {got}")
    return whole


def _integer(timestep) -> int:
    if timestep % 1 != 0:  # true of what is not finite too
        raise ValueError(f"timestep must be an integer, got {timestep}")
    return int(timestep)
