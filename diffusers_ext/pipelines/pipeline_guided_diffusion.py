"""Images from noise: unconditional or by label, in pixels or in latents, with any scheduler and guider of diffusers."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Generator, Tensor

from diffusers_ext.guidance import GuidedDenoiser, Interval, guided_steps
from diffusers_ext.labels import LabelledMixin, Labels
from diffusers_ext.latents import decode_latents
from diffusers_ext.noising import predict_x0
from diffusers_ext.pipelines.checks import check_components, check_guider, check_outputs, choose_guider, count_images
from diffusers_ext.pipelines.image_inputs import ImageInput, encode_image, mask_to_tensor
from diffusers_ext.pipelines.inpainting import KnownPixels, check_resampling, mask_of_latents
from diffusers_ext.pipelines.inversion import InversionMixin
from diffusers_ext.schedulers.levels import noise_level


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


class GuidedDiffusionPipeline(LabelledMixin, InversionMixin, DiffusionPipeline):
    """Generates images from noise or from images, unconditionally or by label.

    Args:
        denoiser: `UNetModel`, `DiTModel`, or a model of diffusers that is called `model(x_t, timestep, class_labels=)`.
        scheduler: Any scheduler of this package or of diffusers.
        vae: `VAEModel` or an autoencoder of diffusers, for models trained on latents; `None` for models of pixels.
        guider: How conditional and unconditional predictions are combined, if not by `guidance_scale`.
        classifier: `NoisyClassifierModel`, for `ClassifierGuidance`.
        weak_denoiser: A weaker network of the same data, for `WeakModelGuidance`.
        id2label: Names of the labels by their ids, saved with the pipeline.

    Raises:
        ValueError: if the components do not fit one another.

    Example:

        >>> import diffusers_ext
        >>> pipe = diffusers_ext.DiffusionPipeline.from_pretrained("runs/digits")
        >>> three = pipe(class_labels=[3, 3, 7], num_inference_steps=50, guidance_scale=2.0).images[0]
        >>> other_threes = pipe(class_labels=3, batch_size=4, image=three, strength=0.6).images
    """

    model_cpu_offload_seq = "denoiser->vae"
    _exclude_from_cpu_offload = ["classifier", "weak_denoiser"]  # used in turns with the denoiser, in each step
    _optional_components = ["vae", "guider", "classifier", "weak_denoiser"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        guider: BaseGuidance | None = None,
        classifier: ModelMixin | None = None,
        weak_denoiser: ModelMixin | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        check_components(denoiser, vae, classifier, weak_denoiser)
        self.register_modules(
            denoiser=denoiser,
            scheduler=scheduler,
            vae=vae,
            guider=guider,
            classifier=classifier,
            weak_denoiser=weak_denoiser,
        )
        # JSON turns the keys into strings, and so does this, so that a saved pipeline equals the loaded one.
        self.register_to_config(id2label=None if id2label is None else {str(k): v for k, v in id2label.items()})
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        *,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        image: ImageInput | None = None,
        strength: float | None = None,
        mask_image: ImageInput | None = None,
        num_resample_steps: int = 1,
        guider: BaseGuidance | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval | None = None,
        classifier_scale: float = 0.0,
        timesteps: list[int] | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        low_memory: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        trajectory_steps: Sequence[int] | None = None,
    ) -> GuidedDiffusionPipelineOutput | tuple:
        """Generates a batch of images.

        Args:
            class_labels: One label for all images, or one for each, as ids or as names; `None` for no label. In place of
                a label there may be a list of labels that an image has all at once, for models trained so; or a dict
                from labels to weights, whose directions are then added up (`ComposedGuidance`).
            batch_size: Number of images, where `class_labels`, `latents` and `image` do not say it.
            num_inference_steps: Number of steps, each of one call of the network (two with guidance).
            guidance_scale: Weight of classifier-free guidance; 1 is none. Not to be given together with a guider.
            generator: Source of the noise. With a list, one generator for each image, image i depends on generator i
                alone, whatever else is in the batch; one generator is drawn from for the batch as a whole.
            latents: Start noise of unit variance, shape `(batch, in_channels, *sample_size)`.
            image: Images to start from, or to keep what `mask_image` says of: PIL images; arrays `(batch, height,
                width, channels)` or tensors `(batch, channels, height, width)` in [0, 1]; one for all, or one for each.
            strength: How far to go back to noise, in [0, 1]: 0 gives the image itself, 1 does not look at it. By
                default 0.8, or 1 with a `mask_image`. The steps taken are that share of `num_inference_steps`.
            mask_image: White (from 0.5 on) where to make the image anew, black where to keep it exactly.
            num_resample_steps: How often each step of inpainting is done, with noise added back between, so that the
                new parts fit the known ones better (RePaint, arXiv 2201.09865).
            guider: Takes the place of the pipeline's guider in this call.
            guidance_rescale: In [0, 1], how far a guided prediction gets the standard deviation of the conditional one
                back (arXiv 2305.08891, Section 3.4). For `guidance_scale`; a guider has its own.
            guidance_interval: Where to guide: `(start, stop)` as fractions of the steps, or `{"sigma": (low, high)}` in
                sigma / alpha, or `{"timestep": (low, high)}`. Elsewhere the conditional prediction is used alone, which
                costs one call of the network (arXiv 2404.07724).
            classifier_scale: Weight of the pipeline's classifier (`ClassifierGuidance`), on top of `guidance_scale`.
            timesteps: Timesteps to visit, descending, in place of `num_inference_steps`.
            eta: Share of the noise that DDIM puts back in each step, in [0, 1]; other schedulers take none.
            use_clipped_model_output: Whether DDIM takes the noise in x_t to be what the clipped x_0 leaves. By default it
                does under guidance, whose predictions leave the range of the data: the noise that they say would stay
                in the image. Other schedulers have no such choice.
            low_memory: Call the network once for each prediction of a guider, instead of once for all.
            output_type: "pil"; "np", `(batch, height, width, channels)` in [0, 1]; "pt",
                `(batch, channels, height, width)` in [0, 1]; or "latent", as the sampler left them.
            return_dict: `False` returns a tuple of images and, if asked for, trajectory.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after each step; may return
                tensors to go on with, and set `pipeline._guidance_scale` for the steps that follow. It is one of
                `pipeline.num_timesteps`.
            callback_on_step_end_tensor_inputs: Names of those tensors; "latents" is the only one.
            trajectory_steps: Indices of the steps whose `x_t` and predicted clean sample are returned.

        Raises:
            ValueError: if an argument does not fit the model, the scheduler or another argument.
        """
        check_outputs(self, output_type, callback_on_step_end_tensor_inputs)
        given_guider = guider
        strength = self._strength(strength, image, mask_image, latents)
        check_resampling(num_resample_steps, mask_image is not None, self.scheduler)
        device = self._execution_device
        labels = None if class_labels is None else self.label_tensor(class_labels)
        guider = choose_guider(self, given_guider, guidance_scale, guidance_rescale, classifier_scale, labels)
        x0, pixels = (None, None) if image is None else self._encode(image, device)
        mask = None if mask_image is None else mask_to_tensor(mask_image, self._dims).to(device)
        batch_size = count_images(
            batch_size=batch_size, latents=latents, class_labels=labels, image=x0, mask_image=mask
        )
        visited = self._set_timesteps(num_inference_steps, timesteps, strength, device)
        check_guider(self, guider, labels, visited, guidance_interval)
        guide = guided_steps(guidance_interval, self.scheduler, visited)
        denoise = self._denoiser(self.scheduler, guider, labels, batch_size, device, low_memory)
        step_kwargs = self._step_kwargs(generator, eta, use_clipped_model_output, guider, guide)
        wanted = self._trajectory_indices(trajectory_steps, len(visited))

        x = self._start(batch_size, generator, latents, x0, strength, visited)
        known = None
        if mask is not None:
            spatial_mask = self._fitting_mask(mask, x0, pixels)
            known = KnownPixels(x0.expand_as(x), spatial_mask, self.scheduler, generator)

        self._guidance_scale, self._num_timesteps = guidance_scale, len(visited)
        trajectory = []
        with self.progress_bar(total=len(visited) * num_resample_steps) as bar:
            for i, t in enumerate(visited):
                for repeat in range(num_resample_steps):
                    output = denoise(x, t, i, len(visited), guide[i])
                    step = self.scheduler.step(self._as_expected(output, x.shape[1]), t, x, **step_kwargs)
                    if i in wanted and repeat == num_resample_steps - 1:
                        trajectory.append(self._trajectory_point(t, x, output[:, : x.shape[1]], step))
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
                        guider = choose_guider(
                            self, given_guider, guidance_scale, guidance_rescale, classifier_scale, labels
                        )
                        check_guider(self, guider, labels, visited, guidance_interval)
                        step_kwargs = self._step_kwargs(generator, eta, use_clipped_model_output, guider, guide)
                        denoise = self._denoiser(self.scheduler, guider, labels, batch_size, device, low_memory)

        images = self._decode(x, output_type, pixels, mask)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,) if trajectory_steps is None else (images, trajectory)
        return GuidedDiffusionPipelineOutput(
            images=images, trajectory=None if trajectory_steps is None else trajectory
        )

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

    def _conditions(self, labels: Tensor | None, batch_size: int, device) -> dict[str, tuple[Tensor, Tensor]]:
        """Pairs of labels and null labels, each of shape `(batch,)`, or multi-hot or weights `(batch, num_classes)`."""
        if self.denoiser_num_classes is None:
            return {}
        if labels is None and self.null_label is None:
            raise ValueError(f"class_labels must be given: the model has {self.num_classes} labels and no null label")
        null = torch.full((batch_size,), self.null_label or 0, device=device)
        if labels is None:
            return {"class_labels": (null, null)}
        labels = labels.to(device).expand(batch_size, *labels.shape[1:])
        return {"class_labels": (labels, torch.zeros_like(labels) if labels.dtype == torch.bool else null)}

    def _denoiser(
        self, scheduler, guider, labels: Tensor | None, batch_size: int, device, low_memory: bool = False
    ) -> GuidedDenoiser:
        return GuidedDenoiser(
            self.denoiser,
            scheduler,
            guider,
            self._conditions(labels, batch_size, device),
            self.denoiser.config.in_channels,
            class_labels=None if labels is None else labels.to(device).expand(batch_size, *labels.shape[1:]),
            classifier=self.classifier,
            weak_denoiser=self.weak_denoiser,
            low_memory=low_memory,
        )

    def _set_timesteps(self, num_inference_steps: int, timesteps, strength: float, device) -> Tensor:
        """The timesteps to visit: the last ones, if it does not start from noise."""
        scheduler = self.scheduler
        if timesteps is None:
            scheduler.set_timesteps(num_inference_steps, device=device)
        elif "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
            scheduler.set_timesteps(timesteps=timesteps, device=device)
        else:
            raise ValueError(f"{type(scheduler).__name__} takes no timesteps; give num_inference_steps")
        if strength == 1:
            return scheduler.timesteps
        num_steps = num_inference_steps if timesteps is None else len(timesteps)
        # The small number is for shares such as 0.29, of which 100 are 28.999... in floating point.
        first = (num_steps - int(num_steps * strength + 1e-6)) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        return scheduler.timesteps[first:]

    def _start(self, batch_size: int, generator, latents, x0, strength: float, visited: Tensor) -> Tensor:
        """x_T from noise, or the level of the first visited timestep from an image."""
        # In float32 whatever the network's precision: a sum of many small steps.
        shape, device = self._latent_shape(batch_size), visited.device
        if latents is None:
            noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        else:
            noise = latents.to(device, torch.float32)
        if strength == 1:
            return noise * self.scheduler.init_noise_sigma
        x0 = x0.expand(shape)
        return self.scheduler.add_noise(x0, noise, visited[:1]) if len(visited) else x0

    def _step_kwargs(
        self, generator, eta: float, reuse_clipped: bool | None, guider: BaseGuidance | None, guide: list[bool]
    ) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        guided = guider is not None and guider._enabled and any(guide)
        given = {
            "generator": generator,
            "eta": eta,
            "use_clipped_model_output": guided if reuse_clipped is None else reuse_clipped,
        }
        for name, asked, neutral in (("eta", eta, 0), ("use_clipped_model_output", reuse_clipped, None)):
            if asked and name not in accepted:
                scheduler = type(self.scheduler).__name__
                raise ValueError(f"{name} must be {neutral} for {scheduler}, which has none, got {asked}")
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

    def _as_expected(self, output: Tensor, channels: int) -> Tensor:
        """Leaves a learned variance away for a scheduler that has no use for it."""
        # A config keeps the keys of the scheduler that it came from, whether or not the class knows them.
        known = inspect.signature(type(self.scheduler).__init__).parameters
        learned = "variance_type" in known and str(self.scheduler.config.variance_type).startswith("learned")
        # Solvers of diffusers use no variance, and keep 3 channels of what they get, whatever the data.
        if learned and "algorithm_type" in known:
            if channels > 3:
                name = type(self.scheduler).__name__
                raise ValueError(
                    f"{name} takes no learned variance for {channels} channels, got variance_type="
                    f"{self.scheduler.config.variance_type!r}; make it by {name}.from_config(config, variance_type=None)"
                )
            learned = False
        return output if learned else output[:, :channels]

    def _fitting_mask(self, mask: Tensor, x0: Tensor, pixels: Tensor) -> Tensor:
        if mask.shape[2:] != pixels.shape[2:]:
            sizes = ["x".join(map(str, tensor.shape[2:])) for tensor in (pixels, mask)]
            raise ValueError(f"mask_image must have the size of image, {sizes[0]}, got {sizes[1]}")
        return mask if self.vae is None else mask_of_latents(mask, tuple(x0.shape[2:]))

    def _trajectory_point(self, t: Tensor, x_t: Tensor, output: Tensor, step) -> TrajectoryPoint:
        x0_hat = getattr(step, "pred_original_sample", None)
        variance_preserving = torch.as_tensor(self.scheduler.init_noise_sigma).item() == 1
        if x0_hat is None and variance_preserving and hasattr(self.scheduler, "alphas_cumprod"):
            level = noise_level(self.scheduler, t, x_t)
            x0_hat = predict_x0(output, x_t, level, self.scheduler.config.prediction_type)
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
