"""Makes this package known to diffusers, so that a pipeline saved with our classes loads through diffusers again.

While it loads a pipeline, diffusers looks up two names:

    model_index.json["_class_name"]   an attribute of the module `diffusers`
    model_index.json[component]       `[library, class]`; `library` must be a key of `LOADABLE_CLASSES` and expose the
                                      base classes named there next to the class itself

So `diffusers_ext` becomes such a library, and its classes become attributes of `diffusers` too. The second also lets
`diffusers.AutoModel` find our models, and lets diffusers' schedulers take the config of ours without a warning.

What is saved also names its code, for those who load it without this package (`diffusers_ext.hub.remote_code`), and
diffusers would run that code, after asking for consent, wherever it is named. So what diffusers reads of a saved config
is what it would say if only those with this package were to load it.

It also looks at what a repository says before diffusers follows it (`docs/safety.md`): sizes of configs, names of classes
and of shards. And a folder whose replacement a process was ended in (`diffusers_ext.atomic_files`) is completed first.
"""

import functools
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import diffusers.guiders
from diffusers import AutoModel, ConfigMixin, DiffusionPipeline, ModelMixin, ModularPipelineBlocks, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.pipelines import pipeline_loading_utils
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils import logging

from diffusers_ext.atomic_files import finish_replacing
from diffusers_ext.untrusted import check_component_folder, is_plain_name, read_json


logger = logging.get_logger(__name__)

LIBRARY = "diffusers_ext"
_OWN_PACKAGE = re.compile(rf"{LIBRARY}(_\w+)?")  # or what the code in a repository is imported as
_CODE = (LIBRARY, f"modeling_{LIBRARY}")  # the files that an `auto_map` of ours names

# Base classes of a pipeline's components. `diffusers_ext` has to expose each of these by its name, since diffusers saves
# and loads a component by the methods of the base class, among its library's, that it derives from.
BASE_CLASSES = (ModelMixin, SchedulerMixin, DiffusionPipeline, BaseGuidance)

# What else diffusers finds by name: the blocks of a modular pipeline.
NAMED_CLASSES = (*BASE_CLASSES, ModularPipelineBlocks)


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
        if not (isinstance(value, type) and issubclass(value, NAMED_CLASSES) and _is_ours(value)):
            continue
        existing = getattr(diffusers, name, None)
        if existing is None or _is_ours(existing):
            setattr(diffusers, name, value)
        else:
            logger.warning(
                f"diffusers {diffusers.__version__} has a {name} of its own, so `diffusers.{name}` is not the one of"
                f" {LIBRARY}. Load that with `{LIBRARY}.{name}.from_pretrained(...)`."
            )

    _complete_before_loading()
    _read_configs_without_code()
    _load_ours_with_consent_too()
    _look_before_loading()
    _miss_no_pipeline_class()
    _load_our_blocks_without_code()


def _complete_before_loading() -> None:
    """Lets diffusers read a config, with which all loading begins, after `finish_replacing` of the folder."""
    load = ConfigMixin.__dict__["load_config"].__func__
    if hasattr(load, "completes"):
        return

    @functools.wraps(load)
    def load_config(cls, pretrained_model_name_or_path, *args, **kwargs):
        finish_replacing(pretrained_model_name_or_path)
        return load(cls, pretrained_model_name_or_path, *args, **kwargs)

    load_config.completes = True  # type: ignore[attr-defined]
    ConfigMixin.load_config = classmethod(load_config)


def _read_configs_without_code() -> None:
    """Lets diffusers read each config through `without_code`."""
    read = ConfigMixin.__dict__["_dict_from_json_file"].__func__
    if hasattr(read, "__wrapped__"):
        return

    @functools.wraps(read)
    def dict_from_json_file(cls, json_file):
        config = read_json(json_file)  # which refuses what is no mapping, or takes too much room
        # Who reads the index alone needs no class in it; who loads a pipeline is told of it there.
        if os.path.basename(json_file) == DiffusionPipeline.config_name and "_class_name" in config:
            check_pipeline_class(config["_class_name"], json_file)
        return without_code(read(cls, json_file))

    ConfigMixin._dict_from_json_file = classmethod(dict_from_json_file)


def _load_ours_with_consent_too() -> None:
    """`AutoModel` refuses `trust_remote_code=True` for what has no code, as our models have none with this package."""
    load = AutoModel.__dict__["from_pretrained"].__func__
    if hasattr(load, "ours_with_consent"):
        return

    @functools.wraps(load)
    def from_pretrained(cls, pretrained_model_or_path=None, **kwargs):
        try:
            return load(cls, pretrained_model_or_path, **kwargs)
        except ValueError:
            if not kwargs.pop("trust_remote_code", False):
                raise
            with suppress(Exception):  # of what is not ours, which the first error tells of
                loaded = load(cls, pretrained_model_or_path, **kwargs)  # without consent, so that no code is run
                if _is_ours(type(loaded)):
                    return loaded
            raise

    from_pretrained.ours_with_consent = True  # type: ignore[attr-defined]
    AutoModel.from_pretrained = classmethod(from_pretrained)


def _look_before_loading() -> None:
    """Lets diffusers look up the class of a component only after `check_component`."""
    find = pipeline_loading_utils.get_class_obj_and_candidates
    if hasattr(find, "__wrapped__"):
        return

    @functools.wraps(find)
    def get_class_obj_and_candidates(library_name, class_name, *args, component_name=None, cache_dir=None, **kwargs):
        folder = Path(cache_dir, component_name) if component_name and cache_dir else None
        check_component(library_name, class_name, folder)
        found = find(library_name, class_name, *args, component_name=component_name, cache_dir=cache_dir, **kwargs)
        if not isinstance(found[0], type):
            raise ValueError(f"a component must be of a class, got {library_name}.{class_name}")
        return found

    pipeline_loading_utils.get_class_obj_and_candidates = get_class_obj_and_candidates


def _miss_no_pipeline_class() -> None:
    """Lets diffusers say in a sentence that a pipeline names no class at all, which is a `KeyError` there."""
    load = DiffusionPipeline.__dict__["from_pretrained"].__func__
    if hasattr(load, "misses_no_class"):
        return

    @functools.wraps(load)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        try:
            return load(cls, pretrained_model_name_or_path, **kwargs)
        except KeyError as error:
            if error.args != ("_class_name",):
                raise
            raise ValueError(
                f"{pretrained_model_name_or_path} must name a class of pipelines under _class_name in its "
                f"{DiffusionPipeline.config_name}, got none"
            ) from error

    from_pretrained.misses_no_class = True  # type: ignore[attr-defined]
    DiffusionPipeline.from_pretrained = classmethod(from_pretrained)


def check_pipeline_class(name: Any, where: Any) -> None:
    """Refuses a pipeline that names no class: its own name, or the file of its code and the name.

    Args:
        where: The file, for errors.

    Raises:
        ValueError: with the name.
    """
    parts = name if isinstance(name, list) and len(name) == 2 else [name]
    if not _is_class_name(parts[-1]) or not is_plain_name(parts[0]):  # a file may be named as no class may
        raise ValueError(f"{where} must name a class of pipelines under _class_name, got {name!r}")
    if not isinstance(getattr(diffusers, parts[-1], type), type):
        raise ValueError(f"{where} must name a class of pipelines under _class_name, got {name!r}, which is none")


def _is_class_name(name: Any) -> bool:
    """Whether a class may be named so; of what Python itself names with two underscores, none is a component's."""
    return isinstance(name, str) and name.isidentifier() and not name.startswith("__")


def check_component(library: Any, class_name: Any, folder: Path | None) -> None:
    """Refuses a component that names what no component is of, before anything that it names is imported or read.

    Its library must be one that diffusers loads components from, a module that is imported already, or a file of code in
    its own folder, for which diffusers asks for consent. diffusers imported whatever was named up to 0.42.0.

    Args:
        folder: Of the component, in which lists of shards must name files of it.

    Raises:
        ValueError: with what is named.
    """
    names = isinstance(library, str) and isinstance(class_name, str)
    has_code = names and folder is not None and is_plain_name(f"{library}.py") and (folder / f"{library}.py").is_file()
    # Modules may begin with an underscore, as `__main__` does, where a notebook has its classes.
    if not names or not (has_code or re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", library, re.ASCII)):
        raise ValueError(f"a component must name a library and a class in it, got {library!r} and {class_name!r}")
    if not _is_class_name(class_name):
        raise ValueError(f"a component must name a class of {library}, got {class_name!r}")
    known = library in LOADABLE_CLASSES or hasattr(diffusers.pipelines, library) or library in sys.modules
    module = sys.modules.get(library)
    if known and not has_code and library not in LOADABLE_CLASSES and not hasattr(diffusers.pipelines, library):
        known = isinstance(getattr(module, class_name, None), type) and hasattr(
            getattr(module, class_name), "from_pretrained"
        )
    if not known and not has_code:
        raise ValueError(
            f"a component must be of one of the libraries {', '.join(sorted(LOADABLE_CLASSES))} or of a module that is "
            f"imported already, got {library}.{class_name}: import {library} first, if that is your own"
        )
    if folder is not None and os.path.isdir(folder):
        check_component_folder(folder)


def _load_our_blocks_without_code() -> None:
    """Lets `ModularPipelineBlocks`, and so `ModularPipeline`, take our blocks from here and not from a repository."""
    load = ModularPipelineBlocks.__dict__["from_pretrained"].__func__
    if hasattr(load, "__wrapped__"):
        return

    @functools.wraps(load)
    def from_pretrained(cls, pretrained_model_name_or_path, trust_remote_code=False, **kwargs):
        config = {}
        with suppress(OSError):  # there is none, of which the function itself tells
            config = cls.load_config(pretrained_model_name_or_path, **kwargs)
        blocks = getattr(diffusers, str(config.get("_class_name")), None)
        if config.get("_library") == LIBRARY and _is_ours(blocks) and issubclass(blocks, ModularPipelineBlocks):
            return blocks()
        return load(cls, pretrained_model_name_or_path, trust_remote_code, **kwargs)

    ModularPipelineBlocks.from_pretrained = classmethod(from_pretrained)


def without_code(config: Any) -> Any:
    """A saved config without the names of the code beside it, if that is code of this package; else the same.

    A class that this package does not have, as a later version of it may, keeps the way to its code.
    """
    if not isinstance(config, dict):
        return config
    named = _file_in(config.get("auto_map")) in _CODE
    components = {
        key: entry[1]
        for key, entry in config.items()
        if isinstance(entry, list) and (entry[0:1] == [LIBRARY] and len(entry) == 2 or _is_modular_of_ours(entry))
    }
    saved_class = config.get("_class_name")
    class_name = saved_class[-1] if named and isinstance(saved_class, list) and saved_class else saved_class
    needed = [*components.values(), *([class_name] if named else [])]
    if not all(isinstance(name, str) and _is_ours(getattr(diffusers, name, None)) for name in needed):
        return config
    if named:
        config = {key: value for key, value in config.items() if key != "auto_map"} | {"_class_name": class_name}
    # As classes of diffusers, since it would take those of a library from a file of this name, if there is one.
    return config | {key: _of_diffusers(config[key]) for key in components}


def _of_diffusers(entry: list) -> list:
    names = ["diffusers", entry[1]]
    return names if len(entry) == 2 else [*names, entry[2] | {"type_hint": names}]


def _is_modular_of_ours(entry: list) -> bool:
    """Whether it is the entry of a component in a modular index, of this package or of the code beside the index."""
    if len(entry) != 3 or not isinstance(entry[2], dict):
        return False
    hint = entry[2].get("type_hint")
    return hint == entry[:2] and isinstance(entry[0], str) and bool(_OWN_PACKAGE.fullmatch(entry[0]))


def _file_in(auto_map: Any) -> str | None:
    """The file, without its suffix, that an entry of a config has for `AutoModel`, if it is one at all."""
    reference = auto_map.get("AutoModel") if isinstance(auto_map, dict) else None
    return reference.partition(".")[0] if isinstance(reference, str) else None


def _is_ours(value: object) -> bool:
    return getattr(value, "__module__", "").startswith(f"{LIBRARY}.")
