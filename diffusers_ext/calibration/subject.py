"""The pipeline that is calibrated: its network in a pipeline of this package, and what images are asked of it by."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_ext.calibration.examples import Examples
from diffusers_ext.command_names import name_commands
from diffusers_ext.diffusion.analytic_variance import VISIBLE_NOISE
from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.noising import LEARNED_VARIANCES, NoiseSchedule
from diffusers_ext.diffusion.timestep_search import search_grid
from diffusers_ext.evaluation.bits_per_dim import clip_of
from diffusers_ext.evaluation.conditioned import condition_images
from diffusers_ext.evaluation.labelled_images import LabelledImages, convert_channels
from diffusers_ext.evaluation.pipeline_facts import label_names_of
from diffusers_ext.evaluation.subject import default_scale
from diffusers_ext.pipelines.call_condition import CallCondition
from diffusers_ext.pipelines.image_inputs import encode_pixels
from diffusers_ext.pipelines.label_condition import LabelCondition
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.pipelines.pipeline_text_guided_diffusion import TextGuidedDiffusionPipeline
from diffusers_ext.pipelines.statistics import labels_of_data
from diffusers_ext.pipelines.stock import components_for, stock_name
from diffusers_ext.pipelines.text_condition import TextCondition
from diffusers_ext.schedulers import ConsistencyScheduler, ExtDDIMScheduler, ExtDDPMScheduler, FlowScheduler
from diffusers_ext.schedulers.gaussian import GaussianSchedulerMixin
from diffusers_ext.schedulers.levels import is_linear, model_schedule, prediction_type_of
from diffusers_ext.schedulers.samplers import is_sampler


BATCH_SIZE = 50  # images at a time, by default

# In the scheduler's config of a student, the number of steps that it was distilled to.
STUDENT_STEPS = "_student_steps"


@dataclass
class Subject:
    """A pipeline, and what the calibration needs of it.

    Attributes:
        original: As it was loaded, and is saved.
        pipe: The one that is measured: the same, or one of this package with the networks of a pipeline of diffusers. Its
            scheduler is of this package.
        num_steps: Network calls that it is calibrated for.
        mixed_precision: That images are made in, "no", "bf16" or "fp16"; trajectories and errors are those of the weights as they
            are.
        batch_size: Images at a time.
    """

    original: DiffusionPipeline
    pipe: GuidedDiffusionPipeline | TextGuidedDiffusionPipeline
    num_steps: int
    mixed_precision: str = "no"
    batch_size: int = BATCH_SIZE
    # The scheduler that `own_timesteps` was last asked of, and the same without chosen timesteps.
    _plain: tuple[SchedulerMixin, SchedulerMixin] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, original: DiffusionPipeline, num_steps: int, **how: Any) -> "Subject":
        """A pipeline of this package, or of diffusers that is called as these are.

        Args:
            how: `mixed_precision` and `batch_size`.

        Raises:
            ValueError: if it is another, or its scheduler is for none of the paths that are known here.
        """
        if (getattr(original, "config", {}).get("call_defaults") or {}).get("start_timestep") is not None:
            raise ValueError(
                name_commands(
                    "a pipeline to calibrate must start from pure noise, got a start_timestep in its call_defaults: calibrate it "
                    "before training/fit_prior.py"
                )
            )
        name, pipe = type(original).__name__, original
        if isinstance(original, GuidedDiffusionPipeline | TextGuidedDiffusionPipeline):
            original.scheduler = own_scheduler(original.scheduler)
        elif stock_name(original.components, "denoiser") is None or getattr(original, "text_encoder_2", None):
            raise ValueError(
                "a pipeline to calibrate must have a network that is called with labels, with the hidden states of one text encoder, "
                f"or with neither, got {name} of {', '.join(original.components)}"
            )
        else:
            of_texts = getattr(original, "text_encoder", None) is not None or hasattr(original, "tokenizer")
            kind = TextGuidedDiffusionPipeline if of_texts else GuidedDiffusionPipeline
            components = components_for(kind, original) | {"scheduler": own_scheduler(original.scheduler)}
            pipe = kind(**components, **({} if of_texts else {"id2label": _names(original)}))
        if isinstance(pipe, TextGuidedDiffusionPipeline) and pipe.text_encoder is None:
            raise ValueError(f"a pipeline to calibrate must have its tokenizer and text_encoder, got {name} without")
        pipe.set_progress_bar_config(disable=True)
        pipe.denoiser.eval()
        return cls(original, pipe, num_steps, **how)

    def check_can_be_calibrated(self) -> None:
        """Refuses a student, whose timesteps and guidance it was distilled for.

        Raises:
            ValueError: with what to do instead.
        """
        steps = self.pipe.scheduler.config.get(STUDENT_STEPS)
        if steps is not None:
            raise ValueError(
                f"a pipeline to calibrate must be one that chooses its timesteps, got a student of {steps} steps, which was "
                "distilled for its own: calibrate the pipeline that it was distilled from, and distil again"
            )

    @property
    def keeps_defaults(self) -> bool:
        """Whether the pipeline that is saved can say what its calls do by default."""
        return self.pipe is self.original

    @property
    def of_texts(self) -> bool:
        """Whether images are asked for by texts."""
        return isinstance(self.pipe, TextGuidedDiffusionPipeline)

    @property
    def num_classes(self) -> int | None:
        """Labels that images are asked for by; None without."""
        return None if self.of_texts else self.pipe.denoiser_num_classes

    @property
    def needs_examples(self) -> bool:
        """Whether images can only be asked for by what real ones have, which labels are known without."""
        return self.of_texts or self.pipe.image_condition is not None

    def asks_as(self, examples: Examples | None) -> bool:
        """Whether images are asked for as these examples are, and not by a label each in turn or in proportion."""
        return (
            self.needs_examples or self.num_classes is not None and examples is not None and examples.sets is not None
        )

    @property
    def can_guide(self) -> bool:
        """Whether there is a condition to guide to, and the network knows what to do without, to be led away from."""
        pipe = self.pipe
        if pipe.image_condition is not None and pipe.denoiser.config.get("learned_without_image", True):
            return True
        if self.of_texts:
            return pipe.knows_empty_text
        return self.num_classes is not None and pipe.null_label is not None

    @property
    def takes_scale(self) -> bool:
        """Whether calls are guided by a scale, and not by a guider or by nothing."""
        return self.can_guide and self.pipe.guider is None

    @property
    def default_scale(self) -> float:
        """Of guidance, in calls of the pipeline that say nothing of it; 1 is none."""
        scale = default_scale(self.original) if self.can_guide else None
        return 1.0 if scale is None else scale

    @property
    def image_channels(self) -> int:
        """Of the images that the pipeline makes, or that its latents are of."""
        return (self.pipe.vae or self.pipe.denoiser).config.in_channels

    @property
    def has_betas(self) -> bool:
        """Whether the path is a table of betas, whose steps have a variance, and not the linear one."""
        return not is_linear(self.pipe.scheduler)

    @property
    def schedule(self) -> NoiseSchedule:
        """The path, whose `labels` are the timesteps of the scheduler."""
        return model_schedule(self.pipe.scheduler)

    @property
    def without_noise(self) -> ExtDDIMScheduler | FlowScheduler:
        """A sampler that draws no noise."""
        cls = ExtDDIMScheduler if self.has_betas else FlowScheduler
        return cls.from_config(self.pipe.scheduler.config, multistep_order=1)

    def own_timesteps(self, number: int) -> list[int]:
        """Those of the scheduler's spacing, whatever was chosen, in whole numbers."""
        scheduler = self.pipe.scheduler
        if self._plain is None or self._plain[0] is not scheduler:
            self._plain = scheduler, type(scheduler).from_config(scheduler.config, optimal_timesteps=None)
        plain = self._plain[1]
        if self.has_betas:
            return plain.list_timesteps(number).tolist()
        plain.set_timesteps(number)
        return plain.timesteps.round().int().tolist()

    def search_grid(self, number: int) -> Tensor:
        """Timesteps to choose from, at most so many, descending."""
        schedule, scheduler = self.schedule, self.pipe.scheduler
        rows = search_grid(schedule, number)
        if not self.has_betas and prediction_type_of(scheduler) in ("epsilon", "score"):
            rows = rows[1:]  # at the first there is no signal to divide by
        return schedule.labels(rows)

    @property
    def learns_variance(self) -> bool:
        return str(self.pipe.scheduler.config.get("variance_type")).startswith(LEARNED_VARIANCES)

    @property
    def clip(self) -> Callable[[Tensor], Tensor] | None:
        """What the sampler does to the predicted x_0, or None."""
        return clip_of(self.pipe.scheduler.config)

    def asked(self, examples: Examples) -> dict[str, list]:
        """Keywords of `generate_images` that ask for images as these are: by label, text and condition image of each."""
        asked: dict[str, list] = {}
        if (condition := self.pipe.image_condition) is not None:
            asked["conditions"] = list(condition_images(condition, examples.images.images, examples.conditions))
        if self.of_texts:
            asked["prompts"] = list(examples.captions)
        elif self.num_classes is not None and examples.sets is not None:
            asked["labels"] = [row.nonzero().flatten().tolist() for row in examples.sets]
        elif self.num_classes is not None and len(examples.images.label_names) == self.num_classes:
            asked["labels"] = examples.images.labels.tolist()
        return asked

    def ask_in_turn(self, number: int, examples: Examples | None = None, seed: int = 0) -> dict[str, list]:
        """The same for so many images of all labels in turn, or like examples that the seed draws."""
        if self.asks_as(examples):
            return self.asked(examples.draw(number, seed))
        return {} if self.num_classes is None else {"labels": [i % self.num_classes for i in range(number)]}

    def condition(self, asked: dict[str, list]) -> CallCondition:
        """What a call of the pipeline makes of these keywords."""
        pipe = self.pipe
        if self.of_texts:
            named = TextCondition(pipe, asked["prompts"], None, 1)
        else:
            named = LabelCondition(pipe, asked.get("labels"))
        return CallCondition(pipe, named, (), asked.get("conditions"))

    def clean_samples(self, examples: Examples) -> tuple[Tensor, CallCondition]:
        """x_0 of real images, on the scale of the network and its device, and the condition that each is asked for by."""
        condition = self.condition(self.asked(examples))
        return self.x0(examples.images, labels_of_data(self.pipe.statistics, condition)), condition

    def x0(self, images: LabelledImages, labels: Tensor | None = None) -> Tensor:
        """Real images on the scale of the network and its device.

        Args:
            labels: By which statistics of the data know their means, where they have one for each label.
        """
        pipe = self.pipe
        if (scale := pipe._value_scale or images.value_scale) is not None:
            pixels = scale.to_model(images.images).to(pipe.device, torch.float32)
        else:
            pixels = (
                convert_channels(images.images, self.image_channels).to(pipe.device, torch.float32) * (2 / 255) - 1
            )
        labels = None if labels is None else labels.to(pipe.device)
        return encode_pixels(pixels, pipe.vae, pipe._sample_shape, pipe.statistics, labels)

    def units(self, condition: CallCondition, like: Tensor) -> DataUnits | None:
        """From samples of the network to images in [-1, 1]; None if they are the same, or latents."""
        pipe = self.pipe
        if pipe.vae is not None or pipe.statistics is None:
            return None
        labels = labels_of_data(pipe.statistics, condition)
        return pipe.statistics.units(None if labels is None else labels.to(like.device), like)

    @property
    def has_bins(self) -> bool:
        """Whether the network's samples are images in 8 bits, and not latents or sequences."""
        return self.pipe.vae is None and self.pipe._dims == 2

    @property
    def last_noise(self) -> float | None:
        """The most noise, as `X0Variances` has it, that cannot be seen in a channel of an image in 8 bits; None for others."""
        pipe = self.pipe
        if not self.has_bins:
            return None
        return VISIBLE_NOISE if pipe.statistics is None else VISIBLE_NOISE / pipe.statistics.std.max().item()

    def network(self, condition: CallCondition, number: int) -> Callable[[Tensor, Tensor], Tensor]:
        """The network under a condition of so many samples, without guidance and without its variances.

        It takes samples and timesteps, which are the same for all of them.
        """
        denoiser = self.pipe._denoiser(self.pipe.scheduler, None, condition, number, self.pipe.device)

        def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
            return denoiser(x_t, timesteps[0])[:, : x_t.shape[1]]

        return denoise

    def choose(self, **config) -> None:
        """Puts keys into the config of the scheduler, in both pipelines."""
        scheduler = self.pipe.scheduler
        scheduler = type(scheduler).from_config(scheduler.config, **config)
        self.pipe.scheduler = scheduler
        if self.original is not self.pipe:
            self.original.register_modules(scheduler=scheduler)


def own_scheduler(scheduler: SchedulerMixin) -> ExtDDPMScheduler | ExtDDIMScheduler | FlowScheduler:
    """The scheduler of this package in the place of another: the same, or of diffusers' DDPM ours, or else DDIM.

    On the linear path it is `FlowScheduler`.

    Raises:
        ValueError: if it is for a model of another path, or for one that was distilled to consistency.
    """
    if isinstance(scheduler, ConsistencyScheduler) or is_sampler(scheduler, "LCMScheduler"):
        raise ValueError(
            "the pipeline must be one of a denoiser, got one with a network that was distilled to predict the end of its "
            f"trajectory, which {type(scheduler).__name__} samples: take the pipeline that it was distilled from"
        )
    if isinstance(scheduler, GaussianSchedulerMixin) and isinstance(scheduler, DDPMScheduler | DDIMScheduler):
        return scheduler
    if is_linear(scheduler):
        own = scheduler if isinstance(scheduler, FlowScheduler) else FlowScheduler.from_config(scheduler.config)
        if own.config.invert_sigmas or own.config.use_dynamic_shifting:
            raise ValueError(
                "a scheduler of the linear path must go from timestep T to 0 and know its shift by itself, got one with "
                f"invert_sigmas={own.config.invert_sigmas} and use_dynamic_shifting={own.config.use_dynamic_shifting}"
            )
        return own
    cls = ExtDDPMScheduler if isinstance(scheduler, DDPMScheduler) else ExtDDIMScheduler
    return cls.from_config(scheduler.config)


def _names(pipeline: DiffusionPipeline) -> dict[int, str] | None:
    names = label_names_of(pipeline)
    return None if names is None else dict(enumerate(names))
