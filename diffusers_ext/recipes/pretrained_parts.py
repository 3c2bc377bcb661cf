"""An autoencoder or a classifier that a run begins with: by itself in a folder or on the Hub, or in a pipeline that has one."""

import dataclasses
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin

from diffusers_ext.sizes import as_size


@dataclass(frozen=True)
class PretrainedPart:
    """What the config of a model says.

    Attributes:
        name: A folder, or a name on the Hub.
        subfolder: In which it lies there; `None` for a model by itself.
        class_name: Of the model.
        config: Complete.
    """

    name: str
    subfolder: str | None
    class_name: str
    config: Mapping[str, Any]

    @property
    def size(self) -> tuple[int, ...]:
        """Of its samples."""
        return as_size(self.config["sample_size"], self.config["dims"])

    def check_samples(self, channels: int, size: tuple[int, ...] | None) -> None:
        """Refuses samples of other channels, or another size than that which is given.

        Args:
            size: None if the model takes any.

        Raises:
            ValueError: if they are others.
        """
        if channels != self.config["in_channels"]:
            raise ValueError(
                f"the samples must have the {self.config['in_channels']} channels that --pretrained_pipeline {self.name} "
                f"takes, got {channels}; see --image_mode"
            )
        if size is not None and tuple(size) != self.size:
            sides = ["x".join(map(str, sides)) for sides in (self.size, size)]
            raise ValueError(
                f"the samples must have the size that --pretrained_pipeline {self.name} was trained on, {sides[0]}, got "
                f"{sides[1]}; see --resolution"
            )

    def load(self, **changes: Any) -> ModelMixin:
        """The model, with its weights in float32, and with these changes of its config, which no weights follow from."""
        cls = getattr(diffusers, self.class_name)
        return cls.from_pretrained(self.name, subfolder=self.subfolder, **changes).float()


def read_part(name: str, part: str, classes: tuple[str, ...]) -> PretrainedPart:
    """The config of a model.

    Args:
        part: Its name in a pipeline, such as "vae".
        classes: Those that it may be of.

    Raises:
        ValueError: if there is none.
    """
    subfolder = part if is_pipeline_with(name, part) else None
    try:
        config = getattr(diffusers, classes[0]).load_config(name, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--pretrained_pipeline {name} must be a {' or '.join(classes)}, or a pipeline with one as its {part}: {error}"
        ) from error
    class_name = config.get("_class_name")
    if class_name not in classes:
        raise ValueError(
            f"--pretrained_pipeline {name} must be a {' or '.join(classes)}, or a pipeline with one as its {part}, got a "
            f"{class_name}"
        )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        complete = dict(getattr(diffusers, class_name).from_config(config).config)
    return PretrainedPart(name, subfolder, class_name, complete)


def read_vae(name: str) -> PretrainedPart:
    """The config of an autoencoder of this package; see `read_part`."""
    return read_part(name, "vae", ("VAEModel", "HierarchicalVAEModel"))


def options_of_vae(part: PretrainedPart) -> dict[str, Any]:
    """An autoencoder by the options of `training/train_vae.py`."""
    config, hierarchical = part.config, part.class_name == "HierarchicalVAEModel"
    kind = "hierarchical" if hierarchical else config["architecture"]
    names = ["likelihood"]
    if kind == "mlp":
        names += ["latent_dim", "hidden_dims"]
    else:
        names += ["block_out_channels", "layers_per_block", "mid_block_add_attention"]
    if hierarchical:
        names.append("num_levels")
    if config["likelihood"] != "bernoulli":
        names += ["likelihood_scale", "learn_scale"]
    options = {"architecture": kind} | {name: config[name] for name in names}
    if kind != "mlp":
        several = not isinstance(config["latent_channels"], int)
        options["level_channels" if several else "latent_channels"] = config["latent_channels"]
    return options


def is_pipeline_with(name: str, part: str) -> bool:
    """Whether a folder or a name on the Hub is a pipeline with a component of that name."""
    if Path(name).is_dir():
        return (Path(name) / part / ModelMixin.config_name).is_file()
    with suppress(OSError, ValueError):  # of a repository that holds a model alone
        return part in DiffusionPipeline.load_config(name)
    return False


def hold(config: Any, name: str, theirs: Any, source: str, *, known: bool = True) -> None:
    """Refuses an option of a run that was given, and is not that of what the run begins with.

    Args:
        theirs: As it is there; not looked at unless `known`.
        source: What the run begins with.

    Raises:
        ValueError: if so.
    """
    default = next(field.default for field in dataclasses.fields(config) if field.name == name)
    given = getattr(config, name)
    if given == default or (known and given == theirs):
        return
    of = f"be {theirs!r}, as it is of" if known and theirs is not None else "be left out with"
    raise ValueError(f"{name} must {of} --pretrained_pipeline {source}, got {given!r}")


def take_over(config: Any, theirs: Mapping[str, Any], source: str) -> None:
    """Gives a frozen config the options of what its run begins with.

    Raises:
        ValueError: for one that was given and is another.
    """
    for name, value in theirs.items():
        value = tuple(value) if isinstance(value, list) else value
        hold(config, name, value, source)
        object.__setattr__(config, name, value)
