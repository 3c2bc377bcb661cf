"""Sequences from disk to batches: every way they may lie there, their scale, their cuts, and what is refused."""

import dataclasses

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.io import wavfile

from diffusers_ext.data.batches import BatchOptions, make_batches
from diffusers_ext.data.config import TrainingDataConfig
from diffusers_ext.data.identity import describe_change, identify
from diffusers_ext.data.prepare import prepare_data, prepare_images
from diffusers_ext.data.sequences import SequenceData
from diffusers_ext.data.sources import split_names
from diffusers_ext.data.validation import prepare_validation
from diffusers_ext.trainer.config import TrainerConfig


NUMBER, LENGTH, CHANNELS = 12, 10, 3
VALUES = np.random.default_rng(0).normal(100, 20, (NUMBER, LENGTH, CHANNELS)).astype(np.float32)
LABELS = np.arange(NUMBER) % 2


def to_parquet(folder, name="train", **columns):
    """Columns of lists, as pandas or pyarrow write them."""
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")
    return str(folder)


def lists(folder):
    return to_parquet(folder, values=VALUES.tolist(), label=LABELS.tolist())


def arrays(folder):
    features = {"values": datasets.Array2D((LENGTH, CHANNELS), "float32"), "label": datasets.Value("int64")}
    rows = datasets.Dataset.from_dict({"values": VALUES, "label": LABELS}, features=datasets.Features(features))
    rows.save_to_disk(folder)
    return str(folder)


def channels_first(folder):
    return to_parquet(folder, values=VALUES.transpose(0, 2, 1).tolist(), label=LABELS.tolist())


def npz(folder):
    folder.mkdir()
    np.savez(folder / "train.npz", values=VALUES, label=LABELS)
    return str(folder / "train.npz")


@pytest.mark.parametrize("write", [lists, arrays, channels_first, npz])
def test_sequences_are_the_same_however_they_lie_on_disk(write, tmp_path):
    data = prepare_images(write(tmp_path / "data"), sequence_column="values")
    assert isinstance(data, SequenceData) and (data.size, data.channels) == ((LENGTH,), CHANNELS)
    assert np.array_equal(data.pixels[np.arange(NUMBER)], VALUES)
    assert data.labels.tolist() == LABELS.tolist() and data.id2label == {0: "0", 1: "1"}
    assert "--sequence_layout" in data.notes[0]


def test_files_of_arrays_are_split_by_their_names(tmp_path):
    for name, rows in (("train", slice(0, 8)), ("test", slice(8, None)), ("other", slice(0, 1))):
        np.save(tmp_path / f"{name}.npy", VALUES[rows, :, 0])
    assert split_names(str(tmp_path)) == ["train", "test"]
    config = TrainerConfig(dataset_name=str(tmp_path), dataset_split="train[:50%]", validation_split="test")
    data = prepare_data(config)
    assert np.array_equal(data.pixels[np.arange(4)][..., 0], VALUES[:4, :, 0]) and len(data) == 4
    assert "1 files are of no split and not used, such as other.npy" in data.notes[0]
    held_out = prepare_validation(dataclasses.replace(config, resolution=data.size), data)
    # Held-out sequences are seen in the scale of the training, which their own values may leave.
    assert held_out.value_scale == data.value_scale
    rows, none = np.arange(4), np.zeros(4, bool)
    seen = held_out.read(rows, np.zeros((4, 2)), none)[..., 0].astype(np.float64)
    back = seen * data.value_scale.scale[0] + data.value_scale.shift[0]
    assert np.allclose(back, VALUES[8:, :, 0], rtol=1e-6)


def test_a_column_of_sequences_is_taken_only_where_there_are_no_images(tmp_path):
    columns = {"values": VALUES[..., 0].tolist(), "labels": [[0, 1]] * NUMBER, "steps": [[1, 2]] * NUMBER}
    data = prepare_images(to_parquet(tmp_path / "plain", **columns))
    assert data.channels == 1 and data.size == (LENGTH,)  # floats come before integers, and labels are none
    pictures = [Image.fromarray(np.full((4, 4), i, np.uint8)) for i in range(NUMBER)]
    features = datasets.Features({"image": datasets.Image(), "values": datasets.List(datasets.Value("float32"))})
    rows = datasets.Dataset.from_dict({"image": pictures, "values": VALUES[..., 0].tolist()}, features=features)
    rows.save_to_disk(tmp_path / "both")
    assert prepare_images(str(tmp_path / "both")).size == (4, 4)
    assert prepare_images(str(tmp_path / "both"), sequence_column="values").size == (LENGTH,)


def test_audio_lies_in_folders_of_its_labels_and_is_read_as_pcm_is(tmp_path):
    samples = {"no": np.array([0, 16384, -32768, 32767], np.int16), "yes": np.array([0, 192, 128, 255], np.uint8)}
    for name, values in samples.items():
        (tmp_path / name).mkdir()
        wavfile.write(tmp_path / name / "0.wav", 8000, values)
    data = prepare_images(str(tmp_path))
    expected = [[0, 0.5, -1, 32767 / 32768], [-1, 0.5, 0, 127 / 128]]
    assert data.pixels[[0, 1]][..., 0].tolist() == np.float32(expected).tolist()
    assert data.id2label == {0: "no", 1: "yes"} and data.labels.tolist() == [0, 1]
    assert "audio of 8000 Hz" in data.notes


def test_the_scale_keeps_the_extremes_of_integers_and_every_channel_by_itself(tmp_path):
    values = np.stack([[-128, 127, 0, 5], [7, 7, 7, 7]], axis=-1).astype(np.int8)[None].repeat(2, 0)
    np.save(tmp_path / "train.npy", values)
    data = prepare_images(str(tmp_path), sequence_layout="length_channels")
    rows, none = np.arange(2), np.zeros(2, bool)
    seen = data.read(rows, np.zeros((2, 2)), none)[0]
    assert seen[:2, 0].tolist() == [-1, 1] and seen[:, 1].tolist() == [0] * 4
    assert data.value_scale.shift == (-0.5, 7.0) and data.value_scale.scale == (127.5, 0.0)
    data = prepare_images(str(tmp_path), sequence_layout="length_channels", sequence_scale="mean_max")
    assert data.value_scale.shift == (1.0, 7.0) and data.value_scale.scale == (129.0, 0.0)


def ramps(folder, lengths):
    """Sequence i counts up from 100 i, so that a cut says where it is from."""
    return to_parquet(folder, values=[[100.0 * i + n for n in range(length)] for i, length in enumerate(lengths)])


def test_longer_sequences_are_cut_and_shorter_ones_padded(tmp_path):
    name = ramps(tmp_path / "data", [9, 4, 6])
    middle = prepare_images(name, resolution=(6,), resize_mode="crop", pad_value=7)
    assert middle.pixels[[0, 1]][..., 0].tolist() == [[1, 2, 3, 4, 5, 6], [100, 101, 102, 103, 7, 7]]
    data = prepare_images(name, resolution=(6,))  # auto
    assert data.resize_mode == "random_crop" and "at random or padded to 6 with 0 behind" in data.notes[0]
    assert data.pixels[[0, 1]][..., 0].tolist() == [[1, 2, 3, 4, 5, 6], [100, 101, 102, 103, 0, 0]]
    starts = data.pixels.cut(np.zeros(400, int), np.linspace(0, 1, 400, endpoint=False))[:, 0, 0]
    assert [int((starts == start).sum()) for start in range(4)] == [100] * 4
    assert prepare_images(ramps(tmp_path / "one", [9, 9]), multiple_of=4).size == (12,)


def test_batches_hold_the_scaled_sequences_that_the_position_chooses(tmp_path):
    data = prepare_images(ramps(tmp_path / "data", [9] * 8), resolution=(6,), resize_mode="random_crop")
    options = BatchOptions(seed=3, batch_size=4, random_flip=True)
    batches = make_batches(data, options)
    first, second = next(batches), next(batches)
    assert first["pixels"].shape == first["noise"].shape == (4, 1, 6) and first["noise"].std() > 0.5
    shift, scale = data.value_scale.shift[0], data.value_scale.scale[0]
    seen = np.concatenate([batch["pixels"][:, 0].numpy() * scale + shift for batch in (first, second)]).round()
    assert sorted((seen // 100)[:, 0].tolist()) == list(range(8))  # an epoch has each of them once
    steps = np.diff(seen, axis=1)
    assert set(np.unique(steps)) == {-1, 1} and (steps == steps[:, :1]).all()  # some of them turned round in time
    assert len(set(seen.min(1) % 100)) > 1
    again = next(make_batches(data, options, position=4))
    assert np.array_equal(again["pixels"], second["pixels"]) and np.array_equal(again["noise"], second["noise"])


def test_other_values_are_other_data(tmp_path):
    before = identify(prepare_images(ramps(tmp_path / "a", [5, 5])))
    now = identify(prepare_images(to_parquet(tmp_path / "b", values=[[0.0, 1, 2, 3, 4], [100.0, 101, 102, 103, 0]])))
    assert "contents of images were replaced" in describe_change(before, now)


REFUSED = {
    "several lengths": (
        {"values": [[1.0, 2], [1.0, 2, 3]]},
        {},
        r"several lengths \(2 to 3 .*--resolution, the length",
    ),
    "a later length": (
        {"values": [[1.0, 2]] * 64 + [[1.0]]},
        {"max_bad_share": 0},
        "a length of 1 where the first sequences are all 2",
    ),
    "longer than to pad": (
        {"values": [[1.0, 2, 3]] * 2},
        {"resolution": (2,), "resize_mode": "pad"},
        "length of 3, which resize_mode pad does not cut to 2",
    ),
    "NaN": ({"values": [[1.0, float("nan")]] * 2}, {}, "NaN or infinity at position 1: fill the gaps"),
    "a gap": ({"values": [[1.0, None]] * 2}, {}, "NaN or infinity at position 1"),
    "one with NaN of too many": (
        {"values": [[1.0, 2]] * 2 + [[float("inf"), 1.0]] * 2},
        {},
        "2 of 4 sequences cannot be decoded, the first in row 2 .*NaN or infinity",
    ),
    "beyond float32": ({"values": [[1e300, 2.0]] * 2}, {}, "values beyond those of float32"),
    "large integers": ({"values": [[2**60, 2**60 + 5]] * 2}, {}, "all values of a channel are the same"),
    "an offset": ({"values": [[1.7e9, 1.7e9 + 512]] * 2}, {}, "float32, with 7 digits, hardly tells them apart"),
    "constants": ({"values": [[3.0, 3.0]] * 2}, {}, r"all values of a channel are the same \(3\): nothing to learn"),
    "ragged channels": ({"values": [[[1.0, 2], [3.0]]] * 2}, {}, "channels are of unequal lengths"),
    "both axes": ({"values": [[[1.0, 2]], [[1.0], [2.0]]]}, {}, "differ along both axes"),
    "empty": ({"values": [[1.0, 2], []]}, {"max_bad_share": 0}, "it has no values"),
    "two columns": ({"a": [[1.0, 2]], "b": [[1.0, 2]]}, {}, r"\(a, b\): name one with --sequence_column"),
    "no such column": ({"a": [[1.0, 2]]}, {"sequence_column": "c"}, "sequence_column 'c' is not in the data set"),
    "no numbers": ({"a": ["x"]}, {"sequence_column": "a"}, "'a' holds no sequences of numbers; its columns are: a"),
    "nothing of either": ({"a": ["x"]}, {}, r"no column of images; .*\(string\). Nor is one of sequences among them"),
    "a mode of pictures": (
        {"a": [[1.0, 2]]},
        {"image_mode": "L"},
        "image_mode is of images, and the data are sequences",
    ),
    "stretch": ({"a": [[1.0, 2]]}, {"resize_mode": "stretch"}, "resize_mode stretch is of images"),
    "two sides": ({"a": [[1.0, 2]]}, {"resolution": (2, 2)}, "resolution must be one length, .* got 2 2"),
}


@pytest.mark.parametrize("columns, options, message", REFUSED.values(), ids=REFUSED)
def test_sequences_that_cannot_be_are_refused(columns, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        prepare_images(to_parquet(tmp_path / "data", **columns), **options)


def test_a_stream_of_sequences_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sequences are not read as a stream"):
        prepare_data(TrainingDataConfig(dataset_name=ramps(tmp_path / "data", [4, 4]), streaming=True))


def test_files_that_hold_no_arrays_or_need_a_decoder_are_refused(tmp_path):
    ragged = np.empty(2, object)
    ragged[:] = [[1.0], [1.0, 2.0]]
    np.save(tmp_path / "a.npy", ragged, allow_pickle=True)
    with pytest.raises(ValueError, match="Arrays of objects, such as of sequences of unequal lengths"):
        prepare_images(str(tmp_path / "a.npy"))
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 4)), label=np.zeros(2))
    with pytest.raises(ValueError, match=r"as many in all, got x \(3, 4\), label \(2,\)"):
        prepare_images(str(tmp_path / "b.npz"))
    (tmp_path / "apart").mkdir()
    for name, array in (("x", np.zeros((3, 4))), ("y", np.zeros(3, int))):
        np.save(tmp_path / "apart" / f"{name}.npy", array)
    with pytest.raises(ValueError, match="y.npy holds other arrays than x.npy, .* into one .npz"):
        prepare_images(str(tmp_path / "apart"))
    (tmp_path / "music").mkdir()
    (tmp_path / "music" / "0.flac").write_bytes(b"fLaC" + bytes(40))
    with pytest.raises(ValueError, match="none of the first 1 sequences can be read"):
        prepare_images(str(tmp_path / "music"))
    (tmp_path / "rates").mkdir()
    for number, rate in enumerate((8000, 16000)):
        wavfile.write(tmp_path / "rates" / f"{number}.wav", rate, np.arange(8, dtype=np.int16))
    with pytest.raises(ValueError, match="a sampling rate of 16000 Hz where the first file has 8000"):
        prepare_images(str(tmp_path / "rates"), max_bad_share=0)


def test_pandas_columns_of_lists_are_sequences(tmp_path):
    frame = pd.DataFrame({"values": [np.arange(4.0), np.arange(4.0) + 1], "label": ["a", "b"]})
    frame.to_parquet(tmp_path / "train.parquet")
    data = prepare_images(str(tmp_path))
    assert data.pixels[[1]][0, :, 0].tolist() == [1, 2, 3, 4] and data.id2label == {0: "a", 1: "b"}
