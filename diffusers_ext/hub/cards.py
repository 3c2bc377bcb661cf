"""Model cards of what a training run has saved.

A card says only what is known: a line that nobody filled in is left out, and a figure carries what is needed to
measure it again.
"""

import math
import os
import platform
import re
import shutil
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.hub.push import check_repo_id
from diffusers_ext.hub.remote_code import MODEL_FILE, PIPELINE_FILE
from diffusers_ext.hub.saved_folder import (
    USE_HEADING,
    SavedFolder,
    lines_of_part,
    lines_without_package,
    loading_lines,
)
from diffusers_ext.hub.stock_places import stock_places
from diffusers_ext.untrusted import one_line, read_json


# Beside this module and not in the repository's `model_cards/`, since an installed package needs it too.
CARD_TEMPLATE = Path(__file__).with_name("model_card_template.md")

# Of `training/calibrate.py`, beside the pipeline.
CALIBRATION_FILE, CALIBRATION_HEADING = "calibration.json", "## Calibration"
RESULTS_HEADING = "## Results"
_COMPONENTS = re.compile(r"^\| component \|.*\n(?:\|.*(?:\n|\Z))+", re.MULTILINE)  # the table of them
_NOTHING = "No figure was measured."
_CALIBRATED = "No figure was measured beside those of the calibration below."
_NAME = re.compile(r"[^,;:.!?\n]{1,40}")  # of a metric

DEFAULT_LIMITATIONS = (
    "It makes images like those it was trained on and shares their gaps and biases. It was not examined for copies of"
    " training images beyond what Results says, nor for any use outside that data."
)


@dataclass(frozen=True)
class Figure:
    """One measured number, with what it takes to measure it again.

    Args:
        metric: What was measured, features and reference data included, such as "Fréchet distance, digits classifier".
        value: The number; it must be finite.
        num_samples: How many generated images it was measured on, or real ones for what needs no sampling.
        sampler: The scheduler's class and its settings that matter; `None` where nothing is sampled.
        num_inference_steps: Network calls for an image, guidance not counted; `None` where nothing is sampled.
        command: The command that prints it.
        name: What the field calls the metric, such as "Fréchet distance", for the Hub's tables; `metric` unless given,
            which then must be no longer than such a name.
    """

    metric: str
    value: float
    num_samples: int
    sampler: str | None
    num_inference_steps: int | None
    command: str
    name: str | None = None

    def __post_init__(self):
        if self.name is None:
            object.__setattr__(self, "name", self.metric)
        if not math.isfinite(self.value):
            raise ValueError(f"the value of {self.metric!r} must be finite, got {self.value}")
        for name in ("num_samples", "num_inference_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} of {self.metric!r} must be at least 1, got {getattr(self, name)}")
        for name in ("metric", "sampler", "command"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"a figure needs its {name}, so that it can be measured again; got an empty one")
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"the name of a metric must have at most 40 characters and no punctuation, got {self.name!r}; what it was"
                " measured on belongs into `metric`"
            )


@dataclass(frozen=True)
class TrainingRun:
    """How a model was trained. What is `None` is left out of the card.

    Args:
        command: The command line. An access token in it is written as `$HF_TOKEN`.
        commit: The commit of the code, as `source_commit()` gives it.
        seed: The run's seed.
        num_steps: Optimizer steps.
        seconds: Training time alone.
        hardware: What it ran on, as `describe_machine()` gives it.
        options_file: The file in the pipeline's folder that has every option.
        origin: How its weights came to be, and from what, in Markdown.
        base_model: What they began as: a folder, or a name on the Hub; None for random weights.
    """

    command: str | None = None
    commit: str | None = None
    seed: int | None = None
    num_steps: int | None = None
    seconds: float | None = None
    hardware: str | None = None
    options_file: str | None = None
    origin: str = "trained from scratch"
    base_model: str | None = None


def write_card(
    folder: str | os.PathLike,
    *,
    data: str,
    training: TrainingRun | None = None,
    figures: Sequence[Figure] = (),
    measured: Sequence[str] = (),
    sample_grid: str | os.PathLike | None = None,
    pictures: Mapping[str, str] | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    title: str | None = None,
    dataset_id: str | None = None,
    license: str = "unknown",
    tags: Sequence[str] = (),
    pipeline_tag: str = "unconditional-image-generation",
    limitations: str = DEFAULT_LIMITATIONS,
) -> Path:
    """Writes the card of the pipeline or model saved in `folder`, `folder/README.md`, over any that is there.

    Components, parameter counts and label names are read from the folder.

    Args:
        data: What it was trained on, in Markdown: source, number and size of the images, labels, preparation.
        figures: What was measured; none at all is said so.
        measured: What else was measured, in Markdown.
        sample_grid: An image to show. One from outside the folder is copied into it.
        pictures: What pictures in the folder mean, by their names there, in Markdown.
        repo_id: Where it is to be loaded from; by default the folder, by a path from here or by its name. A push puts the
            repository in its place.
        revision: The branch that it is on, if not on `main`.
        title: Heading; the last part of `repo_id` or of the folder's path unless given.
        dataset_id: Id of the data set on the Hub, if it is there.
        license: A licence identifier of the Hub, such as "mit" or "apache-2.0".
        tags: Tags beside "diffusers" and "diffusers_ext".
        pipeline_tag: The Hub's name of the task. It has none for images by label.
        limitations: In Markdown.

    Returns:
        The path of the card.

    Raises:
        ValueError: if the folder holds no whole pipeline or model, or `dataset_id` is not a repo id.
        FileNotFoundError: if `sample_grid` does not exist.
    """
    folder = Path(folder)
    saved = SavedFolder.read(folder)
    if dataset_id is not None:
        check_repo_id(dataset_id)
    training = training or TrainingRun(origin="trained")
    title = one_line(title or Path(repo_id or folder.resolve()).name)
    card_data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=pipeline_tag,
        tags=list(dict.fromkeys(["diffusers", "diffusers_ext", *tags])),
        datasets=dataset_id,
        base_model=None if training.base_model is None or Path(training.base_model).exists() else training.base_model,
    )
    _put_into_metadata(card_data, figures, title)
    sections = {
        "title": title,
        "class_name": saved.class_name,
        "origin": one_line(training.origin),
        "components": saved.components,
        "labels": saved.labels,
        "data": data.strip(),
        "training": _training_rows(training),
        "command": _without_tokens(training.command),
        "options_file": training.options_file,
        "results": "\n\n".join([*measured, *([_results(figures)] if figures or not measured else [])]),
        "sample_grid": _inside(folder, sample_grid),
        "pictures": {name: shown for name, shown in (pictures or {}).items() if (folder / name).is_file()},
        **_ways_to_load(saved, repo_id or _local_name(folder), revision),
        "limitations": limitations.strip(),
    }
    card = ModelCard.from_template(card_data, template_path=str(CARD_TEMPLATE), **sections)
    path = _save(card, folder / "README.md")
    if (folder / CALIBRATION_FILE).is_file():
        add_calibration(folder)
    return path


def add_figures(folder: str | os.PathLike, figures: Sequence[Figure]) -> Path:
    """Replaces the figures in the card of `folder` by ones that were measured later; the rest stays.

    Raises:
        FileNotFoundError: if `folder` has no card.
        ValueError: if its card has no section "Results" followed by "Use", as those of `write_card` have.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: write the card by write_card first")
    card = ModelCard.load(path)
    text = _with_results(card.text, _results(figures))
    if text is None:
        raise ValueError(
            f"{path} has no section '{RESULTS_HEADING}' followed by '{USE_HEADING}' to put figures in: write it by write_card"
        )
    card.text = text
    _put_into_metadata(card.data, figures, Path(folder).resolve().name)
    return _save(card, path)


def _with_results(text: str, results: str) -> str | None:
    """A card with another section of results; None if it has no such section before that on its use."""
    before, heading, rest = text.partition(f"{RESULTS_HEADING}\n")
    _, next_heading, after = rest.partition(f"\n{USE_HEADING}\n")
    return f"{before}{heading}\n{results}\n{next_heading}{after}" if heading and next_heading else None


def renew_card(folder: Path, results: str) -> Path | None:
    """Lists the parts that are now in `folder` in its card, and drops the figures, which were of the pipeline before.

    Args:
        results: What stands in the place of the figures, in Markdown.

    Returns: The path of the card; None if there is no card, or it is none of `write_card`.

    Raises:
        ValueError: if the folder holds no whole pipeline or model.
    """
    path = folder / "README.md"
    if not path.is_file():
        return None
    card = ModelCard.load(path)
    text = _with_results(card.text, results)
    if text is None or not _COMPONENTS.search(text):
        return None
    # As the template has it.
    parts = {"components": SavedFolder.read(folder).components}
    table = _COMPONENTS.search(
        ModelCard.from_template(ModelCardData(), template_path=str(CARD_TEMPLATE), **parts).text
    )
    card.text = _COMPONENTS.sub(lambda _: table[0], text, count=1)
    card.data.eval_results = card.data.model_name = None  # the Hub's tables of the same figures
    return _save(card, path)


def add_calibration(folder: str | os.PathLike) -> Path | None:
    """Puts what `calibration.json` says into the card of `folder`, in the place of what an earlier one said.

    Returns: The path of the card; None if there is no card, or it is none of `write_card`.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        return None
    card = ModelCard.load(path)
    before, heading, after = card.text.partition("\n## Limitations\n")
    if not heading:
        return None
    before = before.partition(f"\n{CALIBRATION_HEADING}\n")[0].rstrip("\n")
    section = _calibration(Path(folder))
    if section:
        before = before.replace(f"{RESULTS_HEADING}\n\n{_NOTHING}", f"{RESULTS_HEADING}\n\n{_CALIBRATED}")
    card.text = f"{before}\n{section and chr(10) + section}{heading}{after}"
    return _save(card, path)


def _calibration(folder: Path) -> str:
    """The section on what was chosen for a pipeline after its training, from its `calibration.json`; empty without one."""
    path = folder / CALIBRATION_FILE
    if not path.is_file():
        return ""
    found = read_json(path)
    lines = [CALIBRATION_HEADING, "", *(f"- {line}" for line in found["lines"])]
    if found.get("picture"):
        lines += ["", f"![By what it was chosen]({found['picture']})"]
    if found.get("command"):
        lines += ["", "```bash", _without_tokens(found["command"]), "```"]
    return "\n".join(lines) + "\n"


def _ways_to_load(saved: SavedFolder, name: str, revision: str | None) -> dict[str, Any]:
    """With the package; by the code in the repository; and which parts fit which pipelines of diffusers."""
    model_class = saved.class_name if saved.is_model else None
    fitting = {
        (None if saved.is_model else component.name): (component.class_name, places)
        for component in saved.components
        if (places := stock_places(component, {other.name: other for other in saved.components}))
    }
    return {
        "loading_lines": loading_lines(name, model_class, revision),
        "lines_without_package": lines_without_package(name, saved.is_model, revision),
        "code_file": MODEL_FILE if saved.is_model else PIPELINE_FILE,
        "parts": {lines_of_part(name, part, cls, revision): places for part, (cls, places) in fitting.items()},
    }


def _local_name(folder: Path) -> str:
    """As a folder is given, unless that says where it is on this machine."""
    return folder.resolve().name if folder.is_absolute() or ".." in folder.parts else folder.as_posix()


def _results(figures: Sequence[Figure]) -> str:
    if not figures:
        return _NOTHING
    rows = ["| metric | value | samples | sampler | steps |", "|---|---|---|---|---|"]
    for figure in figures:
        cells = (figure.metric, f"{figure.value:.4g}", figure.num_samples, figure.sampler, figure.num_inference_steps)
        rows.append(f"| {' | '.join('' if cell is None else one_line(cell) for cell in cells)} |")
    commands = dict.fromkeys(_without_tokens(figure.command) for figure in figures)
    return "\n".join([*rows, "", "Measured by:", "", "```bash", *commands, "```"])


def _put_into_metadata(card_data: ModelCardData, figures: Sequence[Figure], title: str) -> None:
    """The figures for the Hub's own tables, in the card's metadata."""
    if not figures:
        return
    dataset_id = card_data.datasets if isinstance(card_data.datasets, str) else None
    card_data.model_name = card_data.model_name or title
    card_data.eval_results = [
        EvalResult(
            task_type=card_data.pipeline_tag,
            dataset_type=dataset_id or "unknown",
            dataset_name=dataset_id or "the data described in the card",
            metric_type=_identifier(figure.name),
            metric_name=figure.name,
            metric_value=figure.value,
        )
        for figure in figures
    ]


def _identifier(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"\W+", "_", plain.lower()).strip("_")


def _save(card: ModelCard, path: Path) -> Path:
    with atomic_write(path) as partial:
        partial.write_text(str(card), encoding="utf-8")
    return path


def describe_machine() -> str:
    """Processor or GPUs, and the versions that decide speed and rounding, in one line."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        device = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        device = f"{cores} CPU cores ({platform.machine()})"
    return f"{device}, Python {platform.python_version()}, torch {torch.__version__}"


def source_commit() -> str | None:
    """The commit of the checkout that this package runs from, or `None` if it does not run from one.

    " (changed)" is added if tracked files differ from that commit.
    """
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # An installed copy may lie inside a checkout of something else.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        git("ls-files", "--error-unmatch", str(Path(__file__).resolve()))
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" (changed)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _training_rows(training: TrainingRun) -> dict[str, str | int]:
    rows = {
        "Commit": training.commit,
        "Seed": training.seed,
        "Optimizer steps": training.num_steps,
        "Time": None if training.seconds is None else _duration(training.seconds),
        "Hardware": training.hardware,
    }
    return {name: value for name, value in rows.items() if value is not None}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _without_tokens(command: str | None) -> str | None:
    """A card is public and its commands are for running again, so a token in them becomes the variable that holds it."""
    if command is None:
        return None
    command = command.replace("```", "` ` `")  # which would end the block that it stands in
    command = re.sub(r"(--\w*token[= ])\S+", r"\1$HF_TOKEN", command.strip())
    return re.sub(r"(?<![\w/-])hf_\w{16,}", "$HF_TOKEN", command)


def _inside(folder: Path, image: str | os.PathLike | None) -> str | None:
    """The path of `image` relative to `folder`, where it is copied to if it lies elsewhere."""
    if image is None:
        return None
    image = Path(image)
    if not image.is_file():
        raise FileNotFoundError(f"sample_grid must be an image file, but {str(image)!r} does not exist")
    if not image.resolve().is_relative_to(folder.resolve()):
        image = Path(shutil.copy(image, folder / image.name))
    return image.resolve().relative_to(folder.resolve()).as_posix()
