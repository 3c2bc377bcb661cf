"""The rows of a data set: of the Hub, of a local folder of whatever kind, or of the digits that come with scikit-learn."""

import functools
import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np

from diffusers_ext.data.folders import (
    Entry,
    digest_of,
    divide_tables,
    is_declared,
    list_files,
    look_at,
    saved_splits,
)
from diffusers_ext.data.image_columns import with_image_columns
from diffusers_ext.data.picture_folders import PictureSplit, join, read_pictures
from diffusers_ext.data.sequence_files import read_sequence_files, split_sequence_files
from diffusers_ext.untrusted import one_line


Rows = datasets.Dataset | datasets.IterableDataset


class Source(NamedTuple):
    """Rows, with a line on each decision about which they are, and the local files that they are from."""

    rows: Rows
    notes: tuple[str, ...] = ()
    files: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class LocalFolder:
    """The splits of a local folder, or of a single file.

    Attributes:
        path: Of the folder.
        pictures: The splits of a folder of pictures.
        tables: The files of rows of each split.
        sequences: The files of arrays or of audio of each split, where there are no others.
        reader: What `datasets` calls the reader of the tables.
        declared: Files of a folder that says itself, in its README.md, which are its data; `datasets` follows that.
        notes: One line for each decision that a user may want to know of.
    """

    path: Path
    pictures: Mapping[str, PictureSplit] | None = None
    tables: Mapping[str, Sequence[Entry]] | None = None
    sequences: Mapping[str, Sequence[Entry]] | None = None
    reader: str | None = None
    declared: Sequence[Entry] | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: str | Path) -> "LocalFolder":
        """Looks at all files of a folder; opens tables about pictures, and the lists of zips."""
        path = Path(path)
        if path.is_dir() and (saved := saved_splits(path)):
            return cls(path, tables=saved, reader="arrow")
        entries = list_files(path)
        if path.is_dir() and is_declared(path):
            return cls(path, declared=entries)
        contents = look_at(entries)
        if contents.pictures:
            return cls(path, pictures=read_pictures(contents))
        if contents.tables:
            splits, notes = divide_tables(contents.tables)
            return cls(path, tables=splits, reader=contents.reader, notes=(*contents.notes, *notes))
        sequences, notes = split_sequence_files(entries)
        if sequences:
            return cls(path, sequences=sequences, notes=tuple(notes))
        raise ValueError(
            "it holds no pictures, and no files of rows (parquet, arrow, WebDataset tars, csv, json), of arrays (npy, npz) or of "
            "audio" + "".join(f"; {note}" for note in contents.notes)
        )

    def split_names(self, config_name: str | None = None) -> list[str]:
        if self.declared is not None:
            return datasets.get_dataset_split_names(str(self.path), config_name)
        return list(self.pictures or self.tables or self.sequences)

    def open(
        self, config_name: str | None, split: str, streaming: bool = False, cache_dir: str | None = None
    ) -> Source:
        """The rows of a split, or of what an expression such as `train[:90%]` says.

        Raises:
            ValueError: if there is no such split or configuration, or if a stream is to be a part of one.
        """
        options = {"streaming": streaming, "cache_dir": cache_dir, "split": split}
        if self.declared is not None:
            # `datasets` keys its cache by what is declared, and not by the files: a changed one would not be seen.
            cache = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / f"declared-{digest_of(self.declared)}"
            rows = datasets.load_dataset(str(self.path), config_name, **options | {"cache_dir": str(cache)})
            return Source(rows, self.notes, tuple(self.declared))
        if config_name is not None:
            raise ValueError(f"it has no configurations, got {config_name!r}: leave dataset_config_name out")
        names = self._names_in(split)
        if self.sequences is not None:
            return self._sequences_in(split, streaming)
        if self.tables is not None:
            files = {name: [glob.escape(entry.file) for entry in entries] for name, entries in self.tables.items()}
            rows = datasets.load_dataset(self.reader, data_files=files, **options)
            return Source(rows, self.notes, tuple(entry for name in names for entry in self.tables[name]))
        notes = tuple(dict.fromkeys(note for name in names for note in self.pictures[name].notes))
        if not streaming:
            return Source(self._pictures_in(split, cache_dir), notes)
        if names != [split]:
            raise ValueError(f"a stream takes a split as it is, got {split!r}")
        return Source(self.pictures[split].to_stream(), notes, self.pictures[split].files)

    def _names_in(self, split: str) -> list[str]:
        """The splits that an expression speaks of.

        Raises:
            ValueError: if there is no such split.
        """
        there = list(self.pictures or self.tables or self.sequences)
        names = [part.split("[")[0].strip() for part in split.split("+")]
        for name in names:
            if name not in there:
                raise ValueError(f"Unknown split {name!r}: there are {', '.join(there)}")
        return names

    def _sequences_in(self, split: str, streaming: bool) -> Source:
        opened = {name: read_sequence_files(self.sequences[name]) for name in self._names_in(split)}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(
            {name: len(rows) for name, rows in opened.items()}
        )
        rows = datasets.concatenate_datasets(
            [opened[part.splitname].select(range(part.from_, part.to)) for part in parts]
        )
        files = tuple(entry for name in opened for entry in self.sequences[name])
        return Source(rows.to_iterable_dataset() if streaming else rows, self.notes, files)

    def _pictures_in(self, split: str, cache_dir: str | None) -> datasets.Dataset:
        lengths = {name: len(each.rows) for name, each in self.pictures.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        joined = join([(self.pictures[part.splitname], slice(part.from_, part.to)) for part in parts])
        return joined.to_dataset(cache_dir)


def is_local(name: str) -> bool:
    """Whether a data set is not looked for on the Hub."""
    return name == "digits" or Path(name).exists()


def load_source(name: str, config_name: str | None = None, split: str = "train", **kwargs) -> Rows:
    """The rows of `digits`, of a data set on the Hub, or of a local folder; see `open_source`."""
    return open_source(name, config_name, split, **kwargs).rows


def open_source(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    *,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> Source:
    """The rows of a split, a line on each decision about which they are, and the local files that they are from.

    Args:
        name: `digits`, a data set on the Hub, or a local folder or file (see `LocalFolder`).
        streaming: Read the rows as they are asked for, in order.

    Raises:
        ValueError: if there is no such data set, configuration or split, or it cannot be read.
    """
    if name == "digits" and not Path(name).exists():
        digits = load_digits(split)
        return Source(digits.to_iterable_dataset(num_shards=16) if streaming else digits)
    try:
        if is_local(name):
            source = LocalFolder.read(name).open(config_name, split, streaming, cache_dir)
        else:
            options = {"split": split, "streaming": streaming, "cache_dir": cache_dir}
            source = Source(datasets.load_dataset(name, config_name, **options))
    except Exception as error:  # what a reader of files or of the Hub raises, which is of many kinds
        where = "" if is_local(name) else "; it is no local folder, so it was looked for on the Hub"
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        raise ValueError(
            f"the split {split!r} of the data set {name!r} cannot be loaded{where}: {cause or error}"
        ) from error
    rows = with_image_columns(source.rows, Path(name) if is_local(name) else None)
    return source._replace(rows=rows, notes=tuple(map(one_line, source.notes)))  # which name files


def split_names(name: str, config_name: str | None = None) -> list[str]:
    """The splits of a data set."""
    if name == "digits" and not Path(name).exists():
        return ["train", "test"]
    if is_local(name):
        return LocalFolder.read(name).split_names(config_name)
    return datasets.get_dataset_split_names(name, config_name)


def load_digits(split: str = "train") -> datasets.Dataset:
    """scikit-learn's 1797 handwritten digits, 8x8 grey: `train` is a draw of 1500, `test` the other 297.

    Drawn by label and not taken in file order, where the last rows differ: a classifier (SVC) of the first 1500 reads
    95 % of them, one of a draw 98 % of the others.
    """
    pixels, labels, splits = _read_digits()
    if split not in splits:
        raise ValueError(f"the split of digits must be one of {', '.join(splits)}, got {split!r}")
    rows = splits[split]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    # As the files of a format without compression, which are the same bytes with every PIL.
    files = [{"bytes": b"P5\n8 8\n255\n" + picture.tobytes(), "path": None} for picture in pixels[rows]]
    columns = {"image": files, "label": labels[rows]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@functools.cache
def _read_digits() -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Pixels, labels, and the rows of the splits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(np.arange(1797), test_size=297, stratify=digits.target, random_state=0)
    splits = {"train": np.sort(train), "test": np.sort(test), "train+test": np.arange(1797)}
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target, splits
