"""Train a Gaussian diffusion model on images or sequences, by label if there are labels.

The command `diffusers-ext train`; `training/train_ddpm.py` says how it is used.
"""

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext import GuidedDiffusionPipeline
from diffusers_ext.conditions import ImageCondition
from diffusers_ext.data.latent_cache import SampleSpace, value_scale_of
from diffusers_ext.hub.cards import DEFAULT_LIMITATIONS
from diffusers_ext.options import fixed_option, run_script, takes_keywords, to_command
from diffusers_ext.recipes.adapters import clipped_noise_of_run, save_adapter, without_adapter
from diffusers_ext.recipes.augmentation import augmenting, check_augmentation
from diffusers_ext.recipes.calibration import calibrate_run, with_calibration
from diffusers_ext.recipes.condition_grids import condition_rows, described_run
from diffusers_ext.recipes.data_statistics import with_statistics
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.recipes.denoising_parts import (
    build_model,
    build_objective,
    load_data,
    load_validation,
    refuse_unlearned_guidance,
    with_its_schedule,
    without_its_schedule,
)
from diffusers_ext.recipes.fine_tuning import names_of_labels, pretrained_vae
from diffusers_ext.recipes.image_condition import batch_maker, batch_options, condition_of_run, network_options
from diffusers_ext.recipes.model_guidance import left_to_labels, unconditional_inputs
from diffusers_ext.recipes.sample_grids import (
    draw_while_training,
    drawing_cost,
    first_of,
    rows_by_label,
    save_and_draw,
)
from diffusers_ext.recipes.training_path import build_scheduler
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


@takes_keywords
@dataclass(frozen=True)
class TrainConfig(DenoisingConfig):
    """Train a Gaussian diffusion model on images or sequences, by label if there are labels."""

    label_dropout: float = fixed_option(
        0.1, "probability of training an image without its label, for guidance", "labels"
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout:g}")
        if self.unconditional:
            self.refuse_dropout("unconditional, which leaves the labels out")

    def refuse_dropout(self, without: str) -> None:
        """Refuses a `label_dropout` where there are no labels; none is as good as the default there.

        Raises:
            ValueError: if one is given.
        """
        if self.label_dropout not in (0, type(self).label_dropout):
            raise ValueError(f"label_dropout has no meaning with {without}, got {self.label_dropout:g}: leave it out")


def main(config: TrainConfig) -> Path:
    """Trains a model and returns the folder of its pipeline."""
    accelerator, given = make_accelerator(config), config
    config = resolve_for_machine(config)
    with open_run(config, accelerator) as open_folder:
        vae = pretrained_vae(config)
        data = load_data(config, accelerator, vae)
        if data.num_classes is None:
            config.refuse_dropout(f"{data.name}, which has no labels")
        space = with_statistics(config, data, SampleSpace.of(data, vae), accelerator)
        config = dataclasses.replace(config, resolution=space.resolution, resize_mode=data.resize_mode)
        config.check_sample(space.shape[1:], space.resolution)
        unlabelled = config.label_dropout > 0 or data.num_classes is None or data.has_unlabelled
        refuse_unlearned_guidance(config, unlabelled, None if data.num_classes is None else "label_dropout")
        led, unconditional = config.leads_targets, None
        config = left_to_labels(config, data, learned=unlabelled)
        # As it was given, but for a preset's guidance that is left out, which would then be asked for.
        given = dataclasses.replace(given, model_guidance_scale=config.model_guidance_scale)
        command = to_command(given, "training/train_ddpm.py")
        if led and not config.leads_targets:
            accelerator.print(
                "no model_guidance_scale, which the preset has, since there are no images with and without labels"
            )
        if config.leads_targets:
            unconditional = unconditional_inputs(data, learned=unlabelled, dropout="label_dropout")
        check_augmentation(config, data)
        condition = condition_of_run(config, data, space)
        held_out = load_validation(config, accelerator, data, vae)
        rows = rows_by_label(data) if condition is None else condition_rows(config, condition, held_out, data)
        open_folder(config)
        of_image = network_options(config, condition, space)
        network = build_model(config, space, data.num_classes, learned_unconditional=unlabelled, **of_image)
        model = with_its_schedule(config, network, space.num_values)
        scheduler, scale = build_scheduler(config, largest_x0=space.largest), value_scale_of(data, vae)
        pipeline = partial(averaged_pipeline, scheduler=scheduler, space=space, condition=condition, value_scale=scale)
        objective = build_objective(
            *(config, scheduler, accelerator),
            num_bins=space.num_values,
            model=model,
            unconditional=unconditional,
        )
        trainer = Trainer(
            config,
            accelerator,
            model,
            objective,
            data,
            batch_options=batch_options(config, space, condition, label_dropout=config.label_dropout),
            on_images=partial(draw_while_training, pipeline, rows),
            validation_data=held_out,
            prepare_batch=augmenting(config, batch_maker(condition, space, accelerator.device)),
            ending_cost=with_calibration(partial(drawing_cost, pipeline, rows), config.calibrate),
            saved=pipeline,
        )
        trainer.train()
        save_and_draw(pipeline, rows, trainer, **first_of(rows))
        save_adapter(trainer)
        calibrate_run(trainer, config.calibrate, command)
        if accelerator.is_main_process:
            described = "\n\n".join([describe_data(config, data), *data.notes])
            about = described_run(condition) | ({} if scale is None else CARD_OF_SEQUENCES)
            finish_run(trainer, command, described, **about)
    return trainer.output_dir


@contextmanager
def averaged_pipeline(
    trainer: Trainer,
    scheduler: SchedulerMixin,
    space: SampleSpace,
    condition: ImageCondition | None,
    value_scale: dict | None = None,
):
    """The pipeline as it stands, with the averaged weights if there are any; the model's own come back at the end."""
    with trainer.averaged_model() as model:
        network, scheduler = without_its_schedule(trainer.config, model, scheduler)
        pipe = GuidedDiffusionPipeline(
            denoiser=without_adapter(network),
            scheduler=scheduler,
            vae=space.vae,
            statistics=space.statistics,
            id2label=names_of_labels(trainer.config, trainer.data),
            clip_guided_noise=clipped_noise_of_run(trainer.config),
            image_condition=None if condition is None else condition.to_config(),
            value_scale=value_scale,
        )
        pipe.set_progress_bar_config(disable=True)
        yield pipe


run = partial(run_script, TrainConfig, main)
