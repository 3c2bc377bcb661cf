"""Images from noise: unconditional or by label, in pixels or in latents, with any scheduler and guider of diffusers."""

import difflib
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

from diffusers_ext.guidance import classifier_free_guidance, guided_prediction
from diffusers_ext.noising import NoiseLevel, predict_x0


# Where a network's config says how many labels it has: ours; diffusers' DiT; its UNet.
NUM_CLASSES_KEYS = ("num_classes", "num_embeds_ada_norm", "num_class_embeds")

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Labels = int | str | Sequence[int | str] | Tensor


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


class GuidedDiffusionPipeline(DiffusionPipeline):
    """Generates images from noise, unconditionally or by label.

    Args:
        denoiser: `UNetModel`, `DiTModel`, or a model of diffusers that is called `model(x_t, timestep, class_labels=)`.
        scheduler: Any scheduler of this package or of diffusers.
        vae: Decodes the denoiser's output, for models trained on latents; `None` for models trained on pixels.
        guider: How conditional and unconditional predictions are combined, if not by `guidance_scale`.
        id2label: Names of the labels by their ids, saved with the pipeline.

    Example:

        >>> import diffusers_ext
        >>> pipe = diffusers_ext.DiffusionPipeline.from_pretrained("runs/digits")
        >>> pipe(class_labels=[3, 3, 7], num_inference_steps=50, guidance_scale=2.0).images[0].save("three.png")
    """

    model_cpu_offload_seq = "denoiser->vae"
    _optional_components = ["vae", "guider"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        guider: BaseGuidance | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler, vae=vae, guider=guider)
        # JSON turns the keys into strings, and so does this, so that a saved pipeline equals the loaded one.
        self.register_to_config(id2label=None if id2label is None else {str(k): v for k, v in id2label.items()})
        self.image_processor = VaeImageProcessor()

    @property
    def num_classes(self) -> int | None:
        """Number of labels the denoiser knows, the null label not counted; `None` if it takes none."""
        config = self.denoiser.config
        for key in NUM_CLASSES_KEYS:
            if config.get(key) is not None:
                return config[key]
        return None

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no label", or `None` if the denoiser has none."""
        return None if self.denoiser.config.get("num_class_embeds") is not None else self.num_classes

    @property
    def labels(self) -> dict[str, int]:
        """Ids of the labels by name; empty if the labels have no names."""
        return {name: int(label) for label, name in (self.config.id2label or {}).items()}

    def get_label_ids(self, class_labels: Labels) -> list[int]:
        """Ids of one or several labels, each given by id or by name.

        Raises:
            ValueError: for a label that the model does not have.
        """
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence | np.ndarray):
            class_labels = [class_labels]
        if self.num_classes is None:
            raise ValueError("class_labels were given, but the model was trained without labels")
        return [self._label_id(label) for label in class_labels]

    def _label_id(self, label: int | str) -> int:
        if isinstance(label, str):
            if label not in self.labels:
                near = difflib.get_close_matches(label, self.labels, n=5, cutoff=0.4) or list(self.labels)[:20]
                hint = f"near ones are {', '.join(map(repr, near))}" if near else "this model's labels have no names"
                raise ValueError(f"class_labels has no label named {label!r}; {hint}")
            return self.labels[label]
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise ValueError(f"class_labels must be ids or names, got {label!r}")
        last = self.num_classes - 1
        if not (0 <= label <= last or label == self.null_label):
            null = "" if self.null_label is None else f", or {self.null_label} for no label"
            raise ValueError(f"class_labels must be in [0, {last}]{null}, got {label}")
        return int(label)

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
        guider: BaseGuidance | None = None,
        timesteps: list[int] | None = None,
        eta: float = 0.0,
        low_memory: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        trajectory_steps: Sequence[int] | None = None,
    ) -> GuidedDiffusionPipelineOutput | tuple:
        """Generates a batch of images.

        Args:
            class_labels: One label for all images, or one for each, as ids or as names; `None` for no label.
            batch_size: Number of images, where `class_labels` and `latents` do not say it.
            num_inference_steps: Number of steps, each of one call of the network (two with guidance).
            guidance_scale: Weight of classifier-free guidance; 1 is none. Not to be given together with a guider.
            generator: Source of the noise. With a list, one generator for each image, image i depends on generator i
                alone, whatever else is in the batch; one generator is drawn from for the batch as a whole.
            latents: Start noise of unit variance, shape `(batch, in_channels, *sample_size)`.
            guider: Takes the place of the pipeline's guider in this call.
            timesteps: Timesteps to visit, descending, in place of `num_inference_steps`.
            eta: Share of the noise that DDIM puts back in each step, in [0, 1]; other schedulers take none.
            low_memory: Call the network once for each prediction of a guider, instead of once for all.
            output_type: "pil"; "np", `(batch, height, width, channels)` in [0, 1]; "pt",
                `(batch, channels, height, width)` in [0, 1]; or "latent", as the sampler left them.
            return_dict: `False` returns a tuple of images and, if asked for, trajectory.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after each step; may return
                tensors to go on with.
            callback_on_step_end_tensor_inputs: Names of those tensors; "latents" is the only one.
            trajectory_steps: Indices of the steps whose `x_t` and predicted clean sample are returned.

        Raises:
            ValueError: if an argument does not fit the model, the scheduler or another argument.
        """
        guider = self._check_inputs(
            guider, guidance_scale, output_type, callback_on_step_end_tensor_inputs, latents, class_labels
        )
        device = self._execution_device
        labels = None if class_labels is None else self.get_label_ids(class_labels)
        batch_size = self._batch_size(labels, batch_size, latents)
        conditions = self._conditions(labels, batch_size, device)
        self._set_timesteps(num_inference_steps, timesteps, device)
        step_kwargs = self._step_kwargs(generator, eta)
        wanted = self._trajectory_indices(trajectory_steps, len(self.scheduler.timesteps))

        # In float32 whatever the network's precision: a sum of many small steps.
        shape = self._latent_shape(batch_size)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        x = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma

        trajectory = []
        with self.progress_bar(total=len(self.scheduler.timesteps)) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                model_input = self.scheduler.scale_model_input(x, t)
                if guider is not None:
                    guider.set_state(step=i, num_inference_steps=len(self.scheduler.timesteps), timestep=t)
                output = guided_prediction(
                    guider, self.denoiser, self._predictor(model_input, t), conditions, shape[1], low_memory
                )
                step = self.scheduler.step(self._as_expected(output, shape[1]), t, x, **step_kwargs)
                if i in wanted:
                    trajectory.append(self._trajectory_point(t, x, output[:, : shape[1]], step))
                x = step.prev_sample

                if callback_on_step_end is not None:
                    returned = callback_on_step_end(self, i, t, {"latents": x})
                    x = (returned or {}).get("latents", x)
                bar.update()

        images = self._decode(x, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,) if trajectory_steps is None else (images, trajectory)
        return GuidedDiffusionPipelineOutput(
            images=images, trajectory=None if trajectory_steps is None else trajectory
        )

    # What the call is made of, in its order.

    def _check_inputs(self, guider, guidance_scale, output_type, callback_inputs, latents, class_labels):
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        channels = self.denoiser.config.in_channels if self.vae is None else self.vae.config.out_channels
        if output_type == "pil" and (channels not in (1, 3, 4) or self.denoiser.config.get("dims", 2) != 2):
            raise ValueError(
                f"output_type must be 'np' or 'pt' for this model: 'pil' is for images of 1, 3 or 4 channels, and its "
                f"samples have {channels} channels and {self.denoiser.config.get('dims', 2)} dimensions"
            )
        unknown = [name for name in callback_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )
        guider = guider or self.guider
        if guider is not None and guidance_scale != 1.0:
            raise ValueError(
                f"guidance_scale must not be given together with a guider, which has a scale of its own, got "
                f"{guidance_scale}; give the guider that you want for this call as guider="
            )
        guider = guider or classifier_free_guidance(guidance_scale)
        if guider is not None and self.null_label is None:
            reason = "was trained without labels" if self.num_classes is None else "has no null label"
            raise ValueError(f"guidance needs a model with labels and a null label; this one {reason}")
        if guider is not None and class_labels is None:
            raise ValueError("guidance needs class_labels to guide to, got None")
        return guider

    def _batch_size(self, labels, batch_size, latents) -> int:
        given = {"batch_size": batch_size} if batch_size != 1 else {}
        if latents is not None:
            given["latents"] = len(latents)
        if labels is not None and len(labels) != 1:
            given["class_labels"] = len(labels)
        if len(set(given.values())) > 1:
            told = ", ".join(f"{name} has {count}" for name, count in given.items())
            raise ValueError(f"the number of images must be the same everywhere, but {told}")
        size = next(iter(given.values()), 1)
        if size < 1:
            raise ValueError(f"batch_size must be at least 1, got {size}")
        return size

    def _conditions(self, labels, batch_size: int, device) -> dict[str, tuple[Tensor, Tensor]]:
        """Pairs of labels and null labels, each of shape `(batch,)`."""
        if self.num_classes is None:
            return {}
        if labels is None and self.null_label is None:
            raise ValueError(f"class_labels must be given: the model has {self.num_classes} labels and no null label")
        null = torch.full((batch_size,), self.null_label or 0, device=device)
        if labels is None:
            return {"class_labels": (null, null)}
        return {"class_labels": (torch.tensor(labels, device=device).expand(batch_size), null)}

    def _set_timesteps(self, num_inference_steps: int, timesteps, device) -> None:
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        elif "timesteps" in inspect.signature(self.scheduler.set_timesteps).parameters:
            self.scheduler.set_timesteps(timesteps=timesteps, device=device)
        else:
            raise ValueError(f"{type(self.scheduler).__name__} takes no timesteps; give num_inference_steps")

    def _step_kwargs(self, generator, eta: float) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        if eta and "eta" not in accepted:
            raise ValueError(f"eta must be 0 for {type(self.scheduler).__name__}, which has none, got {eta}")
        given = {"generator": generator, "eta": eta}
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
        dims = config.get("dims", 2)
        size = (config.sample_size,) * dims if isinstance(config.sample_size, int) else tuple(config.sample_size)
        return (batch_size, config.in_channels, *size)

    def _predictor(self, model_input: Tensor, timestep: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
        """The network as a function of its conditions, which may be several times the batch."""

        def predict(conditions: dict[str, Tensor]) -> Tensor:
            size = len(next(iter(conditions.values()), model_input))
            x = model_input.repeat(size // len(model_input), *[1] * (model_input.ndim - 1)).to(self.denoiser.dtype)
            return self.denoiser(x, timestep.expand(size), **conditions, return_dict=False)[0].float()

        return predict

    def _as_expected(self, output: Tensor, channels: int) -> Tensor:
        """Leaves a learned variance away for a scheduler that has no use for it."""
        learned = str(self.scheduler.config.get("variance_type", "")).startswith("learned")
        return output if learned else output[:, :channels]

    def _trajectory_point(self, t: Tensor, x_t: Tensor, output: Tensor, step) -> TrajectoryPoint:
        x0_hat = getattr(step, "pred_original_sample", None)
        alpha_bar = getattr(self.scheduler, "alphas_cumprod", None)
        variance_preserving = torch.as_tensor(self.scheduler.init_noise_sigma).item() == 1
        if x0_hat is None and variance_preserving and alpha_bar is not None:
            alpha_bar = alpha_bar.double()[int(t)].to(x_t)
            level = NoiseLevel(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
            x0_hat = predict_x0(output, x_t, level, self.scheduler.config.prediction_type)
        return TrajectoryPoint(t.item(), x_t, x0_hat)

    def _decode(self, x: Tensor, output_type: str) -> list[Image.Image] | np.ndarray | Tensor:
        if output_type == "latent":
            return x
        if self.vae is not None:
            z = x / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0)
            x = self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float()
        x = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return x
        images = x.movedim(1, -1).cpu().numpy()
        if output_type == "np":
            return images
        return self.image_processor.numpy_to_pil(images)
