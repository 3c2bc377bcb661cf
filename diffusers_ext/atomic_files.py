"""Atomic writing: a file is complete, or as it was before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


PARTIAL = ".partial-"  # begins the names of files that are being written


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
