"""The kind of network that a scheduler's config was made for, whichever class of diffusers wrote it.

A network of ours was trained on a Gaussian variance-preserving path: on betas. Of the classes of diffusers, those that
take `beta_schedule` have such a path, and their configs can be read here; the others need a network of another kind.
diffusers leaves out of a config what its class was left to by default, so that the class that reads it puts its own
defaults there. For what belongs to the network, that would be another network.
"""

import inspect
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.noising import check_betas


# What the model was trained on, whatever samples it.
PATH_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")

# What belongs to the model: all of its path, what it outputs, and the range of its data.
MODEL_KEYS = (
    *PATH_KEYS,
    "trained_betas",
    "rescale_betas_zero_snr",
    "snr_shift_scale",
    "prediction_type",
    "clip_sample",
    "clip_sample_range",
)

# What diffusers means where a class has no such key.
MEANT_BY_ABSENCE = {"rescale_betas_zero_snr": False, "prediction_type": "epsilon"}

# The kind of model by a part of the scheduler's name. It decides nothing, and only stands in errors.
KINDS = (
    ("CMStochastic", "a consistency model"),
    ("ConsistencyDecoder", "a consistency decoder"),
    ("SCM", "a TrigFlow consistency model"),
    ("EDM", "a model with EDM's preconditioning"),
    ("CosineDPM", "a model with EDM's preconditioning"),
    ("KarrasVe", "a model of the variance-exploding path"),
    ("ScoreSdeVe", "a score model of the variance-exploding SDE"),
    ("ScoreSdeVp", "a score model of the continuous variance-preserving SDE"),
    ("IPNDM", "a model of a path of evenly spaced angles"),
    ("Wuerstchen", "a model of Wuerstchen's continuous cosine path"),
    ("Amused", "a model of discrete tokens"),
    ("VQDiffusion", "a model of discrete tokens"),
    ("BlockRefinement", "a model of discrete tokens"),
    ("DiscreteDDIM", "a model of discrete tokens"),
    ("EntropyBound", "a model of discrete tokens"),
    ("Flow", "a flow-matching model"),
    ("Helios", "a flow-matching model"),
    ("LTX", "a flow-matching model"),
    ("Piflow", "a flow-matching model"),
)


def kind_of_model(name: str, config: Mapping[str, Any]) -> str:
    """The kind of model that a scheduler of another path is for, in words."""
    if is_flow(config):
        return "a flow-matching model"
    return next((kind for part, kind in KINDS if part in name), f"a model that was trained on {name}'s own path")


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler of betas was set to a straight path instead."""
    return bool(config.get("use_flow_sigmas")) or str(config.get("prediction_type")).startswith("flow")


def has_betas(cls: type) -> bool:
    """Whether a scheduler class has the Gaussian path of a config's betas."""
    return "beta_schedule" in defaults_of(cls)


@cache
def defaults_of(cls: type) -> dict[str, Any]:
    """The config keys of a scheduler class and their defaults."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {each.name: each.default for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}


def read_model(config: Mapping[str, Any], cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The config of any scheduler with all that belongs to its model explicit, for `cls.from_config` to read.

    What a scheduler in memory was left to by default is in its config; what a file does not say is the default of the
    class that it names. Choices of sampling that were left to their default, such as `timestep_spacing`, stay so.

    Args:
        config: That of a scheduler in memory or from disk, or a dict of options.
        given: Options that go before those of the config.

    Raises:
        ValueError: if it is the config of a model of another path, with both classes and the kind of model.
    """
    maker = _named_class(config)
    in_memory = isinstance(config, FrozenDict) or "_use_default_values" in config
    config = dict(config)
    _check_path(config | given, cls, maker, in_memory)

    unset = config.get("_use_default_values", ())
    config["_use_default_values"] = [key for key in unset if key not in MODEL_KEYS]
    if maker is not None:
        defaults = defaults_of(maker)
        config = {key: defaults[key] for key in MODEL_KEYS if key in defaults} | config
    if maker is not None or in_memory:
        config = MEANT_BY_ABSENCE | config
    config.setdefault("prediction_type", MEANT_BY_ABSENCE["prediction_type"])
    if config.get("variance_type", "") is None and "variance_type" in defaults_of(cls):
        del config["variance_type"]  # solvers without noise say so of a variance that is not learned

    shift = config.get("snr_shift_scale")
    if shift is not None and shift != 1:
        # Within the betas, and so for every class that reads them; the key itself is CogVideoX's alone.
        config |= {"trained_betas": shift_snr(_betas(config | given), shift).tolist(), "snr_shift_scale": 1.0}
    return config


def shift_snr(betas: Tensor, scale: float) -> Tensor:
    """Betas of the path whose signal-to-noise ratio is that of `betas` divided by `scale` (CogVideoX)."""
    alpha_bar = (-betas).log1p().cumsum(0).exp()
    alpha_bar = alpha_bar / (scale + (1 - scale) * alpha_bar)
    before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return 1 - alpha_bar / before


def _betas(config: Mapping[str, Any]) -> Tensor:
    """The betas that a config says, before anything is done to them."""
    if config.get("trained_betas") is not None:
        return check_betas(np.asarray(config["trained_betas"], dtype=np.float64))
    ends = {key: config[key] for key in ("beta_start", "beta_end") if key in config}
    return make_betas(config.get("beta_schedule", "linear"), config.get("num_train_timesteps", 1000), **ends)


def _named_class(config: Mapping[str, Any]) -> type | None:
    """The scheduler class that a config names, if this package or diffusers has it."""
    name = config.get("_class_name")
    ours = sys.modules[__name__.partition(".")[0]]  # whatever the package is called where its code runs
    cls = getattr(ours, name, getattr(diffusers, name, None)) if isinstance(name, str) else None
    # What needs a library that is not installed is a placeholder there, which says nothing of its keys.
    return cls if isinstance(cls, type) and issubclass(cls, SchedulerMixin) else None


def _check_path(config: Mapping[str, Any], cls: type, maker: type | None, in_memory: bool) -> None:
    """Refuses the config of a model whose path is not given by betas."""
    owners = [maker]
    if maker is not None:
        other = not has_betas(maker)
    elif in_memory:
        other = "beta_schedule" not in config
    else:
        strange = any(not key.startswith("_") and key not in defaults_of(cls) for key in config)
        owners = _classes_with_keys(config) if strange and "beta_schedule" not in config else []
        other = bool(owners) and not any(map(has_betas, owners))
    if not other and not is_flow(config):
        return
    if maker is None:
        owners = [owner for owner in _classes_with_keys(config) if has_betas(owner) != other]
    name = owners[0].__name__ if owners else config.get("_class_name", "another class")
    raise ValueError(
        f"{cls.__name__} is for models of a Gaussian path given by betas, and the config of {name} is that of "
        f"{kind_of_model(name, config)}: sample it with {name}, or make {cls.__name__} by its class, with the path that "
        "the model was trained on"
    )


def _classes_with_keys(config: Mapping[str, Any]) -> list[type]:
    """The schedulers of diffusers that know all keys of a config, those with the fewest others first."""
    keys = {key for key in config if not key.startswith("_")}
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    classes = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, SchedulerMixin)]
    return sorted((cls for cls in classes if keys <= defaults_of(cls).keys()), key=lambda cls: len(defaults_of(cls)))
