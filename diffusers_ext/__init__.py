"""Train Gaussian diffusion models from scratch and use them everywhere diffusers is used.

Importing the package registers its classes with diffusers (see `diffusers_ext.registration`), so that
`diffusers.DiffusionPipeline.from_pretrained` loads what was saved with them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from diffusers_ext import runtime


if runtime.is_command():  # before torch is loaded, as the scripts in `training/` do
    runtime.settle()

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance

from diffusers_ext.examples import example
from diffusers_ext.guidance.guiders import ClassifierGuidance, ComposedGuidance, InternalGuidance, WeakModelGuidance
from diffusers_ext.models.classifier import NoisyClassifierModel
from diffusers_ext.models.dit import DiTModel
from diffusers_ext.models.gaussian_prior import GaussianPriorModel
from diffusers_ext.models.hierarchical_vae import HierarchicalVAEModel
from diffusers_ext.models.lucidrains_unet import LucidrainsUNetModel
from diffusers_ext.models.statistics import DataStatisticsModel
from diffusers_ext.models.unet import UNetModel
from diffusers_ext.models.vae import VAEModel
from diffusers_ext.pipelines.modular_blocks import GuidedDiffusionBlocks, TextGuidedDiffusionBlocks
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.pipelines.pipeline_text_guided_diffusion import TextGuidedDiffusionPipeline
from diffusers_ext.registration import register_with_diffusers
from diffusers_ext.schedulers import (
    AnnealedLangevinScheduler,
    ConsistencyScheduler,
    ExtDDIMInverseScheduler,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    FlowScheduler,
    ScoreSDEScheduler,
    VPredictionScheduler,
)


if TYPE_CHECKING:
    from diffusers_ext.api import TextConfig as TextConfig
    from diffusers_ext.api import TrainConfig as TrainConfig
    from diffusers_ext.api import TrainVAEConfig as TrainVAEConfig
    from diffusers_ext.api import train as train
else:

    def __getattr__(name: str):
        """Training, when it is first asked for: what it needs is an extra, and takes seconds to import."""
        if name in _OF_TRAINING:
            return getattr(import_module("diffusers_ext.api"), name)
        raise AttributeError(f"module 'diffusers_ext' has no attribute {name!r}")


# Not in `__all__`: with `import *` they would be imported, and fail where the extra is not installed.
_OF_TRAINING = ("TextConfig", "TrainConfig", "TrainVAEConfig", "train")

__version__ = "0.1.0"

__all__ = [
    "AnnealedLangevinScheduler",
    "ClassifierGuidance",
    "ComposedGuidance",
    "ConsistencyScheduler",
    "DataStatisticsModel",
    "DiTModel",
    "ExtDDIMInverseScheduler",
    "ExtDDIMScheduler",
    "ExtDDPMScheduler",
    "FlowScheduler",
    "GaussianPriorModel",
    "GuidedDiffusionBlocks",
    "GuidedDiffusionPipeline",
    "HierarchicalVAEModel",
    "InternalGuidance",
    "LucidrainsUNetModel",
    "NoisyClassifierModel",
    "ScoreSDEScheduler",
    "TextGuidedDiffusionBlocks",
    "TextGuidedDiffusionPipeline",
    "UNetModel",
    "VAEModel",
    "VPredictionScheduler",
    "WeakModelGuidance",
    "example",
    # diffusers' own. It looks its base classes up in the library that a component comes from, so they stand here; and
    # with our classes registered, its `DiffusionPipeline` loads our pipelines as well as its own.
    "BaseGuidance",
    "DiffusionPipeline",
    "ModelMixin",
    "SchedulerMixin",
]

register_with_diffusers(globals())
