"""Pipelines: the loops that turn noise into images."""

from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.pipelines.pipeline_text_guided_diffusion import TextGuidedDiffusionPipeline


__all__ = ["GuidedDiffusionPipeline", "TextGuidedDiffusionPipeline"]
