"""What a pipeline refuses, before the first call of a network."""

import math
import warnings
from collections.abc import Sequence

import torch
from diffusers.guiders import AutoGuidance, BaseGuidance, ClassifierFreeZeroStarGuidance
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from diffusers_ext.guidance.guided_denoiser import asks_for_unconditional, classifier_free_guidance, without_notice
from diffusers_ext.guidance.guiders import ClassifierGuidance, ComposedGuidance
from diffusers_ext.guidance.labels import num_classes_of
from diffusers_ext.latents import latent_scale
from diffusers_ext.models.vae import VAEModel


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_components(
    denoiser: nn.Module, vae: nn.Module | None, classifier: nn.Module | None, weak_denoiser: nn.Module | None
) -> None:
    """Refuses components that do not fit the denoiser.

    Raises:
        ValueError: with what differs.
    """
    components = {"denoiser": denoiser, "vae": vae, "classifier": classifier, "weak_denoiser": weak_denoiser}
    for name, network in components.items():
        refuse_wrapped(name, network)
    in_channels, num_classes = denoiser.config.in_channels, num_classes_of(denoiser)
    if vae is not None:
        _check_vae(vae, denoiser)
    if weak_denoiser is not None:
        for key in ("in_channels", "sample_size"):
            theirs, ours = weak_denoiser.config[key], denoiser.config[key]
            if _size(theirs, 2) != _size(ours, 2):
                raise ValueError(f"weak_denoiser must have the denoiser's {key}, {ours}, got {theirs}")
        if num_classes_of(weak_denoiser) not in (None, num_classes):
            raise ValueError(
                f"weak_denoiser must have no labels or the denoiser's {num_classes}, got {num_classes_of(weak_denoiser)}"
            )
    if classifier is not None:
        if classifier.config.in_channels != in_channels:
            raise ValueError(
                f"classifier must take the denoiser's {in_channels} channels, got {classifier.config.in_channels}"
            )
        dims = denoiser.config.get("dims", 2)
        theirs, ours = (_size(network.config.sample_size, dims) for network in (classifier, denoiser))
        if theirs != ours:
            raise ValueError(f"classifier must take the denoiser's size, {_text(ours)}, got {_text(theirs)}")
        if num_classes is not None and num_classes_of(classifier) != num_classes:
            raise ValueError(
                f"classifier must have the denoiser's {num_classes} labels, got {num_classes_of(classifier)}"
            )


def refuse_wrapped(name: str, network: nn.Module | None) -> None:
    """Refuses what spreads a network over devices; a compiled network is one like any other.

    Raises:
        ValueError: with how to get at the network.
    """
    if isinstance(network, DataParallel | DistributedDataParallel):
        raise ValueError(
            f"{name} must be the network itself, got it in a {type(network).__name__}: give its .module, or "
            "accelerator.unwrap_model of it. To sample on several devices, start a process with a pipeline for each"
        )


def _check_vae(vae: nn.Module, denoiser: nn.Module) -> None:
    channels, config = denoiser.config.in_channels, vae.config
    if config.get("architecture") == "mlp":
        raise ValueError("vae must have latents with room for a denoiser, got a fully connected one, whose are flat")
    if config.latent_channels != channels:
        raise ValueError(
            f"vae must have latents of the denoiser's {channels} channels, got latent_channels={config.latent_channels}"
        )
    vae = getattr(vae, "_orig_mod", vae)  # of a compiled one
    if not isinstance(vae, VAEModel):
        return  # those of diffusers have a sample_size that says nothing of what they are used for
    got, expected = vae.latent_shape[1:], _size(denoiser.config.sample_size, denoiser.config.get("dims", 2))
    if got != expected:
        raise ValueError(
            f"vae must have latents of the denoiser's size, {_text(expected)}, got {_text(got)} for its images of "
            f"{_text(_size(config.sample_size, config.dims))}; if it is to decode images of another size than it was "
            "trained on, say so by vae.register_to_config(sample_size=...)"
        )


def check_outputs(pipe, output_type: str, callback_inputs: Sequence[str]) -> None:
    """Refuses outputs that the pipeline cannot give."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    config = pipe.denoiser.config
    channels = config.in_channels if pipe.vae is None else pipe.vae.config.out_channels
    dims = config.get("dims", 2)
    if output_type == "pil" and (channels not in (1, 3, 4) or dims != 2):
        raise ValueError(
            f"output_type must be 'np' or 'pt' for this model: 'pil' is for images of 1, 3 or 4 channels, and its "
            f"samples have {channels} channels and {dims} dimensions"
        )
    unknown = [name for name in callback_inputs if name not in pipe._callback_tensor_inputs]
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs must be among {pipe._callback_tensor_inputs}, got {unknown}"
        )
    if pipe.vae is not None:
        latent_scale(pipe.vae, torch.empty(1, config.in_channels, *[1] * dims))
        bound = pipe.scheduler.config.get("clip_sample_range", 1.0)
        if pipe.scheduler.config.get("clip_sample") and bound <= 1:
            warnings.warn(
                f"the scheduler clips what it predicts to [-{bound:g}, {bound:g}], which is the range of images and not of "
                "latents: make it with clip_sample=False",
                stacklevel=4,
            )


@without_notice()
def choose_guider(
    pipe,
    guider: BaseGuidance | None,
    guidance_scale: float | None,
    guidance_rescale: float,
    classifier_scale: float,
    labels: Tensor | None,
) -> BaseGuidance | None:
    """The guider of a call: the one given, or the pipeline's, or what the short forms mean.

    Raises:
        ValueError: if more than one of them is given, or one of them is out of range.
    """
    guider = guider or pipe.guider
    if guider is None and labels is not None and labels.is_floating_point():
        if guidance_scale is not None or classifier_scale != 0:
            raise ValueError(
                "class_labels with weights are a guidance of their own, which goes with no guidance_scale or "
                "classifier_scale"
            )
        return ComposedGuidance(guidance_rescale=guidance_rescale)
    if guider is not None:
        short = {
            "guidance_scale": (guidance_scale, None),
            "guidance_rescale": (guidance_rescale, 0),
            "classifier_scale": (classifier_scale, 0),
        }
        for name, (value, default) in short.items():
            if value != default:
                raise ValueError(
                    f"{name} must not be given together with a guider, which has a scale of its own, got {value}; give the "
                    "guider that you want for this call as guider="
                )
        _check_settings(guider)
        return guider
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")
    guidance_scale = 1.0 if guidance_scale is None else guidance_scale
    if classifier_scale:
        return ClassifierGuidance(classifier_scale, guidance_scale, guidance_rescale=guidance_rescale)
    return classifier_free_guidance(guidance_scale, guidance_rescale)


def _check_settings(guider: BaseGuidance) -> None:
    """Refuses what is no guider, and settings with which a guider of diffusers would silently make NaN."""
    if not isinstance(guider, BaseGuidance):
        raise ValueError(
            f"guider must be one of diffusers.guiders or of this package, made by its class, got {guider!r}"
        )
    name = type(guider).__name__
    scale = getattr(guider, "guidance_scale", 1.0)
    if not math.isfinite(scale):
        raise ValueError(f"{name} must have a finite guidance_scale, got {scale}")
    is_zero_star = isinstance(guider, ClassifierFreeZeroStarGuidance)
    if is_zero_star and guider.zero_init_steps > 0 and guider.guidance_rescale > 0:
        raise ValueError(
            f"{name} must have zero_init_steps=0 or guidance_rescale=0, since what it makes of the first steps, zeros, has "
            f"no standard deviation to rescale; got {guider.zero_init_steps} and {guider.guidance_rescale}"
        )
    layers = getattr(guider, "auto_guidance_config", None) or getattr(guider, "skip_layer_config", None) or ()
    if any(getattr(config, "dropout", 1.0) < 1 for config in layers):
        warnings.warn(
            f"{name} with a dropout below 1 draws from torch's global generator, so that an image is not its generator's "
            "alone; a dropout of 1 drops the layers whole",
            stacklevel=5,
        )


def check_guider(
    pipe, guider: BaseGuidance | None, labels: Tensor | None, timesteps: Tensor, guide: Sequence[bool]
) -> None:
    """Refuses a guider that the components or the labels do not suffice for, and labels that would do nothing.

    Args:
        guide: In which of the steps it acts.

    Raises:
        ValueError: with what is missing.
    """
    weighted = labels is not None and labels.is_floating_point()
    if weighted and not isinstance(guider, ComposedGuidance):
        raise ValueError(
            f"class_labels with weights are a guidance of their own, which goes with no {type(guider).__name__}; for this "
            "call give guider=ComposedGuidance()"
        )
    if weighted and not all(guide):
        raise ValueError("guidance_interval must not be given with weights of labels: without them there is no label")
    if labels is not None and labels.dtype == torch.bool and "num_classes" not in pipe.denoiser.config:
        raise ValueError(f"class_labels must be one label for each image for {type(pipe.denoiser).__name__}, got sets")
    if labels is not None and pipe.denoiser_num_classes is None and not isinstance(guider, ClassifierGuidance):
        raise ValueError(
            "class_labels would do nothing: the denoiser takes none, and the pipeline's classifier is not asked; give "
            "classifier_scale, or leave class_labels out"
        )
    if guider is None:
        return
    if hasattr(guider, "check_pipeline"):
        guider.check_pipeline(pipe, labels)
    if isinstance(guider, ComposedGuidance):
        return  # its weights say whether it needs the null label, and it has looked
    has_labels, has_null = pipe.denoiser_num_classes is not None, pipe.null_label is not None
    if has_null and labels is not None:
        return
    if not has_labels and isinstance(guider, AutoGuidance):
        return  # it weakens the network itself
    if not has_labels and isinstance(guider, ClassifierGuidance) and guider.guidance_scale == 0:
        return  # all predictions are unconditional
    if not asks_for_unconditional(guider, timesteps, guide):
        return
    if not has_null:
        reason = "has no null label (label_dropout was 0)" if has_labels else "was trained without labels"
        raise ValueError(
            f"guidance needs a model with labels and a null label; this one {reason}. What needs neither is a "
            "guidance_scale of 1, and to guide by a weaker network or a classifier"
        )
    raise ValueError("guidance needs class_labels to guide to, got None")


def count_images(batch_size: int, class_labels: Tensor | None = None, **tensors: Tensor | None) -> int:
    """The number of images that the arguments of a call agree on; one of an argument stands for any number."""
    given = {"batch_size": batch_size} if batch_size != 1 else {}
    sized = {**tensors, "class_labels": class_labels}
    for name, value in sized.items():
        # Noise is not shared: one start noise means one image.
        if value is not None and (len(value) != 1 or name == "latents"):
            given[name] = len(value)
    if len(set(given.values())) > 1:
        told = ", ".join(f"{name} has {count}" for name, count in given.items())
        raise ValueError(f"the number of images must be the same everywhere, but {told}")
    size = next(iter(given.values()), 1)
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    return size


def _size(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _text(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))
