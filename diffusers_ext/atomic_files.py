"""Atomic writing: a file is complete, or as it was before; and so is a folder, which one process at a time writes to."""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None

PARTIAL = ".partial-"  # begins the names of files that are being written
SAVING, SAVED = ".saving-", ".saved"  # folders in which others are written, and of what is complete and to be moved
LOCK = ".lock"  # of the process that writes to a folder
# Without one of them a folder holds no pipeline, model or features.
INDEX_FILES = ("features.json", "model_index.json", "config.json")


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Yields a temporary path to write to, which is renamed to `path` when the block ends.

    An exception, an interrupt or the end of the process leaves `path` as it was. The temporary file lies beside `path`
    and has its suffix, since libraries infer the format from that.

    Args:
        sync: Flush the file to disk before it is renamed, so that it is also complete after a crash of the machine.

    Raises:
        OSError: if it cannot be written: with the file, and that it is as it was.
    """
    path = Path(path)
    partial = path.with_name(PARTIAL + path.name)
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise OSError(error.errno, f"{path} could not be written, and is as it was ({reason})") from error
        raise


# Folders.


def replace_files(folder: Path, index: str, write: Callable[[Path], None]) -> None:
    """Replaces files and folders in `folder` by others of the same names, all of them or none.

    They are written to a hidden folder first. From its renaming on they are the ones that count: whoever is ended while they
    are moved to where they belong leaves a folder without `index`, and `finish_replacing` moves the others.

    Args:
        index: The file without which the folder is taken for empty, one of `INDEX_FILES`; it goes first and comes last.
        write: Writes them into the folder that it is given.

    Raises:
        OSError: if they cannot be written, or another process writes there; what was there is as it was.
    """
    with lock_folder(folder):
        _remove_partial(folder)
        with tempfile.TemporaryDirectory(dir=folder, prefix=SAVING) as partial:
            try:
                new = Path(partial, "new")
                new.mkdir()
                write(new)
            except Exception as error:  # libraries report a full disk as what they like
                reason = f"{type(error).__name__}: {error}"
                raise OSError(f"{folder} could not be written to, and is as it was ({reason})") from error
            if not (new / index).is_file():
                raise ValueError(f"{index} must be among the files of {folder}")
            _move_saved(folder)
            os.rename(new, folder / SAVED)
        _move_saved(folder)


def finish_replacing(folder: str | Path) -> None:
    """Moves what a process that was killed in `replace_files` had written to where it belongs.

    Whatever is going to read a folder calls it. Where another process is doing it, or nothing may be written, it does nothing.
    """
    if not os.path.isdir(os.path.join(folder, SAVED)):  # whatever the name is, as one of the Hub
        return
    with suppress(OSError), lock_folder(folder):
        _move_saved(Path(folder))
        _remove_partial(Path(folder))


def _remove_partial(folder: Path) -> None:
    """What a process that was killed had begun to write; the folder is locked."""
    for left in folder.glob(f"{SAVING}*"):
        shutil.rmtree(left)


def _move_saved(folder: Path) -> None:
    ready = folder / SAVED
    if not ready.is_dir():
        return
    names = sorted(os.listdir(ready))
    index = next((name for name in INDEX_FILES if name in names), None)
    if index is not None:
        (folder / index).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: name == index):
        target = folder / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(ready / name, target)
    os.rmdir(ready)


class FolderInUse(OSError):
    """Another process writes to a folder."""


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Holds a folder that no other process is to write to meanwhile, and makes it if there is none.

    The end of the process, whatever it is, frees it. Within a process it may be held several times over.

    Raises:
        FolderInUse: if another process holds it.
        OSError: if nothing can be written there.
    """
    path = Path(folder, LOCK)
    held = (os.getpid(), os.path.realpath(path))
    if held in _HELD:
        yield
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    except FolderInUse:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{folder} cannot be written to ({error.strerror})") from error
    _HELD.add(held)
    try:
        yield
    finally:
        _HELD.discard(held)
        path.unlink(missing_ok=True)
        file.close()


_HELD: set[tuple[int, str]] = set()  # by a process that was forked from this one, none of these


def _locked(path: Path) -> IO:
    """The file of the lock, open; closing it frees the folder."""
    while True:
        file = path.open("a+")
        try:
            if fcntl is not None:
                # Of the process, and not of the file, so that workers that it forks do not keep it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return path.open("a+")  # a file system without locks
            raise FolderInUse(
                f"{path.parent} is being written to by another run ({holder}): wait for its end, or choose another folder"
            ) from error
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(file.fileno())):
            break
        file.close()  # its holder has removed it meanwhile
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
