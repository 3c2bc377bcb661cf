"""The pipeline that is calibrated: its network in a pipeline of this package, and the clean samples that it was trained on."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from diffusers_ext.command_names import name_commands
from diffusers_ext.diffusion.analytic_variance import VISIBLE_NOISE
from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.noising import LEARNED_VARIANCES, NoiseSchedule
from diffusers_ext.diffusion.timestep_search import search_grid
from diffusers_ext.evaluation.bits_per_dim import clip_of
from diffusers_ext.evaluation.labelled_images import LabelledImages, convert_channels, drawn_order
from diffusers_ext.evaluation.pipeline_facts import label_names_of
from diffusers_ext.pipelines.image_inputs import encode_pixels
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.schedulers import ConsistencyScheduler, ExtDDIMScheduler, ExtDDPMScheduler, FlowScheduler
from diffusers_ext.schedulers.gaussian import GaussianSchedulerMixin
from diffusers_ext.schedulers.levels import is_linear, model_schedule, prediction_type_of
from diffusers_ext.schedulers.samplers import is_sampler


# Parts of a pipeline of diffusers that may be its network.
NETWORKS = ("denoiser", "unet", "transformer")

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
    """

    original: DiffusionPipeline
    pipe: GuidedDiffusionPipeline
    num_steps: int
    # The scheduler that `own_timesteps` was last asked of, and the same without chosen timesteps.
    _plain: tuple[SchedulerMixin, SchedulerMixin] | None = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, original: DiffusionPipeline, num_steps: int) -> "Subject":
        """A pipeline without texts, unconditional or by label, in pixels or latents.

        Raises:
            ValueError: if it is another, or its scheduler is for none of the paths that are known here.
        """
        name = type(original).__name__
        network = next((part for part in NETWORKS if isinstance(getattr(original, part, None), nn.Module)), None)
        if network is None or getattr(original, "text_encoder", None) is not None or hasattr(original, "tokenizer"):
            raise ValueError(
                name_commands(
                    f"a pipeline to calibrate must make images by label or of no condition, got {name}: of texts, compare scales of "
                    "guidance with training/sample_prompts.py"
                )
            )
        if getattr(original, "image_condition", None) is not None:
            raise ValueError(
                f"a pipeline to calibrate must have no condition images, got {original.image_condition.describe()}"
            )
        if (getattr(original, "config", {}).get("call_defaults") or {}).get("start_timestep") is not None:
            raise ValueError(
                name_commands(
                    "a pipeline to calibrate must start from pure noise, got a start_timestep in its call_defaults: calibrate it "
                    "before training/fit_prior.py"
                )
            )
        scheduler = own_scheduler(original.scheduler)
        if isinstance(original, GuidedDiffusionPipeline):
            original.scheduler = scheduler
            pipe = original
        else:
            pipe = GuidedDiffusionPipeline(
                getattr(original, network), scheduler, vae=getattr(original, "vae", None), id2label=_names(original)
            )
        pipe.set_progress_bar_config(disable=True)
        pipe.denoiser.eval()
        return cls(original, pipe, num_steps)

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
    def can_guide(self) -> bool:
        """Whether there are labels to guide to, and a null label to lead away from."""
        return self.pipe.denoiser_num_classes is not None and self.pipe.null_label is not None

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

    def clean_samples(self, images: LabelledImages, number: int, seed: int) -> tuple[Tensor, Tensor | None]:
        """x_0 of training images that the seed draws, on the scale of the network and its device, and their labels."""
        pipe, rows = self.pipe, drawn_order(len(images), seed)[:number]
        channels = pipe.denoiser.config.in_channels if pipe.vae is None else pipe.vae.config.in_channels
        pixels = convert_channels(images.images[rows], channels).to(pipe.device, torch.float32) * (2 / 255) - 1
        labels = None
        if pipe.denoiser_num_classes is not None:
            known = len(images.label_names) == pipe.denoiser_num_classes
            labels = (images.labels[rows] if known else torch.full((len(rows),), pipe.null_label)).to(pipe.device)
        return encode_pixels(pixels, pipe.vae, pipe._sample_shape, pipe.statistics, labels), labels

    def units(self, labels: Tensor | None, like: Tensor) -> DataUnits | None:
        """From samples of the network to images in [-1, 1]; None if they are the same, or latents."""
        pipe = self.pipe
        return None if pipe.vae is not None or pipe.statistics is None else pipe.statistics.units(labels, like)

    @property
    def last_noise(self) -> float | None:
        """The most noise, as `X0Variances` has it, that cannot be seen in a channel of an image in 8 bits; None for latents."""
        pipe = self.pipe
        if pipe.vae is not None:
            return None
        return VISIBLE_NOISE if pipe.statistics is None else VISIBLE_NOISE / pipe.statistics.std.max().item()

    def network(self, labels: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        """The network under these labels, without guidance and without its variances."""
        denoiser = self.pipe.denoiser
        more = {} if labels is None else {"class_labels": labels}

        def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
            output = denoiser(x_t.to(next(denoiser.parameters()).dtype), timesteps, **more, return_dict=False)[0]
            return output[:, : x_t.shape[1]].float()

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
