"""Train a variational autoencoder on images or sequences.

The command `diffusers-ext train-vae`; `training/train_vae.py` says how it is used.
"""

import dataclasses
import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_ext import HierarchicalVAEModel, VAEModel
from diffusers_ext.data.batches import BatchOptions, make_batches
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import value_scale_of
from diffusers_ext.data.prepare import prepare_data
from diffusers_ext.data.stream import StreamData
from diffusers_ext.data.validation import ValidationBatches, describe_held_out, prepare_validation
from diffusers_ext.models.vae import ARCHITECTURES
from diffusers_ext.models.vae_discriminator import PatchDiscriminator
from diffusers_ext.models.vae_likelihood import LIKELIHOODS
from diffusers_ext.options import fixed_option, option, run_script, takes_keywords, to_command
from diffusers_ext.recipes import hierarchical_figures, vae_figures
from diffusers_ext.recipes.hierarchical_vae import HierarchicalObjective, LevelRates, describe_levels, measure_levels
from diffusers_ext.recipes.pretrained_parts import options_of_vae, read_vae, take_over
from diffusers_ext.recipes.vae_objective import (
    ACTIVE_VARIANCE,
    BINARIZATIONS,
    VAEObjective,
    binarize,
    collapse_warning,
    discriminator_loss,
)
from diffusers_ext.recipes.vae_perceptual import load_perceptual
from diffusers_ext.recipes.vae_scale import LatentMoments, measure_latents, store_scale
from diffusers_ext.sizes import downsampling_factor, one_if_equal
from diffusers_ext.trainer.adversary import Adversary
from diffusers_ext.trainer.config import TrainerConfig, resolve_for_machine
from diffusers_ext.trainer.ending import EndingCost, seconds_of
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.progress import counted, counting_bar
from diffusers_ext.trainer.run import describe_data, finish_run, make_accelerator, open_run, save_atomically
from diffusers_ext.trainer.trackers import log_saved_pictures


MIN_MEASURED = 1000  # training images that the latents' scale is measured on, however short the time
PICTURED = 128  # images whose latents tell which of them to draw

HIERARCHICAL = "hierarchical"

conv_option = partial(fixed_option, needs={"architecture": ("conv", HIERARCHICAL)})
levels_option = partial(fixed_option, needs={"architecture": (HIERARCHICAL,)})
mlp_option = partial(fixed_option, needs={"architecture": ("mlp",)})
adversary_option = partial(fixed_option, needs="adversarial_weight")


@takes_keywords
@dataclass(frozen=True)
class TrainVAEConfig(TrainerConfig):
    """Train a variational autoencoder on images or sequences, by itself or as the first stage of a diffusion model."""

    architecture: Literal[(*ARCHITECTURES, HIERARCHICAL)] = fixed_option(
        "mlp",
        "fully connected with flat latents; convolutional, as the first stage of a diffusion model; or convolutional with "
        "several levels of latents",
        "model",
    )
    block_out_channels: tuple[int, ...] = conv_option(
        (32, 64),
        "conv, hierarchical: channels at each resolution, the full one first; each further one halves the side",
        at_least=1,
    )
    latent_channels: int = conv_option(4, "conv, hierarchical: channels of the latents", at_least=1)
    num_levels: int = levels_option(
        3, "hierarchical: levels of latents; each halves the side of the one below it", at_least=1
    )
    level_channels: tuple[int, ...] | None = levels_option(
        None, "hierarchical: channels of each level's latents, from the top; by default latent_channels for each"
    )
    layers_per_block: int = conv_option(
        1, "conv, hierarchical: residual blocks at each resolution; one more in the decoder", at_least=1
    )
    mid_block_add_attention: bool = conv_option(
        True, "conv, hierarchical: attention at the lowest resolution, and at the levels above"
    )
    latent_dim: int = mlp_option(10, "mlp: number of latents", at_least=1)
    hidden_dims: tuple[int, ...] = mlp_option((256, 256), "mlp: widths of the encoder's hidden layers", at_least=1)

    likelihood: Literal[LIKELIHOODS] = fixed_option("gaussian", "p(x | z); laplace is L1", "loss")
    likelihood_scale: float = fixed_option(
        0.1,
        "standard deviation of gaussian, b of laplace, for data in [-1, 1]",
        needs={"likelihood": ("gaussian", "laplace")},
    )
    learn_scale: bool | None = fixed_option(None, "learn that, from there on; by default yes but for bernoulli")
    binarize: Literal[BINARIZATIONS] = fixed_option(
        "none", "black and white images: white above a half, or with the brightness as probability, drawn each time"
    )
    kl_weight: float = fixed_option(1.0, "weight of the KL divergence; 1 for the variational bound", at_least=0)
    kl_warmup_steps: int = fixed_option(0, "optimizer steps in which kl_weight rises from 0", at_least=0)
    free_bits: float = fixed_option(0.0, "nats of each latent that are not pushed down, against collapse", at_least=0)
    perceptual_network: str | None = fixed_option(
        None, "add a perceptual loss: lpips, or the folder of a classifier of training/train_features.py"
    )
    perceptual_weight: float = fixed_option(0.1, "weight of the perceptual loss", needs="perceptual_network")
    adversarial_weight: float = fixed_option(
        0.0, "weight of a patch discriminator's judgement; 0 for none", at_least=0
    )
    adversarial_adaptive: bool = adversary_option(True, "scale it to the gradient of the rest at the last layer")
    adversarial_start_step: int = adversary_option(
        500, "optimizer steps before the discriminator begins to learn and to count", at_least=0
    )
    adversarial_learning_rate: float = adversary_option(2e-4, "the discriminator's peak learning rate")
    discriminator_channels: int = adversary_option(32, "channels of its first convolution", at_least=1)
    discriminator_layers: int = adversary_option(
        2, "its convolutions that halve the side; a patch has 16, 34 or 70 pixels", at_least=1
    )

    pretrained_pipeline: str | None = fixed_option(
        None,
        "begin with an autoencoder of this script: its folder, a pipeline that has one, or a name on the Hub. Its architecture "
        "and likelihood are taken over",
        "fine-tuning",
    )

    sample_columns: int = option(8, "pictures in a row", "pictures", at_least=1)
    max_measured_samples: int = option(
        20_000,
        "training images that the latents' scale, or the rates of their levels, are measured on; drawn at random if there "
        "are more",
        at_least=1,
    )

    DEFAULT_MAX_TRAIN_STEPS: ClassVar[int] = 3000
    NEEDS_STEPS: ClassVar[dict[str, str]] = TrainerConfig.NEEDS_STEPS | {
        "kl_warmup_steps": "the weight of the KL divergence does not reach kl_weight",
    }

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *TrainerConfig.ESSENTIAL,
        *(
            "architecture",
            "block_out_channels",
            "latent_channels",
            "latent_dim",
            "likelihood",
            "kl_weight",
            "perceptual_network",
        ),
        *("adversarial_weight", "pretrained_pipeline"),
    )

    def __post_init__(self):
        if self.pretrained_pipeline is not None:
            self._take_over()
        super().__post_init__()
        for name in ("likelihood_scale", "perceptual_weight", "adversarial_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name):g}")
        if self.learn_scale and self.likelihood == "bernoulli":
            raise ValueError("learn_scale has no meaning for likelihood bernoulli, which has no scale")
        if self.binarize != "none" and self.likelihood != "bernoulli":
            raise ValueError(
                f"binarize {self.binarize} needs --likelihood bernoulli, got {self.likelihood}: a density of two values has "
                "no bound"
            )
        if self.level_channels is not None and self.latent_channels != type(self).latent_channels:
            raise ValueError(
                "give latent_channels, the same for all levels, or level_channels, and not both, got "
                f"{self.latent_channels} and {' '.join(map(str, self.level_channels))}"
            )
        if self.level_channels is not None and len(self.level_channels) != self.num_levels:
            raise ValueError(
                f"level_channels must be one number for each of {self.num_levels} levels, from the top, got "
                f"{' '.join(map(str, self.level_channels))}"
            )
        smallest = PatchDiscriminator.smallest_side(self.discriminator_layers)
        for side in self.resolution or ():
            if side % self.size_multiple:
                raise ValueError(
                    f"resolution must be a multiple of {self.size_multiple}, since block_out_channels has "
                    f"{len(self.block_out_channels)} widths and each but the last halves the images, got {side}"
                )
            if self.adversarial_weight and side < smallest:
                raise ValueError(
                    f"a discriminator of {self.discriminator_layers} layers needs images of at least {smallest} pixels, got "
                    f"{side}: give fewer --discriminator_layers"
                )

    def _take_over(self) -> None:
        """Takes over what the autoencoder is that the run begins with."""
        part = read_vae(self.pretrained_pipeline)
        take_over(self, options_of_vae(part), part.name)
        if self.resolution is None:
            object.__setattr__(self, "resolution", part.size)

    def too_long_for(self, num_steps: int) -> list[str]:
        lines = super().too_long_for(num_steps)
        if self.adversarial_weight and self.adversarial_start_step >= num_steps:
            lines.append(
                f"adversarial_start_step {self.adversarial_start_step} is not below the {num_steps} optimizer steps of the "
                "run: the discriminator never begins, and adversarial_weight counts for nothing"
            )
        return lines

    @property
    def size_multiple(self) -> int:
        return 1 if self.architecture == "mlp" else downsampling_factor(self.block_out_channels)

    @property
    def learns_scale(self) -> bool:
        return self.likelihood != "bernoulli" if self.learn_scale is None else self.learn_scale


def main(config: TrainVAEConfig) -> Path:
    """Trains an autoencoder and returns its folder."""
    accelerator = make_accelerator(config)
    command = to_command(config, "training/train_vae.py")
    config = resolve_for_machine(config)
    with open_run(config, accelerator) as open_folder:
        data, held_out = load_data(config, accelerator)
        config = dataclasses.replace(config, resolution=data.size, resize_mode=data.resize_mode)
        vae, adversary = build_model(config, data), build_adversary(config, data)
        objective = build_objective(config, accelerator, vae, data, adversary)
        open_folder(config)
        trainer = Trainer(
            config,
            accelerator,
            vae,
            objective,
            data,
            batch_options={"latent_shape": noise_shape(vae)},
            on_images=partial(draw_while_training, config),
            step_hook=adversary,
            validation_data=held_out,
            ending_cost=partial(drawing_cost, config),
        )
        if not config.resume_from_checkpoint:
            draw_while_training(config, trainer, "before")
        trainer.train()
        number = num_to_measure(trainer, trainer.ending.share())
        with trainer.averaged_model() as model:
            with closing(
                counting_bar(num_batches(trainer, number), "measuring: batch", enabled=accelerator.is_main_process)
            ) as bar:
                measured = measure(model, counted(bar, images_to_measure(trainer, number)), accelerator)
            if isinstance(measured, LatentMoments):
                store_scale(model, measured)
            if accelerator.is_main_process:
                save_atomically(model, trainer.output_dir)
        if accelerator.is_main_process:
            notes = [describe_data(config, data), *data.notes, describe(model, measured)]
            print(f"{notes[-1]}\ndrawing pictures ...", flush=True)
            vae = type(vae).from_pretrained(trainer.output_dir).to(accelerator.device)
            draw(config, trainer, vae, trainer.output_dir)
            figures = figures_of(vae)
            about = {"limitations": figures.LIMITATIONS} | ({"pipeline_tag": "other"} if len(data.size) == 1 else {})
            finish_run(trainer, command, "\n\n".join(notes), figures.pictures_of(vae), **about)
    return trainer.output_dir


def load_data(config: TrainVAEConfig, accelerator: Accelerator) -> tuple[ImageData | StreamData, ImageData | None]:
    """The images, decoded by the first process of each machine and read by the others; and the held-out ones, if any."""
    with accelerator.local_main_process_first():
        data = prepare_data(config, multiple_of=config.size_multiple)
        held_out = prepare_validation(config, data)
    for note in (describe_data(config, data), *data.notes, *describe_held_out(held_out, config.validation_split)):
        accelerator.print(note)
    return data, held_out


def build_model(config: TrainVAEConfig, data: ImageData | StreamData) -> VAEModel | HierarchicalVAEModel:
    """A new model with weights that follow from the seed, or that of `pretrained_pipeline`."""
    refuse_what_is_of_images(config, data)
    if config.pretrained_pipeline is not None:
        return load_pretrained(config, data)
    torch.manual_seed(config.seed)
    common = {
        "sample_size": data.size,
        "dims": len(data.size),
        "in_channels": data.channels,
        "out_channels": data.channels,
        "block_out_channels": config.block_out_channels,
        "latent_channels": config.level_channels or config.latent_channels,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": config.mid_block_add_attention,
        "likelihood": config.likelihood,
        "likelihood_scale": config.likelihood_scale,
        "learn_scale": config.learns_scale,
    }
    if config.architecture == HIERARCHICAL:
        return HierarchicalVAEModel(**common, num_levels=config.num_levels)
    return VAEModel(
        **common,
        architecture=config.architecture,
        latent_dim=config.latent_dim,
        hidden_dims=config.hidden_dims,
        value_scale=value_scale_of(data, None),
    )


def load_pretrained(config: TrainVAEConfig, data: ImageData | StreamData) -> VAEModel | HierarchicalVAEModel:
    """The autoencoder that the run begins with, for these images; the scale of its latents is measured anew at the end.

    Raises:
        ValueError: if it does not take them.
    """
    part = read_vae(config.pretrained_pipeline)
    part.check_samples(data.channels, None if config.architecture == "conv" else data.size)
    vae = part.load()
    vae.register_to_config(sample_size=one_if_equal(data.size))
    if isinstance(vae, VAEModel):  # what its encoder gives, as while it was trained
        vae.register_to_config(latent_offset=0.0, shift_factor=None, scaling_factor=1.0)
    return vae


def refuse_what_is_of_images(config: TrainVAEConfig, data: ImageData | StreamData) -> None:
    """Raises: ValueError: if the data are sequences, and an option has no meaning for them."""
    asked = {
        "architecture hierarchical": config.architecture == HIERARCHICAL,
        "likelihood bernoulli": config.likelihood == "bernoulli",
        "perceptual_network": config.perceptual_network is not None,
        "adversarial_weight": config.adversarial_weight > 0,
    }
    given = [name for name, is_given in asked.items() if is_given]
    if given and len(data.size) == 1:
        raise ValueError(f"{given[0]} is of images, and {data.name} holds sequences: leave it out")


def build_adversary(config: TrainVAEConfig, data: ImageData | StreamData) -> Adversary | None:
    """The discriminator, if the options ask for one."""
    if not config.adversarial_weight:
        return None
    torch.manual_seed(config.seed + 1)
    discriminator = PatchDiscriminator(data.channels, config.discriminator_channels, config.discriminator_layers)
    return Adversary(
        discriminator,
        discriminator_loss,
        learning_rate=config.adversarial_learning_rate,
        start_step=config.adversarial_start_step,
    )


def build_objective(
    config: TrainVAEConfig,
    accelerator: Accelerator,
    vae: VAEModel | HierarchicalVAEModel,
    data,
    adversary: Adversary | None,
) -> VAEObjective:
    """The loss, with the perceptual network loaded if one is named."""
    perceptual = None
    if config.perceptual_network is not None:
        perceptual = load_perceptual(config.perceptual_network, (data.channels, *data.size))
    if isinstance(vae, HierarchicalVAEModel):
        new = partial(HierarchicalObjective, num_levels=len(vae.levels))
    else:
        new = partial(VAEObjective, latent_shape=vae.latent_shape)
    return new(
        accelerator,
        config.likelihood,
        last_layer=vae.last_layer,
        kl_weight=config.kl_weight,
        kl_warmup_steps=config.kl_warmup_steps,
        free_bits=config.free_bits,
        binarization=config.binarize,
        perceptual=perceptual,
        perceptual_weight=config.perceptual_weight,
        adversary=adversary,
        adversarial_weight=config.adversarial_weight,
        adaptive=config.adversarial_adaptive,
    )


# One level of latents, or several.


def noise_shape(vae: VAEModel | HierarchicalVAEModel) -> tuple[int, ...]:
    """Shape of the noise that the latents of an image are drawn with."""
    return (vae.num_latents,) if isinstance(vae, HierarchicalVAEModel) else vae.latent_shape


def figures_of(vae: VAEModel | HierarchicalVAEModel) -> ModuleType:
    """The module that draws its pictures."""
    return hierarchical_figures if isinstance(vae, HierarchicalVAEModel) else vae_figures


def measure(
    vae: VAEModel | HierarchicalVAEModel, batches: Iterable[Tensor], accelerator: Accelerator | None = None
) -> LatentMoments | LevelRates:
    """What is known of the latents of a trained model from images."""
    if isinstance(vae, HierarchicalVAEModel):
        return measure_levels(vae, batches, accelerator)
    return measure_latents(vae, batches, accelerator)


def describe(vae: VAEModel | HierarchicalVAEModel, measured: LatentMoments | LevelRates) -> str:
    """That in Markdown, for the card."""
    return (describe_levels if isinstance(measured, LevelRates) else describe_latents)(vae, measured)


def draw(config: TrainVAEConfig, trainer: Trainer, vae: VAEModel | HierarchicalVAEModel, folder: Path) -> None:
    """All pictures of a model, into a folder."""
    settings = {"columns": config.sample_columns, "seed": config.seed}
    figures_of(vae).draw_pictures(vae, some_images(trainer), folder, **settings)


def num_to_measure(trainer: Trainer, share: float = 1.0) -> int:
    """Training images that the latents are measured on: this share, but enough for moments, of all that are asked for."""
    limit, there = trainer.config.max_measured_samples, trainer.data.num_images
    number = limit if there is None else min(limit, there)
    return max(math.ceil(share * number), min(MIN_MEASURED, number))


def num_batches(trainer: Trainer, number: int) -> int:
    """Batches in which each process encodes its part of `number` images."""
    return math.ceil(number / (min(trainer.config.train_batch_size, number) * trainer.accelerator.num_processes))


def images_to_measure(trainer: Trainer, number: int) -> Iterator[Tensor]:
    """Batches of this process's part of `number` training images, as the model is trained on them, but not flipped."""
    config, data, accelerator = trainer.config, trainer.data, trainer.accelerator
    mine = (accelerator.process_index, accelerator.num_processes)
    if data.num_images is None or data.num_images > number:
        return _drawn_images(trainer, number, *mine)
    return _as_trained_on(trainer, ValidationBatches(data, config.train_batch_size).share(*mine))


@torch.no_grad()
def drawing_cost(config: TrainVAEConfig, trainer: Trainer) -> EndingCost:
    """Seconds of the pictures, from drawing them, and of measuring the latents, from a batch of them."""
    number = num_to_measure(trainer)
    batches = num_batches(trainer, number)
    images = next(images_to_measure(trainer, number), some_images(trainer)[: config.train_batch_size])

    def draw_once():
        with tempfile.TemporaryDirectory() as folder:
            draw(config, trainer, vae, Path(folder))

    with trainer.averaged_model() as vae:
        measure(vae, [images])  # the first time makes ready what the next ones use
        encoding = seconds_of(lambda: measure(vae, [images]))
        return EndingCost(fixed=seconds_of(draw_once), scalable=batches * encoding)


def some_images(trainer: Trainer) -> Tensor:
    """Training images for the pictures, in [-1, 1], the same ones each time."""
    return torch.cat(list(_drawn_images(trainer, max(PICTURED, trainer.config.sample_columns), 0, 1)))


def _drawn_images(trainer: Trainer, count: int, process_index: int, num_processes: int) -> Iterator[Tensor]:
    size = min(trainer.config.train_batch_size, count)
    options = BatchOptions(trainer.config.seed, size, num_processes, process_index)
    return _as_trained_on(
        trainer, itertools.islice(make_batches(trainer.data, options), -(-count // (size * num_processes)))
    )


def _as_trained_on(trainer: Trainer, batches: Iterable[dict[str, Tensor]]) -> Iterator[Tensor]:
    for batch in map(trainer.to_device, batches):
        yield binarize(batch["images"], trainer.config.binarize, batch["noise"])


def draw_while_training(config: TrainVAEConfig, trainer: Trainer, name: str | None = None) -> None:
    """The pictures of the averaged weights, in `samples/step-STEP/` or the folder `name`; the main process draws them."""
    folder = trainer.output_dir / (name or f"samples/step-{trainer.state.step:07}")
    with trainer.averaged_model() as vae:
        if trainer.accelerator.is_main_process:
            draw(config, trainer, vae, folder)
            log_saved_pictures(trainer.accelerator, folder, figures_of(vae).pictures_of(vae), trainer.state.step)


def describe_latents(vae: VAEModel, moments: LatentMoments) -> str:
    """The measured moments of the latents, for the card, and a warning if they have collapsed."""
    active = int((moments.mean_var > ACTIVE_VARIANCE).sum())
    lines = [
        f"Latents of shape {' x '.join(map(str, vae.latent_shape))}, measured on {moments.num_images} training images: mean "
        f"{moments.mean:.4g} (kept in latent_offset, so that shift_factor is 0) and std {moments.std:.4g} (scaling_factor "
        f"{1 / moments.std:.4g}); {active} of {moments.mean_var.numel()} are active; the KL divergence from the prior is "
        f"{moments.rate:.4g} nats an image."
    ]
    warning = collapse_warning(active, moments.mean_var.numel(), moments.rate)
    return "\n\n".join([*lines, f"Warning: {warning}."] if warning else lines)


run = partial(run_script, TrainVAEConfig, main)
