"""The common part of the schedulers of any Gaussian path, which may ask the network several times at each level."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from torch import Tensor

from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.diffusion.paths import PATHS, PathSchedule
from diffusers_ext.diffusion.reverse_sde import SDEStep
from diffusers_ext.schedulers.gaussian import GaussianSchedulerMixin, check_choice
from diffusers_ext.schedulers.sources import SCHEDULER_PATHS, has_other_scale


class AnyPathSchedulerMixin(GaussianSchedulerMixin, SchedulerMixin, ConfigMixin):
    """Common part of the schedulers whose config names a path of `SCHEDULER_PATHS`.

    `timesteps` lists a level as often as the network is asked there, as diffusers' Heun does, so that any loop that calls
    the network and then `step` works. What a call is for follows from its number since `set_timesteps`: the loop must go
    through the list in its order, from its start or from a multiple of `order`.

    Attributes:
        calls: Names of the calls at a level in their order; the last one leads to the next level.
        order: Their number.
    """

    _compatibles = [each.name for each in KarrasDiffusionSchedulers]
    calls: tuple[str, ...]
    _first_call = 0  # of `calls`, where sampling starts

    # Construction.

    def _setup(self) -> None:
        self.order = len(self.calls)
        super()._setup()

    def _check_config(self, config) -> None:
        super()._check_config(config)
        if config.path == "linear":
            raise ValueError(
                f"path must be one of {', '.join(SCHEDULER_PATHS)}, got 'linear', which FlowScheduler is for"
            )
        check_choice("path", config.path, SCHEDULER_PATHS)
        if config.rescale_betas_zero_snr and config.path != "vp":
            raise ValueError(
                f"rescale_betas_zero_snr must be False for path {config.path!r}, which has no betas to rescale"
            )

    def _make_schedule(self, config) -> tuple[NoiseSchedule, Tensor]:
        # Others have defaults of their own for these.
        self._register_explicitly(
            **{key: config[key] for key in ("path", "unit_scale_input", "clip_sample", "timestep_spacing")}
        )
        if config.path == "vp":
            return super()._make_schedule(config)
        schedule = PathSchedule(path_of(config), config.num_train_timesteps)
        betas = schedule.betas
        # With them every scheduler of a variance-preserving path samples the network, if it sees x_t at unit scale.
        self._register_explicitly(trained_betas=None if has_other_scale(config) else betas.tolist())
        return schedule, betas

    def _more_noise(self, config) -> str:
        keys = {"ve": "a larger sigma_max", "subvp": "a larger beta_max"}
        return f"Use {keys[config.path]}." if config.path in keys else super()._more_noise(config)

    # Timesteps.

    def _visit(self, descending: np.ndarray, device) -> None:
        self._call = self._first_call
        super()._visit(descending, device)

    def _ordered(self, descending: np.ndarray) -> list[int]:
        first, *rest = descending.tolist()
        return [first] * (self.order - self._first_call) + [t for t in rest for _ in range(self.order)]

    def _next_call(self) -> str:
        """What this call of `step` is for."""
        if self.order == 1:
            return self.calls[0]
        call = self.calls[self._call]
        self._call = (self._call + 1) % self.order
        return call

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """What the network is to see: `sample`, or with `unit_scale_input` x_t / h in its dtype."""
        if self.schedule.preserves_variance or not self.config.unit_scale_input:
            return sample
        if timestep is None:
            raise ValueError(
                "timestep must be given: the network of this scheduler sees x_t / sqrt(alpha^2 + sigma^2)"
            )
        return (sample / self._transition(timestep, sample).t.scale).to(sample.dtype)

    def _steps_between(self, timesteps: Tensor, following: Tensor) -> SDEStep:
        config = self.config
        return SDEStep.between(
            self.schedule,
            timesteps,
            following,
            config.prediction_type,
            self._predictor,
            unit_scale_input=config.unit_scale_input,
        )


def path_of(config: Mapping[str, Any]):
    """The continuous path that a config names."""
    kind = PATHS[config["path"]]
    keys = [field.name for field in fields(kind)]
    return kind(**{key: config[key] for key in keys if config.get(key) is not None})
