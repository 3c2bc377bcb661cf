"""The options, data, network, scheduler and objective of the scripts that train a denoiser."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

from accelerate import Accelerator
from diffusers import ModelMixin

from diffusers_ext.data.batches import TIMESTEP_SAMPLINGS
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import SampleSpace, prepare_samples
from diffusers_ext.data.stream import StreamData
from diffusers_ext.data.validation import prepare_validation
from diffusers_ext.diffusion.betas import BETA_SCHEDULES
from diffusers_ext.diffusion.losses import DEFAULT_WEIGHTINGS, LOSS_WEIGHTINGS, OBJECTIVES
from diffusers_ext.diffusion.noising import PREDICTION_TYPES
from diffusers_ext.guidance.guided_denoiser import check_guidance_scale
from diffusers_ext.models.dit import DiTModel
from diffusers_ext.models.unet import UNetModel
from diffusers_ext.options import fixed_option, option
from diffusers_ext.recipes.denoising_objective import DenoisingObjective
from diffusers_ext.recipes.networks import NetworkConfig, build_network
from diffusers_ext.schedulers import ExtDDIMScheduler, ExtDDPMScheduler
from diffusers_ext.trainer.run import describe_data


SCHEDULERS = {"ddpm": ExtDDPMScheduler, "ddim": ExtDDIMScheduler}

# Of the schedules that are given by their first and last beta.
beta_option = partial(fixed_option, needs={"beta_schedule": ("linear", "scaled_linear", "sigmoid")})


@dataclass(frozen=True)
class DenoisingConfig(NetworkConfig):
    """Options of a training run of a Gaussian diffusion model, whatever its condition.

    Raises:
        ValueError: if options contradict one another or are out of range.
    """

    vae: str | None = fixed_option(
        None,
        "autoencoder whose latents are trained on: a folder, a pipeline that has one, or a name on the Hub; images are "
        "encoded at each batch unless dataset_name is a folder of training/cache_latents.py",
        "latents",
    )

    num_train_timesteps: int = fixed_option(1000, "noise levels", "diffusion", alias="ddpm_num_steps")
    beta_schedule: Literal[BETA_SCHEDULES] = fixed_option("cosine", "noise schedule", alias="ddpm_beta_schedule")
    beta_start: float = beta_option(1e-4, "first beta of linear, scaled_linear and sigmoid")
    beta_end: float = beta_option(0.02, "last beta of linear, scaled_linear and sigmoid")
    rescale_betas_zero_snr: bool = fixed_option(False, "let the last level be pure noise; not with epsilon")
    prediction_type: Literal[PREDICTION_TYPES] = fixed_option("v_prediction", "what the model outputs")
    objective: Literal[OBJECTIVES] = fixed_option(
        "simple",
        "the squared error; the variational bound, with learned variance; or the first for the mean and the second for "
        "the variance",
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
    timestep_sampling: Literal[(*TIMESTEP_SAMPLINGS, "importance")] = fixed_option(
        "stratified",
        "each image's level by itself; evenly spread; or more often where the loss is large, with smaller weights",
    )

    scheduler: Literal[tuple(SCHEDULERS)] = option("ddim", "scheduler that is saved with the pipeline", "sampling")
    timestep_spacing: Literal["leading", "trailing", "linspace"] = option(
        "trailing", "timesteps that the scheduler visits"
    )
    num_inference_steps: int = option(50, "steps of the sample grids", alias="ddpm_num_inference_steps", at_least=1)
    guidance_scale: float = option(1.0, "classifier-free guidance of the sample grids; 1 is none")
    sample_columns: int = option(8, "pictures in a row of the sample grids", at_least=1)
    eval_batch_size: int | None = option(None, "pictures sampled at once; by default train_batch_size", at_least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.loss_weighting is None:  # resolved here, so that a run's options say what it was
            default = "uniform" if self.objective == "vlb" else DEFAULT_WEIGHTINGS.get(self.prediction_type, "uniform")
            object.__setattr__(self, "loss_weighting", default)
        for name in ("snr_gamma", "vlb_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
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

    @property
    def learns_variance(self) -> bool:
        return self.objective != "simple"

    @property
    def time_sampling(self) -> str:
        """How the times of a batch are drawn, from which the objective takes the timesteps."""
        return "stratified" if self.timestep_sampling == "importance" else self.timestep_sampling


def load_data(config: DenoisingConfig, accelerator: Accelerator, vae: ModelMixin | None) -> ImageData | StreamData:
    """The images, decoded by the first process of each machine and read by the others, or a stream, or latents."""
    with accelerator.local_main_process_first():
        data = prepare_samples(config, vae, multiple_of=config.size_multiple)
    for note in (describe_data(config, data), *data.notes):
        accelerator.print(note)
    return data


def load_validation(
    config: DenoisingConfig, accelerator: Accelerator, data: ImageData | StreamData, vae: ModelMixin | None
) -> ImageData | None:
    """The held-out images, if the options name any, read like those of the training."""
    with accelerator.local_main_process_first():
        held_out = prepare_validation(config, data, partial(prepare_samples, vae=vae))
    if held_out is not None:
        accelerator.print(f"the loss is taken on {len(held_out)} images of the split {config.validation_split} too")
    return held_out


def refuse_unlearned_guidance(config: DenoisingConfig, learned_unconditional: bool, dropout: str) -> None:
    """Refuses to guide the sample grids away from what the model is not trained with.

    Args:
        dropout: The option that would train it.

    Raises:
        ValueError: if so.
    """
    if not learned_unconditional and config.guidance_scale != 1:
        raise ValueError(
            f"guidance_scale, of the sample grids, must be 1 with a {dropout} of 0, which trains nothing to lead away from, "
            f"got {config.guidance_scale:g}"
        )


def build_model(
    config: DenoisingConfig,
    space: SampleSpace,
    num_classes: int | None = None,
    *,
    learned_unconditional: bool = True,
    **context,
) -> UNetModel | DiTModel:
    """A new model with weights that follow from the seed.

    Args:
        learned_unconditional: Whether any of its examples will be without label or text.
        context: `build_network`'s options for a text.
    """
    channels, *size = space.shape
    return build_network(
        config,
        sample_size=tuple(size),
        in_channels=channels,
        out_channels=channels * (2 if config.learns_variance else 1),
        num_classes=num_classes,
        learned_unconditional=learned_unconditional,
        **context,
    )


def build_scheduler(config: DenoisingConfig) -> ExtDDPMScheduler | ExtDDIMScheduler:
    """The scheduler that is saved with the pipeline; its noise schedule is the training's."""
    scheduler = SCHEDULERS[config.scheduler](
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
        clip_sample=config.vae is None,  # images end at -1 and 1, latents do not
    )
    if config.learns_variance:
        # Of DDIM too, which has no use for it, so that whoever makes another scheduler from the config knows.
        scheduler = type(scheduler).from_config(scheduler.config, variance_type="learned_range")
        scheduler.register_to_config(variance_type="learned_range")
    return scheduler


def build_objective(
    config: DenoisingConfig,
    scheduler: ExtDDPMScheduler | ExtDDIMScheduler,
    accelerator: Accelerator | None = None,
    *,
    num_bins: int | None = 256,
) -> DenoisingObjective:
    """The loss of a batch; `num_bins` is the number of values that the data can have, None if they are continuous."""
    return DenoisingObjective(
        scheduler.schedule,
        config.prediction_type,
        objective=config.objective,
        weighting=config.loss_weighting,
        snr_gamma=config.snr_gamma,
        p2_gamma=config.p2_gamma,
        vlb_weight=config.vlb_weight,
        importance_sampling=config.timestep_sampling == "importance",
        num_bins=num_bins,
        accelerator=accelerator,
    )
