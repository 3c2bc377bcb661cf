"""The way from noise to images that the pipelines share: any scheduler, any guider, in pixels or in latents."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import LMSDiscreteScheduler, PNDMScheduler
from diffusers.guiders import BaseGuidance
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Generator, Tensor

from diffusers_ext.diffusion.noising import predict_x0
from diffusers_ext.draws import as_generators, draw_normal
from diffusers_ext.guidance.guided_denoiser import GuidedDenoiser, Interval, guided_steps
from diffusers_ext.latents import decode_latents
from diffusers_ext.pipelines.checks import check_outputs
from diffusers_ext.pipelines.image_inputs import ImageInput, encode_image, mask_to_tensor
from diffusers_ext.pipelines.inpainting import KnownPixels, check_resampling, mask_of_latents
from diffusers_ext.schedulers.levels import noise_level
from diffusers_ext.schedulers.samplers import check_sampler, check_timesteps


class TrajectoryPoint(NamedTuple):
    """What a step saw: `x_t` and the clean sample predicted from it, each on the scale of the model, [-1, 1] for data.

    `x0_hat` is `None` for a scheduler that works on another scale of x_t and does not say what it predicted.
    """

    timestep: int | float
    x_t: Tensor
    x0_hat: Tensor | None


@dataclass
class GuidedDiffusionPipelineOutput(BaseOutput):
    """Images of the asked type and, for the asked steps, points of the trajectory."""

    images: list[Image.Image] | np.ndarray | Tensor
    trajectory: list[TrajectoryPoint] | None = None


class SamplingMixin:
    """The call of a pipeline with a `denoiser`, a `scheduler`, and perhaps a `vae`, once it knows its condition.

    What the condition is - labels, texts - is the pipeline's own: the methods that look at it raise
    `NotImplementedError` here.
    """

    _callback_tensor_inputs = ["latents"]

    def __setattr__(self, name: str, value: Any):
        # Here every scheduler comes by, of the constructor, of `register_modules` and assigned.
        if name == "scheduler" and value is not None:
            check_sampler(value, type(self).__name__)
        super().__setattr__(name, value)

    def _sample(
        self,
        condition: Any,
        *,
        batch_size: int = 1,
        num_inference_steps: int,
        guidance_scale: float | None,
        generator: Generator | list[Generator] | None,
        latents: Tensor | None,
        image: ImageInput | None,
        strength: float | None,
        mask_image: ImageInput | None,
        num_resample_steps: int,
        guider: BaseGuidance | None,
        guidance_rescale: float,
        guidance_interval: Interval | None,
        classifier_scale: float = 0.0,
        timesteps: list[int] | None,
        eta: float,
        use_clipped_model_output: bool | None,
        low_memory: bool,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        trajectory_steps: Sequence[int] | None,
    ) -> GuidedDiffusionPipelineOutput | tuple:
        """Generates a batch of images; the arguments are those of `GuidedDiffusionPipeline`."""
        check_outputs(self, output_type, callback_on_step_end_tensor_inputs)
        given_guider = guider
        strength = self._strength(strength, image, mask_image, latents)
        check_resampling(num_resample_steps, mask_image is not None, self.scheduler)
        device = self._execution_device
        guider = self._choose_guider(condition, given_guider, guidance_scale, guidance_rescale, classifier_scale)
        x0, pixels = (None, None) if image is None else self._encode(image, device)
        mask = None if mask_image is None else mask_to_tensor(mask_image, self._dims).to(device)
        batch_size = self._count_images(condition, batch_size, latents=latents, image=x0, mask_image=mask)
        generator = as_generators(generator, batch_size)
        scheduler, visited = self._set_timesteps(num_inference_steps, timesteps, strength, device)
        guide = guided_steps(guidance_interval, scheduler, visited)
        self._check_guider(condition, guider, visited, guide)
        denoise = self._denoiser(scheduler, guider, condition, batch_size, device, low_memory)
        step_kwargs = self._step_kwargs(scheduler, generator, eta, use_clipped_model_output, guider, guide)
        wanted = self._trajectory_indices(trajectory_steps, len(visited))

        x = self._start(scheduler, batch_size, generator, latents, x0, strength, visited)
        known = None
        if mask is not None:
            spatial_mask = self._fitting_mask(mask, x0, pixels)
            known = KnownPixels(x0.expand_as(x), spatial_mask, scheduler, generator)

        guidance_scale = 1.0 if guidance_scale is None else guidance_scale
        self._guidance_scale, self._num_timesteps = guidance_scale, len(visited)
        trajectory = []
        with self.progress_bar(total=len(visited) * num_resample_steps) as bar:
            for i, t in enumerate(visited):
                for repeat in range(num_resample_steps):
                    output = denoise(x, t, i, len(visited), guide[i])
                    step = scheduler.step(self._as_expected(scheduler, output, x.shape[1]), t, x, **step_kwargs)
                    if i in wanted and repeat == num_resample_steps - 1:
                        trajectory.append(self._trajectory_point(scheduler, t, x, output[:, : x.shape[1]], step))
                    x = step.prev_sample
                    if known is not None:
                        x = known.put_into(x, visited[i + 1] if i + 1 < len(visited) else None)
                        x = known.renoise(x, t) if repeat < num_resample_steps - 1 else x
                    bar.update()

                if callback_on_step_end is not None:
                    returned = callback_on_step_end(self, i, t, {"latents": x})
                    x = (returned or {}).get("latents", x)
                    if self._guidance_scale != guidance_scale:
                        guidance_scale = self._guidance_scale
                        guider = self._choose_guider(
                            condition, given_guider, guidance_scale, guidance_rescale, classifier_scale
                        )
                        self._check_guider(condition, guider, visited, guide)
                        step_kwargs = self._step_kwargs(
                            scheduler, generator, eta, use_clipped_model_output, guider, guide
                        )
                        denoise = self._denoiser(scheduler, guider, condition, batch_size, device, low_memory)

        images = self._decode(x, output_type, pixels, mask)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,) if trajectory_steps is None else (images, trajectory)
        return GuidedDiffusionPipelineOutput(
            images=images, trajectory=None if trajectory_steps is None else trajectory
        )

    # What depends on the condition.

    def _choose_guider(
        self,
        condition: Any,
        guider: BaseGuidance | None,
        guidance_scale: float | None,
        guidance_rescale: float,
        classifier_scale: float,
    ) -> BaseGuidance | None:
        """The guider of a call: the one given, or the pipeline's, or what the short forms mean."""
        raise NotImplementedError

    def _count_images(self, condition: Any, batch_size: int, **tensors: Tensor | None) -> int:
        """The number of images that the condition and the other arguments agree on."""
        raise NotImplementedError

    def _check_guider(self, condition: Any, guider: BaseGuidance | None, timesteps: Tensor, guide: list[bool]) -> None:
        """Refuses a guider that the components or the condition do not suffice for in the steps in which it acts."""
        raise NotImplementedError

    def _denoiser(
        self,
        scheduler: SchedulerMixin,
        guider: BaseGuidance | None,
        condition: Any,
        batch_size: int,
        device: torch.device,
        low_memory: bool = False,
    ) -> GuidedDenoiser:
        """The network under its condition and guider."""
        raise NotImplementedError

    # What a callback may look at while the pipeline is called, under diffusers' names.

    @property
    def guidance_scale(self) -> float:
        """Weight of classifier-free guidance in the current step, or in the last one that was made."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps, and so of calls of a callback, in this call or the last."""
        return self._num_timesteps

    # What the call is made of, in its order.

    @property
    def _dims(self) -> int:
        return self.denoiser.config.get("dims", 2)

    def _strength(self, strength: float | None, image, mask_image, latents) -> float:
        if image is None:
            given = [name for name, value in (("strength", strength), ("mask_image", mask_image)) if value is not None]
            if given:
                raise ValueError(f"{' and '.join(given)} must be given together with an image")
            return 1.0
        if strength is None:
            strength = 0.8 if mask_image is None else 1.0
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        if latents is not None and strength < 1:
            raise ValueError("latents must not be given together with an image and a strength below 1: they are noise")
        return strength

    def _encode(self, image: ImageInput, device) -> tuple[Tensor, Tensor]:
        """The images as the denoiser knows them, and in pixels."""
        return encode_image(image, self.vae, self._latent_shape(1)[1:], device)

    def _set_timesteps(
        self, num_inference_steps: int, timesteps, strength: float, device
    ) -> tuple[SchedulerMixin, Tensor]:
        """The scheduler of the call and the timesteps to visit: the last ones, if it does not start from noise."""
        scheduler, name = self.scheduler, type(self.scheduler).__name__
        if strength < 1 and isinstance(scheduler, PNDMScheduler):
            # Its Runge-Kutta steps are for the start from noise; from the middle its multistep rule goes alone.
            scheduler = type(scheduler).from_config(scheduler.config, skip_prk_steps=True)
        options = {"num_inference_steps": num_inference_steps} if timesteps is None else {"timesteps": timesteps}
        if timesteps is not None and "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{name} takes no timesteps; give num_inference_steps")
        num_steps = num_inference_steps if timesteps is None else len(timesteps)
        try:
            scheduler.set_timesteps(**options, device=device)
        except (ValueError, IndexError) as error:
            raise ValueError(
                f"{name} cannot make {num_steps} steps; take another number or scheduler: {error}"
            ) from error
        check_timesteps(scheduler, num_steps)
        if strength == 1:
            return scheduler, scheduler.timesteps
        if isinstance(scheduler, PNDMScheduler):
            # Its list has the second timestep twice: the first step is made again with the mean of both predictions.
            each = torch.cat([scheduler.timesteps[:1], scheduler.timesteps[2:]])
            visited = each[num_steps - _num_visited(num_steps, strength) :]
            scheduler.timesteps = torch.cat([visited[:2], visited[1:]])
            return scheduler, scheduler.timesteps
        order = scheduler.order
        # Solvers of a higher order visit some timesteps in pairs, all but the last or the first.
        if len(scheduler.timesteps) not in (num_steps * order, num_steps * order - order + 1):
            raise ValueError(
                f"strength must be 1 for {name}, whose {len(scheduler.timesteps)} timesteps for {num_steps} steps cannot be "
                f"entered in the middle, got {strength}; take DPMSolverMultistepScheduler or ExtDDIMScheduler"
            )
        first = (num_steps - _num_visited(num_steps, strength)) * order
        if isinstance(scheduler, LMSDiscreteScheduler):
            # It counts the steps that it remembers from the start of its list, which so has to be the first visited one.
            scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[first:], scheduler.sigmas[first:]
            return scheduler, scheduler.timesteps
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return scheduler, scheduler.timesteps[first:]

    def _start(self, scheduler, batch_size: int, generator, latents, x0, strength: float, visited: Tensor) -> Tensor:
        """x_T from noise, or the level of the first visited timestep from an image."""
        # In float32 whatever the network's precision: a sum of many small steps.
        shape, device = self._latent_shape(batch_size), visited.device
        if latents is None:
            noise = draw_normal(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        else:
            noise = latents.to(device, torch.float32)
        if strength == 1:
            return noise * scheduler.init_noise_sigma
        x0 = x0.expand(shape)
        return scheduler.add_noise(x0, noise, visited[:1]) if len(visited) else x0

    def _step_kwargs(
        self,
        scheduler,
        generator,
        eta: float,
        reuse_clipped: bool | None,
        guider: BaseGuidance | None,
        guide: list[bool],
    ) -> dict[str, Any]:
        accepted = inspect.signature(scheduler.step).parameters
        if reuse_clipped is None:
            guided = guider is not None and guider._enabled and any(guide)
            reuse = guided and bool(self.config.get("clip_guided_noise"))
        else:
            reuse = reuse_clipped
        given = {"generator": generator, "eta": eta, "use_clipped_model_output": reuse}
        for name, asked, neutral in (("eta", eta, 0), ("use_clipped_model_output", reuse_clipped, None)):
            if asked and name not in accepted:
                kind = type(scheduler).__name__
                raise ValueError(f"{name} must be {neutral} for {kind}, which has none, got {asked}")
        return {name: value for name, value in given.items() if name in accepted}

    @staticmethod
    def _trajectory_indices(trajectory_steps, num_steps: int) -> set[int]:
        indices = set(trajectory_steps or ())
        outside = sorted(i for i in indices if not 0 <= i < num_steps)
        if outside:
            raise ValueError(f"trajectory_steps must be in [0, {num_steps - 1}], got {outside}")
        return indices

    def _latent_shape(self, batch_size: int) -> tuple[int, ...]:
        config = self.denoiser.config
        size = (config.sample_size,) * self._dims if isinstance(config.sample_size, int) else tuple(config.sample_size)
        return (batch_size, config.in_channels, *size)

    @staticmethod
    def _as_expected(scheduler, output: Tensor, channels: int) -> Tensor:
        """Leaves a learned variance away for a scheduler that has no use for it."""
        # A config keeps the keys of the scheduler that it came from, whether or not the class knows them.
        known = inspect.signature(type(scheduler).__init__).parameters
        learned = "variance_type" in known and str(scheduler.config.variance_type).startswith("learned")
        # Solvers of diffusers use no variance, and keep 3 channels of what they get, whatever the data.
        if learned and "algorithm_type" in known:
            if channels > 3:
                name = type(scheduler).__name__
                raise ValueError(
                    f"{name} takes no learned variance for {channels} channels, got variance_type="
                    f"{scheduler.config.variance_type!r}; make it by {name}.from_config(config, variance_type=None)"
                )
            learned = False
        return output if learned else output[:, :channels]

    def _fitting_mask(self, mask: Tensor, x0: Tensor, pixels: Tensor) -> Tensor:
        if mask.shape[2:] != pixels.shape[2:]:
            sizes = ["x".join(map(str, tensor.shape[2:])) for tensor in (pixels, mask)]
            raise ValueError(f"mask_image must have the size of image, {sizes[0]}, got {sizes[1]}")
        return mask if self.vae is None else mask_of_latents(mask, tuple(x0.shape[2:]))

    def _trajectory_point(self, scheduler, t: Tensor, x_t: Tensor, output: Tensor, step) -> TrajectoryPoint:
        x0_hat = getattr(step, "pred_original_sample", None)
        variance_preserving = torch.as_tensor(scheduler.init_noise_sigma).item() == 1
        if x0_hat is None and variance_preserving and hasattr(scheduler, "alphas_cumprod"):
            level = noise_level(scheduler, t, x_t)
            x0_hat = predict_x0(output, x_t, level, scheduler.config.prediction_type)
        return TrajectoryPoint(t.item(), x_t, x0_hat)

    def _decode(
        self, x: Tensor, output_type: str, pixels: Tensor | None = None, mask: Tensor | None = None
    ) -> list[Image.Image] | np.ndarray | Tensor:
        if output_type == "latent":
            return x
        if self.vae is not None:
            x = decode_latents(self.vae, x)
            if mask is not None:  # what is known is known in pixels, which the way through latents changes
                x = torch.where(mask.bool(), x, pixels)
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        images = x.movedim(1, -1).cpu().numpy()
        if output_type == "np":
            return images
        return self.image_processor.numpy_to_pil(images)


def _num_visited(num_steps: int, strength: float) -> int:
    # The small number is for shares such as 0.29, of which 100 are 28.999... in floating point.
    return int(num_steps * strength + 1e-6)
