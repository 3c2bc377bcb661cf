"""The contents of a folder that a pipeline, or a single model, was saved to."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffusers_ext.atomic_files import finish_replacing
from diffusers_ext.untrusted import is_plain_name, one_line, read_json


# Of the section of a card that has the lines below.
USE_HEADING = "## Use"


@dataclass(frozen=True)
class Component:
    """One part of what was saved.

    Attributes:
        name: Its name in the pipeline, which is its folder too; "model" for a model that was saved by itself.
        library, class_name: Where its class comes from.
        num_parameters: As its weights have them; 0 for what has none.
        config: Of a model or a scheduler; empty for what has none.
    """

    name: str
    library: str
    class_name: str
    num_parameters: int
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SavedFolder:
    """A pipeline or a model on disk.

    Attributes:
        class_name: Of the pipeline or the model.
        is_model: Whether it is a model by itself.
        components: The pipeline's parts, or the model as the only one.
        labels: Names of the labels by their ids, or `None`.
    """

    class_name: str
    is_model: bool
    components: Sequence[Component]
    labels: dict[str, str] | None = None

    @classmethod
    def read(cls, folder: str | os.PathLike) -> "SavedFolder":
        """Reads the configs and the headers of the weights.

        Raises:
            ValueError: if the folder holds neither a whole pipeline nor a whole model.
        """
        folder = Path(folder)
        finish_replacing(folder)
        index, config = folder / "model_index.json", folder / "config.json"
        if index.is_file():
            entries = read_json(index)
            components = _components(folder, entries)
            return cls(saved_class(entries, index), False, components, _labels(entries.get("id2label"), index))
        if config.is_file():
            class_name = saved_class(read_json(config), config)
            weights = _count_parameters(folder)
            if not weights:
                raise ValueError(
                    f"config.json in {str(folder)!r} is of a {class_name}, but there are no weights beside it"
                )
            return cls(
                class_name, True, [Component("model", "diffusers_ext", class_name, weights, _config_of(folder))]
            )
        raise ValueError(
            f"{str(folder)!r} must hold a saved pipeline or model, but has no model_index.json and no config.json. Save"
            " one there with `save_pretrained(folder)`."
        )

    @property
    def folders(self) -> list[str]:
        """Names of the folders that belong to components."""
        return [] if self.is_model else [component.name for component in self.components]


def loading_lines(name: str | os.PathLike, model_class: str | None = None, revision: str | None = None) -> str:
    """The lines of Python that load `name`, a folder or a repo id, with this package.

    Args:
        model_class: The class of a model that was saved by itself; `None` for a pipeline.
        revision: A branch of the repository.
    """
    arguments = _arguments(name, revision=revision)
    if model_class is not None:
        return f"from diffusers_ext import {model_class}\nmodel = {model_class}.from_pretrained({arguments})"
    return (
        "import diffusers_ext\n"
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({arguments})"
    )


def lines_without_package(name: str | os.PathLike, is_model: bool = False, revision: str | None = None) -> str:
    """Those that load it by the code that lies beside it."""
    loader, result = ("AutoModel", "model") if is_model else ("DiffusionPipeline", "pipeline")
    arguments = _arguments(name, revision=revision, trust_remote_code=True)
    return f"from diffusers import {loader}\n{result} = {loader}.from_pretrained({arguments})"


def lines_of_part(name: str | os.PathLike, part: str | None, class_name: str, revision: str | None = None) -> str:
    """Those that load a component of a pipeline by itself, or a model that was saved by itself (`part` is `None`)."""
    arguments = _arguments(name, revision=revision, subfolder=part)
    variable = part or "model"
    return f"from diffusers_ext import {class_name}\n{variable} = {class_name}.from_pretrained({arguments})"


def of_repository(card: str, repo_id: str, revision: str | None = None) -> str:
    """A card whose lines to load with, in the section on its use, load from a repository and not from a folder.

    Args:
        card: Its text.
        revision: A branch of the repository, if it is not the main one.
    """

    def renamed(others: str) -> str:
        return _arguments(repo_id, revision=revision) + re.sub(rf", revision={text}", "", others)

    before, heading, rest = card.partition(f"\n{USE_HEADING}\n")
    use, end, after = rest.partition("\n## ")
    text = r'"(?:[^"\\\n]|\\.)*"'
    use = re.sub(rf"(?<=\bfrom_pretrained\(){text}(.*)(?=\)$)", lambda call: renamed(call[1]), use, flags=re.MULTILINE)
    return f"{before}{heading}{use}{end}{after}"


def _arguments(name: str | os.PathLike, **options) -> str:
    given = {key: value for key, value in options.items() if value is not None}
    values = {key: quoted(value) if isinstance(value, str) else value for key, value in given.items()}
    return ", ".join([quoted(Path(name).as_posix()), *(f"{key}={value}" for key, value in values.items())])


def quoted(text: str) -> str:
    """A text as Python writes it, in double quotes and in one line."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def saved_class(config: dict, path: Path) -> str:
    """The class that a config is of; of a list, what stands after the file of its code.

    Raises:
        ValueError: if the config names none.
    """
    name = config.get("_class_name")
    name = name[-1] if isinstance(name, list) and name else name
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{str(path)!r} must name its class under _class_name, got {name!r}")
    return name


def _labels(labels: object, path: Path) -> dict[str, str] | None:
    if labels is not None and not isinstance(labels, dict):
        raise ValueError(f"{str(path)!r} must have a mapping under id2label, got a {type(labels).__name__}")
    return labels and {one_line(number): one_line(name) for number, name in labels.items()}


def _components(folder: Path, entries: dict) -> list[Component]:
    components = []
    for name, entry in entries.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        if not is_plain_name(name) or not all(isinstance(part, str) and _is_dotted(part) for part in entry):
            raise ValueError(
                f"model_index.json in {str(folder)!r} must name components, and their libraries and classes, got {name!r}: "
                f"{entry!r}"
            )
        if not (folder / name).is_dir():
            raise ValueError(
                f"model_index.json in {str(folder)!r} names the component {name!r}, but has no such folder"
            )
        library, class_name = entry
        about = _count_parameters(folder / name), _config_of(folder / name)
        components.append(Component(name, library, class_name, *about))
    return components


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))


def _config_of(folder: Path) -> dict[str, Any]:
    paths = (folder / name for name in ("config.json", "scheduler_config.json"))
    return next((read_json(path) for path in paths if path.is_file()), {})


def _count_parameters(folder: Path) -> int:
    return sum(_count_in_file(path) for path in sorted(folder.glob("*.safetensors")))


def _count_in_file(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as weights:  # reads the header alone
            return sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); save it again") from error
