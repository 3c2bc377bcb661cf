"""Checkpoints, written atomically.

One is written to a hidden folder, its files are listed with sizes and hashes in a manifest and forced to the disk, and
only then is the folder renamed to `checkpoint-STEP`. Whatever interrupts that leaves the checkpoints before it as they
were.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object

from diffusers_ext.untrusted import inside, read_json


MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(OSError):
    """A checkpoint could not be written, or none can be read."""


def write_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, save: Callable[[Path], None]) -> Path:
    """Writes `OUTPUT_DIR/checkpoint-STEP` atomically. Every process calls it, at the same step.

    Args:
        save: Writes this process's part into the folder it is given. Every process calls it.

    Raises:
        CheckpointError: in every process, if one of them cannot write: with the reason and what is kept. What was there
            before is untouched.
    """
    folder, hidden = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.partial"

    def prepare():
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)

    def complete():
        _write_manifest(hidden, step)
        if folder.exists():  # a run that went back before this step and came here again
            remove_at_once(folder)
        os.rename(hidden, folder)
        _sync(output_dir)

    is_main = accelerator.is_main_process
    try:
        all_or_none(accelerator, prepare if is_main else None)
        all_or_none(accelerator, lambda: save(_seen(hidden)))
        all_or_none(accelerator, complete if is_main else None)
    except BaseException as error:
        if is_main:
            shutil.rmtree(hidden, ignore_errors=True)
        if not isinstance(error, WriteError):
            raise
        raise CheckpointError(_failure(output_dir, step, str(error))) from error.__cause__
    return folder


class WriteError(OSError):
    """One of the processes could not write; raised in all of them."""


def all_or_none(accelerator: Accelerator, write: Callable[[], None] | None) -> None:
    """Calls `write` and waits for the other processes; raises in all of them if it fails in one."""
    fault = None
    try:
        if write:
            write()
    except Exception as error:  # libraries report a full disk as what they like, RuntimeError among others
        fault = error
    if fault and accelerator.distributed_type == DistributedType.FSDP:
        # The others may be waiting for its part of the parameters: its end ends them.
        raise WriteError(f"{type(fault).__name__}: {fault}") from fault
    # A process that fails says so, since the others would wait for it without end.
    reasons = gather_object([None if fault is None else f"{type(fault).__name__}: {fault}"])
    failed = [f"process {index}: {reason}" for index, reason in enumerate(reasons) if reason]
    if failed:
        raise WriteError("; ".join(failed) if accelerator.num_processes > 1 else reasons[0]) from fault


def _seen(folder: Path) -> Path:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}, which the main process sees, is not seen here: all machines must share output_dir"
        )
    return folder


def _failure(output_dir: Path, step: int, reason: str) -> str:
    kept = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none, since there were none"
    free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else 0
    return (
        f"checkpoint-{step} could not be written to {output_dir} ({reason}; {free / 1e6:.1f} MB are free there). The "
        f"checkpoints before it are kept: {kept}. Where there is room, --resume_from_checkpoint latest "
        "goes on from there"
    )


def find_for_all(accelerator: Accelerator, output_dir: Path, request: str) -> tuple[Path | None, list[str]]:
    """As `find_checkpoint`, with the same result in each process. Every process calls it; the main one reads the files.

    Raises:
        CheckpointError: in every process, where `find_checkpoint` raises it, or if one of them does not see the folder.
    """
    found: list = [None]
    if accelerator.is_main_process:
        try:
            found = [find_checkpoint(output_dir, request)]
        except Exception as error:  # goes to the others, which would wait for an answer without end
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    folder, passed_over = found[0]
    try:
        all_or_none(accelerator, None if folder is None else lambda: _seen(folder))
    except WriteError as error:
        raise CheckpointError(str(error)) from error.__cause__
    return folder, passed_over


def find_checkpoint(output_dir: Path, request: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, and a line for each that was passed over.

    Args:
        request: "latest" for the newest complete one in `output_dir`, or a path, or a name in `output_dir`.

    Returns:
        None instead of a path if "latest" finds no checkpoint at all, complete or not.

    Raises:
        CheckpointError: if the named checkpoint is not complete, or if there are checkpoints and none of them is.
    """
    if request != "latest":
        path = next((path for path in (Path(request), output_dir / request) if path.is_dir()), None)
        if path is None:
            there = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
            raise CheckpointError(f"there is no checkpoint {request}; {output_dir} holds: {there}")
        fault = find_fault(path)
        if fault:
            raise CheckpointError(f"{path} is not complete: {fault}")
        return path, []
    passed_over = []
    for path in reversed(list_checkpoints(output_dir)):
        fault = find_fault(path)
        if not fault:
            return path, passed_over
        passed_over.append(f"{path} passed over: {fault}")
    if passed_over:
        raise CheckpointError(f"no checkpoint in {output_dir} is complete: {'; '.join(passed_over)}")
    return None, []


def find_fault(path: Path) -> str | None:
    """The fault of a checkpoint, or None: every file of the manifest must be there with its size and hash."""
    try:
        files = read_json(path / MANIFEST)["files"]
        entries = [
            (name, inside(path, name, MANIFEST), entry["size"], entry["sha256"]) for name, entry in files.items()
        ]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    for name, file, size, digest in entries:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
        if _hash(file) != digest:
            return f"the contents of {name} have changed"
    return None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-STEP`, complete or not, the oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=step_from_name)


def remove_old(output_dir: Path, step: int, *, limit: int | None = None, keep_every: int | None = None) -> None:
    """Removes checkpoints that are not to be kept, and what an interrupted save has left behind.

    Kept are the last ones up to `step`, and of the others those at multiples of a number of steps. Those beyond `step` are
    of a run that went back before them, or are damaged; they would be taken for the latest.

    Args:
        step: Of the checkpoint just written.
        limit: How many of the last are kept; all, if None.
    """
    there = {step_from_name(path): path for path in list_checkpoints(output_dir)}
    past = sorted(number for number in there if number <= step)
    kept = set(past[-limit:] if limit else past)
    kept |= {number for number in past if keep_every and number % keep_every == 0}
    for number in there.keys() - kept:
        remove_at_once(there[number])
    for path in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)


def step_from_name(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def remove_at_once(path: Path) -> None:
    """Removes a folder that must never look like a checkpoint when it is half gone, so that it is renamed first."""
    hidden = path.with_name(f".{path.name}.removed")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def _write_manifest(folder: Path, step: int):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    entries = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": _hash(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": entries}, indent=2) + "\n")
    for path in [*files, folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
