"""Pipelines of diffusers as pipelines of this package: which of their components is what here, and which fit.

here       there
denoiser   unet (DDPMPipeline, DDIMPipeline, LDMPipeline), transformer (DiTPipeline)
vae        vae, or vqvae (LDMPipeline)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging
from torch import nn


logger = logging.get_logger(__name__)

# Where a component of ours is in a pipeline of diffusers.
STOCK_NAMES = {"denoiser": ("denoiser", "unet", "transformer"), "vae": ("vae", "vqvae")}

# The networks of diffusers that are called as ours are: without texts, and with texts alone.
STOCK_DENOISERS = ("UNet2DModel", "DiTTransformer2DModel")
STOCK_TEXT_DENOISERS = ("UNet2DConditionModel",)


def stock_name(names: Sequence[str] | Mapping[str, Any], component: str) -> str | None:
    """Under which of `names` a pipeline has what is `component` here; `None` if it has none."""
    return next((name for name in STOCK_NAMES.get(component, (component,)) if name in names), None)


def components_for(cls: type[DiffusionPipeline], pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The components of `pipeline` under the names that `cls`, a pipeline of this package, has for them.

    Raises:
        ValueError: if it has no denoiser, or one that `cls` does not call as it has to be.
    """
    expected, _ = cls._get_signature_keys(cls)
    there, kind = pipeline.components, type(pipeline).__name__
    found = {name: source for name in expected if (source := stock_name(there, name)) is not None}
    if "denoiser" not in found:
        raise ValueError(
            f"{cls.__name__} takes as denoiser a pipeline's {', '.join(STOCK_NAMES['denoiser'][:-1])} or "
            f"{STOCK_NAMES['denoiser'][-1]}, and {kind} has none of them: its components are {', '.join(there) or 'none'}"
        )
    left = [name for name, part in there.items() if part is not None and name not in found.values()]
    if left:
        logger.warning(f"{cls.__name__} has no use for {', '.join(left)} of {kind}, and leaves them out")
    return {name: there[source] for name, source in found.items()}


def check_stock_denoiser(denoiser: nn.Module, with_texts: bool, component: str = "denoiser") -> None:
    """Refuses a network of diffusers that a pipeline of ours cannot call; networks of others are taken at their word.

    Args:
        with_texts: Whether the pipeline calls it with texts.
        component: What it is in the pipeline, for errors.

    Raises:
        ValueError: with what it would need.
    """
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # of a compiled one
    if not type(denoiser).__module__.startswith("diffusers."):
        return
    names, config = {cls.__name__ for cls in type(denoiser).__mro__}, denoiser.config
    fitting = STOCK_TEXT_DENOISERS if with_texts else STOCK_DENOISERS
    kind = type(denoiser).__name__
    if not names.intersection(fitting):
        reason = "with texts alone" if with_texts else "without texts"
        other = STOCK_DENOISERS if with_texts else STOCK_TEXT_DENOISERS
        instead = "GuidedDiffusionPipeline" if with_texts else "TextGuidedDiffusionPipeline"
        hint = f"; for it there is {instead}" if names.intersection(other) else ""
        raise ValueError(
            f"{component} must be a network that is called {reason}: one of this package, or {' or '.join(fitting)} of "
            f"diffusers, got {kind}{hint}"
        )
    for name, neutral in (("class_embed_type", None), ("addition_embed_type", None), ("encoder_hid_dim_type", None)):
        if config.get(name) != neutral:
            raise ValueError(
                f"{component} must have {name}={neutral}, got a {kind} with {config[name]!r}, which asks for inputs that this "
                "pipeline does not have"
            )
    if with_texts and config.get("num_class_embeds") is not None:
        raise ValueError(f"{component} must have no labels beside texts, got a {kind} with {config.num_class_embeds}")
    if config.get("sample_size") is None:
        raise ValueError(
            f"{component} must say the size of its samples, got a {kind} with sample_size=None: set it by "
            f"{component}.register_to_config(sample_size=SIDE)"
        )


def id2label_of(pipeline: DiffusionPipeline) -> dict[int, str] | None:
    """Names of the labels of a `DiTPipeline`, which keeps them by name: those of a label are joined by commas."""
    labels = getattr(pipeline, "labels", None)
    if not isinstance(labels, Mapping) or not labels or "id2label" in pipeline.config:
        return None
    names: dict[int, list[str]] = {}
    for name, label in labels.items():
        names.setdefault(int(label), []).append(name)
    return {label: ", ".join(names[label]) for label in sorted(names)}
