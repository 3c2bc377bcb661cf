"""Finds the classes of a component in the `pipeline.py` of its repository.

diffusers takes the code of a component from the component's own folder, one file for each, and gives files of the same
name in several folders only one place. So that file is the same in each folder, and holds no classes but the way to
them. `diffusers_ext.hub.remote_code` copies the source of this module into it, so it imports nothing of the package.
"""

import os
import sys

from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module


HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "revision", "token")


def class_in_pipeline_file(path, class_name: str, **kwargs) -> type:
    """The class of this name in `pipeline.py` at the top of the repository `path`.

    Whoever runs this has given consent to the code of the repository: else it would not be run either.
    """
    options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
    return get_class_from_dynamic_module(path, "pipeline.py", class_name=class_name, trust_remote_code=True, **options)


class Component:
    """For `diffusers.AutoModel`, which has one entry for all components of a repository."""

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        """The component in the folder `subfolder`, by the class that `model_index.json` names."""
        options = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}
        _, class_name = DiffusionPipeline.load_config(path, **options)[kwargs["subfolder"]]
        return class_in_pipeline_file(path, class_name, **kwargs).from_pretrained(path, **kwargs)


def components_of(package_name: str, bases: dict[str, type]) -> dict[str, type]:
    """The classes of the components by name: those of `package_name` if it is imported, else ones that load it first.

    Args:
        package_name: The package that `pipeline.py` makes of itself.
        bases: For each name, the class of diffusers by which it decides how a component is loaded.
    """
    package = sys.modules.get(package_name)
    if package is not None:
        return {name: getattr(package, name) for name in bases}
    return {name: _loading_first(name, base) for name, base in bases.items()}


def _loading_first(name: str, base: type) -> type:
    @classmethod
    def from_pretrained(cls, path, **kwargs):
        root = os.path.dirname(os.path.abspath(path))  # diffusers gives the component's own folder
        return class_in_pipeline_file(root, name).from_pretrained(path, **kwargs)

    return type(name, (base,), {"from_pretrained": from_pretrained})
