"""Files that are there whole, or as they were before."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


PARTIAL = ".partial-"  # begins the names of files that are being written


@contextmanager
def written_whole(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Yields a path beside `path` to write to, which takes its place when that is done.

    Whatever ends the writing leaves `path` as it was. The yielded name ends like the one of `path`, since libraries take
    the format from it.

    Args:
        sync: Have the file on the disk before it takes the place, so that a crash of the machine leaves it whole too.
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
