"""Sampling on the linear path, x_t = (1 - t) x_0 + t eps (rectified flow: Liu, Gong, Liu 2022, arXiv 2209.03003)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from diffusers_ext.diffusion.betas import check_integer
from diffusers_ext.diffusion.noising import (
    PREDICTION_TYPES,
    NoiseLevel,
    Transition,
    add_noise,
    training_target,
    weighted_sum,
)
from diffusers_ext.schedulers.gaussian import (
    as_output,
    check_choice,
    draw_noise,
    has_no_noise,
    plain,
    read_chosen,
    wide,
)
from diffusers_ext.schedulers.multistep import MultistepMixin, check_order
from diffusers_ext.schedulers.sources import FLOW_PREDICTION, read_flow_model
from diffusers_ext.schedulers.transitions import FlowTransitions, version_of
from diffusers_ext.untrusted import check_config


FLOW_SPACINGS = ("linspace", "trailing")


@dataclass
class FlowSchedulerOutput(FlowMatchEulerDiscreteSchedulerOutput):
    """x_s and the x_0 that the model means, each of the shape of the sample."""

    pred_original_sample: Tensor | None = None


class FlowScheduler(MultistepMixin, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` whose step is that of DDIM on the linear path, and depends on its arguments alone.

    Takes every config key of diffusers' class, with its meaning and default, and the configs of its other solvers for
    models of flow matching. Where that class is right, timesteps, sigmas and steps are the same with the same generator,
    to float32 rounding. It differs here:

    - A step begins at the level of its timestep, and ends at the next of the list, in whatever order steps are made
      (upstream the timestep of the first step counts alone, and the others go by a counter).
    - Timesteps may be one for each sample. They are not searched for in the list, so that no step waits for the device.
    - `scale_noise` and `add_noise` (which upstream lacks) are at the level of their timesteps, listed or not, in
      float32 or wider (upstream at that of the counter where `set_begin_index` was called, and rounded to the sample's
      precision).
    - `timesteps` without `sigmas` are at the levels that they name, whatever `shift` is (upstream at shifted ones).
    - With `invert_sigmas` noise is added at the inverted level, the list before `set_timesteps` is inverted too, and
      `stochastic_sampling` takes the sign of the output into account.
    - `per_token_timesteps` go with `stochastic_sampling`, and leave the dtype as it is.
    - `shift_terminal` with one step leaves it at sigma 1 (upstream NaN).
    - A list that is empty, or does not go from noise to data, is refused; so are `s_churn`, `s_tmin`, `s_tmax` and
      `s_noise`, which do nothing upstream.
    - The last step draws no noise, and data in half precision round once, at the end.

    In the config "flow" stands as "flow_prediction", and `flow_shift` and `use_flow_sigmas` beside it, so that the
    solvers of diffusers that have another path too (DPM-Solver, UniPC, DEIS) read the same model from it.

    Args:
        num_train_timesteps: T; the network is given T t at time t.
        shift: Factor on the noise-to-signal ratio of the evenly spaced sigmas (Esser et al. 2024, arXiv 2403.03206).
        use_dynamic_shifting: Whether `set_timesteps` is given the shift, as `mu`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: From which pipelines work out `mu`.
        invert_sigmas: Whether timestep 0 is noise and T the data; the model's output is then x_0 - eps.
        shift_terminal: The last sigma before 0, to which the shifted ones are stretched.
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas: Another spacing of sigmas between the same ends.
        time_shift_type: Of `mu`: "exponential" or "linear".
        stochastic_sampling: Whether each step takes the predicted x_0 to the next level with new noise alone.
        prediction_type: One of `PREDICTION_TYPES`, or "flow_prediction" for "flow", eps - x_0. With "epsilon" and "score",
            which say nothing of x_0 where there is no signal, sampling starts at T - 1.
        timestep_spacing: "linspace", from sigma 1 to 1 / T and then to 0, as upstream; "trailing", in n equal steps; or
            "optimal", by `optimal_timesteps`.
        optimal_timesteps: Timesteps chosen for this model, by their number, as `ExtDDIMScheduler` has them; in [1, T], and
            levels whatever `shift` is. They are visited where neither sigmas nor timesteps are given.
        multistep_order: At 2 steps are of second order, as those of `ExtDDIMScheduler`; with `per_token_timesteps` they are not.
        use_flow_sigmas: True; for other solvers to read.
        flow_shift: `shift` by the name that other solvers have for it.

    Raises:
        ValueError: If a value is unknown or out of range.
    """

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        prediction_type: str = "flow",
        timestep_spacing: Literal["linspace", "trailing", "optimal"] = "linspace",
        use_flow_sigmas: bool = True,
        flow_shift: float | None = None,
        optimal_timesteps: dict | None = None,
        multistep_order: int = 1,
    ):
        check_config(self.config, FlowScheduler.__init__)
        prediction_type = "flow" if prediction_type == FLOW_PREDICTION else prediction_type
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if optimal_timesteps is not None:
            optimal_timesteps = plain(optimal_timesteps)
            self._register_explicitly(optimal_timesteps=optimal_timesteps)
        self._chosen, timestep_spacing = read_chosen(optimal_timesteps, timestep_spacing, num_train_timesteps, first=1)
        if self._chosen is not None and invert_sigmas:
            raise ValueError("optimal_timesteps are from T to 0, and invert_sigmas goes from 0 to T: give one of them")
        check_choice("timestep_spacing", timestep_spacing, FLOW_SPACINGS)
        if use_flow_sigmas is not True:
            raise ValueError(f"use_flow_sigmas must be True: there are no others, got {use_flow_sigmas!r}")
        if flow_shift is not None:
            if shift not in (1.0, flow_shift):
                raise ValueError(f"shift and flow_shift are one number by two names, got {shift} and {flow_shift}")
            shift = flow_shift
        if not shift > 0:
            raise ValueError(f"shift must be above 0, got {shift}")
        check_integer("num_train_timesteps", num_train_timesteps)
        check_order(multistep_order)
        if multistep_order > 1 and stochastic_sampling:
            raise ValueError("multistep_order must be 1 with stochastic_sampling, whose steps draw noise, got 2")
        self._register_explicitly(
            shift=shift,
            flow_shift=shift,
            use_flow_sigmas=True,
            prediction_type=FLOW_PREDICTION if prediction_type == "flow" else prediction_type,
            timestep_spacing=timestep_spacing,
        )
        self.prediction_type, self._transitions, self.num_inference_steps = prediction_type, None, None
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        sigmas = self.sigmas
        if prediction_type in ("epsilon", "score") and num_train_timesteps > 1:
            sigmas = sigmas[1:]
            self.sigma_max = sigmas[0].item()
        if invert_sigmas:
            sigmas = 1 - sigmas
        self._visit(sigmas * num_train_timesteps, torch.cat([sigmas, sigmas.new_full((1,), float(invert_sigmas))]))

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """The keys that `from_config` hands to `__init__`, of this class's config or of another solver's of the path.

        Raises:
            ValueError: If the config is that of a model of another path.
        """
        return super().extract_init_dict(read_flow_model(config_dict, cls, kwargs), **kwargs)

    def _register_explicitly(self, **values) -> None:
        if "_use_default_values" in self.config:
            values["_use_default_values"] = [key for key in self.config["_use_default_values"] if key not in values]
        self.register_to_config(**values)

    # Timesteps.

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Chooses the timesteps that sampling visits.

        Args:
            num_inference_steps: Number of steps, spaced as the config says.
            device: Where `timesteps` and `sigmas` are to be.
            sigmas: Those before the config's shift and spacing, descending, without the 0 at the end.
            mu: The shift, with `use_dynamic_shifting`.
            timesteps: What the model is given. Alone they also say the levels, timestep / T; with `sigmas`, which do,
                they are as many.

        Raises:
            ValueError: If nothing says how many steps there are, or the list does not go from noise to data.
        """
        if not isinstance(num_inference_steps, Integral | None):
            raise ValueError(f"num_inference_steps must be an integer, got {num_inference_steps!r}")
        lists = [list_of(values) for values in (sigmas, timesteps) if values is not None]
        counts = {len(values) for values in lists} | ({num_inference_steps} - {None})
        if len(counts) != 1 or min(counts) < 1:
            raise ValueError(
                "num_inference_steps must be at least 1, or sigmas or timesteps must be given, and where there are more of "
                f"them they must agree, got num_inference_steps={num_inference_steps}, sigmas={sigmas} and "
                f"timesteps={timesteps}"
            )
        config = self.config
        if timesteps is not None and sigmas is None:
            self.num_inference_steps = len(lists[0])
            listed = torch.tensor(lists[0], dtype=torch.float32, device="cpu")
            end = float(config.invert_sigmas)
            self._visit(
                listed, torch.cat([listed / config.num_train_timesteps, torch.full((1,), end, device="cpu")]), device
            )
            return
        if sigmas is None and self._chosen is not None:
            chosen = self._chosen.make(num_inference_steps, "trajectory").tolist()
            self.set_timesteps(device=device, timesteps=chosen)
            return
        if sigmas is None and config.timestep_spacing == "trailing":
            sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps) * (
                self.sigma_max if self._ends_early else 1
            )
        super().set_timesteps(num_inference_steps, "cpu", sigmas, mu, timesteps)
        self._visit(self.timesteps, self.sigmas, device)

    @property
    def _ends_early(self) -> bool:
        return self.prediction_type in ("epsilon", "score")

    def _visit(self, timesteps: Tensor, sigmas: Tensor, device: str | torch.device | None = None) -> None:
        """Takes the list, given on the host."""
        config, listed = self.config, timesteps.tolist()
        levels = (1 - sigmas if config.invert_sigmas else sigmas).double()
        if not ((levels >= 0) & (levels <= 1)).all() or not (levels.diff() < 0).all():
            raise ValueError(
                "sigmas must go from noise to data, from 1 at most to above 0, each below the one before it, got "
                f"{levels[:-1].tolist()}; choose them, the number of steps or the shift so"
            )
        if self._ends_early and levels[0] == 1:
            raise ValueError(
                f"sigmas must be below 1 for prediction_type {self.prediction_type!r}, which says nothing of x_0 there"
            )
        self.timesteps, self.sigmas = timesteps.to(device), sigmas.to(device)
        self._step_index = self._begin_index = self._last_step = None
        self._transitions = self._make_transitions(listed, levels[:-1].tolist())
        self._remember_lists()

    def _remember_lists(self) -> None:
        lists = self._known_lists = (self.timesteps, self.sigmas)
        self._known_versions = tuple(map(version_of, lists))

    def _lists_are_known(self) -> bool:
        """Whether the lists are those of the transitions, neither of them replaced or written to."""
        lists = self.timesteps, self.sigmas
        same = all(known is each for known, each in zip(self._known_lists, lists, strict=True))
        return same and self._known_versions == tuple(map(version_of, lists))

    def _make_transitions(self, listed: list[float], levels: list[float]) -> FlowTransitions:
        config = self.config
        return FlowTransitions(
            self.timesteps, listed, levels, config.num_train_timesteps, config.invert_sigmas, self.prediction_type
        )

    def _current_transitions(self) -> FlowTransitions:
        known = self._transitions
        if torch.compiler.is_compiling():
            return known
        if not self._lists_are_known():
            # Pipelines replace them behind our back, or change them in place.
            sigmas = self.sigmas.cpu().double()
            levels = (1 - sigmas if self.config.invert_sigmas else sigmas)[: len(self.timesteps)]
            known = self._transitions = self._make_transitions(self.timesteps.tolist(), levels.tolist())
            self._remember_lists()
        return known

    def stretch_shift_to_terminal(self, t: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Sigmas stretched so that the last of them is `shift_terminal`; one at 1 stays there."""
        return t if t[-1] == 1 else super().stretch_shift_to_terminal(t)

    def previous_timestep(self, timestep: Tensor | float) -> Tensor:
        """The timestep after this one in sampling, the next listed one; that of the data after the last."""
        return self._current_transitions().following(timestep)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        return sample

    # Noising.

    def level(self, timestep: Tensor | float, like: Tensor) -> NoiseLevel:
        """The noise level at each timestep, listed or not, broadcasting against `like`.

        Args:
            timestep: In [0, num_train_timesteps], one or one for each sample.
            like: Gives the device and, if it is wider than float32, the dtype.
        """
        return self._current_transitions().level(timestep, like)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """x_t for the standard normal draw `noise`, computed in float32 or wider and cast last.

        Args:
            timesteps: In [0, num_train_timesteps], one or one for each sample.
        """
        level = self.level(timesteps, original_samples)
        return add_noise(original_samples, noise, level).to(torch.promote_types(original_samples.dtype, noise.dtype))

    def scale_noise(self, sample: Tensor, timestep: Tensor | float, noise: Tensor | None = None) -> Tensor:
        """`add_noise` as upstream's pipelines call it, in the dtype of `sample`."""
        if noise is None:
            raise ValueError("noise must be given: a standard normal draw of the shape of sample")
        return self.add_noise(sample, noise, timestep).to(sample.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor | float | None = None) -> Tensor:
        """The target of flow matching, noise - sample at all timesteps (with `invert_sigmas` sample - noise)."""
        velocity = training_target(wide(sample), wide(noise), NoiseLevel(0.0, 1.0), "flow")
        velocity = -velocity if self.config.invert_sigmas else velocity
        return velocity.to(torch.promote_types(sample.dtype, noise.dtype))

    # Steps.

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
        *,
        eta: float = 0.0,
        variance_noise: Tensor | None = None,
    ) -> FlowSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_t to x_s, s the next of the list: at `eta=0` and for a flow, x_t + (s - t) model_output.

        Args:
            model_output: The model's output at `sample`, of its shape.
            timestep: In [0, num_train_timesteps], one or one for each sample, shape `(batch,)`. One between the listed
                ones steps to the next listed one.
            sample: x_t, shape `(batch, channels, ...)`, or `(batch, tokens, channels)` with `per_token_timesteps`.
            s_churn, s_tmin, s_tmax, s_noise: As they are.
            generator: Source of the noise. With a list, that of sample i comes from generator i alone.
            per_token_timesteps: In place of `timestep`, one for each token, shape `(batch, tokens)`. The model's output is
                then x_0 - eps, as upstream's pipelines negate it. A token at timestep 0 stays as it is.
            eta: Share of the posterior's standard deviation that is drawn, in [0, 1]: 0 the flow, 1 the reverse chain.
            variance_noise: The unit noise itself, of the shape of `sample`, instead of a generator.

        Returns: `prev_sample` is x_s, `pred_original_sample` the predicted x_0.

        Raises:
            ValueError: If a shape does not fit, `eta` or a timestep is out of range, or the timestep is an integer, as
                the index of a step would be.
        """
        self._check_step(model_output, timestep, sample, (s_churn, s_tmin, s_tmax, s_noise), per_token_timesteps, eta)
        timestep = timestep if per_token_timesteps is None else per_token_timesteps
        transitions = self._current_transitions()
        at, sign = transitions.at(timestep, sample), self._sign(per_token_timesteps is not None)
        x_t, prediction = wide(sample), wide(model_output)
        stochastic = self.config.stochastic_sampling
        noise = None
        if (eta > 0 or stochastic) and not has_no_noise(at.s):
            noise = wide(draw_noise(x_t, generator, variance_noise))

        # The predicted x_0, the direction that points to x_t, and new noise: both former are sums of x_t and the output.
        std = at.s.sigma if stochastic else eta * at.posterior_std
        of_x_t, of_output = _step_factors(at, std)
        x0 = weighted_sum((at.x0_of_x_t, x_t), (sign * at.x0_of_output, prediction))
        more = self._second_order_terms(at, x0, is_noisy=eta > 0 or per_token_timesteps is not None)
        x_s = weighted_sum((of_x_t, x_t), (sign * of_output, prediction), (std, noise), *more)

        if not torch.compiler.is_compiling() and per_token_timesteps is None:
            index = transitions.index(timestep)
            self._step_index = self._step_index if index is None else index + 1
        return as_output(
            FlowSchedulerOutput, x_s, x0, torch.promote_types(sample.dtype, model_output.dtype), return_dict
        )

    def reverse_step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        return_dict: bool = True,
        model_input: Tensor | None = None,
    ) -> FlowSchedulerOutput | tuple[Tensor, Tensor]:
        """From x_s up to x_t: what `step` of first order at `timestep` and `eta=0` undoes.

        Args:
            model_output: The model's output at `timestep`, the level that is reached, of the shape of `sample`.
            timestep: The level t to reach, one or one for each sample; s is the next of the list, or the clean end.
            sample: x_s, shape `(batch, channels, ...)`.
            model_input: What the model saw; `sample` by default. It should be x_t.

        Returns: `prev_sample` is x_t, `pred_original_sample` the predicted x_0.

        Raises:
            ValueError: If a shape does not fit or a timestep is out of range.
        """
        if model_output.shape != sample.shape:
            raise ValueError(f"model_output must have shape {tuple(sample.shape)}, got {tuple(model_output.shape)}")
        at, sign = self._current_transitions().at(timestep, sample), self._sign(False)
        x_s, prediction = wide(sample), wide(model_output)
        of_x_t, of_output = _step_factors(at, 0.0)
        if self.prediction_type == "sample":  # of which the last step keeps nothing else
            x_t = x_s if model_input is None else wide(model_input)
            eps = weighted_sum((at.eps_of_x_t, x_t), (at.eps_of_output, prediction))
            x0 = weighted_sum((1 / at.s.alpha, x_s), (-at.s.sigma / at.s.alpha, eps))
            x_t = weighted_sum((at.t.alpha, x0), (at.t.sigma, eps))
        else:
            x_t = weighted_sum((1 / of_x_t, x_s), (-sign * of_output / of_x_t, prediction))
            x0 = weighted_sum((at.x0_of_x_t, x_t), (sign * at.x0_of_output, prediction))
        return as_output(
            FlowSchedulerOutput, x_t, x0, torch.promote_types(sample.dtype, model_output.dtype), return_dict
        )

    def invert(self, denoise: Callable[[Tensor, Tensor], Tensor], sample: Tensor, num_refinements: int = 0) -> Tensor:
        """The x_T that deterministic sampling over `timesteps` takes to `sample`, up to the error of the steps.

        Args: as `ExtDDIMScheduler.invert`.
        """
        for timestep in reversed(self.timesteps.unbind()):
            x_t = sample
            for _ in range(num_refinements + 1):
                output = denoise(x_t, timestep)
                x_t = self.reverse_step(output, timestep, sample, return_dict=False, model_input=x_t)[0]
            sample = x_t
        return sample

    def _sign(self, per_token: bool) -> float:
        """-1 where a flow goes the other way, from noise to data."""
        return -1.0 if self.prediction_type == "flow" and (self.config.invert_sigmas or per_token) else 1.0

    def _check_step(self, model_output, timestep, sample, unused, per_token_timesteps, eta) -> None:
        integer = isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point())
        if integer and per_token_timesteps is None:
            raise ValueError(
                f"timestep must be one of the scheduler's timesteps, as a float and not the index of a step, got {timestep}"
            )
        if model_output.shape != sample.shape:
            raise ValueError(f"model_output must have shape {tuple(sample.shape)}, got {tuple(model_output.shape)}")
        if unused != (0.0, 0.0, float("inf"), 1.0):
            raise ValueError(
                "s_churn, s_tmin, s_tmax and s_noise must be left as they are, since they have no meaning on this path; for "
                f"noise in the steps there is eta, got {unused}"
            )
        if not 0 <= eta <= 1 or (eta and self.config.stochastic_sampling):
            raise ValueError(f"eta must be in [0, 1], and 0 with stochastic_sampling, got {eta}")
        if per_token_timesteps is not None and self.config.invert_sigmas:
            raise ValueError("per_token_timesteps must not be given with invert_sigmas, whose order is the other one")


def _step_factors(at: Transition, std: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Factors of x_t and of the output in the mean of x_s, whose noise has the given standard deviation (DDIM, Eq. 12)."""
    direction = (at.s.sigma**2 - std**2) ** 0.5
    return (
        at.s.alpha * at.x0_of_x_t + direction * at.eps_of_x_t,
        at.s.alpha * at.x0_of_output + direction * at.eps_of_output,
    )


def list_of(values: Sequence[float] | np.ndarray | Tensor) -> list[float]:
    return [float(value) for value in (values.tolist() if isinstance(values, Tensor | np.ndarray) else values)]
