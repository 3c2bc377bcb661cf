"""The rows of a folder of pictures: each picture with its class, what a table says of it, or the text beside it."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from diffusers_ext.data.folders import CAPTION_SUFFIXES, Contents, Entry, digest_of, divide_pictures, sort_names
from diffusers_ext.untrusted import MAX_TEXT_BYTES, is_below, parse_json


# Keys of a .json beside a picture under which its caption may be.
CAPTION_KEYS = ("caption", "captions", "text", "prompt", "description")
MAX_PARTS = 256  # shards of a stream


@dataclass(frozen=True)
class PictureSplit:
    """One split of a folder of pictures.

    Attributes:
        rows: By column; an `Entry` is a file to be read, which under `caption` has the text.
        features: Of the columns.
        notes: One line for each decision that a user may want to know of.
    """

    rows: list[dict[str, Any]]
    features: datasets.Features
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[Entry, ...]:
        return tuple(value for row in self.rows for value in row.values() if isinstance(value, Entry))

    def to_dataset(self, cache_dir: str | None = None) -> datasets.Dataset:
        """The rows, kept by `datasets` under the names, sizes and times of all files: a changed one is read anew."""
        more = [[value for value in row.values() if not isinstance(value, Entry)] for row in self.rows]
        key = digest_of(self.files, list(self.features), more)
        # The key stands for the rows, which would take long to hash one by one.
        rows = _Keyed(key, self.rows)
        return datasets.Dataset.from_generator(
            _generate, self.features, cache_dir=cache_dir, gen_kwargs={"parts": rows}
        )

    def to_stream(self) -> datasets.IterableDataset:
        count = min(len(self.rows), MAX_PARTS)
        parts = [self.rows[len(self.rows) * i // count : len(self.rows) * (i + 1) // count] for i in range(count)]
        return datasets.IterableDataset.from_generator(_generate, self.features, gen_kwargs={"parts": parts})


def join(parts: Sequence[tuple[PictureSplit, slice]]) -> PictureSplit:
    """Rows of several splits, one after the other, with the columns and the classes of all of them.

    Raises:
        ValueError: if a column is of different types.
    """
    rows, features = [], {}
    for split, some in parts:
        rows += split.rows[some]
        for column, feature in split.features.items():
            known = features.setdefault(column, feature)
            if isinstance(known, datasets.ClassLabel) and isinstance(feature, datasets.ClassLabel):
                features[column] = datasets.ClassLabel(names=sort_names([*known.names, *feature.names]))
            elif known != feature:
                raise ValueError(f"the column {column} is {known} in one split and {feature} in another")
    return PictureSplit([dict.fromkeys(features) | row for row in rows], datasets.Features(features))


class _Keyed:
    """Rows that are hashed and pickled by a key alone."""

    def __init__(self, key: str, rows: list[dict[str, Any]]):
        self.key, self._rows = key, rows

    def __iter__(self):
        return iter([self._rows])

    def __getstate__(self):
        return {"key": self.key}


def _generate(parts) -> Iterator[dict[str, Any]]:
    for rows in parts:
        for row in rows:
            yield {column: _cell(column, value) for column, value in row.items()}


def _cell(column: str, value: Any) -> Any:
    if not isinstance(value, Entry):
        return value
    if column == "caption":
        return read_caption(value)
    if value.member is None:
        return {"path": value.file, "bytes": None}
    return {"path": value.member, "bytes": value.read()}


def read_caption(entry: Entry) -> str:
    """The text beside a picture, without white space around it; of a .json, that under one of the usual keys.

    Raises:
        ValueError: if it cannot be read or has no text.
    """
    try:
        if entry.size > MAX_TEXT_BYTES:
            raise ValueError(f"it must have at most {MAX_TEXT_BYTES} bytes, got {entry.size}")
        text = entry.read().decode("utf-8-sig")
        if entry.suffix != ".json":
            return text.strip()
        values = parse_json(text, "it")
    except ValueError as error:
        raise ValueError(f"{entry.path}, the caption of a picture, cannot be read: {error}") from error
    found = next((values[key] for key in CAPTION_KEYS if isinstance(values, dict) and key in values), values)
    if not isinstance(found, str):
        raise ValueError(f"{entry.path} must hold the caption of a picture as a text, or under one of {CAPTION_KEYS}")
    return found.strip()


def read_pictures(contents: Contents) -> dict[str, PictureSplit]:
    """The splits of a folder of pictures.

    With tables of metadata, the rows are theirs. Otherwise folders are classes, and texts of the pictures' names beside
    them are captions.
    """
    tables = [(entry, read_metadata(entry)) for entry in contents.metadata]
    pictures = [*contents.pictures, *_only_in_tables(contents.pictures, tables)]
    divided, depth, notes = divide_pictures(pictures)
    if tables:
        splits = {name: _described(entries, tables, depth) for name, entries in divided.items()}
        splits = {name: split for name, split in splits.items() if split is not None}
    else:
        splits = _classified(divided, depth, _captions(contents.captions))
    return {
        name: PictureSplit(split.rows, split.features, (*contents.notes, *notes, *split.notes))
        for name, split in splits.items()
    }


# Tables.


def read_metadata(entry: Entry) -> pa.Table:
    """A table about pictures.

    Raises:
        ValueError: if it cannot be read, or has no column `file_name`.
    """
    try:
        if entry.suffix == ".csv":
            table = pa.Table.from_pandas(pd.read_csv(io.BytesIO(entry.read())), preserve_index=False)
        elif entry.suffix == ".jsonl":
            table = pyarrow.json.read_json(io.BytesIO(entry.read()))
        else:
            table = pyarrow.parquet.read_table(io.BytesIO(entry.read()))
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"{entry.path} cannot be read: {error}") from error
    if not any(map(_is_of_files, table.column_names)):
        raise ValueError(
            f"{entry.path} must have a column file_name with the pictures' paths from its folder, got the columns "
            + ", ".join(table.column_names)
        )
    return table


def _is_of_files(column: str) -> bool:
    return column == "file_name" or column.endswith("_file_name")


def _image_column(column: str) -> str:
    return "image" if column == "file_name" else column.removesuffix("_file_name")


def _path_of(table: Entry, value: str) -> str:
    """Where a picture is that a table names, below the folder."""
    if not is_below(value):
        raise ValueError(f"{table.path} must name files below its own folder, got file_name {value!r}")
    return "/".join([*table.folders, *PurePosixPath(value.replace("\\", "/")).parts])


def _only_in_tables(pictures: Sequence[Entry], tables: Sequence[tuple[Entry, pa.Table]]) -> list[Entry]:
    """Files that a table names and that are none of the pictures found: what they lack is said when they are decoded."""
    there, missing = {entry.path for entry in pictures}, {}
    for entry, table in tables:
        root = Path(entry.file).parents[len(entry.folders)] if entry.member is None else Path(entry.file).parent
        for column in filter(_is_of_files, table.column_names):
            for value in table[column].to_pylist():
                path = value and _path_of(entry, value)
                if path and path not in there:
                    missing[path] = Entry(path, str(root / path))
    return list(missing.values())


def _described(
    pictures: Sequence[Entry], tables: Sequence[tuple[Entry, pa.Table]], depth: int | None
) -> PictureSplit | None:
    """The rows of the tables that are about these pictures; None if there are none."""
    by_path, rows, features, used = {entry.path: entry for entry in pictures}, [], None, set()
    for entry, table in tables:
        own = datasets.Features.from_arrow_schema(table.schema)
        own = datasets.Features(
            {_image_column(name): datasets.Image() for name in own if _is_of_files(name)}
            | {name: feature for name, feature in own.items() if not _is_of_files(name)}
        )
        taken = []
        for row in table.to_pylist():
            files = {name: row.pop(name) for name in list(row) if _is_of_files(name)}
            paths = {_image_column(name): value and _path_of(entry, value) for name, value in files.items()}
            if any(path in by_path for path in paths.values()):
                used.update(paths.values())
                taken.append({name: by_path.get(path) for name, path in paths.items()} | row)
        if taken and features not in (None, own):
            raise ValueError(
                f"{entry.path} must have the columns of the other tables, {list(features)}, got {list(own)}"
            )
        features, rows = own if taken else features, rows + taken
    if not rows:
        return None
    notes, left = [], [path for path in by_path if path not in used]
    if left:
        notes.append(f"{len(left)} pictures are in no table of metadata and not used, such as {left[0]}")
    folders = {name for entry in pictures for name in entry.folders[-1:]}
    if len(folders) > 1 and not {"label", "cls"} & set(features) and _no_class_labels(features):
        notes.append("folders are not taken for classes, since a table of metadata describes the pictures")
    return PictureSplit(rows, features, tuple(notes))


def _no_class_labels(features: Mapping[str, Any]) -> bool:
    return not any(isinstance(feature, datasets.ClassLabel) for feature in features.values())


# Folders as classes, and texts beside.


def _captions(entries: Sequence[Entry]) -> dict[str, Entry]:
    """The file of the caption for each path without extension: a .txt before others."""
    order = {suffix: number for number, suffix in enumerate(CAPTION_SUFFIXES)}
    return {entry.stem: entry for entry in sorted(entries, key=lambda entry: -order[entry.suffix])}


def _classified(
    divided: Mapping[str, list[Entry]], depth: int | None, captions: Mapping[str, Entry]
) -> dict[str, PictureSplit]:
    """Pictures with the classes that their folders are, if there are several."""
    folders = {name: [_without(entry.folders, depth) for entry in entries] for name, entries in divided.items()}
    everywhere = [path for paths in folders.values() for path in paths]
    common = 0
    while all(len(path) > common and path[common] == everywhere[0][common] for path in everywhere):
        common += 1
    depths = {len(path) - common for path in everywhere}
    level = common if len(depths) > 1 else -1
    labels = {
        name: [None if len(path) == common else path[level] for path in paths] for name, paths in folders.items()
    }
    every = [label for split in labels.values() for label in split]
    names, loose, notes = set(every) - {None}, every.count(None), []
    if len(names) < 2:
        labels = {name: [None] * len(split) for name, split in labels.items()}
    elif 2 * loose > len(every):
        notes.append(f"folders are not taken for classes, since {loose} of {len(every)} pictures are in none of them")
        labels = {name: [None] * len(split) for name, split in labels.items()}
    elif len(depths - {0}) > 1:
        notes.append(f"pictures lie at several depths: their classes are the topmost folders, {len(names)} of them")
    elif level == -1 and max(depths) > 1:
        notes.append(f"pictures lie {max(depths)} folders deep: their classes are the innermost folders")
    return {
        name: _with_classes(entries, labels[name], captions, notes) for name, entries in divided.items() if entries
    }


def _without(path: tuple[str, ...], depth: int | None) -> tuple[str, ...]:
    return path if depth is None else (*path[:depth], *path[depth + 1 :])


def _with_classes(
    pictures: Sequence[Entry], labels: Sequence[str | None], captions: Mapping[str, Entry], notes: Sequence[str]
) -> PictureSplit:
    features, notes = {"image": datasets.Image()}, list(notes)
    names = sort_names(label for label in labels if label is not None)
    rows: list[dict[str, Any]] = [{"image": entry} for entry in pictures]
    if names:
        features["label"] = datasets.ClassLabel(names=names)
        rows = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
        loose = [row["image"].path for row in rows if row["label"] is None]
        rows = [row for row in rows if row["label"] is not None]
        if loose:
            notes.append(f"{len(loose)} pictures beside the folders of classes are not used, such as {loose[0]}")
    found = [captions.get(row["image"].stem) for row in rows]
    if any(found):
        features["caption"] = datasets.Value("string")
        rows = [row | {"caption": caption} for row, caption in zip(rows, found, strict=True)]
        notes.append(
            f"{len(rows) - found.count(None)} of {len(rows)} pictures have a text beside them (column caption)"
        )
    return PictureSplit(rows, datasets.Features(features), tuple(notes))
