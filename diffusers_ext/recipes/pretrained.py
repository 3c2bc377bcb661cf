"""A pipeline that a run begins with: what its configs say, and the options of the run that follow from it.

Its path, its prediction type and its network are not the run's to choose. Options of those that are given are held to it;
those that are left open, or at their default, are taken from it. All of that is known from the configs alone.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext.command_names import name_commands
from diffusers_ext.conditions import GIVEN, ImageCondition
from diffusers_ext.guidance.labels import NUM_CLASSES_KEYS
from diffusers_ext.models.dit import DiTModel
from diffusers_ext.models.dit_parts import PARTS_OF_DIT
from diffusers_ext.models.statistics import DataStatisticsModel
from diffusers_ext.models.unet import UNetModel
from diffusers_ext.pipelines.stock import stock_name
from diffusers_ext.recipes.pretrained_parts import hold
from diffusers_ext.schedulers.levels import describe_path, is_linear, prediction_type_of
from diffusers_ext.sizes import as_size, compression


PRETRAINED_PATH = "pretrained"  # the option `path` of a run whose path is that of a pipeline

# Networks that a run can begin with, by the name of their class, and which option of `NetworkConfig` they are.
KINDS = {
    "UNetModel": "unet",
    "UNet2DModel": "unet",
    "LucidrainsUNetModel": "unet",
    "DiTModel": "dit",
    "DiTTransformer2DModel": "dit",
}

# Options of a network that are in the config of those of this package by the same name.
OF_UNET = ("block_out_channels", "layers_per_block", "attention_resolutions", "attention_head_dim", "fourier_features")
OF_DIT = (
    *("patch_size", "hidden_size", "num_layers", "num_attention_heads", "mlp_ratio", "qk_norm", "num_registers"),
    *PARTS_OF_DIT,
)
OF_PATH = (
    *("path", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr"),
    *(
        "beta_min",
        "beta_max",
        "sigma_min",
        "sigma_max",
        "log_snr_max",
        "log_snr_min",
        "schedule_features",
        "bound_steps",
    ),
)


@dataclass(frozen=True)
class Pretrained:
    """What the configs of a pipeline say.

    Attributes:
        name: A folder, or a name on the Hub.
        class_name: Of the pipeline.
        subfolder: Of the denoiser.
        denoiser_class, denoiser: The denoiser's class by name, and its config, complete.
        scheduler: Of the path that it was trained on.
        vae: The config of its autoencoder; `None` for pixels.
        statistics: The config of the statistics that it normalises data by; `None` for none.
        config: Of the pipeline.
    """

    name: str
    class_name: str
    subfolder: str
    denoiser_class: str
    denoiser: Mapping[str, Any]
    scheduler: SchedulerMixin
    vae: Mapping[str, Any] | None
    statistics: Mapping[str, Any] | None
    config: Mapping[str, Any]

    @property
    def num_classes(self) -> int | None:
        return next((self.denoiser[key] for key in NUM_CLASSES_KEYS if self.denoiser.get(key) is not None), None)

    @property
    def takes_labels(self) -> bool:
        """Whether its network is one that has labels, or can be given some."""
        return any(key in self.denoiser for key in NUM_CLASSES_KEYS)

    @property
    def id2label(self) -> dict[int, str] | None:
        """Names of its labels, if it has some."""
        names = self.config.get("id2label")
        return {int(label): name for label, name in names.items()} if names else None

    @property
    def has_null_label(self) -> bool:
        """Whether it was trained without label or text too; diffusers' U-Net has no label for that."""
        if self.denoiser_class == "UNet2DModel":
            return self.num_classes is None
        return bool(self.denoiser.get("learned_unconditional", True))

    @property
    def learns_variance(self) -> bool:
        return self.denoiser.get("out_channels") == 2 * self.denoiser["in_channels"]

    @property
    def is_linear(self) -> bool:
        return is_linear(self.scheduler)

    @property
    def prediction_type(self) -> str:
        return prediction_type_of(self.scheduler)

    @property
    def path(self) -> dict[str, Any]:
        """Its path by the options that make it; without `beta_schedule` and `path` if none do."""
        path = describe_path(self.scheduler)
        return {} if "trained_betas" in path else path

    @property
    def size(self) -> tuple[int, ...]:
        """Of the samples that the denoiser sees."""
        return as_size(self.denoiser["sample_size"], self.denoiser.get("dims", 2))

    @property
    def resolution(self) -> tuple[int, ...]:
        """Of the images."""
        factor = 1 if self.vae is None else compression(self.vae)
        return tuple(side * factor for side in self.size)

    def describe(self) -> str:
        """The pipeline in a line."""
        path = self.path
        named = path.get("path") or path.get("beta_schedule") or "a table of betas"
        return (
            f"starts from {self.name}, a {self.class_name} of a {self.denoiser_class} on the path {named}, "
            f"{self.prediction_type}"
        )


def read_pretrained(name: str) -> Pretrained:
    """The configs of a pipeline in a folder or on the Hub.

    Raises:
        ValueError: if there is none, or if its denoiser or its scheduler is none that can be trained on.
    """
    index = Path(name) / DiffusionPipeline.config_name
    return _read(name, index.stat().st_mtime_ns if index.is_file() else None)


@lru_cache(maxsize=4)
def _read(name: str, changed: int | None) -> Pretrained:
    """`changed` tells a folder from what it was before it was written again."""
    try:
        index = DiffusionPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"--pretrained_pipeline {name} cannot be loaded as a pipeline: {error}") from error
    parts = {key: entry for key, entry in index.items() if isinstance(entry, list) and entry and entry[0] is not None}
    subfolder = stock_name(parts, "denoiser")
    class_name = _class_name(index.get("_class_name"))
    if subfolder is None or "scheduler" not in parts:
        raise ValueError(
            f"--pretrained_pipeline {name} must be a pipeline with a scheduler and a denoiser, unet or transformer, got a "
            f"{class_name} of {', '.join(name for name in parts if name[0] != '_')}"
        )
    denoiser_class, scheduler_class = parts[subfolder][1], parts["scheduler"][1]
    if denoiser_class not in KINDS:
        raise ValueError(
            f"--pretrained_pipeline {name} must have a denoiser that is one of {', '.join(KINDS)}, got a {denoiser_class}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sampling by its scheduler as it is
        scheduler = getattr(diffusers, scheduler_class).from_pretrained(name, subfolder="scheduler")
    config = {key: value for key, value in index.items() if not isinstance(value, list) and key[0] != "_"}
    vae = stock_name(parts, "vae")
    if vae == "vqvae":
        raise ValueError(
            f"--pretrained_pipeline {name} must have an autoencoder whose latents have a mean and a variance, got a "
            f"{parts[vae][1]}"
        )
    source = Pretrained(
        name=name,
        class_name=class_name,
        subfolder=subfolder,
        denoiser_class=denoiser_class,
        denoiser=_config_of(name, denoiser_class, subfolder),
        scheduler=scheduler,
        vae=None if vae is None else _config_of(name, parts[vae][1], vae),
        statistics=_config_of(name, parts["statistics"][1], "statistics") if "statistics" in parts else None,
        config=config,
    )
    _ = source.path  # refuses a scheduler without one
    if source.denoiser.get("sample_size") is None:
        raise ValueError(f"--pretrained_pipeline {name} must say the size of its samples, got sample_size=None")
    return source


def _class_name(saved: str | list | None) -> str:
    return saved[-1] if isinstance(saved, list) else str(saved)


def _config_of(name: str, class_name: str, subfolder: str) -> dict[str, Any]:
    """A component's config, with the defaults of what it does not say."""
    cls = getattr(diffusers, class_name)
    config = cls.load_config(name, subfolder=subfolder)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(cls.from_config(config).config)


def options_from(config: Any, source: Pretrained) -> dict[str, Any]:
    """The options that a run takes from the pipeline it begins with, those included that were given and are the same.

    Args:
        config: A `DenoisingConfig`, whose options are as they were given.

    Raises:
        ValueError: for a given option that contradicts the pipeline.
    """
    _check_condition(config, source)
    network = _network_options(source)
    for name in ("model", "dit_size", *OF_UNET, *OF_DIT):
        hold(config, name, network.get(name), source.name, known=name in network)
    learned = source.learns_variance
    if config.objective is not None and (config.objective in ("vlb", "hybrid")) != learned:
        raise ValueError(
            f"objective must be {'hybrid or vlb' if learned else 'simple'} with --pretrained_pipeline {source.name}, whose "
            f"network has {'' if learned else 'no '}channels for the variance, got {config.objective}"
        )
    # Where it has attention goes by the side of a map, which is another one where images have another size.
    taken = {name: value for name, value in network.items() if name != "attention_resolutions"}
    taken |= _path_options(config, source)
    taken |= _image_condition_options(config, source)
    for name in ("data_mean", "data_scale"):
        taken[name] = "none" if source.statistics is None else source.statistics[name]
        hold(config, name, taken[name], source.name)
    taken["objective"] = config.objective or ("hybrid" if learned else "simple")
    if source.vae is None and config.vae is not None:
        raise ValueError(f"vae must be left out with --pretrained_pipeline {source.name}, which is of pixels")
    taken["dropout"] = source.denoiser["dropout"] if config.dropout is None else config.dropout
    taken["vae"] = config.vae or (None if source.vae is None else source.name)
    return taken


def _check_condition(config: Any, source: Pretrained) -> None:
    takes_texts = source.denoiser.get("cross_attention_dim") is not None
    if takes_texts and not config.takes_texts:
        raise ValueError(
            name_commands(
                f"--pretrained_pipeline {source.name} is of texts, which training/train_text_to_image.py goes on with"
            )
        )
    if config.takes_texts and not takes_texts:
        raise ValueError(
            f"--pretrained_pipeline {source.name} must be a TextGuidedDiffusionPipeline, whose network has cross-attention, "
            f"got a {source.class_name} of a {source.denoiser_class} without"
        )


def _image_condition_options(config: Any, source: Pretrained) -> dict[str, Any]:
    """What the network sees beside x_t: the same kind of condition image, with as much noise."""
    saved = source.config.get("image_condition")
    if saved is None:
        if config.has_condition:
            raise ValueError(
                f"condition and condition_column must be left out with --pretrained_pipeline {source.name}, whose network sees no "
                "condition image"
            )
        return {}
    condition = ImageCondition.of_config(saved)
    hold(config, "condition_noise", condition.noise, source.name)
    if condition.kind != GIVEN:
        hold(config, "condition_column", None, source.name, known=False)
        hold(config, "condition", condition.text, source.name)
        return {"condition": condition.text, "condition_noise": condition.noise}
    hold(config, "condition", None, source.name, known=False)
    if config.condition_column is None:
        raise ValueError(
            f"condition_column must name the column of the condition images that --pretrained_pipeline {source.name} sees, "
            f"{condition.describe()}"
        )
    return {"condition_noise": condition.noise}


def _network_options(source: Pretrained) -> dict[str, Any]:
    config, kind = source.denoiser, KINDS[source.denoiser_class]
    options = {"model": kind}
    match source.denoiser_class:
        case UNetModel.__name__ | DiTModel.__name__:
            options |= {name: config[name] for name in (OF_UNET if kind == "unet" else OF_DIT)}
        case "UNet2DModel":
            options |= {name: config[name] for name in ("block_out_channels", "layers_per_block")}
        case "LucidrainsUNetModel":
            options["block_out_channels"] = config["block_out_channels"]
        case _:
            width = config["num_attention_heads"] * config["attention_head_dim"]
            options |= {name: config[name] for name in ("patch_size", "num_layers", "num_attention_heads")}
            options["hidden_size"] = width
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def _path_options(config: Any, source: Pretrained) -> dict[str, Any]:
    """Those of the path are all left to the pipeline: `path` says so, and the others are at their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    path = source.path
    if path.get("beta_schedule") == "squaredcos_cap_v2":
        path["beta_schedule"] = "cosine"
    named = path.get("path") or {"linear": "vp", "cosine": "cosine"}.get(path.get("beta_schedule"))
    theirs = path | {"path": named} if named else path
    for name in OF_PATH:
        if name == "path" and config.path == PRETRAINED_PATH:
            continue
        hold(config, name, theirs.get(name), source.name, known=name in theirs)
    hold(config, "prediction_type", source.prediction_type, source.name)
    return {name: defaults[name] for name in OF_PATH} | {
        "path": PRETRAINED_PATH,
        "prediction_type": source.prediction_type,
        "num_train_timesteps": source.scheduler.config.num_train_timesteps,
    }


def load_statistics(source: Pretrained) -> DataStatisticsModel | None:
    """What the pipeline normalises data by, which its network goes on with; `None` for nothing."""
    if source.statistics is None:
        return None
    return DataStatisticsModel.from_pretrained(source.name, subfolder="statistics")


def load_denoiser(source: Pretrained) -> ModelMixin:
    """The pipeline's network with its weights in float32; diffusers' DiT as a `DiTModel`, which has the same weights."""
    cls = getattr(diffusers, source.denoiser_class)
    network = cls.from_pretrained(source.name, subfolder=source.subfolder).float()
    return DiTModel.from_diffusers(network) if source.denoiser_class == "DiTTransformer2DModel" else network
