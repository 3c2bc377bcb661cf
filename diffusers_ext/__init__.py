"""Train Gaussian diffusion models from scratch and use them everywhere diffusers is used.

Importing the package registers its classes with diffusers (see `diffusers_ext.registration`), so that
`diffusers.DiffusionPipeline.from_pretrained` loads what was saved with them.
"""

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance

from diffusers_ext.registration import register_with_diffusers


__version__ = "0.1.0"

# Every model, scheduler, guider and pipeline that a saved pipeline may name.
_COMPONENTS = ()

register_with_diffusers(*_COMPONENTS)

# diffusers' own base classes stand here because diffusers looks them up in the library that a component comes from.
# Once the classes above are registered, its `DiffusionPipeline` loads our pipelines as well as its own.
__all__ = [
    "BaseGuidance",
    "DiffusionPipeline",
    "ModelMixin",
    "SchedulerMixin",
    *[component.__name__ for component in _COMPONENTS],
]
