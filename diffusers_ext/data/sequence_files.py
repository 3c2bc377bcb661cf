"""Files of sequences as the rows of a data set: NumPy's, with all sequences of a split, or audio, one file for each.

`train.npy` is one array; `train.npz` has an array for each column, labels perhaps. Audio lies in folders like pictures.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from diffusers_ext.data.folders import Entry, divide_pictures, divide_tables, sort_names


ARRAY_SUFFIXES = (".npy", ".npz")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")  # those but wav are read by soundfile
SEQUENCE_COLUMN = "sequence"  # of the one array of a .npy file


def split_sequence_files(entries: Sequence[Entry]) -> tuple[dict[str, list[Entry]], list[str]]:
    """The files of each split, of arrays, whose names say it, or of audio, whose folders do, and a line on what is of none.

    Without either there are no splits.
    """
    if found := [entry for entry in entries if entry.suffix in ARRAY_SUFFIXES]:
        return divide_tables(found)
    if found := [entry for entry in entries if entry.suffix in AUDIO_SUFFIXES]:
        splits, _, notes = divide_pictures(found)
        return splits, [note.replace("pictures", "files") for note in notes]
    return {}, []


def read_sequence_files(entries: Sequence[Entry]) -> datasets.Dataset:
    """The rows of files of one kind, in their order.

    Raises:
        ValueError: if a file of arrays is damaged, holds no numbers or not as many rows in all arrays, or other arrays than
            the first.
    """
    if entries[0].suffix not in ARRAY_SUFFIXES:
        return _audio_of(entries)
    parts = [_read_arrays(Path(entry.file)) for entry in entries]
    for entry, part in zip(entries, parts, strict=True):
        if part.features != parts[0].features:
            raise ValueError(
                f"{entry.path} holds other arrays than {entries[0].path}, and both are of one split: put arrays of the same "
                "examples, such as values and labels, into one .npz, and say a split in a file's name (train, test)"
            )
    return datasets.concatenate_datasets(parts)


def _audio_of(entries: Sequence[Entry]) -> datasets.Dataset:
    """Undecoded files, and as label the folder in which each is, if all of them are in one and there are several."""
    # Not by `datasets`' own folders of audio, which need torchcodec to be opened.
    audio = datasets.Audio()
    files = pa.array([{"bytes": None, "path": entry.file} for entry in entries], audio.pa_type)
    columns, features = {"audio": files}, {"audio": audio}
    depth = next((depth for depth in range(8) if len({entry.folders[depth:][:1] for entry in entries}) > 1), None)
    folders = [] if depth is None else [entry.folders[depth:][:1] for entry in entries]
    if folders and all(folders):
        names = sort_names(folder for (folder,) in folders)
        columns["label"] = pa.array([names.index(folder) for (folder,) in folders], pa.int64())
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset(pa.table(columns), info=datasets.DatasetInfo(features=datasets.Features(features)))


def _read_arrays(path: Path) -> datasets.Dataset:
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = (
            {SEQUENCE_COLUMN: loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded}
        )
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Arrays of objects, such as of sequences of unequal lengths, are not read: pad "
            "them, or write lists into a parquet file"
        ) from error
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if not arrays or min(counts.values()) == 0 or len(set(counts.values())) > 1:
        each = ", ".join(f"{name} {array.shape}" for name, array in arrays.items()) or "nothing"
        raise ValueError(f"{path} must hold arrays with a row for each example, as many in all, got {each}")
    return datasets.Dataset(pa.table({name: _column(array, f"{name} in {path}") for name, array in arrays.items()}))


def _column(array: np.ndarray, name: str) -> pa.Array:
    """An array as a column of numbers or texts, of lists, or of lists of lists."""
    if array.ndim > 3:
        raise ValueError(f"{name} must be (sequences, length) or have an axis of channels too, got {array.shape}")
    if array.dtype.kind == "U":
        return pa.array(array.tolist())
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} must hold numbers, got {array.dtype}")
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    if array.dtype == np.float16:
        array = array.astype(np.float32)
    column = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.LargeListArray.from_arrays(np.arange(0, len(column) + 1, size), column)
    return column
