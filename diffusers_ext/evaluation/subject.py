"""What is measured: a pipeline, with its sampler, or a folder of images."""

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers.utils import DummyObject
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor

import diffusers_ext
from diffusers_ext.data.decoding import allowed_faults, describe_fault
from diffusers_ext.data.images import fit
from diffusers_ext.evaluation.generate import (
    convert_channels,
    default_of,
    describe_labels,
    generate_images,
    label_names_of,
    num_classes_of,
    proportional_labels,
    takes_prompts,
)
from diffusers_ext.evaluation.real_images import CHANNEL_MODES, RealImages
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.pipelines.pipeline_text_guided_diffusion import DEFAULT_GUIDANCE_SCALE, TextGuidedDiffusionPipeline
from diffusers_ext.pixels import open_picture, to_array
from diffusers_ext.schedulers.samplers import check_sampler


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def is_image_folder(name: str) -> bool:
    """Whether a local folder holds images rather than a pipeline.

    Raises:
        ValueError: if it holds neither.
    """
    folder = Path(name)
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return False
    if _image_files(folder):
        return True
    raise ValueError(f"{folder} holds neither a pipeline (model_index.json) nor images ({', '.join(IMAGE_SUFFIXES)})")


def load_pipeline(name: str, scheduler: str | None = None) -> diffusers.DiffusionPipeline:
    """A pipeline from a folder or the Hub.

    Args:
        name: Folder, or name on the Hub.
        scheduler: Class of diffusers or of this package to sample with, made from the config of the pipeline's own.

    Raises:
        ValueError: if there is no such pipeline or scheduler, or the scheduler is for models of another path.
        ImportError: if the scheduler needs a library that is not installed.
    """
    if not Path(name).is_dir():
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise ValueError(f"{name} is no folder here, and no name of a pipeline on the Hub") from None
    try:
        pipeline = diffusers_ext.DiffusionPipeline.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise ValueError(f"{name} is no folder here, and cannot be had from the Hub: {error}") from error
    if scheduler is not None:
        scheduler_class = getattr(diffusers_ext, scheduler, None) or getattr(diffusers, scheduler, None)
        if isinstance(scheduler_class, DummyObject):
            scheduler_class.from_config()  # raises an error that says which library it needs
        if not (isinstance(scheduler_class, type) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
            raise ValueError(f"scheduler must be a scheduler class of diffusers or diffusers_ext, got {scheduler}")
        sampler = scheduler_class.from_config(pipeline.scheduler.config)
        if hasattr(pipeline.scheduler, "alphas_cumprod"):  # so the model is one of a path that betas give
            check_sampler(sampler, type(pipeline).__name__)
        pipeline.register_modules(scheduler=sampler)
    return pipeline


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
    """Images to measure against real ones, asked for by labels as often as the training images have them.

    A pipeline that makes images from texts is asked for the captions of the data set, in turn. The processes share the
    work.

    Args:
        real: The data set, whose channels the images get; with captions for a pipeline that makes images from texts.
        pipeline: See `generate_images`, as for the other arguments.
        num_images: Images of all processes together.
        bf16: Run the networks under bf16 autocast.

    Returns:
        The images, uint8, in order, on every process; the labels that they were asked for, or those of the pictures whose
        captions they were asked for, or None; and a record of how they were sampled.

    Raises:
        ValueError: if the pipeline's labels are not those of the data set.
    """
    num_classes = num_classes_of(pipeline)
    if num_classes is not None and real.has_labels:
        names = label_names_of(pipeline) or real.train.label_names
        if num_classes != len(real.train.label_names) or names != real.train.label_names:
            raise ValueError(
                f"the pipeline's {num_classes} labels ({_some(names)}) are not the {len(real.train.label_names)} of"
                f" {real.name} ({_some(real.train.label_names)}): evaluate it on the data set that it was trained on"
            )
    labels, proportions = (None, None) if num_classes is None else labels_for(real, num_classes, num_images)
    asked, captions = {"labels": labels}, None
    if takes_prompts(pipeline):
        captions = real.captions
        prompts, labels = captions.draw(num_images, seed)
        asked = {"prompts": prompts}
        # Said, since the default in its call only means that it depends.
        if guidance_scale is None and isinstance(pipeline, TextGuidedDiffusionPipeline) and pipeline.guider is None:
            guidance_scale = DEFAULT_GUIDANCE_SCALE if pipeline.knows_empty_text else 1.0

    state = PartialState()
    with torch.autocast(state.device.type, torch.bfloat16) if bf16 else nullcontext():
        mine = generate_images(
            pipeline,
            range(state.process_index, num_images, state.num_processes),
            **asked,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            settings=settings,
            batch_size=batch_size,
            seed=seed,
            show_progress=state.is_main_process,
        )
    images = mine
    if state.num_processes > 1:
        images = mine.new_empty(num_images, *mine.shape[1:])
        for process, part in enumerate(gather_object([mine])):
            images[process :: state.num_processes] = part
    guider = getattr(pipeline, "guider", None)
    if guidance_scale is None and guider is None:  # the default of ours, too, only means that it depends
        is_ours = isinstance(pipeline, GuidedDiffusionPipeline)
        guidance_scale = 1.0 if is_ours else default_of(pipeline, "guidance_scale")
    record = {
        "pipeline_class": type(pipeline).__name__,
        "scheduler_class": type(pipeline.scheduler).__name__,
        "num_inference_steps": num_inference_steps or default_of(pipeline, "num_inference_steps"),
        "guidance_scale": guidance_scale,
        "guider": None if guider is None else type(guider).__name__,
        "by_label": num_classes is not None,
        "labels": proportions,
        "captions": captions and {"column": captions.column, "split": captions.split, "number": len(captions.texts)},
        "mixed_precision": "bf16" if bf16 else "no",
        "seed": seed,
    }
    labels = None if labels is None or not real.has_labels else torch.as_tensor(labels)
    return convert_channels(images, real.image_shape[0]), labels, record


def labels_for(real: RealImages, num_classes: int, num_images: int) -> tuple[list[int], dict]:
    """The labels that images to measure are asked for by, and in which proportions that is (see `describe_labels`).

    As often as the training images have them; equally often where those have none.
    """
    counts = [1] * num_classes
    if real.has_labels:
        counts = torch.bincount(real.train.labels, minlength=num_classes).tolist()
    labels = proportional_labels(num_images, counts)
    return labels, describe_labels(labels, counts)


def read_image_folder(
    name: str, real: RealImages, pad_value: int = 0, max_bad_share: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The images of a folder and its subfolders, prepared like the real ones.

    Args:
        name: Folder. If each image is in a subfolder that bears the name of a label, those are the labels.
        real: The data set.
        pad_value: Of a border, where images are smaller than the real ones, in the range of those.
        max_bad_share: Share of the files, rounded up to a whole one, that may fail to decode and are left out.

    Returns:
        The images, uint8, in the order of their paths; and their labels, or None.

    Raises:
        ValueError: if more files cannot be decoded, or none can.
    """
    channels, height, width = real.image_shape
    if channels > len(CHANNEL_MODES):
        raise ValueError(f"files hold images of up to 4 channels, but those of {real.name} have {channels}")
    paths = _image_files(Path(name))
    border = round(pad_value * 255 / real.white)
    images, faults = np.empty((len(paths), height, width, channels), np.uint8), {}
    for row, path in zip(images, paths, strict=True):
        try:
            picture = to_array(open_picture(path), CHANNEL_MODES[channels - 1], border, real.whites)
            row[...] = fit(picture, (height, width), real.resize_mode, border)
        except Exception as error:  # a decoder raises what it likes on a damaged file
            faults[path] = f"{path} cannot be decoded: {describe_fault(error)}"
    if faults and (len(faults) > allowed_faults(len(paths), max_bad_share) or len(faults) == len(paths)):
        more = f", nor {len(faults) - 1} more of {len(paths)}" if len(faults) > 1 else ""
        raise ValueError(f"{next(iter(faults.values()))}{more}; at most a share of {max_bad_share:g} may fail")
    for fault in faults.values() if PartialState().is_main_process else ():
        print(f"left out: {fault}", file=sys.stderr)
    images = torch.from_numpy(images[[path not in faults for path in paths]]).permute(0, 3, 1, 2).contiguous()
    paths = [path for path in paths if path not in faults]

    ids = {label_name: label for label, label_name in enumerate(real.train.label_names)}
    labels = [ids.get(path.relative_to(name).parts[0]) for path in paths]
    return images, None if None in labels else torch.tensor(labels)


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
