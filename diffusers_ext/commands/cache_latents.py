"""Encode a data set once, for training diffusion models on its latents.

The command `diffusers-ext cache-latents`; `training/cache_latents.py` says how it is used.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import datasets
import numpy as np
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from tqdm.auto import tqdm

from diffusers_ext.atomic_files import atomic_write, lock_folder
from diffusers_ext.command_names import name_commands
from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.identity import digest_of_images
from diffusers_ext.data.image_table import ImageData, mirror
from diffusers_ext.data.latent_cache import (
    DTYPE,
    LatentsInfo,
    fingerprint,
    latent_shape,
    load_vae,
    read_info,
    scaled_for,
    shard_path,
    write_info,
)
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.data.sequences import SequenceData
from diffusers_ext.machine import is_fast_at_bf16, set_threads
from diffusers_ext.options import option, run_script
from diffusers_ext.pixels import to_images
from diffusers_ext.sizes import compression


# What the shards that are there were made with, until all are.
PLAN_FILE = ".{split}.plan.json"


@dataclass(frozen=True)
class CacheConfig(DataConfig):
    """Encode the images of a data set by an autoencoder, and keep mean and standard deviation of their latents.

    With `random_flip` each image is encoded mirrored too.
    """

    vae: str | None = option(None, "autoencoder: a folder, a pipeline that has one, or a name on the Hub", "latents")
    output_dir: str | None = option(None, "folder of the latents; by default latents/NAME_OF_THE_DATA_SET")
    overwrite_output_dir: bool = option(False, "encode again what output_dir holds of this split")
    batch_size: int = option(32, "images encoded at once", at_least=1)
    shard_size: int = option(4096, "images of a shard", at_least=1)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of the encoder; by default bf16 where the hardware is fast at it"
    )
    num_threads: int | None = option(None, "CPU threads of a process; by default the cores are shared out", at_least=1)

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *("dataset_name", "dataset_split", "resolution", "vae", "output_dir", "overwrite_output_dir", "batch_size"),
        *("mixed_precision",),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.vae is None:
            raise ValueError(
                name_commands(
                    "vae must name the autoencoder to encode by, such as the output_dir of training/train_vae.py"
                )
            )
        if self.resize_mode == "random_crop":
            raise ValueError("resize_mode random_crop needs the images anew each time: latents are encoded once")


def main(config: CacheConfig) -> Path:
    """Encodes what is not encoded yet, and returns the folder.

    Raises:
        FolderInUse: if another command writes to it.
    """
    precision = config.mixed_precision or ("bf16" if is_fast_at_bf16(_device()) else "no")
    accelerator = Accelerator(cpu=_device() == "cpu", mixed_precision=precision)
    set_threads(config.num_threads, accelerator.num_processes)
    split = config.dataset_split
    folder = Path(config.output_dir or f"latents/{os.path.basename(os.path.abspath(config.dataset_name))}")
    if not split.replace("_", "").isalnum():
        raise ValueError(f"dataset_split must be a split without a slice, whose name the shards bear, got {split}")
    vae = load_vae(config.vae).to(accelerator.device)
    with accelerator.local_main_process_first():
        data = scaled_for(vae, prepare_images(config, multiple_of=compression(vae.config)), config)
    info = describe(config, data, vae)
    count = -(-len(data) // config.shard_size)
    paths = [shard_path(folder, split, number, count) for number in range(count)]
    with lock_folder(folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            begin(folder, split, info, precision, config.shard_size, paths, config.overwrite_output_dir)
        accelerator.wait_for_everyone()
        encode(config, accelerator, vae, data, paths)
        if accelerator.is_main_process:
            check_shards(paths, info)
            write_info(folder, read_info(folder) | {split: info})
            (folder / PLAN_FILE.format(split=split)).unlink()
            print(
                name_commands(
                    f"latents of {split}, {' x '.join(map(str, info.latent_shape))}, are in {folder}; train on them by\n"
                    f"accelerate launch training/train_ddpm.py --dataset_name {folder} --vae {config.vae}"
                )
            )
        accelerator.wait_for_everyone()
    return folder


def encode(
    config: CacheConfig, accelerator: Accelerator, vae: ModelMixin, data: ImageData, paths: Sequence[Path]
) -> None:
    """Writes the shards that are missing; the processes share them out."""
    split, count = config.dataset_split, len(paths)
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    accelerator.wait_for_everyone()  # before any is written: they share out the same ones
    accelerator.print(f"{len(data)} images of {split} in {count} shards, {count - len(missing)} of them there already")
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    with tqdm(total=len(mine) * config.shard_size, disable=not accelerator.is_main_process, unit=" images") as bar:
        for number in mine:
            first = number * config.shard_size
            rows = range(first, min(first + config.shard_size, len(data)))
            write_shard(paths[number], encoded(vae, data, rows, config, accelerator, bar), data)
    accelerator.wait_for_everyone()


def _device() -> str:
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


def describe(config: CacheConfig, data: ImageData, vae: ModelMixin) -> LatentsInfo:
    """The description of the latents, which is saved with them.

    Raises:
        ValueError: if the VAE does not take these images.
    """
    if data.channels != vae.config.in_channels:
        raise ValueError(
            f"--vae takes images of {vae.config.in_channels} channels, those of {data.name} have {data.channels}; see "
            "--image_mode"
        )
    return LatentsInfo(
        dataset_name=config.dataset_name,
        dataset_config_name=config.dataset_config_name,
        dataset_split=config.dataset_split,
        resolution=data.size,
        resize_mode=data.resize_mode,
        pad_value=config.pad_value,
        image_mode=config.image_mode,
        white_value=config.white_value,
        max_train_samples=config.max_train_samples,
        label_column=config.label_column,
        sequence_column=config.sequence_column,
        sequence_layout=config.sequence_layout,
        latent_shape=latent_shape(vae, data.size),
        num_images=len(data),
        random_flip=config.random_flip,
        id2label=data.id2label,
        vae=config.vae,
        vae_fingerprint=fingerprint(vae),
        contents=digest_of_images(data),
    )


def begin(
    folder: Path,
    split: str,
    info: LatentsInfo,
    precision: str,
    shard_size: int,
    paths: Sequence[Path],
    overwrite: bool,
) -> None:
    """Claims the folder for the split: for shards that are there, only if they were made with the same.

    Args:
        paths: Of the shards there are to be.

    Raises:
        ValueError: if they were not.
    """
    plan_file, done = folder / PLAN_FILE.format(split=split), read_info(folder)
    if split in done and done[split].contents is None:  # of a version that did not keep it
        done[split] = dataclasses.replace(done[split], contents=info.contents)
    made_with = dataclasses.asdict(info) | {"mixed_precision": precision, "shard_size": shard_size}
    plan = json.dumps(made_with, indent=2)
    there = list(folder.glob(f"{split}-*-of-*.parquet"))
    if overwrite:
        for path in [*there, plan_file]:
            path.unlink(missing_ok=True)
        if split in done:
            write_info(folder, {name: other for name, other in done.items() if name != split})
    elif (
        (split in done and done[split] != info)
        or (plan_file.exists() and plan_file.read_text() != plan)
        or not set(there) <= set(paths)  # of another shard_size
    ):
        raise ValueError(
            f"{folder} holds latents of {split} that are of other images, another VAE or other options: choose another "
            "--output_dir, or give --overwrite_output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(plan_file) as partial:
        partial.write_text(plan)


@torch.no_grad()
def encoded(
    vae: ModelMixin, data: ImageData, rows: range, config: CacheConfig, accelerator: Accelerator, bar: tqdm
) -> Iterator[dict]:
    """The rows of a shard: mean and standard deviation, and the label; of each image, and then of its mirror image."""
    for start in range(rows.start, rows.stop, config.batch_size):
        numbers = np.arange(start, min(start + config.batch_size, rows.stop))
        pixels = data.pixels[numbers]
        if isinstance(data, SequenceData):
            pixels = data.value_scale.normalized(pixels)
        views = [pixels]
        if config.random_flip:
            views.append(mirror(pixels.copy(), np.ones(len(pixels), bool)))
        moments = []
        for view in views:
            images = torch.from_numpy(view).to(accelerator.device).movedim(-1, 1)
            images = images if images.is_floating_point() else to_images(images)
            with accelerator.autocast():
                posterior = vae.encode(images).latent_dist
            both = torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)
            moments.append(both.movedim(1, -1).cpu().numpy())
        stacked = np.stack(moments, axis=1)
        if not np.isfinite(stacked).all() or np.abs(stacked).max() > np.finfo(DTYPE).max:
            raise ValueError(f"the VAE's latents of images {numbers[0]} to {numbers[-1]} do not fit float16")
        for number, of_image in zip(numbers, stacked.astype(DTYPE), strict=True):
            label = {}
            if data.labels is not None:
                given = data.labels[number]
                label["label"] = np.flatnonzero(given).tolist() if data.has_label_sets else int(given)
            yield from ({"pixels": one.tobytes()} | label for one in of_image)
        bar.update(len(numbers))


def write_shard(path: Path, rows: Iterator[dict], data: ImageData) -> None:
    """Writes a shard atomically."""
    features = {"pixels": datasets.Value("binary")}
    if data.id2label is not None:
        label = datasets.ClassLabel(names=[data.id2label[label] for label in range(data.num_classes)])
        features["label"] = datasets.List(label) if data.has_label_sets else label
    with atomic_write(path, sync=True) as partial:
        datasets.Dataset.from_list(list(rows), features=datasets.Features(features)).to_parquet(partial)


def check_shards(paths: list[Path], info: LatentsInfo) -> None:
    """Raises: ValueError: if they do not hold all the rows."""
    count = sum(pq.read_metadata(path).num_rows for path in paths)
    if count != info.num_images * info.rows_per_image:
        raise ValueError(f"the shards hold {count} rows, not {info.num_images * info.rows_per_image}: encode again")


run = partial(run_script, CacheConfig, main)
