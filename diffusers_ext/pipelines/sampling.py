"""The call that the pipelines share: its options, and the loop from noise to images, with any scheduler and any guider."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from diffusers.guiders import BaseGuidance
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor

from diffusers_ext.draws import as_generators
from diffusers_ext.guidance.guided_denoiser import GuidedDenoiser
from diffusers_ext.guidance.guiding import Interval
from diffusers_ext.latents import image_channels, latent_scale
from diffusers_ext.machine import fast_precision
from diffusers_ext.pipelines.call_condition import CallCondition, ConditionImagesMixin
from diffusers_ext.pipelines.call_defaults import with_defaults
from diffusers_ext.pipelines.image_inputs import (
    ImageInput,
    encode_pixels,
    images_to_tensor,
    mask_to_tensor,
    sequences_to_tensor,
)
from diffusers_ext.pipelines.inpainting import check_resampling
from diffusers_ext.pipelines.outputs import (
    GuidedDiffusionPipelineOutput,
    check_output_type,
    decode_images,
    default_output_type,
)
from diffusers_ext.pipelines.statistics import check_clipping, labels_of_data
from diffusers_ext.pipelines.steps import Steps, noisy_start
from diffusers_ext.pipelines.truncation import truncated_start, truncated_timesteps
from diffusers_ext.schedulers.levels import path_name
from diffusers_ext.schedulers.samplers import check_sampler, set_timesteps
from diffusers_ext.sizes import as_size
from diffusers_ext.value_scale import ValueScale


class Condition(Protocol):
    """The labels or texts that the images of a call are to show."""

    weighted: bool  # whether it has weights of labels
    default_guidance_scale: float | None  # of a call that says nothing of guidance
    per_image: dict[str, Tensor | None]  # its tensors by the names of their arguments, each of one image or of all

    def can_guide(self, pipe: "SamplingMixin") -> bool:
        """Whether there is a condition, and one without it to lead away from."""

    def for_each_image(self, values: Tensor) -> Tensor:
        """What is given once for each prompt, as often as each has images."""

    def check(
        self, pipe: "SamplingMixin", guider: BaseGuidance | None, timesteps: Tensor, guide: Sequence[bool]
    ) -> None:
        """Refuses a guider that it, or the components, do not suffice for in the steps in which it acts."""

    def inputs(self, pipe: "SamplingMixin", batch_size: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Pairs of conditional and unconditional inputs of the network, by name, each of shape `(batch, ...)`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CallOptions:
    """The arguments that the calls of all pipelines have, as `GuidedDiffusionPipeline` describes them.

    Raises:
        ValueError: if they do not fit one another, whatever the pipeline.
    """

    batch_size: int = 1
    num_inference_steps: int | None
    guidance_scale: float | None
    generator: Generator | list[Generator] | None
    latents: Tensor | None
    image: ImageInput | None
    strength: float | None
    mask_image: ImageInput | None
    num_resample_steps: int
    guider: BaseGuidance | None
    guidance_rescale: float
    guidance_interval: Interval | None
    classifier_scale: float = 0.0
    internal_guidance_scale: float = 1.0
    timesteps: list[int] | None
    start_timestep: int | None = None
    eta: float
    use_clipped_model_output: bool | None
    low_memory: bool
    output_type: str | None
    return_dict: bool
    callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None
    callback_on_step_end_tensor_inputs: Sequence[str]
    trajectory_steps: Sequence[int] | None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "CallOptions":
        """From the arguments of a pipeline's call by their names, without those that only this pipeline has."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def __post_init__(self):
        if self.image is None:
            given = [name for name in ("strength", "mask_image") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{' and '.join(given)} must be given together with an image")
        if not 0 <= self.noise_share <= 1:
            raise ValueError(f"strength must be in [0, 1], got {self.strength}")
        if self.latents is not None and self.noise_share < 1:
            raise ValueError("latents must not be given together with an image and a strength below 1: they are noise")
        if self.start_timestep is not None:
            given = [name for name in ("image", "timesteps") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"start_timestep and {given[0]} both say where to start: give one of them")

    @property
    def noise_share(self) -> float:
        """How far back to noise the call starts: `strength`, or what it is by default; 1 is noise alone."""
        if self.strength is not None:
            return self.strength
        return 1.0 if self.image is None or self.mask_image is not None else 0.8

    def wanted_steps(self, num_steps: int) -> set[int]:
        """Indices of the steps that belong to the trajectory.

        Raises:
            ValueError: for one that there is not.
        """
        wanted = set(self.trajectory_steps or ())
        outside = sorted(i for i in wanted if not 0 <= i < num_steps)
        if outside:
            raise ValueError(f"trajectory_steps must be in [0, {num_steps - 1}], got {outside}")
        return wanted


class SamplingMixin(ConditionImagesMixin):
    """The call of a pipeline under a condition: labels or texts.

    The pipeline has a `denoiser` and a `scheduler`, and a `vae`, a `guider`, a `weak_denoiser` and `statistics`, which may be
    `None`.
    """

    _callback_tensor_inputs = ["latents"]
    _autocast_dtype = torch.float32

    def enable_autocast(self, dtype: torch.dtype | None = None) -> torch.dtype:
        """From the next call on, runs the networks in half precision under autocast; weights and steps stay in float32.

        Images differ by the rounding of the networks alone, and a call takes up to a third of the time on CPUs with AMX. The
        casts of the weights are made once in a call. For half the memory too, there is `pipe.to(torch.bfloat16)`.

        Args:
            dtype: bfloat16 or float16; by default what the pipeline's device is fastest at, which may be float32.

        Returns: the precision that the networks run in.

        Raises:
            ValueError: if it is none of these.
        """
        dtype = fast_precision(self._execution_device.type) if dtype is None else dtype
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"dtype must be torch.bfloat16, torch.float16 or torch.float32, got {dtype}")
        self._autocast_dtype = dtype
        return dtype

    def disable_autocast(self) -> None:
        """From the next call on, runs the networks in the precision of their weights."""
        self._autocast_dtype = torch.float32

    def _precision(self) -> AbstractContextManager:
        if self._autocast_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._execution_device.type, self._autocast_dtype)

    def __setattr__(self, name: str, value: Any):
        # Here every scheduler comes by, of the constructor, of `register_modules` and assigned.
        if name == "scheduler" and value is not None:
            path = getattr(self, "_internal_dict", {}).get("noise_path")
            check_sampler(value, type(self).__name__, path)
            if path is None:  # so the scheduler that a pipeline is made with says what its network was trained on
                self.register_to_config(noise_path=path_name(value))
        super().__setattr__(name, value)

    def _sample(self, condition: Condition, call: CallOptions) -> GuidedDiffusionPipelineOutput | tuple:
        """Generates a batch of images."""
        call = self._completed(condition, call)
        self._check_outputs(call)
        if call.num_resample_steps != 1:
            check_resampling(call.num_resample_steps, call.mask_image is not None, self.scheduler)
        device = self._execution_device
        pixels = None if call.image is None else condition.for_each_image(self._to_pixels(call.image, device))
        mask = None if call.mask_image is None else condition.for_each_image(self._to_mask(call.mask_image, pixels))
        batch_size = count_images(
            call.batch_size, **condition.per_image, latents=call.latents, image=pixels, mask_image=mask
        )
        generator = as_generators(call.generator, batch_size)
        if isinstance(condition, CallCondition):
            condition.draw_noise(batch_size, generator, device)
        listed = call.timesteps
        if call.start_timestep is not None:
            listed = truncated_timesteps(self.scheduler, call.num_inference_steps, call.start_timestep)
        scheduler, timesteps = set_timesteps(
            self.scheduler, call.num_inference_steps, listed, call.noise_share, device
        )
        steps = Steps(self, condition, call, scheduler, timesteps, batch_size, generator)
        labels = labels_of_data(self.statistics, condition)
        x0 = None
        if pixels is not None:
            x0 = encode_pixels(pixels, self.vae, self._sample_shape, self.statistics, labels)
        shape, start = (batch_size, *self._sample_shape), x0 if call.noise_share < 1 else None
        if call.start_timestep is None:
            x = noisy_start(scheduler, shape, generator, call.latents, start, timesteps)
        else:
            x = truncated_start(self, condition, shape, generator, call.latents, timesteps[:1], scheduler)
        steps.keep(x0, mask)

        scale = 1.0 if call.guidance_scale is None else call.guidance_scale
        self._guidance_scale, self._num_timesteps, self._interrupt = scale, len(timesteps), False
        with self.progress_bar(total=len(timesteps) * call.num_resample_steps) as bar:
            for i, t in enumerate(timesteps):
                self._current_timestep = t
                for times_left in reversed(range(call.num_resample_steps)):
                    output = steps.predict(x, i)
                    x = steps.advance(x, output, i, times_left)
                    x = steps.put_known(x, i, times_left)
                    bar.update()

                x = self._call_back(call, steps, i, x)
                if self._interrupt:
                    break

        images = decode_images(
            *(x, self.vae, call.output_type, pixels, mask), self.statistics, labels, self._value_scale
        )
        self.maybe_free_model_hooks()
        trajectory = None if call.trajectory_steps is None else steps.trajectory
        if not call.return_dict:
            return (images,) if trajectory is None else (images, trajectory)
        return GuidedDiffusionPipelineOutput(images=images, trajectory=trajectory)

    def _call_back(self, call: CallOptions, steps: Steps, i: int, x: Tensor) -> Tensor:
        """x as the call's callback leaves it after a step; if it has set another scale, the next ones are guided by that."""
        if call.callback_on_step_end is None:
            return x
        scale = self._guidance_scale
        returned = call.callback_on_step_end(self, i, steps.timesteps[i], {"latents": x})
        if self._guidance_scale != scale:
            steps.guide_by(self._guidance_scale)
        return (returned or {}).get("latents", x)

    def _completed(self, condition: Condition, call: CallOptions) -> CallOptions:
        """The call with what it leaves open as the pipeline was saved."""
        can_guide = condition.can_guide(self) and self.guider is None
        given = {field.name: getattr(call, field.name) for field in fields(call)}
        saved = with_defaults(given, self.config.get("call_defaults"), can_guide and not condition.weighted)
        if can_guide and call.guidance_scale is None and call.guider is None:
            saved.setdefault("guidance_scale", condition.default_guidance_scale)
        return replace(call, output_type=call.output_type or self._default_output, **saved)

    def _denoiser(
        self,
        scheduler: SchedulerMixin,
        guider: BaseGuidance | None,
        condition: Condition,
        batch_size: int,
        device: torch.device,
        low_memory: bool = False,
    ) -> GuidedDenoiser:
        """The network under its condition and guider."""
        inputs, regions = condition.inputs(self, batch_size, device), None
        if isinstance(condition, CallCondition):
            regions = condition.regional(inputs, batch_size, device)
        return GuidedDenoiser(
            self.denoiser,
            scheduler,
            guider,
            inputs,
            self._sample_shape[0],
            classifier=getattr(self, "classifier", None),
            weak_denoiser=self.weak_denoiser,
            low_memory=low_memory,
            regions=regions,
        )

    # For callbacks, under diffusers' names.

    @property
    def guidance_scale(self) -> float:
        """Weight of classifier-free guidance in the current step, or in the last one that was made."""
        return self._guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the call early, by setting `_interrupt`: the images are those of its last step."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Number of steps, and so of calls of a callback, in this call or the last."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor:
        """The timestep of the current step, or of the last one that was made."""
        return self._current_timestep

    # Shapes and images.

    @property
    def _dims(self) -> int:
        return self.denoiser.config.get("dims", 2)

    @property
    def _default_output(self) -> str:
        return default_output_type(self._dims)

    @property
    def _value_scale(self) -> ValueScale | None:
        """Between own units of sequences and the samples; None for images."""
        return ValueScale.of_config(self.config.get("value_scale"))

    @property
    def _sample_shape(self) -> tuple[int, ...]:
        """`(channels, *spatial)` of what the denoiser makes."""
        config = self.denoiser.config
        return (config.in_channels, *as_size(config.sample_size, self._dims))

    def _to_pixels(self, image: ImageInput, device: torch.device) -> Tensor:
        channels = self._sample_shape[0] if self.vae is None else self.vae.config.in_channels
        if (scale := self._value_scale) is not None:
            return sequences_to_tensor(image, scale).to(device)
        return images_to_tensor(image, channels, self._dims).to(device)

    def _to_mask(self, mask_image: ImageInput, pixels: Tensor) -> Tensor:
        mask = mask_to_tensor(mask_image, self._dims).to(pixels.device)
        if mask.shape[2:] != pixels.shape[2:]:
            sizes = ["x".join(map(str, tensor.shape[2:])) for tensor in (pixels, mask)]
            raise ValueError(f"mask_image must have the size of image, {sizes[0]}, got {sizes[1]}")
        return mask

    def _check_output_type(self, output_type: str) -> None:
        channels = self._sample_shape[0] if self.vae is None else image_channels(self.vae.config)
        check_output_type(output_type, channels, self._dims)

    def _check_outputs(self, call: CallOptions) -> None:
        """Refuses outputs that the pipeline cannot give."""
        vae, config = self.vae, self.scheduler.config
        self._check_output_type(call.output_type)
        known, asked, callback = self._callback_tensor_inputs, "", call.callback_on_step_end
        names = call.callback_on_step_end_tensor_inputs
        if hasattr(
            callback, "tensor_inputs"
        ):  # one of `diffusers.callbacks`, which says itself what it is to be given
            names = callback.tensor_inputs
            asked = f", which {type(callback).__name__} asks for; a function may set pipeline._guidance_scale"
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"callback_on_step_end_tensor_inputs must be among {known}, got {unknown}{asked}")
        if vae is not None:
            latent_scale(vae, torch.empty(1, self._sample_shape[0], *[1] * self._dims))
        check_clipping(config, vae is not None, self.statistics)


def count_images(batch_size: int, **tensors: Tensor | None) -> int:
    """The number of images that the arguments of a call agree on; one of an argument stands for any number.

    Raises:
        ValueError: if they differ.
    """
    given = {"batch_size": batch_size} if batch_size != 1 else {}
    for name, value in tensors.items():
        # Noise is not shared: one start noise means one image.
        if value is not None and (len(value) != 1 or name == "latents"):
            given[name] = len(value)
    if len(set(given.values())) > 1:
        each = ", ".join(f"{name} has {count}" for name, count in given.items())
        raise ValueError(f"the number of images must be the same everywhere, but {each}")
    size = next(iter(given.values()), 1)
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    return size
