"""The data of a distillation: the images of the pipeline that is distilled, by its labels or with the texts that it encodes."""

import dataclasses
from functools import partial

import torch
from accelerate import Accelerator

from diffusers_ext.data.captions import (
    captions_of,
    find_caption_column,
    with_texts,
)
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import SampleSpace, prepare_samples, read_info
from diffusers_ext.data.sequences import in_scale_of
from diffusers_ext.data.stream import StreamData
from diffusers_ext.data.validation import describe_held_out, prepare_validation
from diffusers_ext.evaluation.pipeline_facts import image_size_of, label_names_of
from diffusers_ext.pipelines.pipeline_text_guided_diffusion import TextGuidedDiffusionPipeline
from diffusers_ext.recipes.distillation import DistillConfig
from diffusers_ext.recipes.teacher import Teacher
from diffusers_ext.recipes.text_encoder import encoded_captions
from diffusers_ext.trainer.run import describe_data


# Options that say which labels images have.
OF_LABELS = ("label_column", "num_classes", "label_names", "unconditional")


def load_student_data(
    config: DistillConfig, accelerator: Accelerator, teacher: Teacher
) -> tuple[DistillConfig, ImageData | StreamData, ImageData | None, SampleSpace]:
    """The images that the pipeline is distilled with, as its network sees them, and the options that have their size.

    Returns: the options, the images, those held out if the options name some, and the space of the samples.

    Raises:
        ValueError: if they are of another shape or of other labels than those that the pipeline makes, or an option is not for
            what it makes them of.
    """
    pipe, subject = teacher.pipe, teacher.subject
    _check_options(config, teacher)
    if subject.num_classes is None and not subject.of_texts:
        config = dataclasses.replace(config, unconditional=True, num_classes=None, label_names=None)
    if config.resolution is None and not read_info(config.dataset_name):
        config = dataclasses.replace(config, resolution=image_size_of(pipe))
    scale, of_data = config.sequence_scale, config
    refusal = f"sequence_scale must be left out, since the pipeline has a scale, got {scale}"
    with accelerator.local_main_process_first():
        if subject.of_texts:  # whose captions are read as labels
            config = dataclasses.replace(config, caption_column=_caption_column(config))
            of_data = dataclasses.replace(config, label_column=config.caption_column)
        data = in_scale_of(pipe.config, prepare_samples(of_data, pipe.vae), scale, refusal)
        space = dataclasses.replace(SampleSpace.of(data, pipe.vae), statistics=pipe.statistics)
        _check_shape(teacher, data, space)
        _check_labels(teacher, data)
        if subject.of_texts:
            note = f"captions of the column {config.caption_column}, by the pipeline's text encoder"
            data = dataclasses.replace(data, notes=(note, *data.notes))
            data = _with_texts(config, data, pipe, accelerator.device)
        held_out = prepare_validation(of_data, data, partial(prepare_samples, vae=space.vae))
        if held_out is not None and subject.of_texts:
            held_out = _with_texts(config, held_out, pipe, accelerator.device)
    for note in (describe_data(config, data), *data.notes, *describe_held_out(held_out, config.validation_split)):
        accelerator.print(note)
    return (
        dataclasses.replace(config, resolution=space.resolution, resize_mode=data.resize_mode),
        data,
        held_out,
        space,
    )


def _check_options(config: DistillConfig, teacher: Teacher) -> None:
    """Refuses options that are of labels for a pipeline of texts, or the other way round, and dropout that it knows not."""
    subject = teacher.subject
    if subject.of_texts:
        if config.streaming:
            raise ValueError("streaming reads no captions ahead, which are encoded beforehand: leave it out")
        for name in OF_LABELS:
            if getattr(config, name):
                raise ValueError(f"{name} has no meaning for a pipeline of texts, whose column is caption_column")
    elif config.caption_column is not None:
        raise ValueError(
            f"caption_column is for pipelines of texts, and {config.pipeline} makes images without, got {config.caption_column}"
        )
    has_condition = subject.num_classes is not None or subject.of_texts
    if config.label_dropout and has_condition and not subject.can_guide:
        raise ValueError(
            "label_dropout must be 0 for a pipeline that has not learned to do without labels or texts (its own label_dropout or "
            f"caption_dropout was 0), got {config.label_dropout:g}"
        )


def _caption_column(config: DistillConfig) -> str:
    """The column of the captions, which no image lacks, of those held out neither."""
    column = find_caption_column(config, config.caption_column)
    if config.validation_split is not None:
        number = config.max_validation_samples
        held_out = dataclasses.replace(
            config, dataset_split=config.validation_split, max_train_samples=number, validation_split=None
        )
        find_caption_column(dataclasses.replace(held_out, max_validation_samples=None), column)
    return column


def _with_texts(
    config: DistillConfig, data: ImageData, pipe: TextGuidedDiffusionPipeline, device: torch.device
) -> ImageData:
    """The data with the hidden states that the pipeline's text encoder has of each caption, in a file that is mapped."""
    table = encoded_captions(
        pipe.tokenizer,
        pipe.text_encoder,
        captions_of(data),
        max_length=pipe.max_text_length,
        mask_padding=pipe.mask_padding,
        dtype="fp32",  # which the states of any encoder fit into
        in_memory=False,
        cache_dir=config.cache_dir,
        device=device,
    )
    return with_texts(data, table)


def _check_shape(teacher: Teacher, data: ImageData | StreamData, space: SampleSpace) -> None:
    """Refuses images of another shape than those that the pipeline makes."""
    if tuple(space.shape) != tuple(teacher.pipe._sample_shape):
        shapes = ["x".join(map(str, shape)) for shape in (teacher.pipe._sample_shape, space.shape)]
        raise ValueError(
            f"the images must be those that the pipeline makes, whose samples are {shapes[0]}, got {shapes[1]} of {data.name}: "
            "see --resolution and --image_mode"
        )


def _check_labels(teacher: Teacher, data: ImageData | StreamData) -> None:
    """Refuses images with other labels than the pipeline's."""
    number, names = teacher.subject.num_classes, label_names_of(teacher.pipe)
    if number is None:
        return
    if data.id2label is None:
        raise ValueError(f"the pipeline makes images by label, and those of {data.name} have none: see --label_column")
    here = [data.id2label[label] for label in sorted(data.id2label)]
    if len(here) != number or names not in (None, here):
        raise ValueError(
            f"the labels of {data.name} must be those of the pipeline, {_some(names or [f'{number} of them'])}, got "
            f"{_some(here)}: see --label_names and --label_column"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "")
