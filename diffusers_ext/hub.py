"""Model cards, and pushing a finished pipeline to the Hugging Face Hub.

A card says only what is known: a line that nobody filled in is left out, and a figure carries what is needed to
measure it again.
"""

import json
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub import get_token as stored_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from safetensors import SafetensorError, safe_open


# Beside this module and not in the repository's `model_cards/`, since an installed package needs it too.
CARD_TEMPLATE = Path(__file__).with_name("model_card_template.md")

# What a training run leaves beside its pipeline and nobody needs for loading it.
NOT_UPLOADED = ("checkpoint-*/*", "logs/*", ".*")

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
        num_samples: How many generated images it was measured on.
        sampler: The scheduler's class and its settings that matter.
        num_inference_steps: Network calls for an image, guidance not counted.
        command: The command that prints it.
    """

    metric: str
    value: float
    num_samples: int
    sampler: str
    num_inference_steps: int
    command: str

    def __post_init__(self):
        if not math.isfinite(self.value):
            raise ValueError(f"the value of {self.metric!r} must be finite, got {self.value}")
        for name in ("num_samples", "num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of {self.metric!r} must be at least 1, got {getattr(self, name)}")
        for name in ("metric", "sampler", "command"):
            if not getattr(self, name).strip():
                raise ValueError(f"a figure needs its {name}, so that it can be measured again; got an empty one")


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
    """

    command: str | None = None
    commit: str | None = None
    seed: int | None = None
    num_steps: int | None = None
    seconds: float | None = None
    hardware: str | None = None
    options_file: str | None = None


def loading_lines(name: str | os.PathLike) -> str:
    """The three lines of Python that load the pipeline `name`, a folder or a repo id."""
    return "\n".join(
        [
            "import diffusers_ext",
            "from diffusers import DiffusionPipeline",
            f'pipeline = DiffusionPipeline.from_pretrained("{Path(name).as_posix()}")',
        ]
    )


def write_card(
    folder: str | os.PathLike,
    *,
    data: str,
    training: TrainingRun | None = None,
    figures: Sequence[Figure] = (),
    sample_grid: str | os.PathLike | None = None,
    repo_id: str | None = None,
    title: str | None = None,
    dataset_id: str | None = None,
    license: str = "unknown",
    tags: Sequence[str] = (),
    pipeline_tag: str = "unconditional-image-generation",
    limitations: str = DEFAULT_LIMITATIONS,
) -> Path:
    """Writes the model card of the pipeline saved in `folder`, `folder/README.md`, in place of any that is there.

    Components, parameter counts and label names are read from the folder.

    Args:
        data: What it was trained on, in Markdown: source, number and size of the images, labels, preparation.
        figures: What was measured; none at all is said so.
        sample_grid: An image to show. One from outside the folder is copied into it.
        repo_id: Where the pipeline is to be loaded from. The folder's own name stands in for it.
        title: Heading; the last part of `repo_id` or of the folder's path unless given.
        dataset_id: Id of the data set on the Hub, if it is there.
        license: A licence identifier of the Hub, such as "mit" or "apache-2.0".
        tags: Tags beside "diffusers" and "diffusers_ext".
        pipeline_tag: The Hub's name of the task. It has none for images by label.
        limitations: In Markdown.

    Returns:
        The path of the card.

    Raises:
        ValueError: if the folder holds no whole pipeline, or `dataset_id` is not a repo id.
        FileNotFoundError: if `sample_grid` does not exist.
    """
    folder = Path(folder)
    model_index = _read_model_index(folder)
    if dataset_id is not None:
        _check_repo_id(dataset_id)
    training = training or TrainingRun()
    title = title or Path(repo_id or folder.resolve()).name

    card_data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag=pipeline_tag,
        tags=list(dict.fromkeys(["diffusers", "diffusers_ext", *tags])),
        datasets=dataset_id,
    )
    _tell_figures(card_data, figures, title)
    card = ModelCard.from_template(
        card_data,
        template_path=str(CARD_TEMPLATE),
        title=title,
        pipeline_class=model_index["_class_name"],
        components=_components(folder, model_index),
        labels=model_index.get("id2label"),
        data=data.strip(),
        training=_training_rows(training),
        command=_without_tokens(training.command),
        options_file=training.options_file,
        results=_results(figures),
        sample_grid=_inside(folder, sample_grid),
        loading_lines=loading_lines(repo_id or folder.resolve().name),
        limitations=limitations.strip(),
    )
    return _write_whole(card, folder / "README.md")


def add_figures(folder: str | os.PathLike, figures: Sequence[Figure]) -> Path:
    """Puts figures that were measured later into the card of `folder`, in place of those it has; the rest stays.

    Raises:
        FileNotFoundError: if `folder` has no card.
        ValueError: if its card has no section "Results" followed by "Use", as those of `write_card` have.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: write the card by write_card first")
    card = ModelCard.load(path)
    before, heading, rest = card.text.partition("## Results\n")
    _, next_heading, after = rest.partition("\n## Use\n")
    if not (heading and next_heading):
        raise ValueError(
            f"{path} has no section '## Results' followed by '## Use' to put figures in: write it by write_card"
        )
    card.text = f"{before}{heading}\n{_results(figures)}\n{next_heading}{after}"
    _tell_figures(card.data, figures, Path(folder).resolve().name)
    return _write_whole(card, path)


def _results(figures: Sequence[Figure]) -> str:
    if not figures:
        return "No figure was measured."
    rows = ["| metric | value | samples | sampler | steps |", "|---|---|---|---|---|"]
    for figure in figures:
        cells = (figure.metric, f"{figure.value:.4g}", figure.num_samples, figure.sampler, figure.num_inference_steps)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    commands = dict.fromkeys(_without_tokens(figure.command) for figure in figures)
    return "\n".join([*rows, "", "Measured by:", "", "```bash", *commands, "```"])


def _tell_figures(card_data: ModelCardData, figures: Sequence[Figure], title: str) -> None:
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
            metric_type=re.sub(r"\W+", "_", figure.metric.lower()).strip("_"),
            metric_name=figure.metric,
            metric_value=figure.value,
        )
        for figure in figures
    ]


def _write_whole(card: ModelCard, path: Path) -> Path:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(str(card), encoding="utf-8")
    unfinished.replace(path)
    return path


def prepare_repo(repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
    """Makes sure that a model repository exists and can be written to, and returns its full id, `namespace/name`.

    Call it before a long run whose result is to be pushed: what would go wrong at the end goes wrong here.

    Args:
        repo_id: `name`, in the namespace of the token's owner, or `namespace/name`.
        token: An access token with the right to write; the one stored on this machine unless given.
        private: Whether nobody else may see it. `None` takes the Hub's default for a new one.

    Raises:
        ValueError: if `repo_id` is none, or the repository exists and is not as private as asked.
        PermissionError: if there is no token, or it does not give the right to write there.
    """
    _check_repo_id(repo_id)
    api = _api(token)
    with _clear_refusals(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        is_private = bool(api.model_info(repo_id).private)
    if private is not None and private != is_private:
        states = ("public", "private")
        raise ValueError(
            f"{repo_id!r} exists and is {states[is_private]}, but private={private} was asked for. Change its"
            f" visibility on the Hub, choose another name, or leave `private` out to keep it {states[is_private]}."
        )
    return repo_id


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload the pipeline",
    ignore_patterns: Sequence[str] = NOT_UPLOADED,
) -> str:
    """Uploads the pipeline saved in `folder` to the model repository `repo_id` in one commit: all of it or nothing.

    The repository is made if it does not exist. Files in it that belong to a component of an earlier upload and are
    not in `folder` any more are deleted in the same commit, so that no stale shard is loaded.

    Args:
        repo_id, token, private: As for `prepare_repo`.
        ignore_patterns: What not to upload, as patterns on the path relative to `folder`, where `*` matches `/` too.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if the folder holds no whole pipeline; and as for `prepare_repo`.
        PermissionError: as for `prepare_repo`.
    """
    folder = Path(folder)
    components = [component["name"] for component in _components(folder, _read_model_index(folder))]
    repo_id = prepare_repo(repo_id, token=token, private=private)

    api = _api(token)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    uploaded = list(filter_repo_objects(files, ignore_patterns=list(ignore_patterns)))
    with _clear_refusals(repo_id):
        remote = api.model_info(repo_id)
        stale = [
            sibling.rfilename
            for sibling in remote.siblings
            if sibling.rfilename not in uploaded and sibling.rfilename.split("/")[0] in components
        ]
        # Not `upload_folder`: it splits a large folder into several commits.
        commit = api.create_commit(
            repo_id,
            [
                *[CommitOperationAdd(name, folder / name) for name in uploaded],
                *[CommitOperationDelete(name) for name in stale],
            ],
            commit_message=commit_message,
            parent_commit=remote.sha,
        )
    return commit.commit_url


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
    package = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # An installed copy may lie inside a checkout of something else.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" (changed)" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _read_model_index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.is_file():
        raise ValueError(
            f"{str(folder)!r} must hold a saved pipeline, but has no model_index.json. Save one there with"
            " `pipeline.save_pretrained(folder)`."
        )
    return json.loads(path.read_text(encoding="utf-8"))


def _components(folder: Path, model_index: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Name, library, class and number of parameters of each component, all of which must be there and whole."""
    components = []
    for name, entry in model_index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[0] is None:
            continue
        if not (folder / name).is_dir():
            raise ValueError(
                f"model_index.json in {str(folder)!r} names the component {name!r}, but has no such folder"
            )
        num_parameters = sum(_count_parameters(path) for path in sorted((folder / name).glob("*.safetensors")))
        components.append(
            {"name": name, "library": entry[0], "class_name": entry[1], "num_parameters": num_parameters}
        )
    return components


def _count_parameters(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as weights:  # reads the header alone
            return sum(math.prod(weights.get_slice(key).get_shape()) for key in weights.keys())
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); save the pipeline again") from error


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


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"a repo id must be 'name' or 'namespace/name', got {repo_id!r}: {error}") from error


def _api(token: str | None) -> HfApi:
    token = token or stored_token()
    if not token:
        raise PermissionError(
            "pushing to the Hub needs an access token with the right to write, and there is none: pass `token`, set"
            " the environment variable HF_TOKEN, or log in once with `hf auth login`"
        )
    return HfApi(token=token, library_name="diffusers_ext")


@contextmanager
def _clear_refusals(repo_id: str) -> Iterator[None]:
    try:
        yield
    except HfHubHTTPError as error:
        match error.response.status_code:
            case 401:
                raise PermissionError(
                    f"the Hub does not accept the access token for {repo_id!r}: it is mistyped, expired or revoked."
                    " Make a new one in the settings of your account."
                ) from error
            case 403:
                raise PermissionError(
                    f"the access token gives no right to write to {repo_id!r}. Use one of an account or organisation"
                    " that owns this namespace, with the right to write."
                ) from error
        raise
