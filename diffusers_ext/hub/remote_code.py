"""The code of this package inside a saved folder, for those who load the folder without the package.

With `trust_remote_code=True`, diffusers runs code of a repository: `pipeline.py`, if `model_index.json` names it in
`_class_name`, and for a component of the class `[library, class]` the file `library.py` in the component's folder. It
follows imports within one folder alone, asks the Hub anew for each file, and gives all local folders one name space. So
the whole code is one file, `pipeline.py`: the modules of the package, as they are but for relative imports, under a
package name that has the version and a hash of the code in it, so that different versions live side by side.

    pipeline.py                   all modules that the public classes need
    COMPONENT/diffusers_ext.py    a way from the component to its class in pipeline.py
    model_index.json              "_class_name": ["pipeline", CLASS], and an "auto_map" for `diffusers.AutoModel`
    modeling_diffusers_ext.py     in the folder of a single model: what pipeline.py is in that of a pipeline
    modular_*.json                the same pipeline in blocks (`diffusers_ext.hub.modular_index`)

Nothing of this is kept by hand: it is made of the sources that run. With the package imported none of it is run or
needs consent (`diffusers_ext.registration`).
"""

import ast
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.guiders import BaseGuidance
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.hub.modular_index import modular_files
from diffusers_ext.hub.saved_folder import saved_class
from diffusers_ext.untrusted import is_plain_name, read_json


LIBRARY = "diffusers_ext"
ROOT = __name__.partition(".")[
    0
]  # the package that this module is of: LIBRARY, or the one in a repository's pipeline.py
PIPELINE_FILE, MODEL_FILE, COMPONENT_FILE = "pipeline.py", f"modeling_{LIBRARY}.py", f"{LIBRARY}.py"
CODE_FILES = (PIPELINE_FILE, MODEL_FILE, COMPONENT_FILE)
BASES = {base.__name__: base for base in (ModelMixin, SchedulerMixin, BaseGuidance)}

QUOTES = "'" * 3  # around each module, so that none may hold them

HEADER = """\
# Copyright the authors of {library}.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
#
# {subject} of {library} {version}, as {name}.
#
# There are two ways to load what lies in this folder. With the package (`pip install {library}`), after
# `import {library}` in Python, nothing of this file is run. Without it, `trust_remote_code=True` runs this file, which
# is the source of the package, written by `python -m {library}.hub code`.
"""


class ForeignParts(ValueError):
    """A folder holds classes whose code is neither of this package nor of diffusers or transformers."""


def public_classes() -> dict[str, type]:
    """The classes that the package exports and defines, by name."""
    exported = {name: getattr(sys.modules[ROOT], name) for name in sys.modules[ROOT].__all__}
    return {
        name: value
        for name, value in exported.items()
        if isinstance(value, type) and value.__module__.startswith(f"{ROOT}.")
    }


@cache
def code_of_pipeline() -> str:
    """The text of `pipeline.py`: the same for everything that is saved with one version of the package.

    Raises:
        ValueError: if a module is written so that it cannot be moved.
    """
    if ROOT != LIBRARY:
        return sys.modules[ROOT].FILE
    version = sys.modules[ROOT].__version__
    classes = public_classes()
    sources = _sources({cls.__module__ for cls in classes.values()} | {__name__})
    lines = [f"from . {_below_root(cls.__module__)} import {name}" for name, cls in classes.items()]
    sources[""] = "\n".join([*lines, "", f"__version__ = {version!r}", f"__all__ = {sorted(classes)!r}", ""])
    name = _name_of(version, sources)
    modules = [f"SOURCES[{key!r}] = r{QUOTES}\n{_raw(key, text)}{QUOTES}\n" for key, text in sorted(sources.items())]
    parts = [
        HEADER.format(subject="The code", library=LIBRARY, version=version, name=name),
        _own_source("hub.bundled_modules").partition('"""\n\n')[2],
        "SOURCES = {}",
        *modules,
        f"NAME = {name!r}",
        "code = import_bundled(NAME, SOURCES, __file__)",
        'with open(__file__, encoding="utf-8") as file:',
        "    code.FILE = file.read()  # what it saves takes it along",
        "globals().update({name: getattr(code, name) for name in code.__all__})",
        "",
    ]
    return "\n".join(parts)


@cache
def code_of_component() -> str:
    """The text of `COMPONENT/diffusers_ext.py`, the same for all components."""
    bases = {}
    for name, cls in public_classes().items():
        for base_name, base in BASES.items():
            if issubclass(cls, base):
                bases[name] = base_name
    name = package_name()
    version = sys.modules[ROOT].__version__
    entries = [f'    "{class_name}": {base},' for class_name, base in bases.items()]
    parts = [
        HEADER.format(subject="The components", library=LIBRARY, version=version, name=name),
        _own_source("hub.component_code").partition('"""\n\n')[2],
        "",
        "from diffusers import ModelMixin, SchedulerMixin",
        "from diffusers.guiders import BaseGuidance",
        "",
        "BASES = {",
        *entries,
        "}",
        f"globals().update(components_of({name!r}, BASES))",
        "",
    ]
    return "\n".join(parts)


def package_name() -> str:
    """Under which the code in a repository is imported: with the version, and a hash of the code."""
    return re.search(r"^NAME = '(\w+)'$", code_of_pipeline(), flags=re.MULTILINE)[1]


def files_with_code(
    folder: str | os.PathLike, repo_id: str | None = None, revision: str | None = None
) -> dict[str, str]:
    """The files that a saved folder has to have for loading without the package: texts by their paths in the folder.

    The configs among them are those of the folder, with the names of the code added. There are none for a folder with
    nothing of this package.

    Args:
        repo_id, revision: The repository, and its branch, that the files are for; a folder has no need to know its name.

    Raises:
        ForeignParts: if it has parts whose code is neither of this package nor of diffusers or transformers.
        ValueError: if its config is none, or names a component by a path.
    """
    folder = Path(folder)
    if (folder / DiffusionPipeline.config_name).is_file():
        return _files_of_pipeline(folder, repo_id, revision)
    if (folder / ModelMixin.config_name).is_file():
        config = read_json(folder / ModelMixin.config_name)
        name = config.get("_class_name")
        if not isinstance(name, str) or not issubclass(public_classes().get(name, object), ModelMixin):
            return {}
        config["auto_map"] = {"AutoModel": f"{Path(MODEL_FILE).stem}.{name}"}
        return {MODEL_FILE: code_of_pipeline(), ModelMixin.config_name: _json(config)}
    return {}


def add_code(folder: str | os.PathLike, repo_id: str | None = None) -> None:
    """Writes the files of `files_with_code` into `folder`, the configs last.

    Args:
        repo_id: As for `files_with_code`.

    Raises:
        ForeignParts: as for `files_with_code`; nothing is written then.
    """
    for name, text in files_with_code(folder, repo_id).items():
        with atomic_write(Path(folder) / name) as partial:
            partial.write_text(text, encoding="utf-8")


def _files_of_pipeline(folder: Path, repo_id: str | None, revision: str | None) -> dict[str, str]:
    index = read_json(folder / DiffusionPipeline.config_name)
    classes, class_name = public_classes(), saved_class(index, folder / DiffusionPipeline.config_name)
    ours = []
    for name, (library, component) in _components(index):
        if library.partition(".")[0] in (LIBRARY, ROOT) and component in classes:
            index[name] = [LIBRARY, component]
            ours.append(name)
        elif not _is_known(library, folder / name):
            raise ForeignParts(
                f"{str(folder)!r} cannot be loaded without {LIBRARY}, since its {name} is a {component} of {library}, whose"
                " code is not saved with it"
            )
    if class_name in classes:
        index["_class_name"] = [Path(PIPELINE_FILE).stem, class_name]
        index["auto_map"] = {"AutoModel": f"{Path(COMPONENT_FILE).stem}.Component"}
    elif not hasattr(diffusers, class_name):
        raise ForeignParts(
            f"{str(folder)!r} cannot be loaded without {LIBRARY}, since the code of its class, {class_name}, is not saved"
            " with it"
        )
    elif not ours:
        return {}
    files = {PIPELINE_FILE: code_of_pipeline()}
    files |= {f"{name}/{COMPONENT_FILE}": code_of_component() for name in ours}
    blocks = getattr(classes.get(class_name), "blocks_class_name", None)
    if blocks is not None:
        modular = modular_files(index, blocks, package_name(), repo_id, revision)
        files |= {name: _json(config) for name, config in modular.items()}
    return files | {DiffusionPipeline.config_name: _json(index)}


def _components(index: dict) -> Iterator[tuple[str, list[str]]]:
    for name, entry in index.items():
        if not name.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[0] is not None:
            if not is_plain_name(name) or not all(isinstance(part, str) for part in entry):
                raise ValueError(f"{DiffusionPipeline.config_name} must name components, got {name!r}: {entry!r}")
            yield name, entry


def _is_known(library: str, folder: Path) -> bool:
    return library in LOADABLE_CLASSES or hasattr(diffusers.pipelines, library) or (folder / f"{library}.py").is_file()


def _json(config: dict) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"  # as diffusers writes them


# The modules.


def _below_root(module: str) -> str:
    return module.removeprefix(f"{ROOT}.")


def _own_source(name: str) -> str:
    """The text of a module by its name below the package."""
    return importlib.util.find_spec(f"{ROOT}.{name}").loader.get_source(f"{ROOT}.{name}")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(f"{ROOT}.{name}") is not None
    except ModuleNotFoundError:  # `name` is what a module that is no package holds
        return False


def _sources(modules: set[str]) -> dict[str, str]:
    """The modules, all that they import of the package, and the packages that they lie in, with relative imports."""
    sources, waiting = {}, {_below_root(module) for module in modules} | {"hub.bundled_modules", "hub.component_code"}
    while waiting:
        name = waiting.pop()
        text = _own_source(name)
        waiting |= set(_imported(name, text))
        if "." in name:
            waiting.add(name.rpartition(".")[0])
        sources[name] = _with_relative_imports(name, text)
        waiting -= sources.keys()
    return sources


def _imported(name: str, text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == LIBRARY for alias in node.names):
            raise ValueError(
                f"{name} must import from the modules of {LIBRARY}, not {LIBRARY} itself: {ast.unparse(node)}"
            )
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == LIBRARY:
            if node.module == LIBRARY:
                raise ValueError(f"{name} must not import from {LIBRARY} itself: {ast.unparse(node)}")
            module = _below_root(node.module)
            submodules = [f"{module}.{alias.name}" for alias in node.names]
            yield module
            yield from filter(_is_module, submodules)


def _with_relative_imports(name: str, text: str) -> str:
    """With a space after the dots: diffusers takes `from .x import` for one of another file, wherever it stands."""
    is_package = importlib.util.find_spec(f"{ROOT}.{name}").submodule_search_locations is not None
    dots = "." * (name.count(".") + 1 + is_package)
    return re.sub(rf"^(\s*)from {LIBRARY}\.(\S+) import", rf"\1from {dots} \2 import", text, flags=re.MULTILINE)


def _raw(name: str, text: str) -> str:
    if QUOTES in text:
        raise ValueError(
            f"{name} must write its texts with double quotes: three single ones end the text that holds it"
        )
    return text if text.endswith("\n") or not text else f"{text}\n"


def _name_of(version: str, sources: dict[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()
    return f"{LIBRARY}_{re.sub(r'[^0-9A-Za-z]+', '_', version)}_{digest[:10]}"
