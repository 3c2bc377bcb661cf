"""The folder of a run: what it may hold, who may write to it, and its log of metrics."""

import dataclasses
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusers_ext.atomic_files import LOCK, PARTIAL, SAVED, SAVING, atomic_write, finish_replacing, lock_folder
from diffusers_ext.hub.cards import CALIBRATION_FILE
from diffusers_ext.hub.push import MILESTONES
from diffusers_ext.hub.remote_code import CODE_FILES
from diffusers_ext.options import fixed_on_resume, written_options
from diffusers_ext.trainer.checkpoints import list_checkpoints
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.posthoc_ema import SNAPSHOT_FOLDER
from diffusers_ext.untrusted import is_plain_name, parse_json, read_json, read_yaml_mapping


CONFIG_FILE, METRICS_FILE, PAGE_FILE = "train_config.yaml", "metrics.jsonl", "index.html"
STAGES = "stages"  # the folder of the students of a distillation but the last
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
_OF_A_RUN = (CONFIG_FILE, METRICS_FILE, "model_index.json")
# Those of diffusion models, of autoencoders, and of classifiers.
PICTURES = (
    "samples",
    "denoising",
    "loss",
    "loss_by_snr",
    "calibration",
    "reconstructions",
    "interpolations",
    "manifold",
    "traversals",
    "accuracy",
    "guidance_scales",
)


# What a run replaces, or removes with `overwrite_output_dir`, beside what makes a folder one of a run.
_FILES = (
    "config.json",
    *CODE_FILES,
    "README.md",
    "evaluation.json",
    CALIBRATION_FILE,
    ADAPTER_FILE,
    PAGE_FILE,
    "loss_by_snr.csv",
    "accuracy.csv",
    *(f"{name}.png" for name in PICTURES),
)


def check_output_dir(config: TrainerConfig, is_main_process: bool = True) -> None:
    """Refuses a folder that holds another run, or files of no run that this one would replace.

    What a run was kept from moving there is moved.

    Raises:
        FolderInUse: if another run writes there.
        ValueError: if `output_dir` holds a run and the config says neither to go on with it nor to overwrite it, if it holds
            such files and no run, or if it is a file.
    """
    path = Path(config.output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir must be a folder, {path} is a file")
    if is_main_process and ((path / LOCK).exists() or (path / SAVED).exists()):
        with lock_folder(path):  # which another run may hold
            finish_replacing(path)
            for left in path.glob(".checkpoint-*"):  # half written, or half removed
                shutil.rmtree(left)
    if not _holds_run(path):
        if others := [name for name in _FILES if (path / name).exists()]:
            raise ValueError(
                f"output_dir {path} must be a folder of a run or one without the files that a run writes: it holds no run, but "
                f"{', '.join(others[:3])}. Move what is yours away, or choose another --output_dir"
            )
        return
    checkpoints = list_checkpoints(path)
    if not (config.resume_from_checkpoint or config.overwrite_output_dir):
        newest = f", checkpoints up to {checkpoints[-1].name}" if checkpoints else ", no checkpoints"
        raise ValueError(
            f"output_dir {path} holds another run{newest}. Go on with it by --resume_from_checkpoint latest, start over "
            "with --overwrite_output_dir, or choose another --output_dir"
        )


def _holds_run(path: Path) -> bool:
    return bool(list_checkpoints(path)) or any((path / name).exists() for name in (*_OF_A_RUN, STAGES))


def clear_output_dir(path: Path) -> None:
    """Removes what a run has written, and nothing else; nothing at all from a folder that holds no run."""
    if not _holds_run(path):
        return
    with suppress(OSError, ValueError):  # there is none, or it is damaged
        for name in filter(is_plain_name, read_json(path / "model_index.json")):
            shutil.rmtree(path / name, ignore_errors=True)
    for folder in [*path.glob("checkpoint-*"), *path.glob(".checkpoint-*"), *path.glob(f"{SAVING}*"), path / SAVED]:
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("samples", "before", "logs", "profile", STAGES, SNAPSHOT_FOLDER, MILESTONES):
        shutil.rmtree(path / name, ignore_errors=True)
    for file in [*path.glob("diffusion_pytorch_model*"), *path.glob(f"{PARTIAL}*")]:
        file.unlink()
    for name in (*_FILES, *reversed(_OF_A_RUN)):  # what says that there is a run last, if this is interrupted
        (path / name).unlink(missing_ok=True)


def check_same_run(config: TrainerConfig, checkpoint: Path) -> list[str]:
    """Compares the options with those of the run that a checkpoint is from.

    An option that is not among those of the run, which is older than it, was what is its default now.

    Returns: a line for each option that has changed and may change.

    Raises:
        ValueError: if an option differs that would make it another run.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    defaults = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    before = defaults | config.OLDER_THAN | read_yaml_mapping(checkpoint / CONFIG_FILE)
    now = written_options(config)
    free = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"}
    changed = [name for name in now if name not in free and before[name] != now[name]]
    for name in changed:
        if name in fixed_on_resume(type(config)):
            raise ValueError(
                f"{checkpoint} is of a run with {name} {before[name]}, got {now[name]}: give the same {name}, or "
                "start a new run in another --output_dir"
            )
    return [f"{name} is now {now[name]}, was {before[name]}" for name in changed]


class MetricsLog:
    """`metrics.jsonl`: one JSON object a line, flushed at once, so that a run that is killed loses none.

    Args:
        path: The file; what it holds is kept up to `step`.
        step: The step that the run goes on from.
    """

    def __init__(self, path: Path, step: int = 0):
        kept = [record for record in read_metrics(path) if record["step"] <= step] if step else []
        with atomic_write(path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._path, self._file = path, path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]):
        """Adds a line.

        Raises:
            OSError: if the disk is full or gone.
        """
        line = (json.dumps(record) + "\n").encode()
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            kept = ", ".join(path.name for path in list_checkpoints(self._path.parent)) or "none"
            reason = f"{error.strerror}: {self._path} could not be written, so the run ends; its checkpoints are kept: {kept}"
            raise OSError(error.errno, reason) from error

    def close(self):
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; a last line that was cut off is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(parse_json(line, path))
        except ValueError:
            break
    return records
