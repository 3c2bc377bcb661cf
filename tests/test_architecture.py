"""Dependencies point one way, rooms are the ones that docs/architecture.md tells of, and no file grows two ideas."""

import ast
import functools
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import diffusers_ext


PACKAGE = Path(diffusers_ext.__file__).parent
ROOT = Path(__file__).parents[1]

# Each room, a folder or a module of the package, and the rooms that it may import from.
MAY_IMPORT = {
    "atomic_files": "",
    "command_names": "",
    "conditions": "",
    "draws": "",
    "foreign_options": "",
    "lettering": "",
    "machine": "",
    "pixels": "",
    "sizes": "",
    "untrusted": "",
    "value_scale": "machine",
    "curves": "",
    "svg_charts": "",
    "option_values": "",
    "options": "foreign_options option_values untrusted command_names",
    "figures": "atomic_files curves lettering",
    "latents": "command_names",
    "registration": "atomic_files untrusted",
    "diffusion": "draws machine",
    "schedulers": "untrusted draws machine diffusion command_names",
    "models": "draws machine sizes untrusted diffusion",
    "guidance": "diffusion schedulers models",
    "pipelines": "conditions draws machine pixels sizes value_scale diffusion schedulers models guidance latents hub command_names",
    "hub": "atomic_files untrusted",
    "data": "machine untrusted atomic_files draws options pixels sizes value_scale latents guidance command_names",
    "trainer": "untrusted atomic_files draws machine pixels options figures svg_charts hub data command_names",
    "conversion": "diffusion schedulers models",
    "metrics": "untrusted pixels diffusion sizes value_scale command_names",
    "evaluation": "__init__ untrusted atomic_files conditions draws machine pixels sizes value_scale options figures latents diffusion schedulers models guidance pipelines hub data metrics command_names",
    "calibration": "__init__ atomic_files options figures diffusion schedulers guidance pipelines hub data trainer metrics evaluation command_names",
    "recipes": "calibration __init__ untrusted atomic_files conditions draws machine pixels options figures latents sizes value_scale diffusion schedulers models guidance pipelines hub data trainer metrics evaluation command_names",
    "studies": "atomic_files figures diffusion",
    "commands": "__init__ calibration studies conversion untrusted atomic_files conditions draws machine pixels options figures latents sizes value_scale diffusion schedulers models guidance pipelines hub data trainer metrics evaluation recipes command_names",
    "api": "__init__ untrusted options data trainer recipes commands command_names",
    "demo": "__init__ atomic_files draws figures untrusted value_scale schedulers guidance hub pipelines evaluation examples",
    "__main__": "__init__ command_names",
    "runtime": "",
    "examples": "pipelines",
    "__init__": "runtime examples registration diffusion schedulers models guidance pipelines",
}
LONGEST_FUNCTION = 80


@functools.cache
def _parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def _modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.Module(_parsed(path).body, [])
        # What a type checker alone imports is no import.
        tree.body = [node for node in tree.body if not _is_type_checking(node)]
        yield path, tree


def _imported(tree):
    """The modules of the package that a module imports from, at its top or within a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "diffusers_ext":
            names = (
                [node.module] if node.module != "diffusers_ext" else [f"diffusers_ext.{a.name}" for a in node.names]
            )
            yield from names
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "diffusers_ext")


def _room(path):
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_room_imports_only_what_lies_below_it():
    wrong = []
    for path, tree in _modules():
        room = _room(path)
        allowed = {room, *MAY_IMPORT[room].split()}
        for name in _imported(tree):
            target = name.split(".")[1] if "." in name else "__init__"
            target = target if target in MAY_IMPORT else "__init__"  # a public class, by its name at the top
            if target not in allowed:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_the_rooms_can_be_put_in_an_order():
    order = TopologicalSorter({room: below.split() for room, below in MAY_IMPORT.items()}).static_order()
    assert set(order) == set(MAY_IMPORT)  # raises CycleError if there is a cycle


def test_no_modules_import_each_other():
    names = {}
    for path, tree in _modules():
        name = ".".join(["diffusers_ext", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        names[name] = set(_imported(tree)) - {name}
    known = {name: {other for other in others if other in names} for name, others in names.items()}
    list(TopologicalSorter(known).static_order())


def _is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_every_room_stands_in_the_description_of_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {_room(path) for path, _ in _modules()} - {"__init__"}
    assert rooms == set(MAY_IMPORT) - {"__init__"}
    assert not [room for room in rooms if f"`{room}`" not in text and f"`{room}/`" not in text]


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_a_document_names_exist(document):
    named = set(re.findall(r"`([\w./]+(?:\.py|/))`", (ROOT / document).read_text(encoding="utf-8")))
    assert len(named) >= 10
    placeholders = {"schedulers/scheduling_NAME.py", "models/NAME.py"}
    assert not [name for name in named - placeholders if not any((base / name).exists() for base in (ROOT, PACKAGE))]


@pytest.mark.parametrize("folder", ["diffusers_ext", "training"])
def test_no_function_is_longer_than_a_screen(folder):
    long = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False)
                lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
                if lines > LONGEST_FUNCTION:
                    long.append(f"{path.name}: {node.name} has {lines} lines")
    assert not long
