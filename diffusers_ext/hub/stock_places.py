"""Where parts of a pipeline have their place in diffusers' own pipelines."""

from collections.abc import Mapping

from diffusers_ext.hub.saved_folder import Component


def stock_places(part: Component, pipeline: Mapping[str, Component]) -> str:
    """The places of a part in pipelines of diffusers that make images with it, in Markdown; empty if there are none.

    Args:
        part: Of a pipeline, or a model by itself.
        pipeline: All parts of it by their names, on which it depends what the part was trained for.
    """
    config = part.config
    # Those pipelines make images, scale no statistics back, and give no condition image.
    if config.get("dims", 2) != 2 or pipeline.keys() & {"statistics"} or config.get("condition_channels"):
        return ""
    in_latents = "vae" in pipeline or "model" in pipeline
    match part.class_name:
        case "VAEModel" if config.get("architecture") != "mlp":
            return "`vae` of `StableDiffusionPipeline` and `DiTPipeline`, `vqvae` of `LDMPipeline`"
        case "DiTModel" if in_latents and config.get("num_classes") and not config.get("cross_attention_dim"):
            return "`transformer` of `DiTPipeline`"
        case "UNetModel" if config.get("cross_attention_dim"):
            return "`unet` of `StableDiffusionPipeline`" if in_latents else ""
        case "UNetModel" if config.get("learned_unconditional", True):
            of_pixels = ["`DDPMPipeline`", *(["`DDIMPipeline`"] if _is_of_betas(pipeline) else [])]
            places = [*(of_pixels if "vae" not in pipeline else []), *(["`LDMPipeline`"] if in_latents else [])]
            return f"`unet` of {', '.join(places)}"
    return ""


def _is_of_betas(pipeline: Mapping[str, Component]) -> bool:
    """Whether `DDIMPipeline`, which takes a `DDIMScheduler` in place of any scheduler, knows the noise levels."""
    if "scheduler" not in pipeline:
        return True
    config = pipeline["scheduler"].config
    return "beta_schedule" in config and config.get("path") is None
