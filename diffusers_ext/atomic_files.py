"""Atomic writing: a file is complete, or as it was before; and so is a folder, which one process at a time writes to."""

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """
    path = Path(path)
    partial = path.with_name(PARTIAL + path.name)
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# Folders.


def replace_files(folder: Path, index: str, write: Callable[[Path], None]) -> None:
    """Replaces files and folders in `folder` by others of the same names, all of them or none.

    They are written to a hidden folder first. From its renaming on they are the ones that count: whoever is ended while they
    are moved to where they belong leaves a folder without `index`, and `finish_replacing` moves the others.

    Args:
        index: The file without which the folder is taken for empty; it goes first and comes last.
        write: Writes them into the folder that it is given.

    Raises:
        OSError: if they cannot be written; what was there is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{SAVING}*"):  # by a process that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=folder, prefix=SAVING, ignore_cleanup_errors=True) as partial:
        try:
            write(Path(partial))
            if not Path(partial, index).is_file():
                raise ValueError(f"{index} was not written")
        except Exception as error:  # libraries report a full disk as what they like
            raise OSError(f"{folder} could not be written to, and is as it was: {type(error).__name__}: {error}") from error
        finish_replacing(folder)
        os.rename(partial, folder / SAVED)
        os.mkdir(partial)  # which is removed on leaving
    finish_replacing(folder)


def finish_replacing(folder: str | Path) -> None:
    """Moves what `replace_files` has written, and was kept from moving, to where it belongs."""
    folder = Path(folder)
    ready = folder / SAVED
    if not ready.is_dir():
        return
    order = [path.name for path in sorted(ready.iterdir())]
    index = next((name for name in INDEX_FILES if name in order), None)
    if index is not None:
        (folder / index).unlink(missing_ok=True)
    for name in sorted(order, key=lambda name: name == index):
        target = folder / name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(ready / name, target)
    os.rmdir(ready)


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Holds a folder that another process must not write to meanwhile. The end of the process, whatever it is, frees it.

    Raises:
        FolderInUse: if another process holds it.
        OSError: if nothing can be written there.
    """
    path = Path(folder, LOCK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path)
    except FolderInUse:
        raise
    except OSError as error:
        raise OSError(error.errno, f"{folder} cannot be written to: {error.strerror}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


class FolderInUse(OSError):
    """Another process writes to a folder."""


def _locked(path: Path) -> IO:
    while True:
        file = path.open("a+")
        try:
            if fcntl is not None:
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
