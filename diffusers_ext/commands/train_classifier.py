"""Train a classifier of noisy images, for guiding a diffusion model by its gradient.

The command `diffusers-ext train-classifier`; `training/train_classifier.py` says how it is used.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor

from diffusers_ext import DiffusionPipeline, ExtDDPMScheduler, NoisyClassifierModel
from diffusers_ext.data.batches import TIMESTEP_SAMPLINGS, make_batches
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import SampleSpace, fingerprint, load_vae, prepare_samples
from diffusers_ext.data.sequences import refuse_sequences
from diffusers_ext.data.stream import StreamData
from diffusers_ext.data.validation import ValidationBatches, describe_held_out, prepare_validation
from diffusers_ext.diffusion.betas import BETA_SCHEDULES
from diffusers_ext.models.statistics import check_statistics
from diffusers_ext.models.unet import refuse_unmatched_resolutions
from diffusers_ext.options import fixed_option, option, run_script, to_command
from diffusers_ext.recipes.classifier_objective import ClassifierObjective, accuracy_by_level, save_accuracy
from diffusers_ext.recipes.pretrained_parts import PretrainedPart, hold, is_pipeline_with, read_part, take_over
from diffusers_ext.recipes.training_path import beta_option
from diffusers_ext.schedulers.levels import describe_path, schedule_of
from diffusers_ext.sizes import downsampling_factor
from diffusers_ext.trainer.config import TrainerConfig, resolve_for_machine
from diffusers_ext.trainer.ending import EndingCost, seconds_of
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.progress import counted, counting_bar
from diffusers_ext.trainer.run import describe_data, finish_run, make_accelerator, open_run, save_atomically


PICTURES = {"accuracy.png": "accuracy by noise level; its numbers are in accuracy.csv"}
LIMITATIONS = (
    "It tells labels apart in noisy images of the path and the data that it was trained on, for guiding a diffusion model of"
    " the same path; it is no classifier of other images."
)


@dataclass(frozen=True)
class TrainClassifierConfig(TrainerConfig):
    """Train a classifier of noisy images, for guiding a diffusion model by its gradient."""

    block_out_channels: tuple[int, ...] = fixed_option(
        (64, 128, 128), "channels at each resolution, the full one first", "model", at_least=1
    )
    layers_per_block: int = fixed_option(1, "residual blocks at each resolution", at_least=1)
    attention_resolutions: tuple[int, ...] | None = fixed_option(
        None, "sides of the maps with attention; by default the largest of at most 16"
    )
    attention_head_dim: int = fixed_option(64, "channels of an attention head", at_least=1)
    dropout: float | None = fixed_option(
        None, "share of the features dropped in each residual block; by default 0.1, or that of pretrained_pipeline"
    )

    pipeline: str | None = fixed_option(
        None,
        "take the noise levels of this pipeline, a folder or a name on the Hub, not those below; and its VAE and the statistics of "
        "its data, if it has them",
        "diffusion",
    )
    vae: str | None = fixed_option(
        None,
        "autoencoder whose latents are classified: a folder, a pipeline that has one, or a name on the Hub; images are "
        "encoded at each batch unless dataset_name is a folder of training/cache_latents.py",
    )
    num_train_timesteps: int = fixed_option(1000, "noise levels", alias="ddpm_num_steps", at_least=1)
    beta_schedule: Literal[BETA_SCHEDULES] = fixed_option("cosine", "noise schedule", alias="ddpm_beta_schedule")
    beta_start: float = beta_option(1e-4, "first beta of linear, scaled_linear and sigmoid")
    beta_end: float = beta_option(0.02, "last beta of linear, scaled_linear and sigmoid")
    beta_reference_timesteps: int | None = beta_option(
        None, "length of the chain that beta_start and beta_end are for; by default num_train_timesteps", at_least=1
    )
    rescale_betas_zero_snr: bool = fixed_option(False, "let the last level be pure noise")
    timestep_sampling: Literal[TIMESTEP_SAMPLINGS] = fixed_option(
        "stratified", "each image's level by itself, or evenly spread"
    )

    pretrained_pipeline: str | None = fixed_option(
        None,
        "begin with a classifier of this script: its folder, a pipeline that has one, or a name on the Hub. Its network, noise "
        "levels and VAE are taken over",
        "fine-tuning",
    )

    max_measured_samples: int = option(
        2000, "images that the accuracy by noise level is measured on", "watching", at_least=1
    )

    # An option of the other scripts: a classifier makes no images while it is trained.
    save_images_steps: ClassVar[int | None] = None

    SCHEDULE_OPTIONS: ClassVar[tuple[str, ...]] = (
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "beta_reference_timesteps",
        "rescale_betas_zero_snr",
    )

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *TrainerConfig.ESSENTIAL,
        *("pipeline", "vae", "block_out_channels", "num_train_timesteps", "beta_schedule", "pretrained_pipeline"),
    )

    def __post_init__(self):
        if self.pretrained_pipeline is not None:
            self._take_over()
        super().__post_init__()
        if self.dropout is None:  # resolved here, so that a run's options say what it was
            object.__setattr__(self, "dropout", 0.1)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout:g}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changed = [name for name in self.SCHEDULE_OPTIONS if getattr(self, name) != defaults[name]]
        if self.pipeline is not None and changed:
            raise ValueError(f"pipeline and {changed[0]} both say which noise levels to train on: give one of them")
        if self.unconditional:
            raise ValueError("unconditional leaves the labels out, and a classifier learns them")
        for side in self.resolution or ():
            if side % self.size_multiple:
                raise ValueError(
                    f"resolution must be a multiple of {self.size_multiple}, since each of block_out_channels but the last "
                    f"halves the images, got {side}"
                )

    def _take_over(self) -> None:
        """Takes over what the classifier is that the run begins with."""
        part = read_classifier(self)
        names = ("block_out_channels", "layers_per_block", "attention_resolutions", "attention_head_dim")
        take_over(self, {name: part.config[name] for name in names}, part.name)
        if self.dropout is None:
            object.__setattr__(self, "dropout", part.config["dropout"])
        if self.pipeline is not None:
            raise ValueError(
                f"pipeline and pretrained_pipeline {part.name} both say which noise levels to train on: give one of them"
            )
        path = part.config["noise_schedule"] or {}
        for name in self.SCHEDULE_OPTIONS:
            hold(self, name, path.get(name), part.name, known=name in path)
        if self.vae is None and part.subfolder is not None and is_pipeline_with(part.name, "vae"):
            object.__setattr__(self, "vae", part.name)
        if self.resolution is None and self.vae is None:
            object.__setattr__(self, "resolution", part.size)

    @property
    def size_multiple(self) -> int:
        """The sides of the samples must be multiples of this."""
        return downsampling_factor(self.block_out_channels)


def main(config: TrainClassifierConfig) -> Path:
    """Trains a classifier and returns its folder."""
    accelerator = make_accelerator(config)
    command = to_command(config, "training/train_classifier.py")
    config = resolve_for_machine(config)
    with open_run(config, accelerator) as open_folder:
        path, vae, statistics = load_path(config)
        data, held_out = load_data(config, accelerator, vae)
        space = dataclasses.replace(SampleSpace.of(data, vae), statistics=statistics)
        check_statistics(statistics, space.shape[0], space.shape[1:], data.num_classes)
        config = dataclasses.replace(config, resolution=space.resolution, resize_mode=data.resize_mode)
        check_latents(config, space)
        open_folder(config)
        objective = ClassifierObjective(schedule_of(path), accelerator)
        trainer = Trainer(
            config,
            accelerator,
            build_model(config, space, data.num_classes, path),
            objective,
            data,
            batch_options={"timestep_sampling": config.timestep_sampling} | space.batch_options,
            validation_data=held_out,
            prepare_batch=space.encoder(accelerator.device),
            ending_cost=partial(measuring_cost, held_out, objective),
        )
        trainer.train()
        count = num_batches_to_measure(trainer, held_out, trainer.ending.share())
        with trainer.averaged_model() as model:
            if accelerator.is_main_process:
                save_atomically(model, trainer.output_dir)
                with closing(counting_bar(count, "measuring: batch")) as bar:
                    batches = counted(bar, images_to_measure(trainer, held_out, count))
                    rows = accuracy_by_level(model, batches, objective.schedule)
        # Ends the last gathering everywhere: a process that leaves during it can hang in gloo's destructor.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            images = "training images" if held_out is None else f"held-out images, {config.validation_split}"
            save_accuracy(rows, trainer.output_dir, num_classes=data.num_classes, images=images)
            notes, accuracy = [describe_data(config, data), *data.notes], describe_accuracy(rows, images)
            print(accuracy, flush=True)
            about = {"pictures": PICTURES, "pipeline_tag": "image-classification", "limitations": LIMITATIONS}
            finish_run(trainer, command, "\n\n".join(notes), **about, measured=[accuracy])
    return trainer.output_dir


def read_classifier(config: TrainClassifierConfig) -> PretrainedPart:
    """What is known of the classifier that the run begins with.

    Raises:
        ValueError: if it is none, or does not say its noise levels.
    """
    part = read_part(config.pretrained_pipeline, "classifier", ("NoisyClassifierModel",))
    if part.config["noise_schedule"] is None:
        raise ValueError(
            f"--pretrained_pipeline {part.name} must say which noise levels it was trained on, got noise_schedule=None"
        )
    return part


def load_path(config: TrainClassifierConfig) -> tuple[dict[str, Any], ModelMixin | None, ModelMixin | None]:
    """The noising path to train on, as `describe_path` has it, and the VAE whose latents go along it and the statistics by
    which its samples are normalised, if any.

    Raises:
        ValueError: if the pipeline has no such path, or is of pixels or of another VAE than the one that is given.
    """
    vae = None if config.vae is None else load_vae(config.vae)
    if config.pretrained_pipeline is not None:
        return read_classifier(config).config["noise_schedule"], vae, None
    if config.pipeline is None:
        options = {name: getattr(config, name) for name in config.SCHEDULE_OPTIONS}
        scheduler = ExtDDPMScheduler(**options, prediction_type="sample")  # the type that any path allows
        return describe_path(scheduler), vae, None
    pipe = DiffusionPipeline.from_pretrained(config.pipeline)
    own = getattr(pipe, "vae", None)
    if vae is not None and (own is None or fingerprint(own) != fingerprint(vae)):
        raise ValueError(
            f"vae must be that of the pipeline {config.pipeline}, which has {'none' if own is None else 'another one'}: "
            "leave --vae out"
        )
    own = None if own is None else own.eval().requires_grad_(False)
    return describe_path(pipe.scheduler), own, getattr(pipe, "statistics", None)


def load_data(
    config: TrainClassifierConfig, accelerator: Accelerator, vae: ModelMixin | None
) -> tuple[ImageData | StreamData, ImageData | None]:
    """The images or latents, made by the first process of each machine and read by the others; and held-out ones, if any."""
    with accelerator.local_main_process_first():
        data = prepare_samples(config, vae, multiple_of=config.size_multiple)
        refuse_sequences(data, "training/train_classifier.py")
        if data.id2label is None:
            raise ValueError(f"{config.dataset_name} has no labels for a classifier to learn; see --label_column")
        if data.has_label_sets:
            raise ValueError(
                f"{config.dataset_name} has several labels an image, and the classifier learns one of them"
            )
        held_out = prepare_validation(config, data, partial(prepare_samples, vae=vae))
    for note in (describe_data(config, data), *data.notes, *describe_held_out(held_out, config.validation_split)):
        accelerator.print(note)
    return data, held_out


def check_latents(config: TrainClassifierConfig, space: SampleSpace) -> None:
    """Raises: ValueError: if the classifier cannot halve the samples as it has to, or lacks maps that options name."""
    height, width = space.shape[1:]
    if height % config.size_multiple or width % config.size_multiple:
        raise ValueError(
            f"the sides of the latents must be multiples of {config.size_multiple}, since each of block_out_channels but "
            f"the last halves them, got {height}x{width}: give fewer block_out_channels or another resolution"
        )
    refuse_unmatched_resolutions((height, width), len(config.block_out_channels), config.attention_resolutions)


def build_model(
    config: TrainClassifierConfig, space: SampleSpace, num_classes: int, path: dict[str, Any]
) -> NoisyClassifierModel:
    """A new model with weights that follow from the seed, or that of `pretrained_pipeline`."""
    channels, *size = space.shape
    if config.pretrained_pipeline is not None:
        part = read_classifier(config)
        part.check_samples(channels, tuple(size))
        if num_classes != part.config["num_classes"]:
            raise ValueError(
                f"the images must have the {part.config['num_classes']} labels that --pretrained_pipeline {part.name} tells "
                f"apart, got {num_classes}"
            )
        return part.load(dropout=config.dropout)
    torch.manual_seed(config.seed)
    return NoisyClassifierModel(
        sample_size=tuple(size),
        in_channels=channels,
        num_classes=num_classes,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_resolutions=config.attention_resolutions,
        attention_head_dim=config.attention_head_dim,
        dropout=config.dropout,
        noise_schedule=path,
        data_statistics=None if space.statistics is None else space.statistics.fingerprint(),
    )


def num_batches_to_measure(trainer: Trainer, held_out: ImageData | None, share: float = 1.0) -> int:
    """Of the images that the accuracy is measured on, this share, as far as the run's time allows."""
    config, data = trainer.config, trainer.data if held_out is None else held_out
    number = min(config.max_measured_samples, config.max_measured_samples if data.num_images is None else len(data))
    return max(1, math.ceil(share * math.ceil(number / config.train_batch_size)))


def images_to_measure(trainer: Trainer, held_out: ImageData | None, count: int) -> Iterator[dict[str, Tensor]]:
    """So many batches: the first held-out images, or training images if there are none, with the same noise in every run."""
    config = trainer.config
    data = trainer.data if held_out is None else held_out
    if data.num_images is None:
        batches = make_batches(data, dataclasses.replace(trainer.batch_options, num_processes=1, process_index=0))
    else:
        batches = ValidationBatches(data, config.train_batch_size, **trainer.batch_options.of_held_out).share()
    for batch in itertools.islice(batches, count):
        yield trainer.to_device(batch)


def measuring_cost(held_out: ImageData | None, objective: ClassifierObjective, trainer: Trainer) -> EndingCost:
    """Seconds of measuring the accuracy, from one batch."""

    def measure():
        with trainer.averaged_model() as model:
            accuracy_by_level(model, images_to_measure(trainer, held_out, 1), objective.schedule)

    measure()  # the first time makes ready what the next ones use
    return EndingCost(scalable=num_batches_to_measure(trainer, held_out) * seconds_of(measure))


def describe_accuracy(rows: list[dict[str, float]], images: str) -> str:
    """The accuracy in a line."""
    picked = [rows[0], rows[len(rows) // 4], rows[len(rows) // 2], rows[-1]]
    described = ", ".join(f"{row['accuracy']:.1%} at timestep {row['timestep']}" for row in picked)
    return f"The label is the likeliest of {images} in {described}."


run = partial(run_script, TrainClassifierConfig, main)
