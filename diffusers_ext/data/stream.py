"""Images that are read during training, from a data set that is too large to decode beforehand.

The shards of a data set (files, or row groups of parquet) are put into a new order each epoch and divided among the
readers: the workers of all processes. A reader takes its examples in windows: some of them are read, undecoded, and put
into an order that follows from (seed, reader, epoch, window). So its state is that of its source at the window's
start and a number: a run resumes exactly where it was, and what it has seen of the window is not decoded again.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from diffusers_ext.data.batches import EPOCH, WINDOW, BatchMaker, BatchOptions
from diffusers_ext.data.decoding import Fit, allowed_faults, decode_cell, describe_fault, name_of_cell
from diffusers_ext.data.image_table import mirror
from diffusers_ext.data.images import crop_at
from diffusers_ext.data.label_columns import StreamLabels
from diffusers_ext.data.label_sets import LabelSets
from diffusers_ext.draws import PositionRandom
from diffusers_ext.pixels import Whites
from diffusers_ext.untrusted import read_json


# Shards beyond this number are grouped: taking one out costs time in proportion to their number.
MAX_GROUPS = 256
_NAMED_FAULTS = 10  # images of a reader's pass that are named when they cannot be decoded
_JUDGED_FROM = 1000  # images, before which a share of bad ones says little


@dataclass(frozen=True)
class StreamData:
    """A data set that is read as it is used. It has no length; its other attributes are those of `ImageData`.

    Attributes:
        source: The examples, with undecoded images. Nothing has been read from it: what `datasets` starts for reading,
            such as threads, does not come along into the workers.
        image_column: Of the source.
        how: How a picture is brought to its size.
        labels: How labels are read, or None.
        name: What the user called the data set.
        shuffle_buffer: Examples of a window.
        max_bad_share: Share of the images that may fail to decode.
        max_samples: Only the first examples, of this number; or None.
        notes: One line for each decision that a user may want to know of.
        contents: A digest of its first images and its files.
    """

    source: datasets.IterableDataset
    image_column: str
    how: Fit
    labels: StreamLabels | LabelSets | None
    name: str
    shuffle_buffer: int = 1000
    max_bad_share: float = 0.01
    max_samples: int | None = None
    notes: tuple[str, ...] = ()
    contents: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self.how.size

    @property
    def resolution(self) -> tuple[int, int]:
        return self.size

    @property
    def channels(self) -> int:
        return self.how.channels

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.how.dtype)

    @property
    def resize_mode(self) -> str:
        return self.how.resize_mode

    @property
    def whites(self) -> Whites:
        return self.how.whites

    @property
    def num_images(self) -> None:
        return None

    @property
    def id2label(self) -> dict[int, str] | None:
        return None if self.labels is None else self.labels.id2label

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None else len(self.labels.names)

    @property
    def used_labels(self) -> list[int] | None:
        """All labels, since a stream is not read ahead to find those that images have; None without labels."""
        return None if self.labels is None else list(range(len(self.labels.names)))

    @property
    def has_label_sets(self) -> bool:
        """Whether an image can have several labels."""
        return isinstance(self.labels, LabelSets)

    @property
    def has_unlabelled(self) -> bool:
        """Whether an image is known whose set of labels is empty; of a stream none is."""
        return False

    def batches(
        self, options: BatchOptions, position: int, state: dict[str, Any] | None, num_readers: int
    ) -> tuple["StreamBatches", dict[str, Any]]:
        """The batches of one process from a position on, and the state that they start in; see `make_batches`.

        Args:
            num_readers: Of the process.
        """
        division = Division(self, options.num_processes * num_readers)
        start = {
            "processes": options.num_processes,
            "workers": num_readers,
            "groups": division.num_groups,
            "next_reader": 0,
            "readers": [None] * num_readers,
        }
        if state is None:
            state = start
            if options.process_index == 0 and division.note():
                print(division.note(), flush=True)
        names = {"processes": "processes", "workers": "workers (--dataloader_num_workers)", "groups": "shards"}
        for key, words in names.items():
            if state[key] != start[key]:
                raise ValueError(
                    f"the checkpoint is of a stream with {state[key]} {words}, got {start[key]}: which examples are "
                    f"behind is known only for the same number; give {state[key]}, or start a new run in another "
                    "--output_dir"
                )
        return StreamBatches(self, options, position, state["next_reader"], state["readers"]), state


class Division:
    """The division of a stream among its readers: in each epoch every example is read by one of them.

    Readers take whole shards, in an order of the epoch. If there are fewer shards than readers, or if only the first
    `max_samples` examples count, each reader goes through all of them and keeps one example in `num_readers`.

    Attributes:
        num_groups: Shards, or groups of them.
        by_shards: Whether readers take whole shards.
    """

    def __init__(self, data: StreamData, num_readers: int):
        source = data.source
        if data.max_samples is None and source.num_shards < num_readers:
            source = source.reshard()  # row groups of parquet
        self.by_shards = data.max_samples is None and source.num_shards >= num_readers
        self.num_groups = min(source.num_shards, max(MAX_GROUPS, num_readers)) if data.max_samples is None else 1
        self._source = source if data.max_samples is None else source.take(data.max_samples)
        self._num_readers, self._limited = num_readers, data.max_samples is not None

    def groups(self, order: np.ndarray, epoch: int, reader: int) -> np.ndarray:
        """The groups that a reader goes through in an epoch, of all of them in their order."""
        # Another reader each epoch has the one group more if they do not divide evenly.
        return order[(reader + epoch) % self._num_readers :: self._num_readers] if self.by_shards else order

    def keeps(self, number: int, epoch: int, reader: int) -> bool:
        """Whether the example with this number in the epoch is the reader's, of those that it goes through."""
        return self.by_shards or (number - reader - epoch) % self._num_readers == 0

    def open(self, group: int) -> datasets.IterableDataset:
        # Neighbouring shards are often alike, so that a group has some from all over.
        return self._source.shard(self.num_groups, int(group), contiguous=False)

    def _why(self) -> str:
        if self._limited:
            return "max_train_samples counts the first images"
        return f"it has {self.num_groups} shards; more files, or fewer --dataloader_num_workers, save the reading"

    def note(self) -> str | None:
        """A line for the user if the readers cannot divide the stream by shards, or None."""
        if self.by_shards or self._num_readers == 1:
            return None
        return (
            f"{self._num_readers} readers (processes x workers) each read all of the stream, which they cannot divide by "
            f"shards, and decode one image in {self._num_readers}: {self._why()}"
        )


class StreamReader:
    """One reader's examples, decoded, without end.

    Args:
        data: The stream.
        seed: Of the order.
        reader, num_readers: Which reader this is, and the number of them.
        state: To resume from; None for the beginning.

    Attributes:
        state: JSON-able; where the reader stands, after the example that it gave last.
    """

    def __init__(
        self, data: StreamData, seed: int, reader: int, num_readers: int, state: dict[str, Any] | None = None
    ):
        self._data, self._reader, self._num_readers = data, reader, num_readers
        self._division, self._random = Division(data, num_readers), PositionRandom(seed)
        # Examples are read this many at a time; a window ends between two such reads.
        self._rows_per_read = int(np.clip(data.shuffle_buffer // 10, 1, 100))
        self._chunks = self._groups = None
        self.state = dict(state) if state else self._start_of(0)

    def __iter__(self) -> Iterator[tuple[np.ndarray, int | np.ndarray | None]]:
        """Pictures, shape `(height, width, channels)`, with their labels or sets of them.

        Raises:
            ValueError: if more images than `max_bad_share` cannot be decoded, or if a label is none.
        """
        while True:
            rows, following = self._read_window()
            state = self.state
            part = state["epoch"] * self._num_readers + self._reader
            order = self._random.at(WINDOW, state["window"], part).permutation(len(rows))
            while state["offset"] < len(rows):
                row = rows[order[state["offset"]]]
                state["offset"] += 1
                picture = self._decode(row)
                if picture is not None:
                    labels = self._data.labels
                    yield picture, None if labels is None else labels.read(row[labels.column])
            del rows
            self._next_window(following)

    def _start_of(self, epoch: int) -> dict[str, Any]:
        """The state at the start of an epoch.

        `group`, `source` and `number` are of the window's start: the group of the reader's, where `datasets` is in it,
        and the number of the example in the epoch; `offset` is the number of examples of the window behind it.
        """
        state = {"epoch": epoch, "window": 0, "offset": 0, "group": 0, "source": None, "number": 0}
        return state | {"good": 0, "bad": 0}

    def _read_window(self) -> tuple[list[dict], dict[str, Any] | None]:
        """The examples of the window that the state is in, and where the next one starts; None if that is the end."""
        state, data = self.state, self._data
        number, group = state["number"], state["group"]
        wanted = data.shuffle_buffer
        if state["window"] == 0:
            # Windows that start elsewhere each epoch, so that their examples do not always stay together.
            part = state["epoch"] * self._num_readers + self._reader
            wanted = int(self._random.at(WINDOW, 2**32, part).integers(1, wanted, endpoint=True))
        rows = []
        while len(rows) < wanted:
            if self._chunks is None:
                order = self._random.at(EPOCH, state["epoch"]).permutation(self._division.num_groups)
                groups = self._division.groups(order, state["epoch"], self._reader)
                if group == len(groups):
                    return rows, None
                self._opened = self._division.open(groups[group])
                if state["source"] is not None and group == state["group"]:
                    self._opened.load_state_dict(state["source"])
                # Not iter(self._opened), which would divide the shard among the workers once more.
                self._chunks = self._opened.iter(self._rows_per_read)
            chunk = next(self._chunks, None)
            if chunk is None:
                self._chunks, group = None, group + 1
                continue
            for index in range(len(chunk[data.image_column])):
                if self._division.keeps(number, state["epoch"], self._reader):
                    rows.append({name: values[index] for name, values in chunk.items()})
                number += 1
        return rows, {"group": group, "source": self._opened.state_dict() if self._chunks else None, "number": number}

    def _next_window(self, following: dict[str, Any] | None):
        state = self.state
        if following is not None:
            self.state = state | following | {"window": state["window"] + 1, "offset": 0}
            return
        seen = state["good"] + state["bad"]
        if not seen:
            raise ValueError(
                f"reader {self._reader + 1} of {self._num_readers} finds no image in {self._data.name}: the stream has "
                "fewer images than readers; give fewer --dataloader_num_workers or processes"
            )
        self._check_bad(seen)
        self.state = self._start_of(state["epoch"] + 1)

    def _decode(self, row: dict[str, Any]) -> np.ndarray | None:
        cell, state = row[self._data.image_column], self.state
        try:
            picture = decode_cell(cell, self._data.how)
        except Exception as error:  # a decoder raises what it likes on a damaged file
            state["bad"] += 1
            if state["bad"] <= _NAMED_FAULTS:
                name = (
                    name_of_cell(cell)
                    or f"{state['good'] + state['bad']} of reader {self._reader + 1}, epoch {state['epoch'] + 1},"
                )
                print(f"image {name} left out: {describe_fault(error)}", file=sys.stderr)
            self._check_bad(max(state["good"] + state["bad"], _JUDGED_FROM), error)
            return None
        state["good"] += 1
        return picture

    def _check_bad(self, seen: int, error: Exception | None = None):
        bad, share = self.state["bad"], self._data.max_bad_share
        if bad > allowed_faults(seen, share):
            last = f", the last one: {describe_fault(error)}" if error else ""
            raise ValueError(
                f"{bad} of {self.state['good'] + bad} images of {self._data.name} cannot be decoded{last}; at most a "
                f"share of {share:g} may fail (--max_bad_share)"
            )


class StreamBatches(IterableDataset):
    """Batches of one process from a stream; with n workers, each of them gives one batch in n.

    What a batch holds is said in `BatchMaker`; `reader` is besides that the state of the batch's reader after it, as JSON.
    Batch j of the run comes from reader j % workers of its process.

    Args:
        next_reader: Of the process's readers, the one whose turn it is.
        states: Of the process's readers; None for the beginning.
    """

    def __init__(
        self,
        data: StreamData,
        options: BatchOptions,
        first_position: int = 0,
        next_reader: int = 0,
        states: list[dict[str, Any]] | None = None,
    ):
        self.data, self.options, self.next_reader, self.states = data, options, next_reader, states
        self._maker = BatchMaker(options, (*data.size, data.channels), data.num_classes, first_position)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if worker is not None:
            fsspec.asyn.reset_lock()  # its thread has not come along into this process
        index, options = (self.next_reader + first) % step, self.options
        reader = StreamReader(
            self.data,
            options.seed,
            options.process_index * step + index,
            options.num_processes * step,
            self.states[index] if self.states else None,
        )
        examples = iter(reader)
        try:
            for number in itertools.count(first, step):
                pictures, labels = zip(*itertools.islice(examples, options.batch_size), strict=True)
                batch = self._maker.make(
                    self._maker.positions(number),
                    self._stacking(pictures),
                    None if self.data.labels is None else np.array(labels, self.data.labels.dtype),
                )
                yield batch | {"reader": json.dumps(reader.state)}
        except ValueError as error:
            # Raised where the user sees it: what a worker raises comes with all of its traceback in the message.
            yield {"error": str(error)}

    def _stacking(self, pictures: tuple[np.ndarray, ...]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        def images(crops: np.ndarray, flipped: np.ndarray) -> np.ndarray:
            cropped = pictures
            if self.data.resize_mode == "random_crop":
                cropped = [
                    crop_at(picture, self.data.size, crop) for picture, crop in zip(pictures, crops, strict=True)
                ]
            return mirror(np.stack(cropped), flipped)

        return images


def save_stream_state(state: dict[str, Any] | None, folder: Path, process_index: int) -> None:
    """Writes the state of a process's stream, if it reads one, into a checkpoint."""
    if state is not None:
        (folder / f"stream-{process_index}.json").write_text(json.dumps(state) + "\n")


def load_stream_state(folder: Path, process_index: int) -> dict[str, Any]:
    """The state that `save_stream_state` has written.

    Raises:
        ValueError: if the run had fewer processes.
    """
    path = folder / f"stream-{process_index}.json"
    if not path.exists():
        count = len(list(folder.glob("stream-*.json")))
        raise ValueError(
            f"{folder} is of a stream with {count} processes, got more: which examples are behind is known only for the "
            f"same number; give {count}, or start a new run in another --output_dir"
        )
    return read_json(path)
