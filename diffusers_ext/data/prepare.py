"""A data set, as named by the user, made ready for training. Each decision on the way is said in a line."""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import datasets
import numpy as np

from diffusers_ext.data.config import DataConfig, TrainingDataConfig
from diffusers_ext.data.decoding import Fit, check_same_size, decode_rows
from diffusers_ext.data.identity import HashedRows, hash_files
from diffusers_ext.data.image_columns import find_image_column, undecoded
from diffusers_ext.data.image_table import ImageData, PixelTable
from diffusers_ext.data.label_columns import fair_share, find_stream_labels, read_labels
from diffusers_ext.data.probing import PROBED_ROWS, decide_fit
from diffusers_ext.data.sequence_columns import SequenceFit, decide_sequence_fit, find_sequence_column
from diffusers_ext.data.sequences import SequenceData, measure_scale
from diffusers_ext.data.sources import Source, open_source
from diffusers_ext.data.stream import StreamData


DEFAULT_SHUFFLE_BUFFER = 1000
MOST_PARTS = 32  # of a stream from which a sample is taken, each of which is opened


class Sample(NamedTuple):
    """So many images in the place of all, where these are more than `all_up_to`, or a stream."""

    number: int
    all_up_to: int = 0


# What options may be called where they stand in a call rather than on a command line.
_SHORT_NAMES = {"split": "dataset_split", "mode": "image_mode", "max_samples": "max_train_samples"}


def prepare_data(
    config: TrainingDataConfig, multiple_of: int = 1, *, read_ahead: bool = False
) -> ImageData | StreamData:
    """The images that the options of a training script ask for; see `prepare_images` and `prepare_stream`.

    Args:
        read_ahead: Read a stream's first `max_train_samples` images at once, for those that are looked at repeatedly.
    """
    if config.streaming and not read_ahead:
        return prepare_stream(config, multiple_of=multiple_of)
    more = {"condition_column": config.condition_column}
    return prepare_images(config, multiple_of=multiple_of, read_ahead=config.streaming, **more)


def prepare_images(
    config: DataConfig | str,
    *,
    multiple_of: int = 1,
    read_ahead: bool = False,
    share_by: str | None = None,
    condition_column: str | None = None,
    sample: Sample | None = None,
    **options: Any,
) -> ImageData:
    """Loads, decodes and fits the images, or the sequences, of a data set, and reads their labels.

    Args:
        config: Which images, and how they are read; or the name of a data set.
        options: Of `DataConfig`, to replace those of the config or of its defaults; `dataset_split`, `image_mode` and
            `max_train_samples` are called `split`, `mode` and `max_samples` too.
        multiple_of: Without a `resolution` images of one size get a border up to the next multiple of this.
        read_ahead: Fetch no more than the first `max_train_samples` rows, in order, and keep them in memory.
        share_by: Column by whose values `max_train_samples` are shared; None for that of the labels.
        condition_column: Column of a condition image for each image, of its size; None for none.
        sample: Of those images some, which stand for all: of each label its share, or of a stream the first of parts that are
            spread over it.

    Raises:
        ValueError: if the data set has no images, if its labels are neither integers nor names, or if it must be said
            which column or size is meant.
    """
    config = _with_options(config, options, DataConfig)
    source, notes, _ = _open(config, streaming=read_ahead)
    column, noun, decide = find_sequence_column(source, config), "sequences", decide_sequence_fit
    if column is None:
        column = find_image_column(source, config.image_column, condition_column)
        _refuse_options_of_sequences(config)
        noun, decide = "images", decide_fit
    max_samples, chosen = config.max_train_samples, None
    if read_ahead:
        rows = undecoded(source, column)
        if sample is None or max_samples is not None:
            first = max_samples if sample is None else min(max_samples, sample.number)
            examples, which = list(itertools.islice(rows, first)), "the first {}"
        else:
            examples, which = first_of_parts(rows, sample.number), "{}, from all over it"
        source = datasets.Dataset.from_list(examples, features=rows.features)
        which = which.format(f"{len(source)} {noun}")
        notes += (f"of the split {config.dataset_split}, which is read as a stream, these are {which}",)
    else:
        every = len(source)
        for limit in (None if max_samples is None else Sample(max_samples, max_samples), sample):
            if limit is not None and len(source) > limit.all_up_to:
                some = fair_share(source, limit.number, share_by or config.label_column)
                chosen, source = some if chosen is None else chosen[some], source.select(some)
        if chosen is not None:
            notes += (f"{len(chosen)} of {every} {noun} are taken, of each label its share",)
    labels = None if config.unconditional else read_labels(source, config.label_column, config.names_of_labels)
    first_rows = undecoded(source.select_columns([column]).select(range(min(len(source), PROBED_ROWS))), column)
    how, decided = decide(first_rows, source.features[column], column, config, multiple_of)
    num_proc = config.preprocessing_num_workers
    decoding = {"max_bad_share": config.max_bad_share, "num_proc": num_proc}
    pixels, rows, bad = decode_rows(source, column, how, **decoding)
    conditions, notes = None, [*notes, *decided]
    if condition_column is not None:
        conditions, also, of_conditions = _decode_conditions(source, condition_column, column, how, config, decoding)
        rows = np.intersect1d(rows, also)
        pixels, conditions, bad = pixels.of_rows(rows), conditions.of_rows(rows), len(source) - len(rows)
        notes += of_conditions
    if bad:
        notes.append(f"{bad} of {len(rows) + bad} {noun} could not be decoded and are left out")
    kind, more = ImageData, {"rows": rows if chosen is None else chosen[rows]}
    if isinstance(how, SequenceFit):
        kind, more["value_scale"] = SequenceData, measure_scale(pixels, config.sequence_scale or "min_max")
    else:
        more |= {"whites": how.whites, "white": how.white, "conditions": conditions}
    if labels is None:
        return kind(pixels, None, None, config.dataset_name, tuple(notes), how.resize_mode, **more)
    data = kind(pixels, labels[0][rows], labels[1], config.dataset_name, tuple(notes), how.resize_mode, **more)
    return dataclasses.replace(data, notes=(*data.notes, *_about_labels(data)))


def first_of_parts(rows: datasets.IterableDataset, number: int) -> list[dict[str, Any]]:
    """At most so many examples: of parts that are spread over all shards the first ones, equally many of each."""
    if rows.num_shards < MOST_PARTS:
        rows = rows.reshard()  # row groups of parquet
    num_parts = min(rows.num_shards, MOST_PARTS, number)
    counts = [len(part) for part in np.array_split(np.arange(number), num_parts)]
    return [
        example
        for part, count in enumerate(counts)
        for example in itertools.islice(rows.shard(num_parts, part), count)
    ]


def _decode_conditions(
    source: datasets.Dataset, column: str, image_column: str, how: Fit, config: DataConfig, decoding: dict[str, Any]
) -> tuple[PixelTable, np.ndarray, list[str]]:
    """The condition images of a column at the size of the images, their rows, and a line for each decision.

    Raises:
        ValueError: if the column holds no images, or one of another size than its image.
    """
    if column == image_column:
        raise ValueError(f"condition_column must be another column than that of the images, got {column!r} for both")
    find_image_column(source, column)  # which refuses a column that holds no images
    first = undecoded(
        source.select_columns([column, image_column]).select(range(min(len(source), PROBED_ROWS))), column
    )
    for number, row in enumerate(undecoded(first, image_column)):
        try:
            check_same_size(row[column], row[image_column])
        except ValueError as error:
            raise ValueError(f"condition_column {column!r}, row {number}: {error}") from None
    options = dataclasses.replace(config, resolution=how.size, resize_mode=how.resize_mode, image_mode=None)
    fit, decided = decide_fit(first.select_columns([column]), source.features[column], column, options, 1)
    pixels, rows, _ = decode_rows(source, column, fit, like=image_column, **decoding)
    return pixels, rows, [f"condition images: {note}" for note in decided]


def _refuse_options_of_sequences(config: DataConfig) -> None:
    """Raises: ValueError: if an option is given that has no effect on images."""
    for name in ("sequence_layout", "sequence_scale"):
        if (value := getattr(config, name)) is not None:
            raise ValueError(
                f"{name} is of sequences, and {config.dataset_name} holds images, got {value}: leave it out"
            )


def _with_options(
    config: DataConfig | str, options: dict[str, Any], kind: Callable[..., DataConfig]
) -> DataConfig | TrainingDataConfig:
    """The config with these options in it, or a new one of a kind for the name of a data set."""
    options = {_SHORT_NAMES.get(name, name): value for name, value in options.items()}
    return kind(dataset_name=config, **options) if isinstance(config, str) else dataclasses.replace(config, **options)


def _open(config: DataConfig, *, streaming: bool) -> Source:
    where = config.dataset_name, config.dataset_config_name, config.dataset_split
    return open_source(*where, streaming=streaming, cache_dir=config.cache_dir)


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


def prepare_stream(config: TrainingDataConfig | str, *, multiple_of: int = 1, **options: Any) -> StreamData:
    """Opens a data set for reading it while it is used; see `prepare_images`, whose arguments these are.

    What follows from the images follows from the first of them. Labels that `datasets` has no names of must be named.

    Raises:
        ValueError: see `prepare_images`; and if the labels must be named.
    """
    config = _with_options(config, options, partial(TrainingDataConfig, streaming=True))
    shuffle_buffer, max_samples = config.shuffle_buffer or DEFAULT_SHUFFLE_BUFFER, config.max_train_samples
    source, notes, files = _open(config, streaming=True)
    if find_sequence_column(source, config) is not None:
        raise ValueError(
            "sequences are not read as a stream, since the scale of their values is measured on all of them: leave streaming out"
        )
    column = find_image_column(source, config.image_column)
    _refuse_options_of_sequences(config)
    labels = None if config.unconditional else find_stream_labels(source, config.label_column, config.names_of_labels)
    columns = [column] if labels is None else [column, labels.column]
    rows = undecoded(source, column).select_columns(columns)
    # From another opening of it, so that the workers get one that nothing has been read from.
    again = undecoded(_open(config, streaming=True).rows, column).select_columns(columns)
    first_rows = HashedRows(itertools.islice(again, PROBED_ROWS), column)
    how, decided = decide_fit(first_rows, source.features[column], column, config, multiple_of)
    notes = [*notes, *decided]
    if max_samples is not None:
        notes.append(f"of a stream the first {max_samples} images are taken, whatever their labels")
    if rows.num_shards == 1:
        notes.append(
            f"the stream is one shard: only {shuffle_buffer} images at a time are shuffled (--shuffle_buffer)"
        )
    return StreamData(
        source=rows,
        image_column=column,
        how=how,
        labels=labels,
        name=config.dataset_name,
        shuffle_buffer=shuffle_buffer,
        max_bad_share=config.max_bad_share,
        max_samples=max_samples,
        notes=tuple(notes),
        contents=f"{first_rows.digest}-{hash_files(files)}",
    )
