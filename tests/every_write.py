"""Ends a process at the k-th thing that it does to the files of a folder: what a power cut or a kill would do, at each place.

    total = run_until(None, folder, work)        # how many places there are
    run_until(7, folder, work)                   # ends just before the 7th, with nothing tidied up

Places are before each opening for writing, with the file opened and still empty, before each renaming, removal and making of
a folder, and in the middle of each file of weights, which safetensors writes by itself.
"""

import itertools
import os
import sys
import traceback
from pathlib import Path

import safetensors.torch


ENDED = 137  # exit status at the place that was asked for
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Places:
    """Counts the places of this process, and ends it at one of them."""

    def __init__(self, folder, number):
        self.folder, self.number, self.count, self.is_ending = os.path.realpath(folder), number, 0, False
        self.numbers = itertools.count(1)  # also of threads
        sys.addaudithook(self.note)  # for good, so that this is for a process that was forked for it
        self.serialize_file = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self.write_weights

    def is_here(self):
        number = next(self.numbers)
        self.count = max(self.count, number)
        return number == self.number

    def end(self):
        self.is_ending = True
        os._exit(ENDED)

    def note(self, event, details):
        if self.is_ending or not (event == "open" or event in _CHANGES):
            return
        path = details[0]
        is_below = isinstance(path, str | bytes | os.PathLike) and os.path.realpath(path).startswith(self.folder)
        of_opened_folder = event in _CHANGES and len(details) > 1 and details[-1] not in (-1, None)
        if not is_below and not of_opened_folder:
            return
        if event != "open":
            if self.is_here():
                self.end()
            return
        _, mode, flags = details
        if not (set(mode or "") & set("wax+") or (flags or 0) & _WRITING):
            return
        if self.is_here():
            self.end()
        if self.is_here():
            self.is_ending = True
            if "a" not in (mode or ""):
                open(path, "wb").close()
            self.end()

    def write_weights(self, tensors, filename, *args, **kwargs):
        if str(filename).startswith(self.folder):
            if self.is_here():
                self.end()
            if self.is_here():
                self.serialize_file(tensors, filename, *args, **kwargs)
                os.truncate(filename, os.path.getsize(filename) // 2)
                self.end()
        return self.serialize_file(tensors, filename, *args, **kwargs)


def start(work, number=None, folder=None, count_to=None, environment=None):
    """A fork of this process that does the work, and ends without what this one has to do at its end; its id.

    Args:
        number: Of the place in `folder` at which it ends with `ENDED`; None for none, and the end of the work.
        count_to: A file that gets the number of places.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.environ.update(environment or {})
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            places = Places(folder, number) if folder is not None else None
            work()
            if count_to is not None:
                places.folder = "\0"
                Path(count_to).write_text(str(places.count))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finish(child):
    """The exit status of a fork."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
