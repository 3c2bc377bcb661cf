"""Identity of the data of a run: contents, order and labels, so that it resumes with the same ones only.

Contents are compared as they are in the files, and not by names, places or times: a folder may be moved or copied.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusers_ext.data.folders import Entry


if TYPE_CHECKING:
    from torch import nn

    from diffusers_ext.data.image_table import ImageData
    from diffusers_ext.data.stream import StreamData


IDENTITY_FILE = "data.json"
DIGEST_BYTES = 16
_PARTS = 64  # stretches of the images that are compared one by one, to say where a change is
_NAMED = 1000  # labels up to this number are kept by name
_SAMPLED_FILES, _SAMPLED_BYTES = 256, 65536  # files of a stream that are looked into, and how much of either end


def _digest(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def hash_bytes(*arrays: np.ndarray) -> np.ndarray:
    """A digest of arrays of bytes, uint8, shape `(16,)`."""
    return np.frombuffer(_digest(*(array.tobytes() for array in arrays)), np.uint8)


def hash_cell(value: Any) -> bytes:
    """A digest of what an undecoded cell of images holds: the bytes of the file, or the numbers of an array.

    It says nothing of how a decoder reads them. Of a file that would have to be fetched, it is one of the name.
    """
    if value is None:
        return _digest(b"")
    if not isinstance(value, dict):
        try:
            array = np.asarray(value)
        except ValueError:  # lists of unequal lengths, which are refused when they are decoded
            return _digest(repr(value).encode())
        return _digest(repr(array.shape).encode(), np.ascontiguousarray(array).tobytes())
    if value["bytes"] is not None:
        return _digest(value["bytes"])
    if "://" in value["path"]:
        return _digest(value["path"].rpartition("/")[2].encode())
    try:
        return _digest(Path(value["path"]).read_bytes())
    except OSError:  # is said when it is decoded
        return _digest(b"")


def hash_files(entries: Sequence[Entry]) -> str:
    """A digest of files that are too much to read: their names and sizes, and both ends of some of them.

    Tars and parquet files tell at their ends of what is in them.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for entry in entries:
        digest.update(repr((entry.path, entry.size)).encode())
    for entry in entries[:: -(-len(entries) // _SAMPLED_FILES) or 1]:
        with open(entry.file, "rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            file.seek(max(0, file.seek(0, 2) - _SAMPLED_BYTES))
            digest.update(file.read(_SAMPLED_BYTES))
    return digest.hexdigest()


def hash_weights(model: "nn.Module", prefix: bytes = b"") -> str:
    """SHA-256 of the names and values of a network's weights, in float32, after the bytes of `prefix`."""
    digest = hashlib.sha256(prefix)
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class HashedRows(Iterator[dict[str, Any]]):
    """Rows as they are read, with a digest of those that have been."""

    def __init__(self, rows: Iterable[dict[str, Any]], image_column: str):
        self._rows, self._column, self._hash = iter(rows), image_column, hashlib.blake2b(digest_size=DIGEST_BYTES)

    def __next__(self) -> dict[str, Any]:
        row = next(self._rows)
        rest = {name: value for name, value in row.items() if name != self._column}
        self._hash.update(hash_cell(row[self._column]) + repr(rest).encode())
        return row

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


def identify(data: "ImageData | StreamData") -> dict[str, Any]:
    """The identity of data, as JSON.

    Of images: their number; `contents`, whatever the order, and `parts`, of stretches in their order; `labels`, the names
    in the order of their ids, and `assigned`, the label of each image. Of a stream, which is not read beforehand: its
    labels' names, and its first images and its files (see `hash_files`) as `contents`.
    """
    names = None if data.id2label is None else [data.id2label[label] for label in range(len(data.id2label))]
    identity = {
        "num_images": data.num_images,
        "labels": names if names is None or len(names) <= _NAMED else len(names),
        "label_digest": None if names is None else _digest(json.dumps(names).encode()).hex(),
    }
    if data.num_images is None:
        return identity | {"contents": data.contents}
    digests = data.digests()
    return identity | {
        "assigned": None if data.labels is None else _digest(np.ascontiguousarray(data.labels).tobytes()).hex(),
        "contents": digests if isinstance(digests, str) else _sum(digests),
        "parts": [] if isinstance(digests, str) else [_digest(part.tobytes()).hex()[:16] for part in _parts(digests)],
    }


def _sum(digests: np.ndarray) -> str:
    """A digest of all images that does not depend on their order."""
    return digests.view(np.uint64).sum(axis=0, dtype=np.uint64).tobytes().hex()


def _parts(digests: np.ndarray) -> list[np.ndarray]:
    return np.array_split(digests, min(_PARTS, max(len(digests), 1)))


def digest_of_images(data: "ImageData") -> str:
    """A digest of all contents in their order."""
    digests = data.digests()
    return digests if isinstance(digests, str) else _digest(digests.tobytes()).hex()


def describe_change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first difference between two identities in words, or None."""
    if before["num_images"] != now["num_images"]:
        return f"it had {before['num_images']} images, and has {now['num_images']}"
    if before["label_digest"] != now["label_digest"]:
        return _change_of_labels(before["labels"], now["labels"])
    if before["contents"] != now["contents"]:
        return f"the contents of images were replaced{_where(before, now)}"
    if before.get("parts") != now.get("parts"):
        return f"the images are in another order{_where(before, now)}"
    if before.get("assigned") != now.get("assigned"):
        return "images have other labels than they had"
    return None


def _change_of_labels(before: list[str] | int | None, now: list[str] | int | None) -> str:
    if before is None or now is None:
        return f"it had {'no' if before is None else _count(before)} labels, and has {'no' if now is None else _count(now)}"
    if _count(before) != _count(now):
        return f"it had {_count(before)} labels, and has {_count(now)}{_in_one_only(before, now)}"
    if isinstance(before, int) or isinstance(now, int):
        return f"some of its {_count(before)} labels have other names, or another order"
    label = next(label for label, names in enumerate(zip(before, now, strict=True)) if names[0] != names[1])
    what = "its labels are in another order" if sorted(before) == sorted(now) else "its labels have other names"
    return f"{what}: label {label} was {before[label]!r}, and is {now[label]!r}"


def _count(labels: list[str] | int) -> int:
    return labels if isinstance(labels, int) else len(labels)


def _in_one_only(before: list[str] | int, now: list[str] | int) -> str:
    if isinstance(before, int) or isinstance(now, int):
        return ""
    gone, new = [name for name in before if name not in now], [name for name in now if name not in before]
    parts = [f"{words} {', '.join(names[:5])}" for words, names in (("without", gone), ("with", new)) if names]
    return f" ({'; '.join(parts)})" if parts else ""


def _where(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Among which images the first change is, if it is known."""
    pairs = enumerate(itertools.zip_longest(before.get("parts", []), now.get("parts", [])))
    part = next((number for number, (old, new) in pairs if old != new), None)
    if part is None:
        return ""
    rows = np.array_split(np.arange(now["num_images"]), min(_PARTS, now["num_images"]))[part]
    return f", the first of them among the images {rows[0]} to {rows[-1]}"
