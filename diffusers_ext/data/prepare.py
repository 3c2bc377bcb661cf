"""A data set, as named by the user, made ready for training. Whatever is decided on the way is said in a line."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import datasets

from diffusers_ext.data.config import DataConfig, TrainingDataConfig
from diffusers_ext.data.identity import HashedRows, hash_files
from diffusers_ext.data.image_table import (
    PROBED_ROWS,
    Fit,
    ImageData,
    decode,
    find_image_column,
    load_source,
    open_source,
    undecoded,
)
from diffusers_ext.data.images import LONGEST
from diffusers_ext.data.label_columns import fair_share, find_stream_labels, read_labels
from diffusers_ext.data.probing import decide_reading, probe
from diffusers_ext.data.stream import StreamData


# Pictures of one size get a border, rather than being enlarged, if that leaves them at least this share of a side.
PAD_FROM = 0.75
DEFAULT_SHUFFLE_BUFFER = 1000


def prepare_data(
    config: TrainingDataConfig, multiple_of: int = 1, *, read_ahead: bool = False
) -> ImageData | StreamData:
    """The images that the options of a training script ask for; see `prepare_images` and `prepare_stream`.

    Args:
        read_ahead: Read a stream's first `max_train_samples` images now, for those that are looked at again and again.
    """
    options = data_options(config, multiple_of)
    if config.streaming and read_ahead:
        return prepare_images(config.dataset_name, streaming=True, **options)
    if config.streaming:
        shuffle_buffer = config.shuffle_buffer or DEFAULT_SHUFFLE_BUFFER
        return prepare_stream(config.dataset_name, shuffle_buffer=shuffle_buffer, **options)
    return prepare_images(config.dataset_name, num_proc=config.preprocessing_num_workers, **options)


def data_options(config: DataConfig, multiple_of: int = 1) -> dict[str, Any]:
    """Keywords of `prepare_images` and `prepare_stream` that the options of a script stand for."""
    return {
        "config_name": config.dataset_config_name,
        "split": config.dataset_split,
        "image_column": config.image_column,
        "label_column": config.label_column,
        "label_names": config.names_of_labels,
        "with_labels": not config.unconditional,
        "resolution": config.resolution,
        "multiple_of": multiple_of,
        "resize_mode": config.resize_mode,
        "pad_value": config.pad_value,
        "mode": config.image_mode,
        "white_value": config.white_value,
        "max_samples": config.max_train_samples,
        "max_bad_share": config.max_bad_share,
        "cache_dir": config.cache_dir,
    }


def prepare_images(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    with_labels: bool = True,
    resolution: tuple[int, ...] | None = None,
    multiple_of: int = 1,
    resize_mode: str = "auto",
    pad_value: int = 0,
    mode: str | None = None,
    white_value: int | None = None,
    max_samples: int | None = None,
    max_bad_share: float = 0.01,
    num_proc: int | None = None,
    cache_dir: str | None = None,
    streaming: bool = False,
    share_by: str | None = None,
) -> ImageData:
    """Loads, decodes and fits the images of a data set, and reads their labels.

    Args:
        name: `digits`, a data set on the Hub, or a local folder or file (see `LocalFolder`).
        image_column, label_column: None to find them; see `find_image_column` and `find_label_column`.
        label_names: See `read_labels`.
        resolution: `(side,)` or `(height, width)`. None for the images' own size, which must then be one size, with a
            border up to the next multiple of `multiple_of`.
        resize_mode: One of `RESIZE_MODES` (see `fit`); "auto" pads images of one size that fill at least three quarters
            of each side, and crops others.
        pad_value: Value of the border and behind transparent pixels, in the images' own range.
        mode: PIL mode to read images in, L, LA, RGB or RGBA, of 8 bits; None for what the first images say, see
            `common_mode`.
        white_value: What is white in pixels of more than 8 bits; None for what their type says, or else the first images,
            see `Whites`.
        max_samples: At most so many images; of each label its share (see `fair_share`).
        max_bad_share: Share of the images that may fail to decode, rounded up to a whole image.
        streaming: Fetch no more than the first `max_samples` rows, and keep them in memory.
        share_by: Column by whose values `max_samples` are shared; None for that of the labels.

    Raises:
        ValueError: if the data set has no images, if its labels are neither integers nor names, or if it must be said
            which column or size is meant.
    """
    source, notes, _ = open_source(name, config_name, split, cache_dir=cache_dir, streaming=streaming)
    column = find_image_column(source, image_column)
    chosen = None
    if streaming:
        rows = undecoded(source, column)
        source = datasets.Dataset.from_list(list(itertools.islice(rows, max_samples)), features=rows.features)
        notes += (f"of the split {split}, which is read as a stream, these are the first {len(source)} images",)
    elif max_samples is not None and max_samples < len(source):
        chosen = fair_share(source, max_samples, share_by or label_column)
        notes += (f"{len(chosen)} of {len(source)} images are taken, of each label its share",)
        source = source.select(chosen)
    labels = read_labels(source, label_column, label_names) if with_labels else None
    first_rows = undecoded(source.select_columns([column]).select(range(min(len(source), PROBED_ROWS))), column)
    how, decided = _decide(
        source, column, first_rows, resolution, multiple_of, resize_mode, pad_value, mode, white_value
    )
    pixels, rows, bad = decode(source, column, how, max_bad_share=max_bad_share, num_proc=num_proc)
    notes = [*notes, *decided]
    if bad:
        notes.append(f"{bad} of {len(rows) + bad} images could not be decoded and are left out")
    more = {"rows": rows if chosen is None else chosen[rows], "whites": how.whites, "white": how.white}
    if labels is None:
        return ImageData(pixels, None, None, name, tuple(notes), how.resize_mode, **more)
    data = ImageData(pixels, labels[0][rows], labels[1], name, tuple(notes), how.resize_mode, **more)
    return dataclasses.replace(data, notes=(*data.notes, *_about_labels(data)))


def _about_labels(data: ImageData) -> list[str]:
    """A line on labels whose names are other numbers than theirs, and one on those that no image has."""
    names, notes = list(data.id2label.values()), []
    if all(name.isdecimal() for name in names) and names != list(map(str, range(len(names)))):
        notes.append(
            f"the labels are {len(names)} numbers that are their names, {names[0]} to {names[-1]}; their ids are 0 to "
            f"{len(names) - 1}"
        )
    missing = sorted(set(data.id2label) - set(data.used_labels))
    if missing:
        some = ", ".join(data.id2label[label] for label in missing[:5]) + (", ..." if len(missing) > 5 else "")
        notes.append(f"{len(missing)} of {data.num_classes} labels have no images and are not drawn: {some}")
    return notes


def prepare_stream(
    name: str,
    *,
    config_name: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    label_names: Sequence[str] | None = None,
    with_labels: bool = True,
    resolution: tuple[int, ...] | None = None,
    multiple_of: int = 1,
    resize_mode: str = "auto",
    pad_value: int = 0,
    mode: str | None = None,
    white_value: int | None = None,
    max_samples: int | None = None,
    max_bad_share: float = 0.01,
    shuffle_buffer: int = DEFAULT_SHUFFLE_BUFFER,
    cache_dir: str | None = None,
) -> StreamData:
    """Opens a data set for reading it while it is used; see `prepare_images`, whose arguments these are.

    What follows from the images follows from the first of them.

    Args:
        label_names: Needed for labels that `datasets` has no names of.
        shuffle_buffer: Examples that a reader puts into a new order at a time.

    Raises:
        ValueError: see `prepare_images`; and if the labels must be named.
    """
    if shuffle_buffer < 1:
        raise ValueError(f"shuffle_buffer must be at least 1, got {shuffle_buffer}")
    source, told, files = open_source(name, config_name, split, cache_dir=cache_dir, streaming=True)
    column = find_image_column(source, image_column)
    labels = find_stream_labels(source, label_column, label_names) if with_labels else None
    columns = [column] if labels is None else [column, labels.column]
    rows = undecoded(source, column).select_columns(columns)
    # From another opening of it, so that the workers get one that nothing has been read from.
    again = load_source(name, config_name, split, cache_dir=cache_dir, streaming=True)
    first_rows = HashedRows(itertools.islice(undecoded(again, column).select_columns(columns), PROBED_ROWS), column)
    how, decided = _decide(
        source, column, first_rows, resolution, multiple_of, resize_mode, pad_value, mode, white_value
    )
    notes = [*told, *decided]
    if max_samples is not None:
        notes.append(f"of a stream the first {max_samples} images are taken, whatever their labels")
    if rows.num_shards == 1:
        notes.append(
            f"the stream is one shard: only {shuffle_buffer} images at a time are shuffled (--shuffle_buffer)"
        )
    contents = f"{first_rows.digest}-{hash_files(files)}"
    return StreamData(
        rows, column, how, labels, name, shuffle_buffer, max_bad_share, max_samples, tuple(notes), contents
    )


def _decide(
    source: datasets.Dataset | datasets.IterableDataset,
    column: str,
    first_rows: Iterable[dict],
    resolution: tuple[int, ...] | None,
    multiple_of: int,
    resize_mode: str,
    pad_value: int,
    mode: str | None,
    white_value: int | None,
) -> tuple[Fit, list[str]]:
    """How the images get to their shape, with a note for each decision that the user has not made."""
    seen = probe(first_rows, source.features[column], column)
    reading = decide_reading(seen, column, mode, white_value, pad_value)
    if not 0 <= pad_value <= reading.white:
        raise ValueError(
            f"pad_value must be in the range of the images, [0, {reading.white}], of which {reading.white} is white, got "
            f"{pad_value}"
        )
    size, resize_mode, note = _decide_fit(seen.sizes, resolution, multiple_of, resize_mode, pad_value)
    if resize_mode == "random_crop" and any(_is_longer(of_one, size) for of_one in seen.sizes):
        note += f", of the middle where they are longer than {LONGEST} times that"
    how = Fit(
        size,
        reading.mode,
        reading.channels,
        reading.dtype,
        resize_mode,
        pad_value,
        mode_was_found=mode is None,
        whites=reading.whites,
        white=reading.white,
        array_dtype=seen.array_dtype,
        channels_first=seen.channels_first,
    )
    return how, [*reading.notes, *([note] if note else [])]


def _decide_fit(
    sizes: list[tuple[int, int]],
    resolution: tuple[int, ...] | None,
    multiple_of: int,
    resize_mode: str,
    pad_value: int,
) -> tuple[tuple[int, int], str, str | None]:
    counts = Counter(sizes)
    own, one_size = sizes[0], len(counts) == 1
    if resolution is None:
        if not one_size:
            some = ", ".join(_text(size) for size in list(counts)[:4])
            raise ValueError(f"the images are of several sizes ({some}, ...): give --resolution, one side or H W")
        resolution = tuple(-(-side // multiple_of) * multiple_of for side in own)
        resize_mode = "pad" if resize_mode == "auto" else resize_mode
    size = (resolution[0], resolution[-1])
    if resize_mode == "auto":
        fills = all(PAD_FROM * target <= side <= target for side, target in zip(own, size, strict=True))
        resize_mode = "pad" if one_size and fills else "crop"
    if one_size and own == size:
        return size, resize_mode, None
    seen = f"{_text(own)} images" if one_size else f"images of several sizes ({_text(own)}, ...)"
    done = {
        "pad": f"centred on {_text(size)} with a border of {pad_value}",
        "crop": f"scaled to cover {_text(size)} and cropped to it",
        "random_crop": f"scaled to cover {_text(size)} and cropped to it at random places",
        "stretch": f"stretched to {_text(size)}",
    }
    return size, resize_mode, f"{seen} are {done[resize_mode]} (--resize_mode {resize_mode})"


def _is_longer(own: tuple[int, int], size: tuple[int, int]) -> bool:
    ratio = own[0] * size[1] / (own[1] * size[0])
    return max(ratio, 1 / ratio) > LONGEST


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
