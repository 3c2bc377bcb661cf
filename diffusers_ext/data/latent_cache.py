"""Data as the latents of a VAE: encoded once and kept on disk, or at each batch.

What is kept are the mean and the standard deviation of each latent, so that each look at an image draws its latents
anew, as encoding at each batch does. Both ways draw by the same numbers of the batch, so that they give the same
latents, but for the rounding to float16 of what is kept.
"""

import dataclasses
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from diffusers import AutoModel, DiffusionPipeline, ModelMixin
from torch import Tensor

from diffusers_ext.atomic_files import atomic_write, finish_replacing
from diffusers_ext.command_names import name_commands
from diffusers_ext.data.config import DataConfig, TrainingDataConfig
from diffusers_ext.data.identity import hash_weights
from diffusers_ext.data.image_table import ImageData, PixelTable
from diffusers_ext.data.label_columns import fair_share, read_labels
from diffusers_ext.data.prepare import prepare_data
from diffusers_ext.data.sequences import in_scale_of
from diffusers_ext.data.stream import StreamData
from diffusers_ext.latents import check_one_level, latent_scale, normalize_latents
from diffusers_ext.sizes import compression, one_if_equal
from diffusers_ext.untrusted import from_mapping, read_yaml_mapping


LATENTS_FILE = "latents.yaml"
MAX_INFO_BYTES = 2**26  # each label has its name there, and each different caption
LONGEST_SIDE = 2**16
# Of the columns of a shard, `pixels` has the mean and then the standard deviation, (height, width, 2 channels).
DTYPE = np.dtype(np.float16)

# What of a VAE's config has no influence on what its encoder gives.
_NO_INFLUENCE = ("scaling_factor", "shift_factor", "sample_size", "force_upcast")


@dataclass(frozen=True)
class LatentsInfo:
    """The entry of `latents.yaml` for the latents of one split.

    Attributes:
        dataset_name, dataset_config_name, dataset_split: Where the images are from.
        resolution: (height, width) of the images, or (length,) of sequences.
        resize_mode, pad_value, image_mode, white_value, max_train_samples, label_column, sequence_column, sequence_layout: As
            for `DataConfig`.
        latent_shape: Of one image, (channels, height, width), or of one sequence, (channels, length).
        num_images: How many; each has a second row, mirrored, if `random_flip`.
        random_flip: See `num_images`.
        id2label: Name of each label, or None.
        vae: Where the VAE was loaded from.
        vae_fingerprint: See `fingerprint`.
        contents: A digest of the images; None if that was not kept.
    """

    dataset_name: str
    dataset_config_name: str | None
    dataset_split: str
    resolution: tuple[int, ...]
    resize_mode: str
    pad_value: int
    image_mode: str | None
    max_train_samples: int | None
    label_column: str | None
    latent_shape: tuple[int, ...]
    num_images: int
    random_flip: bool
    id2label: dict[int, str] | None
    vae: str
    vae_fingerprint: str
    white_value: int | None = None
    contents: str | None = None
    sequence_column: str | None = None
    sequence_layout: str | None = None

    @property
    def rows_per_image(self) -> int:
        return 2 if self.random_flip else 1


def write_info(folder: Path, infos: dict[str, LatentsInfo]) -> None:
    """Writes `latents.yaml`, what the folder holds of each split, atomically."""
    splits = {split: json.loads(json.dumps(dataclasses.asdict(info))) for split, info in infos.items()}
    for split, info in infos.items():
        splits[split]["id2label"] = info.id2label
    with atomic_write(folder / LATENTS_FILE) as partial:
        partial.write_text(yaml.safe_dump({"splits": splits}, sort_keys=False, allow_unicode=True))


def read_info(folder: str | Path) -> dict[str, LatentsInfo]:
    """The splits that a folder of latents holds; none if it holds no latents.

    Raises:
        ValueError: if its `latents.yaml` is none of `write_info`.
    """
    path = Path(folder) / LATENTS_FILE
    if not path.is_file():
        return {}
    splits = read_yaml_mapping(path, MAX_INFO_BYTES).get("splits")
    if not isinstance(splits, dict):
        raise ValueError(f"{path} must have the splits that the folder holds")
    return {str(split): _checked_info(entry, path) for split, entry in splits.items()}


def _checked_info(entry: object, path: Path) -> LatentsInfo:
    info = from_mapping(LatentsInfo, entry, path)
    shapes = {name: tuple(getattr(info, name)) for name in ("resolution", "latent_shape")}
    dims = 1 if len(shapes["resolution"]) == 1 else 2
    for name, length in (("resolution", dims), ("latent_shape", dims + 1)):
        sides = shapes[name]
        if len(sides) != length or not all(type(side) is int and 0 < side <= LONGEST_SIDE for side in sides):
            raise ValueError(f"{path}: {name} must be {length} integers in [1, {LONGEST_SIDE}], got {list(sides)}")
    if info.num_images < 1:
        raise ValueError(f"{path}: num_images must be at least 1, got {info.num_images}")
    return dataclasses.replace(info, **shapes)


def shard_path(folder: Path, split: str, number: int, count: int) -> Path:
    return folder / f"{split}-{number:05}-of-{count:05}.parquet"


@dataclass(frozen=True)
class LatentData(ImageData):
    """Latents from disk instead of images.

    Attributes:
        pixels: Float16, each row (height, width, 2 channels), the mean and the standard deviation.
        info: What they are of.
    """

    info: LatentsInfo | None = None

    def __len__(self) -> int:
        return len(self.pixels) // self.info.rows_per_image

    def read(self, rows: np.ndarray, crops: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """See `ImageData.read`. Mirrored images have rows of their own: latents cannot be mirrored."""
        return self.pixels[rows * self.info.rows_per_image + flipped]

    def digests(self) -> str:
        """A digest of the images and of the VAE."""
        return f"{self.info.contents}-{self.info.vae_fingerprint[:32]}"

    @property
    def size(self) -> tuple[int, int]:
        return self.info.latent_shape[1:]

    @property
    def resolution(self) -> tuple[int, ...]:
        return self.info.resolution

    @property
    def channels(self) -> int:
        return self.info.latent_shape[0]


def load_vae(name: str) -> ModelMixin:
    """An autoencoder by itself or of a pipeline, from a folder or the Hub, for encoding.

    Raises:
        ValueError: if there is none, if it is none of images, or if the scale of its latents was never measured.
    """
    finish_replacing(name)
    try:
        vae = AutoModel.from_pretrained(name, subfolder="vae" if _is_pipeline_with_vae(name) else None)
    except (OSError, ValueError) as error:
        raise ValueError(f"--vae {name} cannot be loaded as an autoencoder: {error}") from error
    if not hasattr(vae, "encode") or vae.config.get("latent_channels") is None:
        raise ValueError(f"--vae {name} must be an autoencoder with latent_channels, got a {type(vae).__name__}")
    check_one_level(vae, f"--vae {name}")
    if vae.config.get("architecture") == "mlp":
        raise ValueError(
            f"--vae {name} must have latents with height and width, or length, which a denoiser has room for"
        )
    latent_scale(vae, torch.empty(1, vae.config.latent_channels, 1, 1))  # refuses one that was never measured
    return vae.eval().requires_grad_(False)


def _is_pipeline_with_vae(name: str) -> bool:
    if Path(name).is_dir():
        return (Path(name) / "vae" / "config.json").is_file()
    with suppress(OSError, ValueError):  # of a repository that holds a model alone
        return "vae" in DiffusionPipeline.load_config(name)
    return False


def fingerprint(vae: ModelMixin) -> str:
    """A hash of all that the latents of an image depend on: the weights, and the config but for the latents' scale."""
    config = {name: value for name, value in vae.config.items() if name[0] != "_" and name not in _NO_INFLUENCE}
    return hash_weights(vae, json.dumps([type(vae).__name__, config], sort_keys=True, default=str).encode())


@torch.no_grad()
def latent_shape(vae: ModelMixin, size: tuple[int, ...]) -> tuple[int, ...]:
    """(channels, height, width) of the latents of an image of (height, width), or (channels, length) of a sequence's.

    Raises:
        ValueError: if the VAE does not take images of that size.
    """
    dims = vae.config.get("dims", 2)
    if dims != len(size):
        kinds = {1: "sequences", 2: "images"}
        raise ValueError(f"--vae is of {kinds[dims]}, and the data are {kinds[len(size)]}")
    images = torch.zeros(1, vae.config.in_channels, *size, device=vae.device, dtype=vae.dtype)
    return tuple(vae.encode(images).latent_dist.mean.shape[1:])


def prepare_latents(config: DataConfig, vae: ModelMixin | None) -> LatentData:
    """The latents in the folder `config.dataset_name`.

    Args:
        vae: The one that is to decode what is made of them.

    Raises:
        ValueError: if the folder has no such split, if its latents are of another VAE or of images that were read in
            another way than the options say, or if a shard is missing.
    """
    folder, splits = Path(config.dataset_name), read_info(config.dataset_name)
    info = splits.get(config.dataset_split)
    if info is None:
        raise ValueError(
            name_commands(
                f"{folder} holds latents of the splits {', '.join(splits)}, got {config.dataset_split}: encode it by "
                f"training/cache_latents.py --dataset_split {config.dataset_split} --output_dir {folder}"
            )
        )
    if vae is None:
        raise ValueError(f"{folder} holds latents: give the VAE that they are of, --vae {info.vae}")
    if fingerprint(vae) != info.vae_fingerprint:
        raise ValueError(
            name_commands(
                f"{folder} holds latents of another VAE than --vae: they were made by {info.vae}. Give that one, or encode the "
                "images again by training/cache_latents.py"
            )
        )
    _check_options(config, info, folder)
    count = len(list(folder.glob(f"{config.dataset_split}-*.parquet")))
    shards = [shard_path(folder, config.dataset_split, number, count) for number in range(count)]
    table = datasets.load_dataset(
        "parquet", data_files=[str(path) for path in shards], split="train", cache_dir=config.cache_dir
    )
    num_rows = info.num_images * info.rows_per_image
    if len(table) != num_rows:
        raise ValueError(
            f"{folder} should hold {num_rows} rows of {config.dataset_split}, got {len(table)}: encode again"
        )
    each = info.rows_per_image
    images = table.select(range(0, num_rows, each))  # without the mirrored ones
    chosen = fair_share(images, config.max_train_samples or info.num_images, "label")
    channels, *size = info.latent_shape
    shape = (*size, 2 * channels)
    labelled = info.id2label is not None and not config.unconditional
    return LatentData(
        PixelTable(table.select_columns(["pixels"]), shape, DTYPE, (chosen[:, None] * each + np.arange(each)).ravel()),
        read_labels(images.select(chosen), "label")[0] if labelled else None,
        info.id2label if labelled else None,
        config.dataset_name,
        (f"latents of {info.dataset_name} at {'x'.join(map(str, info.resolution))}, encoded by {info.vae}",),
        info.resize_mode,
        info,
        rows=chosen,
    )


def _check_options(config: DataConfig, info: LatentsInfo, folder: Path) -> None:
    """Refuses options of the images that the latents were not made with."""
    if config.random_flip and not info.random_flip:
        raise ValueError(f"random_flip needs mirrored latents, which {folder} has none of: encode with --random_flip")
    defaults = {field.name: field.default for field in dataclasses.fields(DataConfig)}
    for name in (
        "resolution",
        "resize_mode",
        "pad_value",
        "image_mode",
        "white_value",
        "label_column",
        "sequence_column",
        "sequence_layout",
        "dataset_config_name",
    ):
        asked, made = getattr(config, name), getattr(info, name)
        asked = (asked[0], asked[-1])[: len(made)] if name == "resolution" and asked else asked
        if asked not in (defaults[name], made):
            raise ValueError(
                f"{folder} holds latents made with {name} {made}, got {asked}: leave it out or encode again"
            )
    for name in ("num_classes", "label_names", "image_column", "sequence_scale"):
        if getattr(config, name) is not None:
            raise ValueError(
                f"{name} was settled when the latents in {folder} were made: leave it out or encode again"
            )


class LatentEncoder:
    """Turns a batch of images, or of latents' moments from disk, into latents drawn by the batch's own numbers.

    Args:
        vae: Which is moved to `device`.
        cached: Whether the batches come from disk.
    """

    def __init__(self, vae: ModelMixin, device: torch.device, cached: bool):
        self.vae, self.cached = vae.to(device), cached

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of images, or as they come from disk, at the VAE's own scale."""
        if self.cached:
            return images.float().chunk(2, dim=1)
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        mean, std = self.moments(batch["images"])
        latents = normalize_latents(self.vae, mean + std * batch["latent_noise"])
        return {name: value for name, value in batch.items() if name != "latent_noise"} | {"images": latents}


class Normaliser:
    """Turns the images or latents of a batch into samples of the denoiser, by the statistics of the data.

    The batch gets `units`, the way back. The mean of a label is that of the image's own, also where its label was dropped to
    train the unconditional prediction: that is one of what is left of the data without the means of their labels.

    Args:
        statistics: `DataStatisticsModel`, which is moved to `device`.
        encode: What makes latents of a batch, if anything.
    """

    def __init__(self, statistics: ModelMixin, device: torch.device, encode: LatentEncoder | None):
        self.statistics, self.encode = statistics.to(device), encode

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch = dict(batch) if self.encode is None else self.encode(batch)
        labels = batch.pop("own_labels", None)
        labels = batch.get("labels") if labels is None else labels
        images = batch["images"].float()
        units = self.statistics.units(labels, images)
        return batch | {"images": (images - units.shift) / units.scale, "units": units}


@dataclass(frozen=True)
class SampleSpace:
    """The space in which a denoiser is trained: images, or their latents.

    Attributes:
        shape: Of a sample, (channels, height, width) or (channels, length).
        resolution: (height, width) of the images, or (length,) of the sequences.
        num_values: Of a channel of a pixel; None if they are continuous.
        vae: Between images and latents; None for images.
        cached: Whether the latents are on disk.
        statistics: `DataStatisticsModel` by which samples are normalised; None for images in [-1, 1] or latents at their
            VAE's scale.
    """

    shape: tuple[int, ...]
    resolution: tuple[int, ...]
    num_values: int | None
    vae: ModelMixin | None = None
    cached: bool = False
    statistics: ModelMixin | None = None

    @classmethod
    def of(cls, data: ImageData | StreamData, vae: ModelMixin | None) -> "SampleSpace":
        """The space of a data set, with a VAE or without.

        The VAE's `sample_size` becomes that of the images, which it is to decode.

        Raises:
            ValueError: if the VAE does not take these images.
        """
        if vae is None:
            num_values = int(np.iinfo(data.dtype).max) + 1 if data.dtype.kind == "u" else None
            return cls((data.channels, *data.size), data.size, num_values)
        cached = isinstance(data, LatentData)
        if not cached and data.channels != vae.config.in_channels:
            raise ValueError(
                f"--vae takes images of {vae.config.in_channels} channels, those of {data.name} have {data.channels}; see "
                "--image_mode"
            )
        resolution = data.resolution
        shape = data.info.latent_shape if cached else latent_shape(vae, data.size)
        vae.register_to_config(sample_size=one_if_equal(resolution))
        return cls(shape, resolution, None, vae, cached)

    @property
    def batch_options(self) -> dict:
        """Keywords of `BatchOptions`."""
        own = {} if self.statistics is None else {"own_labels": self.statistics.config.num_classes is not None}
        if self.vae is None:
            return own
        return own | {"latent_shape": self.shape, "noise_shape": (*self.shape[1:], self.shape[0])}

    @property
    def largest(self) -> float:
        """The least bound of the magnitude of an image as the denoiser knows it; of latents none is known, and it is 1."""
        return 1.0 if self.vae is not None or self.statistics is None else self.statistics.largest

    def encoder(self, device: torch.device) -> LatentEncoder | Normaliser | None:
        """Makes samples of the images of a batch on its device; None for images as they are."""
        encode = None if self.vae is None else LatentEncoder(self.vae, device, self.cached)
        return encode if self.statistics is None else Normaliser(self.statistics, device, encode)


def scaled_for(vae: ModelMixin, data: ImageData | StreamData, config: DataConfig) -> ImageData | StreamData:
    """The data, of sequences in the scale that an autoencoder was trained in, if its config says it.

    Raises:
        ValueError: if the options ask for a scale of their own.
    """
    given = config.sequence_scale
    refusal = f"sequence_scale {given} has no meaning beside --vae, which has a scale: leave it out"
    return in_scale_of(vae.config, data, given, refusal)


def value_scale_of(data: ImageData | StreamData, vae: ModelMixin | None) -> dict[str, list[float]] | None:
    """The `value_scale` of a pipeline for these data; None for images."""
    scale = getattr(data, "value_scale", None)
    return scale.to_config() if scale else None if vae is None else vae.config.get("value_scale")


def prepare_samples(
    config: TrainingDataConfig, vae: ModelMixin | None, multiple_of: int = 1, *, read_ahead: bool = False
) -> ImageData | StreamData:
    """The latents in a folder of them, or the images that the options ask for.

    Args:
        vae: The one that is trained with, or None for images.
        multiple_of: Of what the sides of the samples are to be multiples.
        read_ahead: See `prepare_data`.
    """
    if not read_info(config.dataset_name):
        factor = 1 if vae is None else compression(vae.config)
        data = prepare_data(config, multiple_of * factor, read_ahead=read_ahead)
        return data if vae is None else scaled_for(vae, data, config)
    if config.streaming:
        raise ValueError(f"{config.dataset_name} holds latents, which are read where they are: leave streaming out")
    return prepare_latents(config, vae)
