"""The call that the pipelines share: its options, and the loop from noise to images, with any scheduler and any guider."""

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from diffusers.guiders import BaseGuidance
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor

from diffusers_ext.draws import as_generators, draw_normal
from diffusers_ext.guidance.guided_denoiser import GuidedDenoiser
from diffusers_ext.guidance.guiding import Interval, choose_guider, guided_steps
from diffusers_ext.latents import latent_scale
from diffusers_ext.machine import fast_precision
from diffusers_ext.pipelines.call_defaults import with_defaults
from diffusers_ext.pipelines.image_inputs import (
    ImageInput,
    encode_pixels,
    images_to_tensor,
    mask_to_tensor,
    sequences_to_tensor,
)
from diffusers_ext.pipelines.inpainting import KnownPixels, check_resampling, mask_of_latents
from diffusers_ext.pipelines.outputs import GuidedDiffusionPipelineOutput, TrajectoryPoint, decode_images
from diffusers_ext.schedulers.levels import add_noise_at, path_name, start_scale
from diffusers_ext.schedulers.samplers import check_sampler, set_timesteps
from diffusers_ext.sizes import as_size
from diffusers_ext.value_scale import ValueScale


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class Condition(Protocol):
    """The labels or texts that the images of a call are to show."""

    weighted: bool  # whether it has weights of labels
    can_guide: bool  # whether there is a condition, and one without it to lead away from
    per_image: dict[str, Tensor | None]  # its tensors by the names of their arguments, each of one image or of all

    def check(self, guider: BaseGuidance | None, timesteps: Tensor, guide: Sequence[bool]) -> None:
        """Refuses a guider that it, or the components, do not suffice for in the steps in which it acts."""

    def inputs(self, batch_size: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
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
    timesteps: list[int] | None
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
        if self.output_type not in (None, *OUTPUT_TYPES):
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {self.output_type!r}")
        if self.image is None:
            given = [name for name in ("strength", "mask_image") if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{' and '.join(given)} must be given together with an image")
        if not 0 <= self.noise_share <= 1:
            raise ValueError(f"strength must be in [0, 1], got {self.strength}")
        if self.latents is not None and self.noise_share < 1:
            raise ValueError("latents must not be given together with an image and a strength below 1: they are noise")

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


class SamplingMixin:
    """The call of a pipeline under a condition: labels or texts.

    The pipeline has a `denoiser` and a `scheduler`, and a `vae`, a `guider` and a `weak_denoiser`, which may be `None`.
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
        pixels = None if call.image is None else self._to_pixels(call.image, device)
        mask = None if call.mask_image is None else self._to_mask(call.mask_image, pixels)
        batch_size = count_images(
            call.batch_size, **condition.per_image, latents=call.latents, image=pixels, mask_image=mask
        )
        generator = as_generators(call.generator, batch_size)
        scheduler, timesteps = set_timesteps(
            self.scheduler, call.num_inference_steps, call.timesteps, call.noise_share, device
        )
        num_steps, guide = len(timesteps), guided_steps(call.guidance_interval, scheduler, timesteps)
        wanted, used = call.wanted_steps(num_steps), _channels_for_step(scheduler, self._sample_shape[0])

        def guided_by(guidance_scale: float | None) -> tuple[GuidedDenoiser, dict[str, Any]]:
            """The network under the guider of this scale, and the options of the scheduler's step under it."""
            guider = self.guider if call.guider is None else call.guider
            guider = choose_guider(
                guider, guidance_scale, call.guidance_rescale, call.classifier_scale, weighted=condition.weighted
            )
            condition.check(guider, timesteps, guide)
            denoise = self._denoiser(scheduler, guider, condition, batch_size, device, call.low_memory)
            is_guided = guider is not None and guider._enabled and any(guide)
            reuse_clipped = is_guided and bool(self.config.get("clip_guided_noise"))
            return denoise, _step_options(scheduler, generator, call, reuse_clipped)

        denoise, step_options = guided_by(call.guidance_scale)
        x0 = None if pixels is None else encode_pixels(pixels, self.vae, self._sample_shape)
        shape, start = (batch_size, *self._sample_shape), x0 if call.noise_share < 1 else None
        x = _noisy_start(scheduler, shape, generator, call.latents, start, timesteps)
        known = None
        if mask is not None:
            spatial_mask = mask if self.vae is None else mask_of_latents(mask, self._sample_shape[1:])
            known = KnownPixels(x0.expand_as(x), spatial_mask, scheduler, generator)

        scale = 1.0 if call.guidance_scale is None else call.guidance_scale
        self._guidance_scale, self._num_timesteps, trajectory = scale, num_steps, []
        with self.progress_bar(total=num_steps * call.num_resample_steps) as bar:
            for i, t in enumerate(timesteps):
                for times_left in reversed(range(call.num_resample_steps)):
                    output = denoise(x, t, i, num_steps, guide[i])
                    step = scheduler.step(output[:, :used], t, x, **step_options)
                    if i in wanted and not times_left:
                        trajectory.append(TrajectoryPoint.of_step(scheduler, t, x, output, step))
                    x = step.prev_sample
                    if known is not None:
                        x = known.put_into(x, timesteps[i + 1] if i + 1 < num_steps else None)
                        x = known.renoise(x, t) if times_left else x
                    bar.update()

                if call.callback_on_step_end is not None:
                    returned = call.callback_on_step_end(self, i, t, {"latents": x})
                    x = (returned or {}).get("latents", x)
                    if self._guidance_scale != scale:
                        scale = self._guidance_scale
                        denoise, step_options = guided_by(scale)

        images = decode_images(x, self.vae, call.output_type, pixels, mask, self._value_scale)
        self.maybe_free_model_hooks()
        trajectory = None if call.trajectory_steps is None else trajectory
        if not call.return_dict:
            return (images,) if trajectory is None else (images, trajectory)
        return GuidedDiffusionPipelineOutput(images=images, trajectory=trajectory)

    def _completed(self, condition: Condition, call: CallOptions) -> CallOptions:
        """The call with what it leaves open as the pipeline was saved."""
        can_guide = condition.can_guide and not condition.weighted and self.guider is None
        given = {field.name: getattr(call, field.name) for field in fields(call)}
        output_type = call.output_type or self._default_output
        return replace(
            call, output_type=output_type, **with_defaults(given, self.config.get("call_defaults"), can_guide)
        )

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
        return GuidedDenoiser(
            self.denoiser,
            scheduler,
            guider,
            condition.inputs(batch_size, device),
            self._sample_shape[0],
            classifier=getattr(self, "classifier", None),
            weak_denoiser=self.weak_denoiser,
            low_memory=low_memory,
        )

    # For callbacks, under diffusers' names.

    @property
    def guidance_scale(self) -> float:
        """Weight of classifier-free guidance in the current step, or in the last one that was made."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps, and so of calls of a callback, in this call or the last."""
        return self._num_timesteps

    # Shapes and images.

    @property
    def _dims(self) -> int:
        return self.denoiser.config.get("dims", 2)

    @property
    def _default_output(self) -> str:
        return "pil" if self._dims == 2 else "np"

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

    def _check_outputs(self, call: CallOptions) -> None:
        """Refuses outputs that the pipeline cannot give."""
        vae, config = self.vae, self.scheduler.config
        channels = self._sample_shape[0] if vae is None else vae.config.out_channels
        if call.output_type == "pil" and (channels not in (1, 3, 4) or self._dims != 2):
            raise ValueError(
                f"output_type must be 'np' or 'pt' for this model: 'pil' is for images of 1, 3 or 4 channels, and its "
                f"samples have {channels} channels and {self._dims} dimensions"
            )
        unknown = [
            name for name in call.callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs
        ]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )
        if vae is None:
            return
        latent_scale(vae, torch.empty(1, self._sample_shape[0], *[1] * self._dims))
        bound = config.get("clip_sample_range", 1.0)
        if config.get("clip_sample") and bound <= 1:
            warnings.warn(
                f"the scheduler clips what it predicts to [-{bound:g}, {bound:g}], which is the range of images and not of "
                "latents: make it with clip_sample=False",
                stacklevel=5,
            )


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


def _channels_for_step(scheduler: SchedulerMixin, channels: int) -> int | None:
    """Channels of a network's output that the scheduler's step takes: those of the sample, or all, with a learned variance.

    Raises:
        ValueError: if the scheduler would misread a learned variance.
    """
    # A config keeps the keys of the scheduler that it came from, whether or not the class knows them.
    known = inspect.signature(type(scheduler).__init__).parameters
    if "variance_type" not in known or not str(scheduler.config.variance_type).startswith("learned"):
        return channels
    if "algorithm_type" not in known:
        return None
    # Solvers of diffusers use no variance, and keep 3 channels of what they get, whatever the data.
    if channels > 3:
        name = type(scheduler).__name__
        raise ValueError(
            f"{name} takes no learned variance for {channels} channels, got variance_type="
            f"{scheduler.config.variance_type!r}; make it by {name}.from_config(config, variance_type=None)"
        )
    return channels


def _step_options(
    scheduler: SchedulerMixin,
    generator: Generator | list[Generator] | None,
    call: CallOptions,
    reuse_clipped: bool,
) -> dict[str, Any]:
    """Options of the scheduler's step, of those that it has.

    Args:
        reuse_clipped: Whether DDIM uses the clipped x_0 where the call does not say it.

    Raises:
        ValueError: if the call asks for one that it has not.
    """
    accepted = inspect.signature(scheduler.step).parameters
    asked = call.use_clipped_model_output
    for name, value, neutral in (("eta", call.eta, 0), ("use_clipped_model_output", asked, None)):
        if value and name not in accepted:
            kind = type(scheduler).__name__
            raise ValueError(f"{name} must be {neutral} for {kind}, which has none, got {value}")
    reuse = reuse_clipped if asked is None else asked
    options = {"generator": generator, "eta": call.eta, "use_clipped_model_output": reuse}
    return {name: value for name, value in options.items() if name in accepted}


def _noisy_start(
    scheduler: SchedulerMixin,
    shape: tuple[int, ...],
    generator: Generator | list[Generator] | None,
    latents: Tensor | None,
    x0: Tensor | None,
    timesteps: Tensor,
) -> Tensor:
    """x_T from noise, or from clean samples the level of the first timestep; float32, whatever the network's precision,
    since sampling is a sum of many small steps.

    Args:
        latents: The noise, of unit variance, if it is given.
        x0: Clean samples to start from, one or as many as `shape` says, on the scale of the denoiser; `None` for noise.
    """
    device = timesteps.device
    if latents is None:
        noise = draw_normal(shape, generator=generator, device=device, dtype=torch.float32)
    elif latents.shape != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
    else:
        noise = latents.to(device, torch.float32)
    if x0 is None:
        return noise * start_scale(scheduler)
    x0 = x0.expand(shape)
    return add_noise_at(scheduler, x0, noise, timesteps[:1]) if len(timesteps) else x0
