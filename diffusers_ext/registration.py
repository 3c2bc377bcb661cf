"""Makes this package known to diffusers, so that a pipeline saved with our classes loads through diffusers again.

While it loads a pipeline, diffusers looks up two names:

    model_index.json["_class_name"]   an attribute of the module `diffusers`
    model_index.json[component]       `[library, class]`; `library` must be a key of `LOADABLE_CLASSES` and expose the
                                      base classes named there next to the class itself

So `diffusers_ext` becomes such a library, and its classes become attributes of `diffusers` too. The second also lets
`diffusers.AutoModel` find our models, and lets diffusers' schedulers take the config of ours without a warning.
"""

from collections.abc import Mapping

import diffusers
import diffusers.guiders
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import logging


logger = logging.get_logger(__name__)

LIBRARY = "diffusers_ext"

# Base classes of a pipeline's components. `diffusers_ext` has to expose each of these by its name, since diffusers saves
# and loads a component by the methods of the base class, among its library's, that it derives from.
BASE_CLASSES = (ModelMixin, SchedulerMixin, DiffusionPipeline, BaseGuidance)


def register_with_diffusers(namespace: Mapping[str, object]) -> None:
    """Makes diffusers resolve by name the components and pipelines of ours in `namespace`, that of `diffusers_ext`.

    Doing it again is harmless. A name that diffusers itself uses for another class keeps its meaning there, with a
    warning: replacing it would change what every other repository loads.
    """
    LOADABLE_CLASSES[LIBRARY] = {base.__name__: ["save_pretrained", "from_pretrained"] for base in BASE_CLASSES}
    for name, value in vars(diffusers.guiders).items():
        # Some versions of diffusers have guiders that they can save but do not find again.
        if isinstance(value, type) and issubclass(value, BaseGuidance) and not hasattr(diffusers, name):
            setattr(diffusers, name, value)
    for name, value in namespace.items():
        if not (isinstance(value, type) and issubclass(value, BASE_CLASSES) and _is_ours(value)):
            continue
        existing = getattr(diffusers, name, None)
        if existing is None or _is_ours(existing):
            setattr(diffusers, name, value)
        else:
            logger.warning(
                f"diffusers {diffusers.__version__} has a {name} of its own, so `diffusers.{name}` is not the one of"
                f" {LIBRARY}. Load that with `{LIBRARY}.{name}.from_pretrained(...)`."
            )


def _is_ours(value: object) -> bool:
    return getattr(value, "__module__", "").startswith(f"{LIBRARY}.")
