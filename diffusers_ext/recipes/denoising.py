"""The options of the scripts that train a denoiser; `denoising_parts.py` makes of them what a run needs."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from diffusers_ext.conditions import parse_condition
from diffusers_ext.data.batches import TIMESTEP_SAMPLINGS
from diffusers_ext.data.latent_cache import read_info
from diffusers_ext.diffusion.losses import DEFAULT_WEIGHTINGS, LOSS_WEIGHTINGS, OBJECTIVES
from diffusers_ext.guidance.guided_denoiser import check_guidance_scale
from diffusers_ext.models.statistics import DATA_MEANS, DATA_SCALES
from diffusers_ext.options import fixed_option, option
from diffusers_ext.recipes.denoising_objective import check_internal_weight
from diffusers_ext.recipes.model_guidance import check_model_guidance
from diffusers_ext.recipes.networks import NetworkConfig
from diffusers_ext.recipes.presets import DESCRIBED_PRESETS, PRESETS, REPLACED_BY, preset_for
from diffusers_ext.recipes.pretrained import options_from, read_pretrained
from diffusers_ext.recipes.training_path import SCHEDULERS, PathConfig


_logit_normal_option = partial(fixed_option, needs={"timestep_sampling": ("logit_normal",)})


@dataclass(frozen=True)
class DenoisingConfig(PathConfig):
    """Options of a training run of a Gaussian diffusion model, whatever its condition.

    Raises:
        ValueError: if options contradict one another or are out of range.
    """

    preset: Literal[(*PRESETS, "none")] | None = option(
        None,
        f"options for a time that there is: {DESCRIBED_PRESETS}. An option that is given wins; the run's first line says what "
        "the preset means. By default quick or good, by a max_train_time of a minute or more, beside which no network, path or "
        "optimizer is given, but for digits; else none",
        "run",
    )

    vae: str | None = fixed_option(
        None,
        "autoencoder whose latents are trained on: a folder, a pipeline that has one, or a name on the Hub; images are "
        "encoded at each batch unless dataset_name is a folder of training/cache_latents.py",
        "latents",
    )

    data_mean: Literal[DATA_MEANS] = fixed_option(
        "none",
        "what is subtracted from images or latents before noise is added, pixel by pixel: the mean of all, or of those of the "
        "label; the pipeline adds it again",
        "statistics of the data",
    )
    data_scale: Literal[DATA_SCALES] = fixed_option(
        "none", "what is divided by before noise is added: the standard deviation of all values, or of each channel's"
    )

    objective: Literal[(*OBJECTIVES, "bound")] | None = fixed_option(
        None,
        "simple, the squared error, the default; vlb, the variational bound, with learned variance; hybrid, the first for the "
        "mean and the second for the variance; bound, that of fixed variances, of path learned alone",
        "objective",
    )
    vlb_weight: float = fixed_option(
        1e-3, "weight of the bound, in nats per dimension, in hybrid", needs={"objective": ("hybrid",)}
    )
    loss_weighting: Literal[LOSS_WEIGHTINGS] | None = fixed_option(
        None,
        "weight of the noise levels in the squared error, see diffusers_ext.diffusion.losses; by default simple for score and "
        "uniform for the others",
    )
    snr_gamma: float = fixed_option(5.0, "where min_snr cuts off", needs={"loss_weighting": ("min_snr",)})
    p2_gamma: float = fixed_option(1.0, "exponent of p2", needs={"loss_weighting": ("p2",)})
    timestep_sampling: Literal[(*TIMESTEP_SAMPLINGS, "importance", "logit_normal")] = fixed_option(
        "stratified",
        "each image's level by itself; evenly spread; more often where the loss is large, with smaller weights; or more often "
        "at middle levels, with equal weights, which changes the weighting of the loss",
    )
    logit_mean: float = _logit_normal_option(0.0, "mean of the logit of time; below 0 for cleaner levels")
    logit_std: float = _logit_normal_option(1.0, "standard deviation of the logit of time")
    timestep_shift: float = fixed_option(
        1.0,
        "s, by which a time t in [0, 1) becomes s t / (1 + (s - 1) t): above 1 for noisier levels more often, with equal weights",
        needs={"timestep_sampling": TIMESTEP_SAMPLINGS},
    )

    internal_guidance_loss_weight: float = fixed_option(
        0.5, "weight of the loss of the middle layer's output (arXiv 2512.24176)", needs="internal_guidance_layer"
    )

    model_guidance_scale: float | None = fixed_option(
        None,
        "guidance that the network learns, so that it samples as if guided by one call a step: its targets are led by its own "
        "predictions with label or text and without (arXiv 2502.12154)",
    )
    model_guidance_interval: tuple[float, float] = fixed_option(
        (0.2, 0.8), "where: from and to which share of the noise levels, from noise", needs="model_guidance_scale"
    )

    augmentation_probability: float = fixed_option(
        0.0,
        "probability with which each image is changed in each of six ways: mirrored left to right or upside down, scaled, turned, "
        "stretched, shifted; the network is given by how much, and samples unchanged images. 0.12 in its paper",
    )

    lora_rank: int | None = fixed_option(
        None,
        "train an adapter of this rank alone, LoRA, whose weights are saved beside a pipeline that has it in its own",
        "fine-tuning",
        at_least=1,
        needs="pretrained_pipeline",
    )
    lora_alpha: float | None = fixed_option(
        None, "its weight, divided by the rank; by default the rank", needs="lora_rank"
    )
    lora_target_modules: tuple[str, ...] | None = fixed_option(
        None, "ends of the names of the layers that it changes; by default those of attention", needs="lora_rank"
    )
    condition: str | None = fixed_option(
        None,
        "condition image that is made of each image: lowres:K, of a K-th of the sides; grey, without colour; edges, its lines",
        "condition images",
    )
    condition_column: str | None = fixed_option(
        None, "column that holds the condition image of each image, of the same size, instead"
    )
    condition_dropout: float = fixed_option(
        0.1, "probability of training an image without its condition image, for guidance"
    )
    condition_noise: float = fixed_option(
        0.0,
        "largest level of noise that is put into condition images, as its standard deviation in [0, 1], and given to the network too: "
        "for cascades",
    )

    scheduler: Literal[tuple(SCHEDULERS)] | None = option(
        None,
        "scheduler that is saved with the pipeline; by default ddim, score_sde with path ve or subvp, and flow with linear",
        "sampling",
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] = option(
        "trailing", "timesteps that the scheduler visits"
    )
    num_inference_steps: int = option(50, "steps of the sample grids", alias="ddpm_num_inference_steps", at_least=1)
    guidance_scale: float = option(1.0, "classifier-free guidance of the sample grids; 1 is none")
    sample_columns: int = option(8, "pictures in a row of the sample grids", at_least=1)
    eval_batch_size: int | None = option(None, "pictures sampled at once; by default train_batch_size", at_least=1)
    calibrate: bool | None = option(
        None,
        "choose at the end what the pipeline does by default, as training/calibrate.py does, in a tenth of the training's time "
        "or 30 s if that is more; by default after a training of at least 2 minutes",
    )

    def default_optimizer(self) -> str:
        """Muon for a transformer that starts at random weights, whose images it makes good soonest (docs/speedrun.md)."""
        is_spread = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # as `accelerate launch` says it
        from_scratch = self.lora_rank is None and self.pretrained_pipeline is None
        return "muon" if self.model == "dit" and from_scratch and not is_spread else "adamw"

    def __post_init__(self):
        if self.pretrained_pipeline is not None:
            self._take_over()
        if self.objective is None:  # resolved here, so that a run's options say what it was
            object.__setattr__(self, "objective", "bound" if self.path == "learned" else "simple")
        super().__post_init__()
        if self.loss_weighting is None:
            default = {"vlb": "uniform", "bound": "likelihood"}.get(self.objective)
            object.__setattr__(self, "loss_weighting", default or DEFAULT_WEIGHTINGS[self.prediction_type])
        if self.scheduler is None:
            object.__setattr__(self, "scheduler", self.default_scheduler)
        self._check_path()
        if self.lora_rank is not None and self.ema_snapshot_steps is not None:
            raise ValueError(
                "ema_snapshot_steps takes averages of all weights, of which lora_rank trains none: leave it out"
            )
        if self.lora_rank is not None and self.optimizer == "muon":
            raise ValueError("optimizer muon is for full matrices, and lora_rank trains factors of them: take adamw")
        self._check_condition()
        self._check_augmentation()
        for name in ("snr_gamma", "vlb_weight", "logit_std", "timestep_shift"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        check_internal_weight(self.internal_guidance_loss_weight)
        if self.leads_targets:
            check_model_guidance(self.model_guidance_scale, self.model_guidance_interval)
        if self.leads_targets and self.objective != "simple":
            raise ValueError(
                f"model_guidance_scale leads the targets of objective simple, which {self.objective} is not: leave it out"
            )
        check_guidance_scale(self.guidance_scale)
        if self.objective == "vlb" and self.loss_weighting != "uniform":
            raise ValueError(
                f"loss_weighting is of the squared error, which objective vlb has none of, got {self.loss_weighting}"
            )
        if self.num_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be at most num_train_timesteps ({self.num_train_timesteps}), got "
                f"{self.num_inference_steps}"
            )

    def _take_over(self) -> None:
        """Takes over what the pipeline is that the run begins with."""
        source = read_pretrained(self.pretrained_pipeline)
        taken = options_from(self, source)
        if self.resolution is None and not read_info(self.dataset_name):
            taken["resolution"] = source.resolution
        for name, value in taken.items():
            object.__setattr__(self, name, value)

    def _check_condition(self) -> None:
        if self.condition is not None:
            parse_condition(self.condition)
        if self.condition is not None and self.condition_column is not None:
            raise ValueError("condition and condition_column are two ways to the same: give one of them")
        if self.condition_column is not None and self.streaming:
            raise ValueError(
                "condition_column needs images that are decoded beforehand, and streaming reads them while training: leave "
                "streaming out, or make the condition of the images (condition)"
            )
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"condition_dropout must be in [0, 1), got {self.condition_dropout:g}")
        if not 0 <= self.condition_noise <= 1:
            raise ValueError(f"condition_noise must be in [0, 1], got {self.condition_noise:g}")
        if not self.has_condition:
            for name, default in (("condition_dropout", 0.1), ("condition_noise", 0.0)):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} has no meaning without condition or condition_column: leave it out")

    def _check_augmentation(self) -> None:
        if not 0 <= self.augmentation_probability <= 1:
            raise ValueError(f"augmentation_probability must be in [0, 1], got {self.augmentation_probability:g}")
        if not self.augmentation_probability:
            return
        reasons = {
            "random_flip": (self.random_flip, "counts mirrored images as data, which augmentation marks as changed"),
            "condition and condition_column": (self.has_condition, "give an image that is not changed along"),
            "pretrained_pipeline": (self.pretrained_pipeline, "begins with a network that is not given the changes"),
        }
        for name, (is_given, reason) in reasons.items():
            if is_given:
                raise ValueError(
                    f"augmentation_probability does not fit {name}, which {reason}: leave one of them out"
                )

    @property
    def has_condition(self) -> bool:
        """Whether the network sees a condition image."""
        return self.condition is not None or self.condition_column is not None

    @property
    def drops_condition(self) -> bool:
        """Whether the network learns to do without its condition image too."""
        return self.has_condition and self.condition_dropout > 0

    def _check_path(self) -> None:
        if (self.objective == "bound") != (self.path == "learned"):
            raise ValueError(
                f"objective bound is for path learned alone, and path learned for it, got objective {self.objective} with path "
                f"{self.path}; on another path it is loss_weighting likelihood"
            )
        if self.path == "learned" and self.internal_guidance_layer is not None:
            raise ValueError(
                "internal_guidance_layer has no loss with path learned, whose schedule is that of the network's output: leave it out"
            )
        if self.path == "learned" and (self.loss_weighting, self.time_sampling, self.timestep_shift) != (
            *("likelihood", self.timestep_sampling),
            1.0,
        ):
            raise ValueError(
                "with path learned the schedule itself says how often a noise level is seen and what it weighs: leave "
                f"loss_weighting, timestep_sampling and timestep_shift out, got {self.loss_weighting}, "
                f"{self.timestep_sampling} and {self.timestep_shift:g}"
            )
        if (self.scheduler == "flow") != self.is_linear:
            raise ValueError(
                f"scheduler flow is for path linear alone, and path linear for it, got scheduler {self.scheduler} with path "
                f"{self.path}: leave scheduler out"
            )
        if self.is_linear and self.timestep_spacing == "leading":
            raise ValueError("timestep_spacing must be trailing or linspace with path linear, got leading")
        if self.is_linear and self.learns_variance:
            raise ValueError(
                f"objective must be simple with path linear, whose sampler has no variance to learn, got {self.objective}"
            )

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = PRESETS
    REPLACED_BY: ClassVar[dict[str, tuple[str, ...]]] = REPLACED_BY
    preset_for: ClassVar[Callable[[dict[str, Any]], str | None]] = staticmethod(preset_for)
    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *NetworkConfig.ESSENTIAL,
        *(
            "preset",
            "model",
            "block_out_channels",
            "dit_size",
            "pretrained_pipeline",
            "vae",
            "path",
            "prediction_type",
        ),
        *("num_inference_steps", "guidance_scale"),
    )

    @property
    def origin(self) -> tuple[str, str | None]:
        if self.lora_rank is None:
            return super().origin
        name = self.pretrained_pipeline
        return f"fine-tuned by an adapter of rank {self.lora_rank} (LoRA) from `{name}`", name

    takes_texts: ClassVar[bool] = False  # whether captions are the condition

    @property
    def grid_guidance_scale(self) -> float:
        """Of the sample grids."""
        return self.guidance_scale

    @property
    def leads_targets(self) -> bool:
        """Whether the network learns its guided prediction."""
        return self.model_guidance_scale is not None

    @property
    def learns_variance(self) -> bool:
        return self.objective in ("vlb", "hybrid")

    @property
    def time_sampling(self) -> str:
        """How the times of a batch are drawn, from which the objective takes the timesteps."""
        return self.timestep_sampling if self.timestep_sampling in TIMESTEP_SAMPLINGS else "stratified"
