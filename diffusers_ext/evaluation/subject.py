"""A pipeline that is measured: loaded, with its sampler, and asked for images of a data set's labels or captions."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from diffusers.utils import DummyObject
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

import diffusers_ext
from diffusers_ext.atomic_files import finish_replacing
from diffusers_ext.evaluation.conditioned import ConditionedImages
from diffusers_ext.evaluation.generate import generate_images, shared_by_processes
from diffusers_ext.evaluation.label_shares import describe_labels, proportional_labels
from diffusers_ext.evaluation.labelled_images import convert_channels
from diffusers_ext.evaluation.pipeline_facts import default_of, label_names_of, num_labels_of, takes_prompts
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.pipelines.call_defaults import with_defaults
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.pipelines.pipeline_text_guided_diffusion import TextGuidedDiffusionPipeline
from diffusers_ext.pipelines.text_condition import DEFAULT_GUIDANCE_SCALE
from diffusers_ext.schedulers.levels import is_linear, path_name
from diffusers_ext.schedulers.samplers import check_sampler


INDEX_FILE = diffusers.DiffusionPipeline.config_name


def load_pipeline(name: str, scheduler: str | None = None) -> diffusers.DiffusionPipeline:
    """A pipeline from a folder or the Hub.

    Args:
        name: Folder, or name on the Hub.
        scheduler: Class of diffusers or of this package to sample with, made from the config of the pipeline's own.

    Raises:
        ValueError: if there is no such pipeline or scheduler, or it is not whole, or the scheduler is for models of another path.
        ImportError: if the scheduler needs a library that is not installed.
    """
    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise ValueError(f"{name} is no folder here, and no name of a pipeline on the Hub") from None
    finish_replacing(name)
    if Path(name).is_dir():
        _check_has_pipeline(Path(name))
    try:
        pipeline = diffusers_ext.DiffusionPipeline.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise ValueError(f"{name} must hold a whole pipeline, which cannot be loaded: {error}") from error
        raise ValueError(f"{name} is no folder here, and cannot be had from the Hub: {error}") from error
    if scheduler is not None:
        pipeline.register_modules(scheduler=make_sampler(pipeline, scheduler))
    return pipeline


def _check_has_pipeline(folder: Path) -> None:
    """Refuses a folder without a pipeline, such as a checkpoint or a component of one."""
    if (folder / INDEX_FILE).is_file():
        return
    above = next((each for each in folder.absolute().parents if (each / INDEX_FILE).is_file()), None)
    hint = "give the folder of a run that is through, or of save_pretrained"
    raise ValueError(
        f"{folder} must hold a pipeline, but has no {INDEX_FILE}: {hint if above is None else f'{above} has one'}"
    )


def make_sampler(pipeline: diffusers.DiffusionPipeline, name: str) -> diffusers.SchedulerMixin:
    """A scheduler of a class of diffusers or of this package, made from the config of the pipeline's own.

    Raises:
        ValueError: if there is no such scheduler, or it is for models of another path.
        ImportError: if it needs a library that is not installed.
    """
    scheduler_class = getattr(diffusers_ext, name, None) or getattr(diffusers, name, None)
    if isinstance(scheduler_class, DummyObject):
        scheduler_class.from_config()  # raises an error that says which library it needs
    if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise ValueError(f"scheduler must be a scheduler class of diffusers or diffusers_ext, got {name}")
    sampler = scheduler_class.from_config(pipeline.scheduler.config)
    own = pipeline.scheduler
    if hasattr(own, "alphas_cumprod") or is_linear(own):  # so the path of the model is known
        check_sampler(sampler, type(pipeline).__name__, path_name(own))
    return sampler


@dataclass(frozen=True)
class Asked:
    """The labels or texts that the images of a set are asked for.

    Attributes:
        condition: `labels` or `prompts` of `generate_images`, one for each image, or neither.
        labels: The label that each image is to show, int64, or None if it is not known.
        proportions: Of the labels, see `describe_labels`; None where images are not asked for by label.
        captions: Column, split and number of the captions; None where images are not asked for by text.
        image_condition: How the condition images are made that are asked for; None without.
    """

    condition: dict[str, list]
    labels: Tensor | None = None
    proportions: dict | None = None
    captions: dict | None = None
    image_condition: dict | None = None

    @classmethod
    def of(cls, pipeline, real: RealImages, num_images: int, seed: int) -> "Asked":
        """Labels as often as the training images have them, or the captions of the data set in turn, or nothing.

        For a pipeline with condition images, those of held-out images in turn, with their labels or captions.

        Raises:
            ValueError: if the pipeline's labels are not those of the data set.
        """
        if getattr(pipeline, "image_condition", None) is not None:
            return cls._of_images(pipeline, real, num_images, seed)
        if takes_prompts(pipeline):
            prompts, labels = real.captions.draw(num_images, seed)
            return cls({"prompts": prompts}, labels if real.has_labels else None, captions=real.captions.describe())
        num_classes = num_labels_of(pipeline)
        if num_classes is None:
            return cls({})
        _check_labels(pipeline, num_classes, real)
        labels, proportions = labels_for(real, num_classes, num_images)
        return cls({"labels": labels}, torch.tensor(labels) if real.has_labels else None, proportions)

    @classmethod
    def _of_images(cls, pipeline, real: RealImages, num_images: int, seed: int) -> "Asked":
        conditioned = ConditionedImages.of(pipeline.image_condition, real, num_images, seed)
        condition, captions = {"conditions": conditioned.conditions}, None
        labels, num_classes = conditioned.labels if real.has_labels else None, num_labels_of(pipeline)
        if takes_prompts(pipeline):
            condition["prompts"], captions = real.captions.draw(num_images, seed)[0], real.captions.describe()
        elif num_classes is not None and labels is not None:
            _check_labels(pipeline, num_classes, real)
            condition["labels"] = labels.tolist()
        return cls(condition, labels, captions=captions, image_condition=conditioned.condition.to_config())


def generate_for(
    real: RealImages,
    pipeline,
    num_images: int,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 64,
    bf16: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor | None, dict]:
    """Images to measure against real ones, of the labels or captions of `Asked`. The processes share the work.

    Args:
        real: The data set, whose channels the images get; with captions for a pipeline that makes images from texts.
        pipeline: See `generate_images`, as for the other arguments.
        num_images: Images of all processes together.
        bf16: Run the networks under bf16 autocast.

    Returns:
        The images, uint8, in order, on every process; the labels that they were asked for, or those of the pictures whose
        captions they were asked for, or None; and a record of how they were sampled.

    Raises:
        ValueError: see `Asked.of` and `generate_images`.
    """
    asked = Asked.of(pipeline, real, num_images, seed)
    state = PartialState()

    def make(indices: range) -> Tensor:
        return generate_images(
            pipeline,
            indices,
            **asked.condition,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            settings=settings,
            batch_size=batch_size,
            seed=seed,
            show_progress=state.is_main_process,
        )

    with torch.autocast(state.device.type, torch.bfloat16) if bf16 else nullcontext():
        images = shared_by_processes(num_images, make)
    guider = getattr(pipeline, "guider", None)
    record = {
        "pipeline_class": type(pipeline).__name__,
        "scheduler_class": type(pipeline.scheduler).__name__,
        "num_inference_steps": num_inference_steps or default_of(pipeline, "num_inference_steps"),
        **guidance_of_call(pipeline, guidance_scale, settings or {}),
        "call_defaults": getattr(pipeline, "config", {}).get("call_defaults"),
        "guider": None if guider is None else type(guider).__name__,
        "by_label": asked.proportions is not None,
        "labels": asked.proportions,
        "captions": asked.captions,
        "condition": asked.image_condition,
        "mixed_precision": "bf16" if bf16 else "no",
        "seed": seed,
    }
    return convert_channels(images, real.image_shape[0]), asked.labels, record


def labels_for(real: RealImages, num_classes: int, num_images: int) -> tuple[list[int], dict]:
    """The labels that images to measure are asked for by, and in which proportions that is (see `describe_labels`).

    As often as the training images have them; equally often where those have none.
    """
    counts = [1] * num_classes
    if real.has_labels:
        counts = torch.bincount(real.train.labels, minlength=num_classes).tolist()
    labels = proportional_labels(num_images, counts)
    return labels, describe_labels(labels, counts)


def _check_labels(pipeline, num_classes: int, real: RealImages) -> None:
    in_data = real.train.label_names
    names = label_names_of(pipeline) or in_data
    if real.has_labels and (num_classes != len(in_data) or names != in_data):
        raise ValueError(
            f"the pipeline's {num_classes} labels ({_some(names)}) are not the {len(in_data)} of {real.name} "
            f"({_some(in_data)}): evaluate it on the data set that it was trained on"
        )


def guidance_of_call(pipeline, guidance_scale: float | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What guides a call, for the record of how images were made: as it says, or else as the pipeline was saved.

    Args:
        guidance_scale, settings: Of the call.
    """
    scale, defaults = default_scale(pipeline), getattr(pipeline, "config", {}).get("call_defaults")
    given = {"num_inference_steps": None, **settings, "guidance_scale": guidance_scale}
    call = given | with_defaults(given, defaults, can_guide=scale is not None)
    return {
        "guidance_scale": scale if guidance_scale is None else guidance_scale,
        "guidance_interval": call.get("guidance_interval"),
        "internal_guidance_scale": call.get("internal_guidance_scale", 1.0),
    }


def default_scale(pipeline) -> float | None:
    """The guidance scale of a call that gives none; None with a guider in its stead, or where there is no guidance."""
    if getattr(pipeline, "guider", None) is not None:
        return None
    if isinstance(pipeline, TextGuidedDiffusionPipeline | GuidedDiffusionPipeline):
        of_texts = isinstance(pipeline, TextGuidedDiffusionPipeline) and pipeline.knows_empty_text
        usual = DEFAULT_GUIDANCE_SCALE if of_texts else 1.0
        return (pipeline.config.call_defaults or {}).get("guidance_scale", usual)
    return default_of(pipeline, "guidance_scale")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
