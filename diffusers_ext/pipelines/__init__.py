"""Pipelines: the loops that turn noise into images."""

from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline


__all__ = ["GuidedDiffusionPipeline"]
