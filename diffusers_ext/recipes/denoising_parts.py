"""What a run of a denoiser is made of, by its options: data, network, and objective."""

from functools import partial

from accelerate import Accelerator
from diffusers import ModelMixin, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import SampleSpace, prepare_samples
from diffusers_ext.data.stream import StreamData
from diffusers_ext.data.validation import describe_held_out, prepare_validation
from diffusers_ext.models.dit import DiTModel
from diffusers_ext.models.unet import UNetModel
from diffusers_ext.recipes.adapters import add_adapter
from diffusers_ext.recipes.augmentation import NUM_LABELS
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.recipes.denoising_objective import DenoisingObjective
from diffusers_ext.recipes.fine_tuning import load_network, with_labels_of
from diffusers_ext.recipes.model_guidance import ModelGuidance
from diffusers_ext.recipes.networks import build_network
from diffusers_ext.recipes.training_path import build_scheduler
from diffusers_ext.recipes.variational_objective import VariationalModel, VariationalObjective
from diffusers_ext.schedulers.levels import model_schedule
from diffusers_ext.trainer.run import describe_data
from diffusers_ext.trainer.sharding import is_sharded


def load_data(config: DenoisingConfig, accelerator: Accelerator, vae: ModelMixin | None) -> ImageData | StreamData:
    """The images, decoded by the first process of each machine and read by the others, or a stream, or latents."""
    with accelerator.local_main_process_first():
        data = with_labels_of(config, prepare_samples(config, vae, multiple_of=config.size_multiple))
    for note in (describe_data(config, data), *data.notes):
        accelerator.print(note)
    return data


def load_validation(
    config: DenoisingConfig, accelerator: Accelerator, data: ImageData | StreamData, vae: ModelMixin | None
) -> ImageData | None:
    """The held-out images, if the options name any, read like those of the training."""
    with accelerator.local_main_process_first():
        held_out = prepare_validation(config, data, partial(prepare_samples, vae=vae))
    for line in describe_held_out(held_out, config.validation_split):
        accelerator.print(line)
    return held_out


def refuse_unlearned_guidance(config: DenoisingConfig, learned_unconditional: bool, dropout: str | None) -> None:
    """Refuses to guide the sample grids away from what the model is not trained with.

    Args:
        learned_unconditional: Whether it learns to do without its label or its text, if it has one.
        dropout: The option that would train it; None for data without labels and texts.

    Raises:
        ValueError: if so.
    """
    if config.guidance_scale == 1 or config.drops_condition:
        return
    if dropout is None:
        raise ValueError(
            "guidance_scale, of the sample grids, must be 1 for images without labels, unless they have a condition image "
            f"that is dropped (condition_dropout): there is nothing to lead to, got {config.guidance_scale:g}"
        )
    if not learned_unconditional:
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
) -> UNetModel | DiTModel | UNet2DModel:
    """A new model with weights that follow from the seed, or that of `pretrained_pipeline`.

    Args:
        learned_unconditional: Whether any of its examples will be without label or text.
        context: `build_network`'s options for a text and for a condition image.
    """
    if config.pretrained_pipeline is not None:
        network = load_network(config, space, num_classes, learned_unconditional=learned_unconditional, **context)
        return add_adapter(network, config)
    channels, *size = space.shape
    return build_network(
        config,
        augmentation_dim=NUM_LABELS if config.augmentation_probability else 0,
        sample_size=tuple(size),
        in_channels=channels,
        out_channels=channels * (2 if config.learns_variance else 1),
        num_classes=num_classes,
        learned_unconditional=learned_unconditional,
        **context,
    )


def with_its_schedule(config: DenoisingConfig, network: nn.Module, num_bins: int | None = 256) -> nn.Module:
    """What is trained: the network, with path "learned" together with its noise schedule."""
    if config.path != "learned":
        return network
    return VariationalModel(
        network,
        config.make_noise_schedule(),
        config.prediction_type,
        num_train_timesteps=config.num_train_timesteps,
        num_steps=config.bound_steps,
        num_bins=num_bins,
    )


def without_its_schedule(
    config: DenoisingConfig, model: nn.Module, scheduler: SchedulerMixin
) -> tuple[nn.Module, SchedulerMixin]:
    """The network of `with_its_schedule` by itself, and a scheduler for it of its own: sampling sets its timesteps.

    Args:
        scheduler: Of the path, if it is not learned.
    """
    if config.path != "learned":
        return model, type(scheduler).from_config(scheduler.config)
    largest_x0 = scheduler.config.get("clip_sample_range", 1.0)
    return model.denoiser, build_scheduler(config, model.noise_schedule, largest_x0)


def build_objective(
    config: DenoisingConfig,
    scheduler: SchedulerMixin,
    accelerator: Accelerator | None = None,
    *,
    num_bins: int | None = 256,
    model: nn.Module | None = None,
    unconditional: dict[str, Tensor] | None = None,
) -> DenoisingObjective | VariationalObjective:
    """The loss of a batch.

    Args:
        num_bins: Number of values that the data can have, None if they are continuous.
        model: Of `with_its_schedule`, for path "learned".
        unconditional: Of `diffusers_ext.recipes.model_guidance.unconditional_inputs`, with which targets are led as the options
            say; None for targets that are not.

    Raises:
        ValueError: if the run is sharded and its path is learned.
    """
    if config.path == "learned":
        if accelerator is not None and is_sharded(accelerator):
            raise ValueError(
                "path learned has a schedule that every process reads whole, and FSDP spreads it over them: launch with "
                "--multi_gpu"
            )
        return VariationalObjective(model.noise_schedule, config.num_train_timesteps, accelerator)
    logit_normal = (config.logit_mean, config.logit_std) if config.timestep_sampling == "logit_normal" else None
    guidance = None
    if unconditional is not None:
        guidance = ModelGuidance(config.model_guidance_scale, unconditional, config.model_guidance_interval)
    return DenoisingObjective(
        model_schedule(scheduler),
        config.prediction_type,
        objective=config.objective,
        weighting=config.loss_weighting,
        snr_gamma=config.snr_gamma,
        p2_gamma=config.p2_gamma,
        vlb_weight=config.vlb_weight,
        importance_sampling=config.timestep_sampling == "importance",
        logit_normal=logit_normal,
        internal_weight=None if config.internal_guidance_layer is None else config.internal_guidance_loss_weight,
        timestep_shift=config.timestep_shift,
        guidance=guidance,
        num_bins=num_bins,
        accelerator=accelerator,
    )
