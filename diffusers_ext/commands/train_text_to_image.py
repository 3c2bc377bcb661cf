"""Train a Gaussian diffusion model on images and their captions.

The command `diffusers-ext train-text-to-image`; `training/train_text_to_image.py` says how it is used.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from diffusers import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext import TextGuidedDiffusionPipeline
from diffusers_ext.conditions import ImageCondition
from diffusers_ext.data.captions import captions_of, find_caption_column, has_empty_caption, with_texts
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import SampleSpace, prepare_samples
from diffusers_ext.data.sequences import refuse_sequences
from diffusers_ext.data.validation import describe_held_out, prepare_validation
from diffusers_ext.guidance.texts import width_of
from diffusers_ext.options import run_script, to_command
from diffusers_ext.recipes.adapters import clipped_noise_of_run, save_adapter, without_adapter
from diffusers_ext.recipes.augmentation import augmenting, check_augmentation
from diffusers_ext.recipes.calibration import calibrate_run, with_calibration
from diffusers_ext.recipes.condition_grids import condition_rows, described_run
from diffusers_ext.recipes.data_statistics import with_statistics
from diffusers_ext.recipes.denoising_parts import build_model, build_objective, refuse_unlearned_guidance
from diffusers_ext.recipes.fine_tuning import pretrained_vae, with_labels_of
from diffusers_ext.recipes.image_condition import batch_maker, batch_options, condition_of_run, network_options
from diffusers_ext.recipes.model_guidance import unconditional_inputs
from diffusers_ext.recipes.sample_grids import draw_while_training, drawing_cost, first_of, save_and_draw
from diffusers_ext.recipes.text_encoder import TextDenoiser
from diffusers_ext.recipes.text_to_image import PICTURES, TextConfig, Texts
from diffusers_ext.recipes.training_path import build_scheduler
from diffusers_ext.trainer.config import resolve_for_machine
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.run import describe_data, finish_run, make_accelerator, open_run


def main(config: TextConfig) -> Path:
    """Trains a model and returns the folder of its pipeline."""
    accelerator = make_accelerator(config)
    command = to_command(config, "training/train_text_to_image.py")
    config = resolve_for_machine(config)
    with open_run(config, accelerator) as open_folder:
        vae = pretrained_vae(config)
        data, held_out, texts = load_data(config, accelerator, vae)
        rows = rows_of(config, data)
        space = with_statistics(config, data, SampleSpace.of(data, vae), accelerator)
        config = dataclasses.replace(config, resolution=space.resolution, resize_mode=data.resize_mode)
        config.check_sample(space.shape[1:], space.resolution)
        empty = config.caption_dropout > 0 or has_empty_caption(data)
        refuse_unlearned_guidance(config, empty, "caption_dropout")
        unconditional = None
        if config.leads_targets:
            unconditional = unconditional_inputs(data, learned=empty, dropout="caption_dropout")
        check_augmentation(config, data)
        condition = condition_of_run(config, data, space)
        if condition is not None:
            rows = condition_rows(config, condition, held_out, data)
        open_folder(config)
        scheduler = build_scheduler(config, largest_x0=space.largest)
        model = build_model(
            config,
            space,
            learned_unconditional=empty,
            cross_attention_dim=width_of(texts.text_encoder),
            pool_context=config.pool_context,
            **network_options(config, condition, space),
        )
        if texts.trained:
            model = TextDenoiser(model, texts.text_encoder, texts.mask_padding)
        pipeline = partial(averaged_pipeline, scheduler=scheduler, space=space, texts=texts, condition=condition)
        objective = build_objective(
            *(config, scheduler, accelerator),
            num_bins=space.num_values,
            unconditional=unconditional,
        )
        trainer = Trainer(
            config,
            accelerator,
            model,
            objective,
            data,
            batch_options=batch_options(config, space, condition, label_dropout=config.caption_dropout)
            | {"text_dropout": config.bpe_dropout > 0},
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
            about = {"pictures": PICTURES, "pipeline_tag": "text-to-image"} | described_run(condition)
            finish_run(trainer, command, described, **about)
    return trainer.output_dir


def load_data(
    config: TextConfig, accelerator: Accelerator, vae: ModelMixin | None
) -> tuple[ImageData, ImageData | None, Texts]:
    """The images with their captions, those held out if the options name any, and what the captions are made to."""
    with accelerator.local_main_process_first():
        data_config = config.for_data(find_caption_column(config, config.caption_column))
        if config.validation_split is not None:
            held_out_config = dataclasses.replace(
                data_config,
                dataset_split=config.validation_split,
                max_train_samples=config.max_validation_samples,
            )
            find_caption_column(held_out_config, data_config.label_column)  # which looks whether they are all there
        data = prepare_samples(data_config, vae, multiple_of=config.size_multiple)
        refuse_sequences(data, "training/train_text_to_image.py")
        captions = captions_of(data)
        texts = Texts.of(config, captions)
        data = with_texts(data, texts.table(captions, accelerator.device))
        held_out = prepare_validation(data_config, data, partial(prepare_samples, vae=vae))
        if held_out is not None:
            held_out = with_texts(held_out, texts.table(captions_of(held_out), accelerator.device))
    encoder = "trained from scratch" if texts.trained else f"from {config.pretrained_text_encoder}"
    tokens = f"{len(texts.tokenizer)} different tokens, at most {texts.max_length} in a text"
    notes = [f"captions of the column {data_config.label_column}; text encoder {encoder}; {tokens}", *data.notes]
    data = with_labels_of(config, dataclasses.replace(data, notes=tuple(notes)))
    for note in (describe_data(config, data), *data.notes):
        accelerator.print(note)
    for line in describe_held_out(held_out, config.validation_split):
        accelerator.print(line)
    return data, held_out, texts


@contextmanager
def averaged_pipeline(
    trainer: Trainer,
    scheduler: SchedulerMixin,
    space: SampleSpace,
    texts: Texts,
    condition: ImageCondition | None = None,
) -> Iterator[TextGuidedDiffusionPipeline]:
    """The pipeline as it stands, with the averaged weights if there are any; the model's own come back at the end."""
    with trainer.averaged_model() as model:
        trained = texts.trained
        encoder = model.text_encoder if trained else texts.text_encoder.to(trainer.accelerator.device)
        pipe = TextGuidedDiffusionPipeline(
            denoiser=model.denoiser if trained else without_adapter(model),
            scheduler=type(scheduler).from_config(scheduler.config),  # a copy: sampling sets its timesteps
            tokenizer=texts.tokenizer,
            text_encoder=encoder,
            vae=space.vae,
            statistics=space.statistics,
            max_text_length=texts.max_length,
            mask_padding=texts.mask_padding,
            clip_guided_noise=clipped_noise_of_run(trainer.config),
            image_condition=None if condition is None else condition.to_config(),
        )
        pipe.set_progress_bar_config(disable=True)
        yield pipe
        if not trained:
            encoder.to("cpu")


def rows_of(config: TextConfig, data: ImageData) -> dict[str, list[str]]:
    """The rows of a sample grid: one for each text."""
    prompts = config.prompts_of(captions_of(data))
    return {"prompts": prompts, "names": prompts}


run = partial(run_script, TextConfig, main)
