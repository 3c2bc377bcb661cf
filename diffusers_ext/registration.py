"""Makes this package known to diffusers, so that a pipeline saved with our classes loads through diffusers again.

While it loads a pipeline, diffusers looks names up in two places:

    model_index.json["_class_name"]   an attribute of the module `diffusers`
    model_index.json[component]       `[library, class]`; `library` must be a key of `LOADABLE_CLASSES` and expose the
                                      base classes named there next to the class itself

So `diffusers_ext` becomes such a library, and its classes become attributes of `diffusers` too. The second also lets
`diffusers.AutoModel` find our models, and lets diffusers' schedulers take the config of ours without a warning.
"""

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import logging


logger = logging.get_logger(__name__)

LIBRARY = "diffusers_ext"

# A component is saved and loaded by the methods that diffusers lists for the base class it derives from. `diffusers_ext`
# has to expose each of these names.
BASE_CLASSES = ("ModelMixin", "SchedulerMixin", "DiffusionPipeline", "BaseGuidance")


def register_with_diffusers(*classes: type) -> None:
    """Makes diffusers resolve `classes`, the public components and pipelines of this package, by their names.

    Calling it again is harmless. A name that diffusers itself uses for another class keeps its meaning there, with a
    warning: replacing it would change what every other repository loads.
    """
    LOADABLE_CLASSES[LIBRARY] = {base: LOADABLE_CLASSES["diffusers"][base] for base in BASE_CLASSES}
    for cls in classes:
        existing = getattr(diffusers, cls.__name__, cls)
        if existing is cls or getattr(existing, "__module__", "").startswith(f"{LIBRARY}."):
            setattr(diffusers, cls.__name__, cls)
        else:
            logger.warning(
                f"diffusers {diffusers.__version__} has a class named {cls.__name__} of its own, so"
                f" `diffusers.{cls.__name__}` is not the one of {LIBRARY}. Load it with"
                f" `{LIBRARY}.{cls.__name__}.from_pretrained(...)`."
            )
