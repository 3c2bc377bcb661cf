"""The files by which diffusers loads a saved pipeline as a modular one, beside `model_index.json`.

    modular_model_index.json    the components: their classes, and from where they are loaded
    modular_config.json         the class of the blocks, and the file of its code for those without this package

`ModularPipeline.from_pretrained` reads the second first. With consent it runs the code that it names, whose package then
is where the classes of the components are found: so the index names them by that package, which is the code beside it.
With this package imported the classes are its own (`diffusers_ext.registration`).

diffusers takes a component from the folder that it reads the index from, if it is there, and else from the repository
that the index names. So a folder names none and can be moved, and a push writes the name of the repository.
"""

from collections.abc import Mapping
from typing import Any


LIBRARY = "diffusers_ext"
INDEX_FILE, BLOCKS_FILE = "modular_model_index.json", "modular_config.json"
MODULAR_FILES = (INDEX_FILE, BLOCKS_FILE)


def modular_files(
    model_index: Mapping[str, Any], blocks: str, package: str, repo_id: str | None, revision: str | None
) -> dict[str, dict[str, Any]]:
    """The contents of the two files by their names.

    Args:
        model_index: Of the pipeline, whose components of this package are of the library `LIBRARY`.
        blocks: Name of the class of the blocks.
        package: Name under which the code beside it is imported.
        repo_id, revision: Where the weights are, if they are not in the same folder.
    """
    index = {"_class_name": "ModularPipeline", "_blocks_class_name": blocks}
    for name, value in model_index.items():
        if name == "_diffusers_version":
            index[name] = value
        elif name.startswith("_") or name == "auto_map":
            continue
        elif isinstance(value, list) and len(value) == 2 and value[1] is None:
            continue  # a component that the pipeline does without
        elif isinstance(value, list) and len(value) == 2:
            library = package if value[0] == LIBRARY else value[0]
            spec = {
                "type_hint": [library, value[1]],
                "pretrained_model_name_or_path": repo_id,
                "subfolder": name,
                "variant": None,
                "revision": revision,
            }
            index[name] = [library, value[1], spec]
        else:
            index[name] = value
    code = {"_class_name": blocks, "_library": LIBRARY, "auto_map": {"ModularPipelineBlocks": f"pipeline.{blocks}"}}
    return {INDEX_FILE: index, BLOCKS_FILE: code}
