"""The common part of the schedulers of a Gaussian noising path: config, timesteps, noising, arithmetic of a step."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from diffusers_ext.command_names import name_commands
from diffusers_ext.diffusion.analytic_variance import X0Variances
from diffusers_ext.diffusion.betas import check_integer, make_betas, rescale_zero_terminal_snr
from diffusers_ext.diffusion.noising import (
    PREDICTION_TYPES,
    NoiseLevel,
    NoiseSchedule,
    Transition,
    add_noise,
    check_betas,
    dynamic_threshold,
    training_target,
    weighted_sum,
)
from diffusers_ext.diffusion.tables import is_readable
from diffusers_ext.diffusion.timestep_search import ChosenTimesteps
from diffusers_ext.diffusion.timesteps import TIMESTEP_SPACINGS, check_timesteps, make_timesteps
from diffusers_ext.draws import draw_normal
from diffusers_ext.schedulers.sources import PATH_KEYS, read_model
from diffusers_ext.schedulers.transitions import Transitions
from diffusers_ext.untrusted import check_config


# Of these the classes of diffusers make the betas themselves; the others are handed to them as `trained_betas`.
COMMON_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")

# Samplers start from N(0, 1), so the noisiest level should have next to no signal left.
LARGE_ALPHA_BAR = 0.01


def plain(value: Any) -> Any:
    """A value of a config as JSON has it: arrays and tensors, also within mappings and lists, as lists of numbers."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {plain(key): plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def read_chosen(
    lists: Mapping | None, spacing: str, num_train_timesteps: int, first: int = 0
) -> tuple[ChosenTimesteps | None, str]:
    """The timesteps that were chosen for a model, if they count: beside the spacing that they take the place of, or "optimal".

    Args:
        lists: `optimal_timesteps` of a config.
        first: The timestep of the cleanest level.

    Returns: them or None, and the spacing, in the place of "optimal" the one that they replace. The config is to say that,
        so that classes of diffusers, which refuse a spacing that they do not know, fall back to it.
    """
    if lists is None:
        if spacing == "optimal":
            raise ValueError(
                name_commands(
                    "timestep_spacing 'optimal' needs optimal_timesteps, which training/calibrate.py chooses for a model, got None"
                )
            )
        return None, spacing
    chosen = ChosenTimesteps(lists, num_train_timesteps, first)
    spacing = chosen.spacing if spacing == "optimal" else spacing
    return chosen if spacing == chosen.spacing else None, spacing


class GaussianSchedulerMixin:
    """Common part of the schedulers; goes before the diffusers class whose config keys it understands."""

    order = 1
    _stock_beta_schedules: tuple[str, ...] = COMMON_BETA_SCHEDULES

    # Construction.

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """The keys that `from_config` hands to `__init__`: also those of the model that the source left at their defaults.

        Raises:
            ValueError: If the config is that of a model of another path.
        """
        return super().extract_init_dict(read_model(config_dict, cls, kwargs), **kwargs)

    def _setup(self) -> None:
        """Builds everything from `self.config`, refusing what cannot work."""
        check_config(self.config, type(self).__init__)
        measured = {key: self.config.get(key) for key in ("trained_betas", "analytic_variance", "optimal_timesteps")}
        self._register_explicitly(**{key: plain(value) for key, value in measured.items() if value is not None})
        # Some samplers of diffusers have other defaults for the path, to which `from_config` would fall back. Those that
        # never clip hand on the range, by which `read_model` knows that the model is not one of theirs.
        self._register_explicitly(**{key: self.config[key] for key in (*PATH_KEYS, "clip_sample_range")})
        self._choose_timesteps(self.config)
        self._check_config(self.config)
        self.schedule, betas = self._make_schedule(self.config)
        config = self.config
        if config.get("analytic_variance") is not None:
            X0Variances(config.analytic_variance, self.schedule)  # which refuses what is none
        alpha_bar = self.schedule.alpha_bar[:-1]
        if alpha_bar[-1] == 0 and config.prediction_type in ("epsilon", "score"):
            raise ValueError(
                f"prediction_type must be 'v_prediction' or 'sample' at zero terminal SNR, where x_T holds no signal "
                f"to divide by, got {config.prediction_type!r}; set prediction_type or rescale_betas_zero_snr=False"
            )
        if alpha_bar[-1] > LARGE_ALPHA_BAR:
            warnings.warn(
                f"alpha_bar of the last timestep is {alpha_bar[-1]:.3g}: x_T keeps signal, so that training and "
                f"sampling from noise disagree. {self._more_noise(config)}",
                stacklevel=4,
            )
        if config.prediction_type == "score" and self.schedule.sigma[0] == 0:
            raise ValueError(
                "the first beta must be above 0 for prediction_type 'score', since a density without noise has no score, got 0"
            )
        # The names and dtypes under which diffusers' pipelines look for the tables.
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alphas_cumprod = alpha_bar.float()
        self.one = torch.tensor(1.0, device="cpu")
        self.final_alpha_cumprod = self.one if self.schedule.alpha[-1] == 1 else self.alphas_cumprod[0]
        self.custom_timesteps = False
        self.num_inference_steps = None
        self._transitions = None
        self._visit(np.arange(config.num_train_timesteps)[::-1], device=None)

    def _choose_timesteps(self, config) -> None:
        lists, length = config.get("optimal_timesteps"), config.num_train_timesteps
        self._chosen, spacing = read_chosen(lists, config.timestep_spacing, length)
        if spacing != config.timestep_spacing:
            self._register_explicitly(timestep_spacing=spacing)

    def _check_config(self, config) -> None:
        check_choice("prediction_type", config.prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
        check_integer("steps_offset", config.steps_offset, at_least=0)
        if config.get("variance_type") == "analytic" and config.get("analytic_variance") is None:
            raise ValueError(
                name_commands(
                    "variance_type 'analytic' needs analytic_variance, which training/calibrate.py measures for a model, got None"
                )
            )
        if not config.clip_sample_range > 0:
            raise ValueError(f"clip_sample_range must be above 0, got {config.clip_sample_range}")
        if not 0 <= config.get("dynamic_thresholding_ratio", 1) <= 1:
            raise ValueError(f"dynamic_thresholding_ratio must be in [0, 1], got {config.dynamic_thresholding_ratio}")
        if not config.get("sample_max_value", 1) >= 1:
            raise ValueError(f"sample_max_value must be at least 1, got {config.sample_max_value}")
        largest = torch.finfo(torch.float32).max  # what samples are computed in
        for name in ("clip_sample_range", "sample_max_value"):
            if config.get(name, 1) > largest:
                raise ValueError(
                    f"{name} must be at most {largest:.2g}, the largest number of float32, got {config[name]}"
                )

    def _make_schedule(self, config) -> tuple[NoiseSchedule, Tensor]:
        """The noising path, and its betas at unit scale."""
        betas = self._make_betas(config)
        if config.rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        to_one = config.get("set_alpha_to_one", True)
        return NoiseSchedule(betas, final_alpha_bar=1.0 if to_one else 1 - float(betas[0])), betas

    def _more_noise(self, config) -> str:
        """What to do for a path that ends with too little noise."""
        return "Use more timesteps, larger betas, beta_reference_timesteps=1000 or rescale_betas_zero_snr=True."

    def _make_betas(self, config) -> Tensor:
        length = config.num_train_timesteps
        if config.trained_betas is not None:
            betas = torch.as_tensor(np.asarray(config.trained_betas, dtype=np.float64), device="cpu")
            if betas.shape != (length,):
                raise ValueError(
                    f"trained_betas must have shape ({length},) (num_train_timesteps), got {tuple(betas.shape)}"
                )
            return check_betas(betas)
        betas = make_betas(
            config.beta_schedule,
            length,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            reference_timesteps=config.beta_reference_timesteps,
        )
        if config.beta_schedule not in self._stock_beta_schedules or config.beta_reference_timesteps is not None:
            # The config then builds the same path in every class of diffusers, which reads `trained_betas` first.
            self._register_explicitly(trained_betas=betas.tolist())
        return betas

    def _register_explicitly(self, **values) -> None:
        """Puts `values` into the config as if they had been passed, so that `from_config` hands them on."""
        if "_use_default_values" in self.config:  # diffusers leaves the key out if nothing was left to its default
            values["_use_default_values"] = [key for key in self.config["_use_default_values"] if key not in values]
        self.register_to_config(**values)

    # Timesteps.

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the timesteps that sampling visits.

        Args:
            num_inference_steps: Number of steps, spaced as `timestep_spacing` says, or by `optimal_timesteps`; in
                [1, num_train_timesteps].
            device: Where `timesteps` is to be.
            timesteps: The list itself, strictly descending, instead of a number.

        Raises:
            ValueError: If not exactly one of the two is given, or it is out of range or not descending.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"pass one of num_inference_steps and timesteps, got num_inference_steps={num_inference_steps!r} and "
                f"timesteps={timesteps!r}"
            )
        config = self.config
        self.custom_timesteps = timesteps is not None
        if timesteps is not None:
            if isinstance(timesteps, Tensor):
                timesteps = timesteps.tolist()
            values = check_timesteps(timesteps, config.num_train_timesteps)
        else:
            values = self.list_timesteps(num_inference_steps)
            first = float(self.schedule.alpha_bar[values[0]])
            if first > LARGE_ALPHA_BAR and float(self.schedule.alpha_bar[-2]) <= LARGE_ALPHA_BAR:
                warnings.warn(
                    f"the first of {num_inference_steps} {config.timestep_spacing!r} timesteps is {values[0]}, where "
                    f"alpha_bar is {first:.3g}: sampling from N(0, 1) starts too late. Use "
                    f"timestep_spacing='trailing' or another number of steps.",
                    stacklevel=2,
                )
        self.num_inference_steps = len(values)
        self._visit(values, device)

    def list_timesteps(self, num_inference_steps: int, objective: str = "trajectory") -> np.ndarray:
        """The timesteps of a number of steps, int64, descending: chosen for the model, or spaced as the config says.

        Args:
            objective: What chosen ones are best in, one of `TIMESTEP_OBJECTIVES`: near a fine trajectory, as sampling visits
                them, or in the bound, as the likelihood does.
        """
        config = self.config
        if self._chosen is not None:
            return self._chosen.make(num_inference_steps, objective)
        return make_timesteps(
            config.timestep_spacing, num_inference_steps, config.num_train_timesteps, config.steps_offset
        )

    def _visit(self, descending: np.ndarray, device: str | torch.device | None) -> None:
        values = self._ordered(descending)
        self.timesteps = torch.tensor(values, device="cpu").to(device)
        # The standard deviation of x_t where sampling starts.
        self.init_noise_sigma = 1.0 if self.schedule.preserves_variance else float(self.schedule.scale[max(values)])
        self._current_transitions(values)

    def _ordered(self, descending: np.ndarray) -> list[int]:
        return descending.tolist()

    def previous_timestep(self, timestep: Tensor | int) -> Tensor:
        """The timestep after this one in sampling, the next lower listed one; -1 after the last."""
        return self._current_transitions().following(timestep)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        return sample

    def _current_transitions(self, listed: list[int] | None = None) -> Transitions:
        known = self._transitions
        if torch.compiler.is_compiling():
            return known  # made by `set_timesteps`, outside of the graph
        # Pipelines replace `timesteps` and the config behind our back, or change the list in place.
        if known is None or not known.is_of(self.timesteps, self._internal_dict):
            known = self._transitions = Transitions(
                self.timesteps, listed, self.schedule, self._steps_between, self._internal_dict
            )
        return known

    def _steps_between(self, timesteps: Tensor, following: Tensor) -> Transition:
        """The numbers of the steps from timesteps to others, in float64; -1 stands for the clean end."""
        like = torch.zeros(1, dtype=torch.float64, device="cpu")
        t, s = self.schedule.level(timesteps, like), self.schedule.level(following, like)
        return Transition.between(t, s, self.config.prediction_type)

    # Noising.

    def level(self, timestep: Tensor | int, like: Tensor) -> NoiseLevel:
        """alpha and sigma of x_t at a timestep, or at one for each sample, broadcasting against `like`."""
        return self.schedule.level(timestep, like)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """x_t for the standard normal draw `noise`, computed in float32 or wider and cast last.

        Args:
            timesteps: In [0, num_train_timesteps), one or one for each sample.

        Raises:
            ValueError: If the host can see that one is out of range.
        """
        level = self._noisy_level(timesteps, original_samples)
        return add_noise(original_samples, noise, level).to(torch.promote_types(original_samples.dtype, noise.dtype))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """The target of v-prediction, alpha noise - sigma sample, in float32 or wider and cast last.

        Args:
            timesteps: As in `add_noise`.
        """
        level = self._noisy_level(timesteps, sample)
        velocity = training_target(sample, noise, level, "v_prediction")
        return velocity.to(torch.promote_types(sample.dtype, noise.dtype))

    def _noisy_level(self, timesteps: Tensor | int, like: Tensor) -> NoiseLevel:
        """That of timesteps without -1, the clean end, which no network is trained at."""
        if isinstance(timesteps, Tensor):
            lowest = min(timesteps.reshape(-1).tolist(), default=0) if is_readable(timesteps) else 0
        else:
            lowest = timesteps
        if lowest < 0:
            raise ValueError(f"timesteps must be in [0, {len(self) - 1}], got {lowest}")
        return self.schedule.level(timesteps, like)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # The parts of a step.

    def _transition(self, timestep: Tensor | int, sample: Tensor) -> Transition:
        """The step from `timestep` to the next of the list; see `Transitions.at`."""
        return self._current_transitions().at(timestep, sample)

    def _predict_x0(self, at: Transition, output: Tensor, x_t: Tensor) -> Tensor:
        """The x_0 that the model means, within the range that the config gives it."""
        if self.config.prediction_type == "sample":
            return self._clip(output, in_place=False)
        return self._clip(weighted_sum((at.x0_of_x_t, x_t), (at.x0_of_output, output)))

    def _predict_eps(self, at: Transition, output: Tensor, x_t: Tensor) -> Tensor:
        """The noise in x_t that the model means."""
        if self.config.prediction_type == "epsilon":
            return output
        return weighted_sum((at.eps_of_x_t, x_t), (at.eps_of_output, output))

    def _clip(self, x0: Tensor, in_place: bool = True) -> Tensor:
        config = self.config
        if getattr(config, "thresholding", False):
            return dynamic_threshold(x0, config.dynamic_thresholding_ratio, config.sample_max_value)
        if config.clip_sample:
            bound = config.clip_sample_range
            return x0.clamp_(-bound, bound) if in_place else x0.clamp(-bound, bound)
        return x0


def wide(tensor: Tensor) -> Tensor:
    """Float32 or wider, so that half precision rounds once, at the end."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def as_output(
    cls: type[BaseOutput], prev_sample: Tensor, x0: Tensor, dtype: torch.dtype, return_dict: bool
) -> BaseOutput | tuple[Tensor, Tensor]:
    """The results of a step, rounded to `dtype`, as diffusers' classes of that name hold them or as a pair."""
    prev_sample, x0 = prev_sample.to(dtype), x0.to(dtype)
    return cls(prev_sample=prev_sample, pred_original_sample=x0) if return_dict else (prev_sample, x0)


def has_no_noise(level: NoiseLevel) -> bool:
    """Whether the host knows that a level is the clean end, or like it, to which no noise is added."""
    return isinstance(level.sigma, float) and level.sigma == 0


def check_output(
    model_output: Tensor, sample: Tensor, takes_variance: bool, variance_type: str | None = None
) -> tuple[Tensor, Tensor | None]:
    """Splits the model's output into the prediction and, if it has twice the channels, the variance output.

    Args:
        takes_variance: Whether twice the channels are accepted.
        variance_type: Given if the variance output decides which shape is right.

    Raises:
        ValueError: If the shape does not fit.
    """
    needs_variance = takes_variance and variance_type is not None
    if model_output.shape == sample.shape and not needs_variance:
        return model_output, None
    doubled = (len(sample), 2 * sample.shape[1], *sample.shape[2:]) if sample.ndim > 1 else None
    if takes_variance and model_output.shape == doubled:
        return model_output.split(sample.shape[1], dim=1)
    accepted = [tuple(sample.shape)] * (not needs_variance) + [doubled] * takes_variance
    hint = "" if variance_type is None else f" for variance_type {variance_type!r}"
    raise ValueError(
        f"model_output must have shape {' or '.join(str(shape) for shape in accepted)}{hint}, "
        f"got {tuple(model_output.shape)}"
    )


def draw_noise(output: Tensor, generator, variance_noise: Tensor | None) -> Tensor:
    """The noise of a step: as given, or from `generator`; with a list, that of image i from generator i alone."""
    if variance_noise is not None:
        if generator is not None:
            raise ValueError("pass one of generator and variance_noise, got both")
        if variance_noise.shape != output.shape:
            raise ValueError(
                f"variance_noise must have shape {tuple(output.shape)}, got {tuple(variance_noise.shape)}"
            )
        return variance_noise
    return draw_normal(output.shape, generator=generator, device=output.device, dtype=output.dtype)


def check_choice(key: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")
