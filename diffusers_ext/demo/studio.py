"""What the demo makes: from settings and pictures to pictures, without any page."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from PIL import Image, ImageOps
from torch import Generator, Tensor

from diffusers_ext.demo.settings import AS_SAVED, MAX_SEED, Settings, number, whole_number
from diffusers_ext.draws import between_draws, draw_normal
from diffusers_ext.evaluation.generate import condition_of
from diffusers_ext.evaluation.pipeline_facts import (
    default_of,
    image_size_of,
    label_names_of,
    num_labels_of,
    takes_prompts,
)
from diffusers_ext.evaluation.subject import default_scale, make_sampler
from diffusers_ext.figures import enlarged, labelled_grid
from diffusers_ext.guidance.guiding import guided_steps
from diffusers_ext.pipelines.outputs import decode_samples
from diffusers_ext.pipelines.truncation import truncated_timesteps
from diffusers_ext.schedulers.samplers import set_timesteps
from diffusers_ext.value_scale import ValueScale


# Schedulers to choose from, those of them that fit the pipeline.
SCHEDULERS = (
    "ExtDDIMScheduler",
    "ExtDDPMScheduler",
    "FlowScheduler",
    "ScoreSDEScheduler",
    "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
)
TRIED_STEPS = 10  # which a scheduler must be able to make
MAX_SHOWN_STEPS = 50  # of a trajectory
MIN_SIDE = 128  # pixels of a picture on the page; smaller ones are enlarged by a whole number
NO_CONDITION_IMAGES = "this pipeline makes images of condition images, for which the demo has no field"
MAX_BETWEEN = 32  # images of an interpolation


@dataclass(frozen=True)
class ShownStep:
    """A step of the sampler: a grid with the x_t of all images above the x_0 predicted from them."""

    head: str
    picture: Image.Image


@dataclass(frozen=True)
class Made:
    """Images, and the way to them."""

    images: list[Image.Image]
    steps: list[ShownStep]


def check_class(cls: type) -> None:
    """Refuses pipelines of a class that the demo does not know how to ask.

    Raises:
        ValueError: with what to do instead.
    """
    if not hasattr(cls, "_sample_shape"):
        raise ValueError(
            f"the demo takes pipelines of diffusers_ext, got {cls.__name__}: GuidedDiffusionPipeline.from_pipe makes one of it, if it "
            "makes images by labels or without"
        )


class Studio:
    """A pipeline of this package, asked by settings. One call at a time: others wait.

    Attributes:
        labels: Names, or numbers, of the labels that can be asked for; None without labels.
        takes_prompts: Whether images are asked for by a text.
        is_of_images: Whether pictures can be given to it, which sequences cannot.
        schedulers: `AS_SAVED`, and those of `SCHEDULERS` that sample the model from where its calls start.

    Raises:
        ValueError: for a pipeline that the demo cannot ask.
    """

    def __init__(self, pipe: DiffusionPipeline):
        check_class(type(pipe))
        if getattr(pipe, "image_condition", None) is not None:
            raise ValueError(NO_CONDITION_IMAGES)
        pipe.set_progress_bar_config(disable=True)
        self._pipe, self._lock = pipe, threading.Lock()
        self._start = (pipe.config.get("call_defaults") or {}).get("start_timestep")
        self.takes_prompts, self.is_of_images = takes_prompts(pipe), len(image_size_of(pipe)) == 2
        count = None if self.takes_prompts else num_labels_of(pipe)
        self.labels = None if count is None else label_names_of(pipe) or [str(label) for label in range(count)]
        self._are_named = bool(label_names_of(pipe))
        self._samplers = {AS_SAVED: pipe.scheduler}
        for name in SCHEDULERS:
            try:
                sampler = make_sampler(pipe, name)
                self._set_timesteps(
                    sampler, TRIED_STEPS if self._start is None else min(TRIED_STEPS, self._start or 1)
                )
            except (ValueError, ImportError):  # of another path or config, or of a library that is not there
                continue
            self._samplers[name] = sampler
        self.schedulers = list(self._samplers)

    @property
    def default_steps(self) -> int:
        """Steps of the pipeline's call by default."""
        return default_of(self._pipe, "num_inference_steps")

    @property
    def default_guidance(self) -> tuple[float, float, float]:
        """The scale of guidance in the pipeline's call by default, and from and to which fraction of its steps it acts."""
        pipe, scale = self._pipe, default_scale(self._pipe)
        if scale is None:  # its guider is what guides
            return 1.0, 0.0, 1.0
        interval = (pipe.config.get("call_defaults") or {}).get("guidance_interval")
        if interval is None:
            return scale, 0.0, 1.0
        sampler, timesteps = self._set_timesteps(pipe.scheduler, self.default_steps)
        acts = [step for step, guided in enumerate(guided_steps(interval, sampler, timesteps)) if guided]
        if not acts:
            return 1.0, 0.0, 1.0
        first, end = acts[0], acts[-1] + 1  # in the middle between two steps, so that rounding changes none
        return scale, round((first + 0.5) / len(timesteps), 3), min(1.0, round((end + 0.5) / len(timesteps), 3))

    def generate(self, settings: Settings) -> Made:
        """Images by their seeds, and the way to them from noise."""
        return self._make(settings)

    def from_image(self, settings: Settings, image: Image.Image | None, strength: float) -> Made:
        """Images that begin with a picture and some noise.

        Args:
            strength: In [0, 1]: 0 gives the picture, 1 does not look at it.
        """
        picture = self._fitted(image, "Give a picture to begin with.")
        strength = number("The strength", strength, 0.0, 1.0)
        return self._make(settings, image=picture, strength=strength)

    def inpaint(self, settings: Settings, image: Image.Image | None, layers: Sequence[Image.Image | None]) -> Made:
        """Images that keep a picture except where it was painted over.

        Args:
            layers: What was painted, with an alpha channel; wherever one of them is not transparent the image is made anew.
        """
        picture = self._fitted(image, "Give a picture to paint over.")
        mask = painted(layers, image.size)
        if mask.getbbox() is None:
            raise ValueError("Paint over the part that is to be made anew.")
        return self._make(settings, image=picture, mask_image=self._fitted(mask, ""))

    def interpolate(self, settings: Settings, other_seed: int, count: int) -> list[Image.Image]:
        """Images of the noise on the arc from the seed's to the other's, the ends included.

        What a sampler draws in its steps is the same for all of them. The first label counts, if there are several.
        """
        other = whole_number("The other seed", other_seed, 0, MAX_SEED)
        count = whole_number("The number of images", count, 2, MAX_BETWEEN)
        shape = (1, *self._pipe._sample_shape)
        ends = [draw_normal(shape, [Generator().manual_seed(seed)]) for seed in (settings.seed, other)]
        noise = torch.cat([between_draws(*ends, number / (count - 1)) for number in range(count)])
        with self._lock:
            result = self._call(
                settings,
                self._condition(settings, count, only_first=True),
                [settings.seed] * count,
                latents=noise.to(self._pipe._execution_device),
            )
        return self._pictures(result.images)

    def _make(self, settings: Settings, **more: Any) -> Made:
        condition = self._condition(settings, settings.num_images)
        with self._lock:
            shown = evenly(self._num_steps(settings, more.get("strength", 1.0), "image" in more), MAX_SHOWN_STEPS)
            result = self._call(settings, condition, settings.seeds, trajectory_steps=shown, **more)
        labels = None if "class_labels" not in condition else self._pipe.label_tensor(condition["class_labels"])
        return Made(self._pictures(result.images), [self._shown(point, labels) for point in result.trajectory])

    def _num_steps(self, settings: Settings, strength: float, of_image: bool) -> int:
        """Steps that the scheduler takes, which may be other than were asked for: with a picture to begin with, fewer."""
        return len(self._set_timesteps(self._sampler(settings), settings.num_steps, strength, of_image)[1])

    def _set_timesteps(
        self, sampler: SchedulerMixin, num_steps: int, strength: float = 1.0, of_image: bool = False
    ) -> tuple[SchedulerMixin, Tensor]:
        """As a call of the pipeline sets them, which starts where its `call_defaults` say unless it has a picture."""
        start = None if of_image else self._start
        listed = None if start is None else truncated_timesteps(sampler, num_steps, start)
        return set_timesteps(sampler, num_steps, listed, strength, self._pipe._execution_device)

    def _sampler(self, settings: Settings) -> SchedulerMixin:
        if settings.scheduler not in self._samplers:
            raise ValueError(f"The scheduler must be one of {', '.join(self.schedulers)}, got {settings.scheduler!r}.")
        return self._samplers[settings.scheduler]

    def _call(self, settings: Settings, condition: dict[str, Any], seeds: Sequence[int], **more: Any):
        pipe = self._pipe
        pipe.register_modules(scheduler=self._sampler(settings))
        return pipe(
            **condition,
            generator=[Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=settings.num_steps,
            output_type="pt",
            **settings.guidance,
            **more,
        )

    def _condition(self, settings: Settings, count: int, only_first: bool = False) -> dict[str, Any]:
        """Keywords of the call for what the images are to show."""
        if self.takes_prompts:
            return condition_of(count, prompts=[settings.prompt] * count)
        if not settings.labels:
            return condition_of(count)
        if self.labels is None:
            raise ValueError("This model was trained without labels: leave them out.")
        if unknown := [label for label in settings.labels if label not in self.labels]:
            raise ValueError(f"The label {unknown[0]!r} is none of the model's: {', '.join(self.labels)}.")
        labels = settings.labels[:1] if only_first else settings.labels
        labels = [label if self._are_named else int(label) for label in labels]
        return condition_of(count, labels=[labels[number % len(labels)] for number in range(count)])

    def _fitted(self, image: Image.Image | None, ask: str) -> Image.Image:
        """A picture in the size of the model's, cut to its shape."""
        if not self.is_of_images:
            raise ValueError("This model makes sequences, and takes no picture.")
        if image is None:
            raise ValueError(ask)
        height, width = image_size_of(self._pipe)
        return ImageOps.fit(image, (width, height), Image.Resampling.BOX)

    def _pictures(self, images: Tensor) -> list[Image.Image]:
        return [_picture(image) for image in images]

    def _shown(self, point, labels: Tensor | None) -> ShownStep:
        """A step of the trajectory as it looks: decoded, on the scale of the data."""
        vae, statistics = (getattr(self._pipe, name, None) for name in ("vae", "statistics"))
        scale = ValueScale.of_config(self._pipe.config.get("value_scale"))
        rows, names = [], []
        for name, samples in (("x_t", point.x_t), ("x_0", point.x0_hat)):
            if samples is None:
                continue
            with torch.no_grad():
                samples = decode_samples(samples, vae, statistics, labels).float()
            rows.append((samples + 1) / 2 if scale is None else scale.to_values(samples))
            names.append(name)
        return ShownStep(f"t = {point.timestep:g}", labelled_grid(rows, names))


def _picture(sample: Tensor) -> Image.Image:
    """An image in [0, 1], or a sequence in its own units, as a picture that can be looked at."""
    if sample.ndim == 2:
        return labelled_grid([sample[None]])
    array = sample.float().mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
    if array.shape[2] not in (3, 4):
        array = np.ascontiguousarray(array[..., 0])
    return enlarged(Image.fromarray(array), MIN_SIDE)


def evenly(count: int, at_most: int) -> list[int]:
    """Some of the numbers 0 to `count - 1`, evenly spaced, the first and the last among them; all if they are not too many."""
    if count <= at_most:
        return list(range(count))
    return [round(number * (count - 1) / (at_most - 1)) for number in range(at_most)]


def painted(layers: Sequence[Image.Image | None], size: tuple[int, int]) -> Image.Image:
    """White where at least one of the layers is not transparent, black elsewhere; of mode L."""
    mask = np.zeros((size[1], size[0]), dtype=bool)
    for layer in layers:
        if layer is not None:
            mask |= np.asarray(layer.convert("RGBA").resize(size, Image.Resampling.NEAREST))[..., 3] > 0
    return Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))
