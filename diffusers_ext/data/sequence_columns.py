"""The column of the sequences: found among the others, and its cells read as arrays of one length.

A cell is a list of numbers, a list of lists, an array of two dimensions, or the undecoded file of an `Audio` column.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np

from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.image_table import PixelTable
from diffusers_ext.data.label_columns import describe_feature
from diffusers_ext.data.sequences import SequenceTable


Rows = datasets.Dataset | datasets.IterableDataset
_LABELS = ("label", "labels", "cls")  # lists of integers in columns of these names are labels
_NUMBERS = ("int", "uint", "float")


def find_sequence_column(source: Rows, config: DataConfig) -> str | None:
    """The column of sequences, if that is what the data set holds: the one that is named, or found where are no images.

    Raises:
        ValueError: if the named column holds none, or several could be meant.
    """
    features, name = source.features, config.sequence_column
    if name is not None:
        if name not in features or _depth(features[name]) is None:
            columns = ", ".join(f"{column} ({describe_feature(feature)})" for column, feature in features.items())
            reason = "holds no sequences of numbers" if name in features else "is not in the data set"
            raise ValueError(f"sequence_column {name!r} {reason}; its columns are: {columns}")
        return name
    images = datasets.Image | datasets.Array2D | datasets.Array3D
    if config.image_column is not None or any(isinstance(feature, images) for feature in features.values()):
        return None
    found = [
        column
        for column, feature in features.items()
        if _depth(feature) is not None and column != config.label_column and column not in _LABELS
    ]
    likely = [column for column in found if not _is_integer(features[column])] or found
    if len(likely) > 1:
        raise ValueError(f"several columns hold sequences ({', '.join(likely)}): name one with --sequence_column")
    return likely[0] if likely else None


def _depth(feature: Any) -> int | None:
    """Dimensions of the arrays in a column of numbers, 0 for audio files; None for other columns."""
    if isinstance(feature, datasets.Audio):
        return 0
    if isinstance(feature, datasets.Array2D):
        return 2 if feature.dtype.startswith(_NUMBERS) else None
    depth = 0
    while isinstance(feature, datasets.List | datasets.LargeList):
        feature, depth = feature.feature, depth + 1
    numbers = isinstance(feature, datasets.Value) and feature.dtype.startswith(_NUMBERS)
    return depth if numbers and depth in (1, 2) else None


def _is_integer(feature: Any) -> bool:
    while isinstance(feature, datasets.List | datasets.LargeList):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and not feature.dtype.startswith("float")


@dataclass(frozen=True)
class SequenceFit:
    """The reading that brings every sequence to one length.

    Attributes:
        size: (length,)
        channels: Of a sequence.
        channels_first: Whether the arrays of cells are (channels, length).
        resize_mode: "pad" takes what is not longer, and puts `pad_value` behind it; "crop" cuts the middle out of what is
            longer; "random_crop" keeps what is longer as it is, to be cut elsewhere each time.
        pad_value: In the data's own units.
        own_length: That all of the first sequences have, where nobody gave a length: another one is a fault.
        longest: Of the first sequences.
        sampling_rate: Of audio, in Hz.
    """

    size: tuple[int]
    channels: int
    channels_first: bool
    resize_mode: str
    pad_value: float
    own_length: int | None
    longest: int
    sampling_rate: int | None = None

    noun: ClassVar[str] = "sequence"
    dtype: ClassVar[str] = "float32"

    @property
    def bytes_per_row(self) -> int:
        return max(self.longest, self.size[0]) * self.channels * 4

    def decode(self, value: Any) -> np.ndarray:
        """The sequence of a cell, float32, shape `(length, channels)`; at least that long with "random_crop".

        Raises:
            ValueError: if it is none, or of another length or number of channels than can be.
        """
        array, rate = read_sequence(value)
        if rate != self.sampling_rate:
            raise ValueError(f"a sampling rate of {rate} Hz where the first file has {self.sampling_rate}")
        array = array.T if self.channels_first and array.ndim == 2 else array.reshape(len(array), -1)
        values, length = to_float32(array), self.size[0]
        if values.shape[1] != self.channels:
            raise ValueError(f"{values.shape[1]} channels where the first sequences have {self.channels}")
        if self.own_length not in (None, len(values)):
            raise ValueError(
                f"a length of {len(values)} where the first sequences are all {self.own_length} long: give --resolution, the "
                "length to cut or to pad to"
            )
        if len(values) < length:
            behind = np.full((length - len(values), self.channels), self.pad_value, np.float32)
            return np.concatenate([values, behind])
        if len(values) > length and self.resize_mode == "pad":
            raise ValueError(
                f"a length of {len(values)}, which resize_mode pad does not cut to {length}: give --resize_mode crop or "
                "random_crop, or a longer --resolution"
            )
        if self.resize_mode == "crop":
            first = (len(values) - length) // 2
            values = values[first : first + length]
        return np.ascontiguousarray(values)

    def table(self, table: datasets.Dataset, rows: np.ndarray) -> PixelTable:
        """The decoded rows, as they are read."""
        shape = (*self.size, self.channels)
        if self.resize_mode == "random_crop":
            return SequenceTable(table, shape, rows)
        return PixelTable(table, shape, np.dtype(self.dtype), rows)


def read_sequence(value: Any) -> tuple[np.ndarray, int | None]:
    """The array of a cell, as it is stored, and the sampling rate of audio in Hz.

    Raises:
        ValueError: if the cell holds none.
    """
    if value is None:
        raise ValueError("the cell is empty")
    if isinstance(value, dict):
        return read_audio(value)
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError("its channels are of unequal lengths") from None
    if array.dtype == object:  # numbers and gaps
        array = np.asarray(value, np.float64)
    if array.size == 0:
        raise ValueError("it has no values")
    return array, None


def read_audio(cell: dict[str, Any]) -> tuple[np.ndarray, int]:
    """The samples of a file, of PCM in [-1, 1), shape `(length,)` or `(length, channels)`; and the sampling rate in Hz.

    Wav files are read by SciPy, others by soundfile if it is installed.

    Raises:
        ValueError: if the file cannot be read, or not without soundfile.
    """
    from scipy.io import wavfile

    if cell["bytes"] is None and cell["path"] is None:
        raise ValueError("the cell has neither bytes nor a path")
    if cell["bytes"] is not None:
        content = cell["bytes"]
    else:
        with open(cell["path"], "rb") as file:
            content = file.read()
    if content[:4] in (b"RIFF", b"RIFX"):
        rate, samples = wavfile.read(io.BytesIO(content))
        if samples.dtype.kind == "f":
            return samples, rate
        middle = 128 if samples.dtype == np.uint8 else 0  # PCM of 8 bits is without sign
        return (samples.astype(np.float64) - middle) / 2.0 ** (8 * samples.dtype.itemsize - 1), rate
    try:
        import soundfile
    except ImportError:
        raise ValueError(
            "no wav file, and others are read by soundfile, which is not installed: pip install soundfile, or convert the "
            "files to wav"
        ) from None
    samples, rate = soundfile.read(io.BytesIO(content))
    return samples, rate


def to_float32(array: np.ndarray) -> np.ndarray:
    """Raises: ValueError: if a value is none, infinite, or beyond float32."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"values of type {array.dtype}, which are no numbers")
    if not np.isfinite(array).all():
        index = np.argwhere(~np.isfinite(array))[0][0]
        raise ValueError(f"NaN or infinity at position {index}: fill the gaps, or leave such sequences out")
    if np.abs(array.astype(np.float64)).max() > np.finfo(np.float32).max:
        raise ValueError("values beyond those of float32: divide them")
    return array.astype(np.float32)


def decide_sequence_fit(
    first_rows: Iterable[dict], feature: Any, column: str, config: DataConfig, multiple_of: int
) -> tuple[SequenceFit, list[str]]:
    """The reading of all sequences, with a note for each decision that the user has not made.

    Args:
        first_rows: Undecoded.
        feature: What `datasets` knows of the column.
        multiple_of: Without a `resolution`, sequences of one length are padded up to the next multiple of this.

    Raises:
        ValueError: if none of the first sequences can be read, if they are of several lengths and none is given, or if an
            option has no meaning for sequences.
    """
    _refuse_options_of_images(config)
    shapes, rates, fault, count = [], [], "the data set is empty", 0
    for count, row in enumerate(first_rows, start=1):
        try:
            array, rate = read_sequence(row[column])
            to_float32(array)
        except Exception as error:  # a decoder raises what it likes on a damaged file
            fault = f"row {count - 1}, {type(error).__name__}: {error}"
            continue
        shapes.append(array.shape if array.ndim == 2 else (len(array), 1))
        rates.append(rate)
    if not shapes:
        raise ValueError(f"none of the first {count} sequences can be read; the last one: {fault}")
    notes = []
    # Of files, and of lists of numbers, it is known.
    channels_first = _depth(feature) == 2 and _channels_first(shapes, config.sequence_layout)
    if _depth(feature) == 2:
        layout = "channels, length" if channels_first else "length, channels"
        notes.append(f"arrays of shape {shapes[0]} are read as ({layout}) (--sequence_layout)")
    lengths, channels = [shape[1 if channels_first else 0] for shape in shapes], shapes[0][0 if channels_first else 1]
    length, resize_mode, own_length, more = _decide_length(lengths, config, multiple_of)
    if rates[0] is not None:
        notes.append(f"audio of {rates[0]} Hz")
    how = SequenceFit(
        (length,), channels, channels_first, resize_mode, config.pad_value, own_length, max(lengths), rates[0]
    )
    return how, [*notes, *more]


def _refuse_options_of_images(config: DataConfig) -> None:
    for name in ("image_mode", "white_value"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} is of images, and the data are sequences: leave it out")
    if config.resize_mode == "stretch":
        raise ValueError("resize_mode stretch is of images, and the data are sequences: give crop, random_crop or pad")
    if config.resolution is not None and len(config.resolution) != 1:
        sides = " ".join(map(str, config.resolution))
        raise ValueError(f"resolution must be one length, since the data are sequences, got {sides}")


def _channels_first(shapes: list[tuple[int, int]], layout: str | None) -> bool:
    """Whether arrays are (channels, length): the axis is the length along which they differ, or else the longer one."""
    if layout is not None:
        return layout == "channels_length"
    rows, columns = ({shape[axis] for shape in shapes} for axis in (0, 1))
    if len(rows) > 1 and len(columns) > 1:
        raise ValueError(
            f"the sequences differ along both axes, as in shapes {shapes[0]} and "
            f"{next(shape for shape in shapes if shape != shapes[0])}: one of them must be the channels, as many in all"
        )
    if len(rows) == len(columns) == 1:
        return shapes[0][0] < shapes[0][1]
    return len(columns) > 1


def _decide_length(lengths: list[int], config: DataConfig, multiple_of: int) -> tuple[int, str, int | None, list[str]]:
    """The length, the way to it, that of all of the first sequences if nobody gave one, and notes."""
    shortest, longest, mode = min(lengths), max(lengths), config.resize_mode
    own_length, own = None, f"of length {shortest}"
    if config.resolution is None:
        if shortest != longest:
            raise ValueError(
                f"the sequences are of several lengths ({shortest} to {longest} among the first {len(lengths)}): give "
                "--resolution, the length to cut them to or to pad them up to"
            )
        own_length, length = shortest, -(-shortest // multiple_of) * multiple_of
        mode = "pad" if mode == "auto" else mode
    else:
        (length,) = config.resolution
        own = own if shortest == longest else f"of lengths {shortest} to {longest}"
        mode = ("random_crop" if longest > length else "pad") if mode == "auto" else mode
    done = []
    if longest > length and mode != "pad":
        done.append(f"cut to {length} {'at random' if mode == 'random_crop' else 'in the middle'}")
    if shortest < length:
        done.append(f"padded to {length} with {config.pad_value} behind")
    notes = [f"sequences {own} are {' or '.join(done)} (--resize_mode {mode})"] if done else []
    return length, mode, own_length, notes
