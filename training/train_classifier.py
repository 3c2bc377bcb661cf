"""Train a classifier of noisy images, for guiding a diffusion model by its gradient.

    accelerate launch training/train_classifier.py --pipeline runs/digits
    accelerate launch training/train_classifier.py --dataset_name ../fashion_mnist --resolution 32 --max_train_time 5m

Without options it trains on scikit-learn's handwritten digits, on the noise levels that are `train_ddpm.py`'s by
default. `--help` lists the options, `--config FILE.yaml` reads them from a file.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_ext import DiffusionPipeline, ExtDDPMScheduler, NoisyClassifierModel
from diffusers_ext.betas import BETA_SCHEDULES
from diffusers_ext.schedulers.levels import describe_path
from diffusers_ext.trainer.batches import TIMESTEP_SAMPLINGS
from diffusers_ext.trainer.classifier_objective import ClassifierObjective, accuracy_by_level, save_accuracy
from diffusers_ext.trainer.config import TrainerConfig, resolve_for_machine
from diffusers_ext.trainer.data import ImageData
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.options import option, run_script, to_command
from diffusers_ext.trainer.prepare import prepare_data
from diffusers_ext.trainer.run import describe_data, finish_run, make_accelerator, open_run, save_whole
from diffusers_ext.trainer.stream import StreamData, make_batches
from diffusers_ext.trainer.validation import ValidationBatches, prepare_validation


PICTURES = {"accuracy.png": "accuracy by noise level; its numbers are in accuracy.csv"}


@dataclass(frozen=True)
class TrainClassifierConfig(TrainerConfig):
    """Train a classifier of noisy images, for guiding a diffusion model by its gradient."""

    block_out_channels: tuple[int, ...] = option(
        (64, 128, 128), "channels at each resolution, the full one first", "model"
    )
    layers_per_block: int = option(1, "residual blocks at each resolution")
    attention_resolutions: tuple[int, ...] | None = option(
        None, "sides of the maps with attention; by default the largest of at most 16"
    )
    attention_head_dim: int = option(64, "channels of an attention head")
    dropout: float = option(0.1, "share of the features dropped in each residual block")

    pipeline: str | None = option(
        None, "take the noise levels of this pipeline, a folder or a name on the Hub, not those below", "diffusion"
    )
    num_train_timesteps: int = option(1000, "noise levels", alias="ddpm_num_steps")
    beta_schedule: Literal[BETA_SCHEDULES] = option("cosine", "noise schedule", alias="ddpm_beta_schedule")
    beta_start: float = option(1e-4, "first beta of linear, scaled_linear and sigmoid")
    beta_end: float = option(0.02, "last beta of linear, scaled_linear and sigmoid")
    rescale_betas_zero_snr: bool = option(False, "let the last level be pure noise")
    timestep_sampling: Literal[TIMESTEP_SAMPLINGS] = option(
        "stratified", "each image's level by itself, or evenly spread"
    )

    max_measured_samples: int = option(2000, "images that the accuracy by noise level is measured on", "watching")

    SCHEDULE_OPTIONS: ClassVar[tuple[str, ...]] = (
        "num_train_timesteps",
        "beta_schedule",
        "beta_start",
        "beta_end",
        "rescale_betas_zero_snr",
    )
    FIXED_ON_RESUME: ClassVar[frozenset[str]] = TrainerConfig.FIXED_ON_RESUME.union(
        "block_out_channels layers_per_block attention_resolutions attention_head_dim dropout pipeline "
        "timestep_sampling".split(),
        SCHEDULE_OPTIONS,
    )

    def __post_init__(self):
        super().__post_init__()
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        changed = [name for name in self.SCHEDULE_OPTIONS if getattr(self, name) != defaults[name]]
        if self.pipeline is not None and changed:
            raise ValueError(f"pipeline and {changed[0]} both say which noise levels to train on: give one of them")
        if self.max_measured_samples < 1:
            raise ValueError(f"max_measured_samples must be at least 1, got {self.max_measured_samples}")
        if self.unconditional:
            raise ValueError("unconditional leaves the labels out, and a classifier learns them")
        factor = 2 ** (len(self.block_out_channels) - 1)
        for side in self.resolution or ():
            if side % factor:
                raise ValueError(
                    f"resolution must be a multiple of {factor}, since each of block_out_channels but the last halves "
                    f"the images, got {side}"
                )


def main(config: TrainClassifierConfig) -> Path:
    """Trains a classifier and returns its folder."""
    accelerator = make_accelerator(config)
    command = to_command(config, "training/train_classifier.py")
    config = resolve_for_machine(config)
    with open_run(config, accelerator) as open_folder:
        path = load_path(config)
        data, held_out = load_data(config, accelerator)
        config = dataclasses.replace(config, resolution=data.size, resize_mode=data.resize_mode)
        open_folder(config)
        objective = ClassifierObjective(make_scheduler(path).schedule, accelerator)
        trainer = Trainer(
            config,
            accelerator,
            build_model(config, data, path),
            objective,
            data,
            batch_options={"timestep_sampling": config.timestep_sampling},
            validation_data=held_out,
        )
        trainer.train()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with trainer.averaged_model() as model:
                save_whole(model, trainer.output_dir)
                rows = accuracy_by_level(model, images_to_measure(trainer, held_out), objective.schedule)
            images = "training images" if held_out is None else f"held-out images, {config.validation_split}"
            save_accuracy(rows, trainer.output_dir, num_classes=data.num_classes, images=images)
            notes = [describe_data(config, data), *data.notes, describe_accuracy(rows, images)]
            print(notes[-1], flush=True)
            finish_run(trainer, command, "\n\n".join(notes), PICTURES)
    return trainer.output_dir


def load_path(config: TrainClassifierConfig) -> dict[str, Any]:
    """The noising path to train on, as `describe_path` has it."""
    if config.pipeline is not None:
        scheduler = DiffusionPipeline.from_pretrained(config.pipeline).scheduler
        if not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(f"pipeline must have a variance-preserving scheduler, got {type(scheduler).__name__}")
        return describe_path(scheduler)
    return describe_path(make_scheduler({name: getattr(config, name) for name in config.SCHEDULE_OPTIONS}))


def make_scheduler(path: dict[str, Any]) -> ExtDDPMScheduler:
    """A scheduler with this noising path."""
    return ExtDDPMScheduler(**path, prediction_type="sample")  # the one that any path allows


def load_data(
    config: TrainClassifierConfig, accelerator: Accelerator
) -> tuple[ImageData | StreamData, ImageData | None]:
    """The images, decoded by the first process of each machine and read by the others; and the held-out ones, if any."""
    with accelerator.local_main_process_first():
        data = prepare_data(config, multiple_of=2 ** (len(config.block_out_channels) - 1))
        if data.id2label is None:
            raise ValueError(f"{config.dataset_name} has no labels for a classifier to learn; see --label_column")
        held_out = prepare_validation(config, data)
    for note in (describe_data(config, data), *data.notes):
        accelerator.print(note)
    return data, held_out


def build_model(
    config: TrainClassifierConfig, data: ImageData | StreamData, path: dict[str, Any]
) -> NoisyClassifierModel:
    """A new model with weights that follow from the seed."""
    torch.manual_seed(config.seed)
    return NoisyClassifierModel(
        sample_size=data.size,
        in_channels=data.channels,
        num_classes=data.num_classes,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_resolutions=config.attention_resolutions,
        attention_head_dim=config.attention_head_dim,
        dropout=config.dropout,
        noise_schedule=path,
    )


def images_to_measure(trainer: Trainer, held_out: ImageData | None) -> Iterator[dict[str, Tensor]]:
    """The first held-out images, or training images if there are none, with noise that is the same in every run."""
    config = trainer.config
    count = -(-config.max_measured_samples // config.train_batch_size)
    data = trainer.data if held_out is None else held_out
    if data.num_images is None:
        batches = make_batches(data, dataclasses.replace(trainer.batch_options, num_processes=1, process_index=0))
    else:
        batches = ValidationBatches(data, config.train_batch_size).share()
    for batch in itertools.islice(batches, count):
        yield trainer.to_device(batch)


def describe_accuracy(rows: list[dict[str, float]], images: str) -> str:
    """The accuracy in a line."""
    picked = [rows[0], rows[len(rows) // 4], rows[len(rows) // 2], rows[-1]]
    told = ", ".join(f"{row['accuracy']:.1%} at timestep {row['timestep']}" for row in picked)
    return f"The label is the likeliest of {images} in {told}."


if __name__ == "__main__":
    run_script(TrainClassifierConfig, main)
