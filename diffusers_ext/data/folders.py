"""Which files of a local folder are its data, and of which split: decided here, and not by words in the names of pictures.

`datasets` takes any file or folder with a word such as `test` in its name for that split, and then reads no others. Here
splits of pictures are folders; and a note says how much is not used, and why.
"""

import hashlib
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from PIL import Image

from diffusers_ext.untrusted import inside, is_below, parse_yaml, read_json


SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_SUFFIXES = (".txt", ".caption", ".json")
# Kinds of files that hold rows, and what `datasets` calls their reader.
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
TEXT_TABLES = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}

LARGEST_MEMBER = 2**30  # bytes of a file in a zip, which is unpacked in memory

# PIL opens files of these, but decodes none, or needs another program for it.
_NO_PICTURES = {".bufr", ".grib", ".h5", ".hdf", ".mpeg", ".mpg", ".eps", ".ps", ".wmf", ".emf"}
# Never data, and no news to anyone.
_SILENT = ("readme", "license", "licence", "thumbs.db", "desktop.ini")
_OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


@dataclass(frozen=True)
class Entry:
    """A file of a folder, or of a zip in it.

    Attributes:
        path: Below the folder, with `/`; a zip counts as a folder of its name without `.zip`.
        file: Where it is, or the zip is that it is in.
        member: Its name in the zip, or None.
        size: In bytes.
        time: When it was changed.
    """

    path: str
    file: str
    member: str | None = None
    size: int = 0
    time: int = 0

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1].lower()

    @property
    def stem(self) -> str:
        """The path without its extension."""
        return self.path[: len(self.path) - len(self.suffix)]

    @property
    def folders(self) -> tuple[str, ...]:
        return tuple(self.path.split("/")[:-1])

    def read(self) -> bytes:
        if self.member is None:
            return Path(self.file).read_bytes()
        with zipfile.ZipFile(self.file) as archive:
            return archive.read(self.member)  # and no more than the size that `list_zip` has looked at


def picture_suffixes() -> frozenset[str]:
    """Extensions of the pictures that this machine's PIL decodes."""
    Image.init()
    return frozenset(name for name, kind in Image.registered_extensions().items() if kind in Image.OPEN) - _NO_PICTURES


def list_files(root: str | Path) -> list[Entry]:
    """The files in a folder and all folders below it, or a file that is named itself, in the order of their paths.

    Left out are those that are hidden, or in a folder that is, and those in folders such as `__MACOSX`.
    """
    root = Path(root)
    if root.is_file():
        return _entry(root, root.name)
    top, found, seen = os.path.abspath(root), [], set()
    for folder, subfolders, names in os.walk(top, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above it
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if not _is_hidden(name)]
        below = os.path.relpath(folder, top).replace(os.sep, "/")
        for name in names:
            if not _is_hidden(name):
                path = name if below == "." else f"{below}/{name}"
                found += _entry(os.path.join(folder, name), path)
    return sorted(found, key=lambda entry: entry.path)


def _entry(file: str | Path, path: str) -> list[Entry]:
    """The file, if it is there and is one."""
    try:
        state = os.stat(file)
    except OSError:  # a link to nowhere
        return []
    return (
        [Entry(path, os.path.abspath(file), None, state.st_size, state.st_mtime_ns)] if S_ISREG(state.st_mode) else []
    )


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def list_zip(entry: Entry) -> list[Entry]:
    """The files in a zip.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        with zipfile.ZipFile(entry.file) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{entry.file} cannot be read as a zip: {error}") from error
    if any(member.flag_bits & 1 for member in members):
        raise ValueError(f"{entry.file} is encrypted: unpack it")
    for member in members:
        if member.file_size > LARGEST_MEMBER:
            raise ValueError(
                f"{entry.file}: {member.filename!r} would have {member.file_size} bytes, at most {LARGEST_MEMBER} are "
                "unpacked in memory: unpack it"
            )
    files = [member for member in members if not any(map(_is_hidden, member.filename.split("/")))]
    entries = [
        Entry(
            f"{entry.path[: -len('.zip')]}/{member.filename}",
            entry.file,
            member.filename,
            member.file_size,
            member.CRC,
        )
        for member in files
    ]
    return sorted(entries, key=lambda entry: entry.path)


def digest_of(entries: Iterable[Entry], *more: object) -> str:
    """A name for files as they are: other paths, sizes or times give another one."""
    digest = hashlib.sha256(repr(more).encode())
    for entry in entries:
        digest.update(repr((entry.path, entry.file, entry.member, entry.size, entry.time)).encode())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class Contents:
    """The files of a folder by kind.

    Attributes:
        pictures, metadata, captions: Where its data are pictures: they, the tables about them, and the texts beside them.
        tables: Where its data are rows in files: these, all of one kind.
        reader: What `datasets` calls the reader of the tables; None for pictures.
        notes: One line for each decision that a user may want to know of.
    """

    pictures: tuple[Entry, ...] = ()
    metadata: tuple[Entry, ...] = ()
    captions: tuple[Entry, ...] = ()
    tables: tuple[Entry, ...] = ()
    reader: str | None = None
    notes: tuple[str, ...] = ()


def look_at(entries: Sequence[Entry]) -> Contents:
    """Decides what the data among these files are.

    Pictures come before texts and small tables beside them. Where there are files of rows too (parquet, arrow, tars), the
    data are what takes more bytes. Zips are opened if there are no pictures outside of them.
    """
    suffixes = picture_suffixes()
    pictures = [entry for entry in entries if entry.suffix in suffixes]
    tables = [entry for entry in entries if entry.suffix in TABLES and entry.name not in METADATA_FILES]
    zips = [entry for entry in entries if entry.suffix == ".zip"]
    if not pictures and not tables and zips:
        inside = [file for entry in zips for file in list_zip(entry)]
        if not any(file.suffix in suffixes for file in inside):
            raise ValueError(f"{zips[0].file} holds no pictures, and of zips only pictures are read: unpack it")
        return look_at([*(entry for entry in entries if entry.suffix != ".zip"), *inside])
    if pictures and _bytes(pictures) >= _bytes(tables):
        return _pictures_of(entries, pictures)
    if not tables:
        known = [entry for entry in entries if entry.suffix in TEXT_TABLES and entry.name not in _OF_DATASETS]
        tables = [entry for entry in entries if entry.name == "metadata.parquet"] or known
    sizes = Counter()
    for entry in tables:
        sizes[(TABLES | TEXT_TABLES)[entry.suffix]] += entry.size
    if not sizes:
        return Contents(notes=tuple(_unused(entries)))
    reader = sizes.most_common(1)[0][0]
    used = [entry for entry in tables if (TABLES | TEXT_TABLES)[entry.suffix] == reader]
    return Contents(tables=tuple(used), reader=reader, notes=tuple(_unused(entries, used)))


def _bytes(entries: Iterable[Entry]) -> int:
    return sum(entry.size for entry in entries)


def _pictures_of(entries: Sequence[Entry], pictures: Sequence[Entry]) -> Contents:
    metadata = [entry for entry in entries if entry.name in METADATA_FILES]
    stems = {entry.stem for entry in pictures}
    beside = [entry for entry in entries if entry.suffix in CAPTION_SUFFIXES and entry.stem in stems]
    captions = [] if metadata else beside
    notes = _unused(entries, [*pictures, *metadata, *captions])
    return Contents(tuple(pictures), tuple(metadata), tuple(captions), notes=tuple(notes))


def _unused(entries: Sequence[Entry], used: Iterable[Entry] = ()) -> list[str]:
    """A line on the files that are not used, by their extensions; none if there are none."""
    there = {entry.path for entry in used}
    left = [entry for entry in entries if entry.path not in there and not entry.name.lower().startswith(_SILENT)]
    left = [entry for entry in left if entry.name not in _OF_DATASETS]
    if not left:
        return []
    counts = Counter(entry.suffix or "without extension" for entry in left)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(6))
    line = f"{len(left)} files of the folder are not used ({kinds}), such as {left[0].path}"
    if any(entry.suffix in (".csv", ".jsonl", ".json") for entry in left):
        line += f"; a table about pictures is read if it is called {' or '.join(METADATA_FILES)}"
    return [line]


def is_declared(root: Path) -> bool:
    """Whether the folder itself says in its README.md which files are its data, as repositories on the Hub do.

    Raises:
        ValueError: if it names files out of the folder.
    """
    path = root / "README.md"
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        head = parse_yaml(match[1], path) if match else None
    except ValueError:
        return False
    if not isinstance(head, dict) or "configs" not in head:
        return False
    for name in _texts_under(head["configs"], ("data_files", "data_dir", "path")):
        if not is_below(name):
            raise ValueError(f"{path} must name files in its own folder, got {name!r}")
    return True


def _texts_under(value: object, keys: Sequence[str], within: bool = False) -> Iterator[str]:
    """The texts in what lies under one of the keys, at any depth."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _texts_under(part, keys, within or key in keys) if key != "split" else ()
    elif isinstance(value, list):
        for part in value:
            yield from _texts_under(part, keys, within)
    elif within and isinstance(value, str):
        yield value


def saved_splits(root: Path) -> dict[str, list[Entry]]:
    """The files of each split of a folder that `save_to_disk` of `datasets` has written; none for other folders.

    Raises:
        ValueError: if its descriptions are none, or name files out of the folder.
    """
    if (root / "dataset_dict.json").is_file():
        names = _entry_of(root / "dataset_dict.json", "splits")
        folders = {name: inside(root, name, root / "dataset_dict.json") for name in names}
        return {name: files for name, folder in folders.items() for files in saved_splits(folder).values()}
    if not ((root / "state.json").is_file() and (root / "dataset_info.json").is_file()):
        return {}
    path = root / "state.json"
    named = [each.get("filename") if isinstance(each, dict) else None for each in _entry_of(path, "_data_files")]
    files = [entry for name in named for entry in _entry(inside(root, name, path), name)]
    return {str(read_json(path).get("_split") or "train"): files}


def _entry_of(path: Path, key: str) -> list:
    value = read_json(path).get(key)
    if not isinstance(value, list):
        raise ValueError(f"{path} must have a list under {key}")
    return value


def split_word(name: str) -> str | None:
    """The split that a name has as a separate word."""
    for split, words in SPLIT_WORDS.items():
        if re.search(rf"(^|[-._ 0-9])({'|'.join(words)})([-._ 0-9]|$)", name.lower()):
            return split
    return None


def split_named(name: str) -> str | None:
    """The split of which this is the very name."""
    return next((split for split, words in SPLIT_WORDS.items() if name.lower() in words), None)


def in_order(splits: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
    """The splits with those of usual names first."""
    usual = list(SPLIT_WORDS)
    return {name: splits[name] for name in [*(name for name in usual if name in splits), *splits]}


def divide_tables(tables: Sequence[Entry]) -> tuple[dict[str, list[Entry]], list[str]]:
    """The files of rows of each split, and a line on those that are of none.

    The split's name is a word in the file's folder or name; or, in a folder `data`, what comes before `-00000-of-00010`.
    Files without such a word are `train`, unless there are others that are.
    """
    splits: dict[str | None, list[Entry]] = {}
    for entry in tables:
        shard = re.fullmatch(r"(\w+)-\d{5}-of-\d{5}.*", entry.name) if entry.folders == ("data",) else None
        folder = next((word for name in reversed(entry.folders) if (word := split_word(name))), None)
        splits.setdefault(folder or split_word(entry.name) or (shard and shard[1]), []).append(entry)
    rest = splits.pop(None, [])
    if rest and "train" not in splits:
        return in_order({"train": rest} | splits), []
    notes = []
    if rest:
        notes.append(
            f"{len(rest)} files are of no split and not used, such as {rest[0].path}: a file's name or its folder's says the "
            f"split ({', '.join(splits)})"
        )
    return in_order(splits), notes


def divide_pictures(pictures: Sequence[Entry]) -> tuple[dict[str, list[Entry]], int | None, list[str]]:
    """The pictures of each split, at which depth the folders are that are splits, and a line on what is of none.

    Folders are splits if at some depth all of them have the name of one; or are named for several, `train` among them,
    such as `train2017` and `val2017`. If other folders are beside `train` and `test`, theirs are not used. A single folder
    named like a split, beside others, is none: trains are pictured too.
    """
    paths = [entry.folders for entry in pictures]
    for depth in range(min(map(len, paths))):
        names = {path[depth] for path in paths}
        said = {split_word(name) for name in names}
        if all(map(split_named, names)) or (None not in said and len(said) > 1 and "train" in said):
            splits: dict[str, list[Entry]] = {}
            for entry, path in zip(pictures, paths, strict=True):
                splits.setdefault(split_word(path[depth]), []).append(entry)
            return in_order(splits), depth, []
    exact = {split_named(path[0]) for path in paths if path} - {None}
    if "train" in exact and len(exact) > 1:
        splits, left = {}, []
        for entry, path in zip(pictures, paths, strict=True):
            split = split_named(path[0]) if path else None
            (splits.setdefault(split, []) if split else left).append(entry)
        note = f"{len(left)} pictures beside the folders of the splits are not used, such as {left[0].path}"
        return in_order(splits), 0, [note]
    words = {split_word(os.path.splitext(entry.name)[0]) for entry in pictures}
    notes = []
    if None not in words and len(words) > 1:
        notes.append(
            "the names of the pictures tell of splits, which is not heeded: put them into folders train and test"
        )
    return {"train": list(pictures)}, None, notes


def sort_names(names: Iterable[str]) -> list[str]:
    """Names of labels in their order: as numbers if all of them are, else alphabetical."""
    names = sorted(set(names))
    return sorted(names, key=int) if all(re.fullmatch(r"\d+", name, re.ASCII) for name in names) else names
