"""EMA of the weights, in float32 whatever the model's precision."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


def power_function_exponent(std: float) -> float:
    """The gamma of the power-function average whose weighting has this standard deviation, relative to the run's length.

    The average at step t weights the weights of step tau by tau^gamma (Karras et al. 2023, "Analyzing and improving the
    training dynamics of diffusion models", arXiv 2312.02696, section 3.1).

    Raises:
        ValueError: if `std` is not in (0, 0.28]; at gamma = 0, the plain mean of all steps, it is 12^-0.5 = 0.289.
    """
    if not 0 < std <= 0.28:
        raise ValueError(f"ema_std must be in (0, 0.28], got {std:g}")
    # std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the variance of the weighting on [0, 1].
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a run changes, by name: not those that are frozen beneath an adapter."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class WeightAverage:
    """A running average of a model's trained parameters.

    Args:
        model: Whose parameters; the average starts as their copy.
        std: Width of the power-function average, relative to the run's length so far, so that one value suits short and
            long runs.
        decay: Of the exponential average, instead of `std`.
        warmup: With `decay`: whether step t decays by `min(decay, (1 + t) / (10 + t))`, which forgets the random start
            of a short run; otherwise by `decay` from the first step on.

    Raises:
        ValueError: if not exactly one of `std` and `decay` is given, or if one is out of range.
    """

    def __init__(
        self, model: nn.Module, *, std: float | None = None, decay: float | None = None, warmup: bool = False
    ):
        if (std is None) == (decay is None):
            raise ValueError(f"exactly one of ema_std and ema_decay must be given, got {std} and {decay}")
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {decay:g}")
        self.std, self.gamma = std, None if std is None else power_function_exponent(std)
        self.decay, self.warmup, self.num_updates = decay, warmup, 0
        parameters = trained_parameters(model)
        self._names = list(parameters)
        self._average = [parameter.detach().float().clone() for parameter in parameters.values()]

    def decay_at(self, update: int) -> float:
        """The share of the old average that update `update`, counted from 1, keeps."""
        if self.gamma is not None:  # Karras et al. 2023, Eq. 2
            return (1 - 1 / update) ** (self.gamma + 1)
        if self.warmup:
            return min(self.decay, (1 + update) / (10 + update))
        return self.decay

    @torch.no_grad()
    def update(self, model: nn.Module):
        """Takes the model's present parameters into the average."""
        self.num_updates += 1
        parameters = [parameter.detach() for parameter in trained_parameters(model).values()]
        if any(parameter.dtype != torch.float32 for parameter in parameters):
            parameters = [parameter.float() for parameter in parameters]
        torch._foreach_lerp_(self._average, parameters, 1 - self.decay_at(self.num_updates))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """The model with the averaged parameters; its own come back at the end, bit for bit."""
        parameters = list(trained_parameters(model).values())
        own = [parameter.data for parameter in parameters]
        try:
            for parameter, average in zip(parameters, self._average, strict=True):
                parameter.data = average.to(parameter.dtype)
            yield model
        finally:
            for parameter, data in zip(parameters, own, strict=True):
                parameter.data = data

    def averages(self) -> dict[str, Tensor]:
        """The averaged parameters by name, float32."""
        # safetensors refuses channels_last.
        return {name: average.contiguous() for name, average in zip(self._names, self._average, strict=True)}

    def state_dict(self) -> dict[str, Tensor]:
        return self.averages() | {"num_updates": torch.tensor(self.num_updates, dtype=torch.int64)}

    def load_state_dict(self, state: dict[str, Tensor]):
        if set(state) != {*self._names, "num_updates"}:
            raise ValueError("the saved average is of another model: the names of its parameters differ")
        self.num_updates = int(state["num_updates"])
        for name, average in zip(self._names, self._average, strict=True):
            average.copy_(state[name])
