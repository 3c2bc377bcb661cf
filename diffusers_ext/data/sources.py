"""The rows of a local folder, of whatever kind, with a line on each decision about them."""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets

from diffusers_ext.data.folders import (
    Entry,
    digest_of,
    divide_tables,
    is_declared,
    list_files,
    look_at,
    saved_splits,
)
from diffusers_ext.data.picture_folders import PictureSplit, join, read_pictures


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
        reader: What `datasets` calls the reader of the tables.
        declared: Files of a folder that says itself, in its README.md, which are its data; `datasets` follows that.
        notes: One line for each decision that a user may want to know of.
    """

    path: Path
    pictures: Mapping[str, PictureSplit] | None = None
    tables: Mapping[str, Sequence[Entry]] | None = None
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
        raise ValueError(
            "it holds no pictures, and no files of rows (parquet, arrow, WebDataset tars, csv, json)"
            + "".join(f"; {note}" for note in contents.notes)
        )

    def split_names(self, config_name: str | None = None) -> list[str]:
        if self.declared is not None:
            return datasets.get_dataset_split_names(str(self.path), config_name)
        return list(self.pictures or self.tables)

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
        there = list(self.pictures or self.tables)
        names = [part.split("[")[0].strip() for part in split.split("+")]
        for name in names:
            if name not in there:
                raise ValueError(f"Unknown split {name!r}: there are {', '.join(there)}")
        return names

    def _pictures_in(self, split: str, cache_dir: str | None) -> datasets.Dataset:
        lengths = {name: len(each.rows) for name, each in self.pictures.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
        joined = join([(self.pictures[part.splitname], slice(part.from_, part.to)) for part in parts])
        return joined.to_dataset(cache_dir)
