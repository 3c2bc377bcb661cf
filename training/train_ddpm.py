"""Train a Gaussian diffusion model on images or sequences, by label if there are labels.

    accelerate launch training/train_ddpm.py
    python training/train_ddpm.py --dataset_name path/to/fashion_mnist --resolution 32 --max_train_time 10m

Without options it trains on scikit-learn's handwritten digits. `--help` lists the options, `--config FILE.yaml` reads
them from a file.
"""

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import openmp  # noqa: F401  before torch is loaded
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext import GuidedDiffusionPipeline
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import SampleSpace, load_vae, value_scale_of
from diffusers_ext.data.stream import StreamData
from diffusers_ext.hub.cards import DEFAULT_LIMITATIONS
from diffusers_ext.options import fixed_option, option, run_script, to_command
from diffusers_ext.recipes.calibration import calibrate_run, with_calibration
from diffusers_ext.recipes.denoising import (
    DenoisingConfig,
    build_model,
    build_objective,
    load_data,
    load_validation,
    refuse_unlearned_guidance,
    with_its_schedule,
    without_its_schedule,
)
from diffusers_ext.recipes.sample_grids import draw_while_training, drawing_cost, save_and_draw
from diffusers_ext.recipes.training_path import TABLES, build_scheduler
from diffusers_ext.trainer.config import resolve_for_machine
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.run import describe_data, finish_run, make_accelerator, open_run


# What the card of a model of sequences says that is not so of images.
CARD_OF_SEQUENCES = {
    "pipeline_tag": "other",  # the Hub has no name for the task
    "limitations": DEFAULT_LIMITATIONS.replace("makes images", "makes sequences").replace(
        "training images", "training data"
    ),
}


@dataclass(frozen=True)
class TrainConfig(DenoisingConfig):
    """Train a Gaussian diffusion model on images or sequences, by label if there are labels."""

    label_dropout: float = fixed_option(
        0.1, "probability of training an image without its label, for guidance", "labels"
    )

    calibrate: bool | None = option(
        None,
        "choose at the end what the pipeline does by default, as training/calibrate.py does, in a tenth of the training's time "
        "or 30 s if that is more; by default after a training of at least 2 minutes on the path of a beta_schedule",
        "sampling",
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout:g}")
        if self.calibrate and self.path not in TABLES:
            raise ValueError(
                f"calibrate is for the paths of a beta_schedule, which path {self.path} is not: leave it out"
            )


def main(config: TrainConfig) -> Path:
    """Trains a model and returns the folder of its pipeline."""
    accelerator = make_accelerator(config)
    command = to_command(config, "training/train_ddpm.py")
    config = resolve_for_machine(config)
    with open_run(config, accelerator) as open_folder:
        vae = None if config.vae is None else load_vae(config.vae)
        data = load_data(config, accelerator, vae)
        space = SampleSpace.of(data, vae)
        config = dataclasses.replace(config, resolution=space.resolution, resize_mode=data.resize_mode)
        config.check_sample(space.shape[1:], space.resolution)
        unlabelled = config.label_dropout > 0 or data.num_classes is None or data.has_unlabelled
        refuse_unlearned_guidance(config, unlabelled, "label_dropout")
        open_folder(config)
        network = build_model(config, space, data.num_classes, learned_unconditional=unlabelled)
        model = with_its_schedule(config, network, space.num_values)
        scheduler = build_scheduler(config)
        scale = value_scale_of(data, vae)
        pipeline, rows = partial(averaged_pipeline, scheduler=scheduler, vae=vae, value_scale=scale), rows_of(data)
        trainer = Trainer(
            config,
            accelerator,
            model,
            build_objective(config, scheduler, accelerator, num_bins=space.num_values, model=model),
            data,
            batch_options={"label_dropout": config.label_dropout, "timestep_sampling": config.time_sampling}
            | space.batch_options,
            on_images=partial(draw_while_training, pipeline, rows),
            validation_data=load_validation(config, accelerator, data, vae),
            prepare_batch=space.encoder(accelerator.device),
            ending_cost=with_calibration(partial(drawing_cost, pipeline, rows), config.calibrate),
            saved=pipeline,
        )
        trainer.train()
        save_and_draw(pipeline, rows, trainer, label=None if data.id2label is None else data.used_labels[0])
        calibrate_run(trainer, config.calibrate, command)
        if accelerator.is_main_process:
            about = "\n\n".join([describe_data(config, data), *data.notes])
            finish_run(trainer, command, about, **({} if scale is None else CARD_OF_SEQUENCES))
    return trainer.output_dir


@contextmanager
def averaged_pipeline(
    trainer: Trainer, scheduler: SchedulerMixin, vae: ModelMixin | None, value_scale: dict | None = None
):
    """The pipeline as it stands, with the averaged weights if there are any; the model's own come back at the end."""
    with trainer.averaged_model() as model:
        network, scheduler = without_its_schedule(trainer.config, model, scheduler)
        pipe = GuidedDiffusionPipeline(
            denoiser=network,
            scheduler=scheduler,
            vae=vae,
            id2label=trainer.data.id2label,
            clip_guided_noise=True,
            value_scale=value_scale,
        )
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def rows_of(data: ImageData | StreamData) -> dict[str, list | None]:
    """The rows of a sample grid: one for each label that images have."""
    if data.id2label is None:
        return {"labels": None, "names": None}
    return {"labels": data.used_labels, "names": [data.id2label[label] for label in data.used_labels]}


if __name__ == "__main__":
    run_script(TrainConfig, main)
