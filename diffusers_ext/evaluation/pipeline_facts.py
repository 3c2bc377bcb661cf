"""Facts about a pipeline: its labels, the size of its images, the arguments of its call."""

import inspect

from diffusers import LDMPipeline, ModelMixin

from diffusers_ext.guidance.labels import num_classes_of
from diffusers_ext.machine import runs_in_bf16
from diffusers_ext.pipelines.call_defaults import DEFAULT_NUM_STEPS
from diffusers_ext.sizes import compression


def num_labels_of(pipeline) -> int | None:
    """The number of labels that a pipeline can be asked for, or None if it takes none."""
    if "class_labels" not in parameters_of(pipeline):
        return None
    networks = [part for part in pipeline.components.values() if isinstance(part, ModelMixin)]
    return next((number for number in map(num_classes_of, networks) if number), None)


def label_names_of(pipeline) -> list[str] | None:
    """Names of a pipeline's labels 0, 1, 2, ...; None if it has none."""
    names = getattr(pipeline, "config", {}).get("id2label")
    return [names[key] for key in sorted(names, key=int)] if names else None


def takes_prompts(pipeline) -> bool:
    """Whether a pipeline makes images from texts."""
    return "prompt" in parameters_of(pipeline) and "class_labels" not in parameters_of(pipeline)


def image_size_of(pipeline) -> tuple[int, ...]:
    """The (height, width) of the images that a pipeline makes, or (length,), from the configs of its networks.

    Raises:
        ValueError: if they do not say it.
    """
    for name in ("denoiser", "unet", "transformer"):
        config = getattr(getattr(pipeline, name, None), "config", None)
        size = getattr(config, "sample_size", None)
        if size is not None:
            sides = (size,) * config.get("dims", 2) if isinstance(size, int) else size
            vae = getattr(pipeline, "vae", None)
            scale = 1 if vae is None else compression(vae.config)
            return tuple(side * scale for side in sides)
    raise ValueError(f"the size of the images of {type(pipeline).__name__} is not in its configs: give --resolution")


def samples_in_bf16(pipeline, mixed_precision: str | None, device: str) -> bool:
    """Whether a pipeline's networks run under bf16 autocast, by an option as in `runs_in_bf16`.

    Raises:
        ValueError: if that is asked for, and the pipeline cannot.
    """
    if not isinstance(pipeline, LDMPipeline):
        return runs_in_bf16(mixed_precision, device)
    if mixed_precision == "bf16":
        raise ValueError(
            "mixed_precision must be no for LDMPipeline, which makes arrays of numpy of what its autoencoder gives, and numpy has "
            "no bfloat16"
        )
    return False


def default_of(pipeline, name: str):
    """The default of an argument of the pipeline's call, as the pipeline was saved or else of its class; or None."""
    if "call_defaults" in getattr(pipeline, "config", {}):
        saved = (pipeline.config.call_defaults or {}).get(name)
        if saved is not None or name == "num_inference_steps":
            return DEFAULT_NUM_STEPS if saved is None else saved
    parameter = parameters_of(pipeline).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def parameters_of(pipeline) -> dict[str, inspect.Parameter]:
    """The arguments of the pipeline's call, by name."""
    return {name: p for name, p in inspect.signature(type(pipeline).__call__).parameters.items() if name != "self"}
