"""Make images with a pipeline and save them in a folder.

The command `diffusers-ext sample`; `training/sample.py` says how it is used.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

import diffusers_ext
from diffusers_ext.atomic_files import PARTIAL, atomic_write
from diffusers_ext.draws import check_seed
from diffusers_ext.evaluation.animation import check_animated, denoising_frames, interpolation_frames
from diffusers_ext.evaluation.generate import LARGEST_SEED_OF_SETS, SEED_STRIDE, generate_images
from diffusers_ext.evaluation.image_folder import METADATA, SAMPLED, SAMPLING_RECORD
from diffusers_ext.evaluation.label_shares import balanced_labels
from diffusers_ext.evaluation.pipeline_facts import (
    default_of,
    label_names_of,
    num_labels_of,
    samples_in_bf16,
    takes_prompts,
)
from diffusers_ext.evaluation.subject import guidance_of_call, load_pipeline
from diffusers_ext.figures import (
    ANIMATION_FORMATS,
    check_animation_format,
    labelled_grid,
    save_animation,
    save_picture,
)
from diffusers_ext.guidance.guided_denoiser import check_guidance_scale
from diffusers_ext.machine import process_state, set_threads
from diffusers_ext.options import check_options, option, parse_config, run_script, to_command
from diffusers_ext.untrusted import is_plain_name


MAX_ROWS = 16  # of the grid


@dataclass(frozen=True)
class SampleConfig:
    """Make images with a pipeline and save them in a folder."""

    pipeline: str | None = option(
        None, "PIPELINE may also stand first, without --pipeline: a folder, or a name on the Hub", "what is made"
    )
    num_images: int = option(16, "images to make, of the labels or texts in turn", at_least=1)
    class_labels: tuple[str, ...] | None = option(None, "labels, by name or number; by default all that the model has")
    prompts: tuple[str, ...] | None = option(None, "texts, for a pipeline that makes images from texts")
    negative_prompt: str | None = option(None, "what to lead away from, in place of the empty text", needs="prompts")
    num_inference_steps: int | None = option(None, "steps of the sampler; by default the pipeline's own", at_least=1)
    guidance_scale: float | None = option(None, "weight of classifier-free guidance; by default the pipeline's own")
    scheduler: str | None = option(None, "class of a scheduler of diffusers or diffusers_ext to sample with instead")
    seed: int = option(0, "image i is made from the seed 1 000 000 * seed + i")

    output_dir: str | None = option(
        None, "folder to save in; by default samples/NAME_OF_THE_PIPELINE", "what is saved"
    )
    overwrite_output_dir: bool = option(False, "replace what this command has saved there")
    image_format: Literal["png", "jpg", "webp"] = option("png", "of the files")
    upscale: int = option(1, "enlarge images by this factor, each pixel as a square", at_least=1)
    grid_columns: int = option(8, "pictures in a row of grid.png; 0 for no grid", at_least=0)
    denoising: Literal[ANIMATION_FORMATS] | None = option(None, "also save how the first images come out of noise")
    interpolation: Literal[ANIMATION_FORMATS] | None = option(
        None, "also save the way through the noise of the first images, with the first label or text"
    )
    num_animated: int = option(4, "images in an animation", at_least=2)
    frames_per_second: float = option(10.0, "of an animation, at most 50")

    batch_size: int = option(64, "images at a time; the images do not depend on it", "speed", at_least=1)
    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "precision of the networks; by default bf16 where the hardware is fast at it"
    )
    num_threads: int | None = option(None, "CPU threads of a process; by default the cores are shared out", at_least=1)

    def __post_init__(self):
        if self.pipeline is None:
            raise ValueError("say which pipeline: sample PIPELINE, a folder or a name on the Hub")
        check_options(self)
        check_seed(self.seed, LARGEST_SEED_OF_SETS)
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        if self.class_labels is not None and self.prompts is not None:
            raise ValueError("class_labels and prompts are of two kinds of pipelines: give one of them")
        for name in ("class_labels", "prompts"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} must be at least one, or be left out")
        if not 0 < self.frames_per_second <= 50:
            raise ValueError(f"frames_per_second must be in (0, 50], got {self.frames_per_second:g}")
        for format in {self.denoising, self.interpolation} - {None}:
            check_animation_format(format)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or Path("samples") / Path(self.pipeline).resolve().name)

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the pipeline's call that are given."""
        names = ("num_inference_steps", "guidance_scale", "negative_prompt")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class Wanted:
    """What the images are to show.

    Attributes:
        labels: One for each image, or None.
        prompts: One for each image, or None.
        names: Of the labels or texts, one for each image; None without either.
    """

    labels: list[int] | None = None
    prompts: list[str] | None = None
    names: list[str] | None = None

    @classmethod
    def of(cls, config: SampleConfig, pipeline) -> "Wanted":
        """Labels or texts in turn.

        Raises:
            ValueError: if the pipeline takes none, or needs what this command does not give.
        """
        kind, number = type(pipeline).__name__, config.num_images
        if getattr(pipeline, "image_condition", None) is not None:
            raise ValueError(f"the {kind} needs condition images, which its call takes: pipe(condition_image=...)")
        if pipeline.config.get("value_scale") is not None:
            raise ValueError(f"the {kind} makes sequences, and this command saves images: call it, pipe(...)")
        if takes_prompts(pipeline):
            if config.class_labels is not None or config.prompts is None:
                raise ValueError(f"the {kind} makes images from texts: give --prompts TEXT ...")
            texts = [config.prompts[i % len(config.prompts)] for i in range(number)]
            return cls(prompts=texts, names=texts)
        if config.prompts is not None:
            raise ValueError(f"the {kind} takes no texts: leave prompts out")
        count = num_labels_of(pipeline)
        if count is None:
            if config.class_labels is not None:
                raise ValueError(f"the {kind} takes no labels: leave class_labels out")
            return cls()
        known = label_names_of(pipeline) or [str(label) for label in range(count)]
        chosen = (
            range(count) if config.class_labels is None else [label_id(name, known) for name in config.class_labels]
        )
        labels = balanced_labels(number, chosen)
        return cls(labels, names=[known[label] for label in labels])

    def of_images(self, indices: Sequence[int]) -> dict[str, list]:
        """`labels` or `prompts` of these images."""
        each = {"labels": self.labels, "prompts": self.prompts}
        return {name: [values[i] for i in indices] for name, values in each.items() if values is not None}


def label_id(name: str, known: Sequence[str]) -> int:
    """A label by its name, or else by its number.

    Raises:
        ValueError: if there is no such label.
    """
    if name in known:
        return list(known).index(name)
    if name.isdecimal() and int(name) < len(known):
        return int(name)
    some = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
    raise ValueError(f"class_labels must be among the {len(known)} of the model ({some}) or their numbers, got {name}")


def main(config: SampleConfig) -> Path:
    """Makes and saves the images, and returns the folder."""
    state, folder = process_state(), config.folder
    set_threads(config.num_threads, state.num_processes)
    check_folder(config)
    pipeline = load_pipeline(config.pipeline, config.scheduler).to(state.device)
    pipeline.set_progress_bar_config(disable=True)
    wanted = Wanted.of(config, pipeline)
    if config.denoising or config.interpolation:
        check_animated(pipeline)
    bf16 = samples_in_bf16(pipeline, config.mixed_precision, state.device.type)
    names = file_names(config, wanted)
    with torch.autocast(state.device.type, torch.bfloat16) if bf16 else nullcontext():
        batches = make_images(config, pipeline, wanted, state)
        first = list(islice(batches, 1))  # so that what the call refuses leaves a folder as it is
        state.wait_for_everyone()  # all have checked
        if state.is_main_process and folder.exists() and config.overwrite_output_dir:
            clear(folder)
        if state.is_main_process:  # before all images, since the folder is known by it
            write_record(config, pipeline, "bf16" if bf16 else "no")
        state.wait_for_everyone()
        save_images(config, chain(first, batches), names)
        state.wait_for_everyone()
        if not state.is_main_process:
            return folder
        saved = [SAMPLED, *save_grid(config, wanted, names), *save_animations(config, pipeline, wanted)]
    write_metadata(config, wanted, names)
    print(f"{config.num_images} images in {folder}: {', '.join([*saved, SAMPLING_RECORD])}")
    return folder


def check_folder(config: SampleConfig) -> None:
    """Refuses a folder that holds something else than what is to be replaced."""
    folder = config.folder
    if not folder.exists() or all(path.name.startswith(PARTIAL) for path in folder.iterdir()):
        return
    if not config.overwrite_output_dir:
        raise ValueError(f"output_dir {folder} is not empty: give another one, or --overwrite_output_dir")
    if not (folder / SAMPLING_RECORD).is_file():
        raise ValueError(f"output_dir {folder} holds nothing that this command has saved, and is left as it is")


def clear(folder: Path) -> None:
    """Removes what this command saves, and what of it was being written when a process ended."""
    shutil.rmtree(folder / SAMPLED, ignore_errors=True)
    animations = (f"{what}.{end}" for what in ("denoising", "interpolation") for end in ANIMATION_FORMATS)
    for path in (
        *folder.glob(f"{PARTIAL}*"),
        folder / "grid.png",
        *(folder / name for name in animations),
        folder / SAMPLING_RECORD,  # by which the folder is known, so last
    ):
        path.unlink(missing_ok=True)


def file_names(config: SampleConfig, wanted: Wanted) -> list[str]:
    """Paths below the images' folder; in a subfolder for each label, which evaluation knows them by."""
    digits = max(5, len(str(config.num_images - 1)))
    files = [f"{index:0{digits}}.{config.image_format}" for index in range(config.num_images)]
    if wanted.labels is None or not all(map(is_plain_name, wanted.names)):
        return files
    return [f"{name}/{file}" for name, file in zip(wanted.names, files, strict=True)]


def make_images(
    config: SampleConfig, pipeline, wanted: Wanted, state: PartialState
) -> Iterator[list[tuple[int, Image.Image]]]:
    """The share of this process, batch by batch: the index of each image and its picture."""
    mine = range(state.process_index, config.num_images, state.num_processes)
    with tqdm(total=len(mine), desc="sampling", unit="image", disable=not state.is_main_process) as bar:
        for start in range(0, len(mine), config.batch_size):
            indices = mine[start : start + config.batch_size]
            images = generate_images(
                pipeline,
                indices,
                labels=wanted.labels,
                prompts=wanted.prompts,
                settings=config.settings,
                batch_size=config.batch_size,
                seed=config.seed,
                show_progress=False,
            )
            pictures = [to_picture(image, config.upscale, config.image_format) for image in images]
            bar.update(len(indices))
            yield list(zip(indices, pictures, strict=True))


def save_images(config: SampleConfig, batches: Iterable[list[tuple[int, Image.Image]]], names: list[str]) -> None:
    for index, picture in chain.from_iterable(batches):
        path = config.folder / SAMPLED / names[index]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_picture(picture, path)


def to_picture(image: Tensor, upscale: int, image_format: str) -> Image.Image:
    """A uint8 image `(channels, height, width)`, each pixel as a square of `upscale` of them.

    Raises:
        ValueError: if a file of the format cannot hold its channels.
    """
    channels, height, width = image.shape
    if channels not in (1, 3, 4) or (channels == 4 and image_format == "jpg"):
        raise ValueError(
            f"{image_format} holds images of 1, 3{'' if image_format == 'jpg' else ' or 4'} channels, got {channels}"
        )
    array = image.permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(array[..., 0] if channels == 1 else array)
    return picture.resize((width * upscale, height * upscale), Image.Resampling.NEAREST)


def save_grid(config: SampleConfig, wanted: Wanted, names: list[str]) -> list[str]:
    """The first images, a row for each label or text; without either in a square."""
    columns, path = config.grid_columns, config.folder / "grid.png"
    if not columns:
        return []
    by_name: dict[str, list[int]] = {}
    for index, name in enumerate(wanted.names or []):
        by_name.setdefault(name, []).append(index)
    rows = [indices[:columns] for indices in by_name.values()][:MAX_ROWS]
    if not rows:
        rows = list(torch.arange(config.num_images).split(columns))[:MAX_ROWS]
    pictures = [torch.stack([read_picture(config.folder / SAMPLED / names[i]) for i in row]) for row in rows]
    save_picture(labelled_grid(pictures, list(by_name)[:MAX_ROWS] or None), path)
    return [path.name]


def read_picture(path: Path) -> Tensor:
    """A saved image, `(channels, height, width)` in [0, 1]."""
    with Image.open(path) as picture:
        pixels = torch.from_numpy(np.array(picture))
    return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)).float() / 255


def save_animations(config: SampleConfig, pipeline, wanted: Wanted) -> list[str]:
    """Those that are asked for, of the first images."""
    count, saved = min(config.num_animated, config.num_images), []
    first, seeds = range(count), [config.seed * SEED_STRIDE + i for i in range(count)]
    if config.denoising:
        heads = None if wanted.names is None else wanted.names[:count]
        frames = denoising_frames(pipeline, seeds, heads=heads, **wanted.of_images(first), **config.settings)
        saved.append(f"denoising.{config.denoising}")
        save_animation(frames, config.folder / saved[-1], config.frames_per_second)
    if config.interpolation:
        one = {name.removesuffix("s"): values[0] for name, values in wanted.of_images([0]).items()}
        options = {"batch_size": config.batch_size} | one | config.settings
        frames = interpolation_frames(pipeline, seeds, **options)
        saved.append(f"interpolation.{config.interpolation}")
        save_animation(frames, config.folder / saved[-1], config.frames_per_second, hold=0.0)
    return saved


def write_metadata(config: SampleConfig, wanted: Wanted, names: list[str]) -> None:
    """A line for each image, with which the folder is a data set: its file, its seed, its label or its text."""
    lines = []
    for index, name in enumerate(names):
        line: dict[str, Any] = {"file_name": name, "seed": config.seed * SEED_STRIDE + index}
        if wanted.names is not None:
            line["label" if wanted.prompts is None else "text"] = wanted.names[index]
        lines.append(json.dumps(line, ensure_ascii=False))
    with atomic_write(config.folder / SAMPLED / METADATA) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_record(config: SampleConfig, pipeline, precision: str) -> None:
    """How the images were made."""
    record = {
        "command": to_command(config, "training/sample.py", launcher="python", first="pipeline"),
        "pipeline": config.pipeline,
        "pipeline_class": type(pipeline).__name__,
        "scheduler_class": type(pipeline.scheduler).__name__,
        "num_inference_steps": config.num_inference_steps or default_of(pipeline, "num_inference_steps"),
        **guidance_of_call(pipeline, config.guidance_scale, config.settings),
        "mixed_precision": precision,
        "seed": config.seed,
        "num_images": config.num_images,
        "versions": {"diffusers_ext": diffusers_ext.__version__, "torch": torch.__version__},
    }
    config.folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(config.folder / SAMPLING_RECORD) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


parse = partial(parse_config, SampleConfig, first="pipeline")
run = partial(run_script, SampleConfig, main, first="pipeline")
