"""Which files of a folder are read, and what is said of the others."""

import io
import itertools
import json
import os
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image, features

from diffusers_ext.data.captions import find_caption_column
from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.folders import split_word
from diffusers_ext.data.prepare import prepare_images, prepare_stream
from diffusers_ext.data.sources import load_source, split_names
from diffusers_ext.evaluation.real_images import find_held_out_split


NUMBERS = itertools.count(1)


def png(value=None, suffix="png"):
    """A picture of one value, its number among all of these tests unless it is given."""
    file = io.BytesIO()
    Image.new("L", (8, 8), next(NUMBERS) % 256 if value is None else value).save(file, suffix)
    return file.getvalue()


@pytest.fixture
def write(tmp_path):
    """Writes files, pictures where nothing is said of them, into a folder; returns it."""

    def write(*names, **contents):
        root = tmp_path / "data"
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents.get(name) or png())
        return root

    return write


def put(root, name, content):
    path = Path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def prepare(root, **options):
    return prepare_images(str(root), cache_dir=str(Path(root).parent / "cache"), **options)


def values(data):
    return data.pixels[np.arange(len(data))][:, 0, 0, 0].tolist()


def names_of(data):
    return [data.id2label[label] for label in data.labels.tolist()]


@pytest.mark.parametrize("name", ["train.png", "photo-test-1.png", "val 3.png", "dev.png"])
def test_a_word_in_the_name_of_a_picture_makes_no_split(write, name):
    root = write(*(f"pic{number}.png" for number in range(5)), name)
    data = prepare(root)
    assert len(data) == 6 and data.labels is None and data.notes == ()


@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("essay-test", "other"), ("dev", "ops", "val-2")])
def test_classes_may_be_called_like_a_split(write, classes):
    data = prepare(write(*(f"{name}/{number}.png" for name in classes for number in range(3))))
    assert names_of(data) == [name for name in sorted(classes) for _ in range(3)]


@pytest.mark.parametrize(
    "train, held_out",
    [("train", "validation"), ("Train", "VAL"), ("train2017", "val2017"), ("train_images", "test_images")],
)
@pytest.mark.parametrize("wrapper", ["", "data/"])
def test_folders_of_splits_without_classes_are_no_labels(write, train, held_out, wrapper):
    root = write(*(f"{wrapper}{split}/{number}.png" for split in (train, held_out) for number in range(3)))
    there = ["train", split_word(held_out)]
    assert split_names(str(root)) == there
    for split in there:
        data = prepare(root, split=split)
        assert len(data) == 3 and data.labels is None and data.notes == ()
    assert find_held_out_split(DataConfig(dataset_name=str(root))) == there[1]
    with pytest.raises(ValueError, match="Unknown split 'extra': there are train"):
        prepare(root, split="extra")


def test_splits_with_classes_number_their_own(write):
    root = write("train/cat/0.png", "train/dog/1.png", "test/cat/2.png", "test/cat/3.png")
    assert names_of(prepare(root)) == ["cat", "dog"]
    assert prepare(root, split="test").id2label == {0: "cat"}
    assert names_of(prepare(root, split="train+test")) == ["cat", "dog", "cat", "cat"]


def test_classes_above_their_splits_are_classes(write):
    root = write(*(f"{name}/{split}/{i}.png" for name in ("a", "b") for split in ("train", "test") for i in range(2)))
    assert names_of(prepare(root)) == ["a", "a", "b", "b"] and len(prepare(root, split="test")) == 4


def test_an_expression_takes_a_part_of_a_split(write):
    root = write(*(f"train/{number}.png" for number in range(10)), "test/a.png")
    assert len(prepare(root, split="train[:30%]")) == 3
    assert len(prepare(root, split="train[2:4]+test")) == 3


def test_what_lies_beside_the_folders_of_splits_is_counted(write):
    root = write("train/0.png", "test/1.png", "extra/2.png", "preview.png")
    data = prepare(root)
    assert len(data) == 1
    assert data.notes == ("2 pictures beside the folders of the splits are not used, such as extra/2.png",)


def test_names_of_pictures_that_all_tell_of_splits_are_spoken_of(write):
    assert "which is not heeded" in prepare(write("train-0.png", "train-1.png", "test-0.png")).notes[0]


def test_classes_at_several_depths_are_the_topmost_folders(write):
    data = prepare(write("cat/0.png", "cat/1.png", "dog/small/2.png", "dog/large/old/3.png"))
    assert names_of(data) == ["cat", "cat", "dog", "dog"]
    assert data.notes == ("pictures lie at several depths: their classes are the topmost folders, 2 of them",)


def test_classes_in_folders_of_one_depth_are_the_innermost(write):
    data = prepare(write("1/cat/0.png", "1/dog/1.png", "2/cat/2.png"))
    assert names_of(data) == ["cat", "dog", "cat"] and "innermost" in data.notes[0]


def test_pictures_without_a_class_are_left_out_or_leave_no_classes(write):
    root = write("cat/0.png", "dog/1.png", "stray.png")
    data = prepare(root)
    assert names_of(data) == ["cat", "dog"]
    assert data.notes == ("1 pictures beside the folders of classes are not used, such as stray.png",)
    data = prepare(write("stray2.png", "stray3.png"))
    assert len(data) == 5 and data.labels is None
    assert data.notes == ("folders are not taken for classes, since 3 of 5 pictures are in none of them",)


def test_classes_named_by_numbers_are_in_the_order_of_these(write):
    data = prepare(write(*(f"{number}/x.png" for number in (10, 9, 100, 1))))
    assert list(data.id2label.values()) == ["1", "9", "10", "100"]
    assert data.notes == ("the labels are 4 numbers that are their names, 1 to 100; their ids are 0 to 3",)


def test_files_that_are_not_read_are_counted_by_their_extension(write):
    root = write("0.png", "1.png")
    for name in ("a.heic", "b.heic", "labels.csv", "README.md", ".DS_Store", "Thumbs.db", "__MACOSX/0.png"):
        put(root, name, "x")
    data = prepare(root)
    assert len(data) == 2
    assert data.notes[0].startswith("3 files of the folder are not used (2 .heic, 1 .csv), such as a.heic")
    assert "is read if it is called metadata.csv" in data.notes[0]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_pictures_of_every_kind_that_is_decoded_here_are_read(write):
    root = write("0.png")
    put(root, "1.AVIF", png(suffix="avif"))
    put(root, "2.webp", png(suffix="webp"))
    assert len(prepare(root)) == 3


def test_pictures_that_are_not_in_the_metadata_are_counted(write):
    root = write("0.png", "1.png", "2.png", "sub/3.png")
    put(root, "metadata.csv", "file_name,label\n1.png,cat\nsub/3.png,dog\n")
    data = prepare(root)
    assert names_of(data) == ["cat", "dog"]
    assert data.notes == ("2 pictures are in no table of metadata and not used, such as 0.png",)


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_metadata_describe_the_pictures_of_each_split(write, form):
    root = write(*(f"{split}/{name}.png" for split in ("train", "test") for name in "ab"))
    for split in ("train", "test"):
        rows = pd.DataFrame({"file_name": ["b.png", "a.png"], "label": [f"{split}-b", "a"], "size": [3, 4]})
        path = root / split / f"metadata.{form}"
        if form == "csv":
            rows.to_csv(path, index=False)
        elif form == "jsonl":
            rows.to_json(path, orient="records", lines=True)
        else:
            rows.to_parquet(path)
    for split in ("train", "test"):
        assert names_of(prepare(root, split=split)) == [f"{split}-b", "a"] and prepare(root, split=split).notes == ()


def test_metadata_above_the_splits_are_divided_by_the_files_they_name(write):
    root = write("train/a.png", "test/b.png")
    put(
        root,
        "metadata.jsonl",
        '{"file_name": "train/a.png", "label": "x"}\n{"file_name": "test/b.png", "label": "y"}\n',
    )
    assert names_of(prepare(root)) == ["x"] and names_of(prepare(root, split="test")) == ["y"]


def test_metadata_that_name_no_files_or_files_elsewhere_are_refused(write):
    root = write("0.png")
    put(root, "metadata.csv", "name,label\n0.png,cat\n")
    with pytest.raises(ValueError, match="metadata.csv must have a column file_name .* got the columns name, label"):
        prepare(root)
    for name in ("../0.png", "/etc/0.png", "file:///0.png"):
        put(root, "metadata.csv", f"file_name\n{name}\n")
        with pytest.raises(ValueError, match="must name files below its own folder"):
            prepare(root)
    put(root, "metadata.csv", "file_name\n0.png\ngone.png\n")
    with pytest.raises(ValueError, match="1 of 2 images cannot be decoded, the first in .*gone.png .*No such file"):
        prepare(root, max_bad_share=0.0)


@pytest.mark.parametrize("suffix", ["txt", "json"])
@pytest.mark.parametrize("classes", [False, True])
def test_texts_beside_the_pictures_are_captions(write, suffix, classes):
    stems = ["cat/0", "dog/1"] if classes else ["0", "1"]
    root = write(*(f"{stem}.png" for stem in stems))
    for number, stem in enumerate(stems):
        text = f"picture {number}, äöü"
        put(root, f"{stem}.{suffix}", json.dumps({"size": 3, "caption": text}) if suffix == "json" else text + "\n")
    config = DataConfig(dataset_name=str(root), cache_dir=str(root.parent / "cache"))
    assert find_caption_column(config) == "caption"
    data = prepare(root, label_column="caption")
    assert names_of(data) == ["picture 0, äöü", "picture 1, äöü"]
    assert (prepare(root).labels is not None) == classes
    assert "2 of 2 pictures have a text beside them (column caption)" in data.notes


def test_missing_and_unreadable_captions_are_errors_with_the_cause(write):
    root = write("0.png", "1.png")
    put(root, "0.txt", "a cat")
    config = DataConfig(dataset_name=str(root), cache_dir=str(root.parent / "cache"))
    with pytest.raises(ValueError, match="caption_column 'caption' is empty in 1 of 2 rows"):
        find_caption_column(config)
    put(root, "1.json", '{"tags": ["a"]}')
    with pytest.raises(ValueError, match="1.json must hold the caption of a picture as a text, or under one of"):
        find_caption_column(config)
    put(root, "1.json", "{")
    with pytest.raises(
        ValueError, match="1.json, the caption of a picture, cannot be read: it must be JSON: Expecting"
    ):
        find_caption_column(config)


@pytest.mark.parametrize("name", ["plain", "[brackets] and * and ?"])
def test_paths_with_characters_of_patterns(tmp_path, name):
    root = tmp_path / name / "data"
    for number in range(2):
        put(root, f"pictures/a[{number}]/x.png", png(number))
    assert values(prepare(root / "pictures")) == [0, 1]
    table = pd.DataFrame({"image": [png(3), png(4)], "label": [0, 1]})
    (root / "rows").mkdir()
    table.to_parquet(root / "rows" / "train.parquet")
    assert values(prepare(root / "rows")) == [3, 4]
    assert values(prepare(root / "rows" / "train.parquet")) == [3, 4]


def test_pandas_parquet_of_bytes_structs_and_paths(write, tmp_path):
    root = write("pictures/0.png", "pictures/1.png")
    cells = [png(5), png(6)]
    (root / "pictures/0.png").write_bytes(cells[0])
    (root / "pictures/1.png").write_bytes(cells[1])
    columns = {
        "bytes": cells,
        "structs": [{"bytes": cell, "path": None} for cell in cells],
        "only_bytes": [{"bytes": cell} for cell in cells],
        "absolute": [str(tmp_path / f"absolute/pictures/{number}.png") for number in range(2)],
    }
    for number in range(2):
        put(tmp_path / "absolute", f"pictures/{number}.png", cells[number])
    for name, column in columns.items():
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        pd.DataFrame({"text": ["a", "b"], "img": column, "label": [3, 4]}).to_parquet(folder / "data.parquet")
        data = prepare(folder)
        assert values(data) == [5, 6] and names_of(data) == ["3", "4"], name
        stream = prepare_stream(str(folder), label_names=["3", "4"])
        assert stream.size == (8, 8) and [row["label"] for row in stream.source] == [3, 4]
    # A table leads to no file outside of its folder.
    outside = [str(root / f"pictures/{number}.png") for number in range(2)]
    (tmp_path / "outside").mkdir()
    pd.DataFrame({"img": outside}).to_parquet(tmp_path / "outside/data.parquet")
    with pytest.raises(ValueError, match="must name files in .*outside, got .*give a folder that holds both"):
        prepare(tmp_path / "outside")
    # A table larger than the pictures beside it, with paths relative to the folder.
    folder = tmp_path / "relative"
    for number in range(2):
        put(folder, f"pictures/{number}.png", cells[number])
    noise = np.random.default_rng(0).bytes(5000)
    table = pd.DataFrame({"img": [f"pictures/{number}.png" for number in (1, 0)], "noise": [noise, noise]})
    table.to_parquet(folder / "data.parquet")
    data = prepare(folder)
    assert values(data) == [6, 5] and "2 files of the folder are not used (2 .png)" in data.notes[0]


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(value), "path": None} for value in (1, 2, 3)], "label": [0, 1, 0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}),
    )
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(tmp_path / "two")
    assert values(prepare(tmp_path / "one")) == [1, 2, 3] and names_of(prepare(tmp_path / "one")) == ["a", "b", "a"]
    assert values(prepare(tmp_path / "two", split="train[:2]")) == [1, 2]
    assert values(prepare(tmp_path / "two", split="test")) == [3] and split_names(str(tmp_path / "two")) == [
        "train",
        "test",
    ]
    assert len(list(prepare_stream(str(tmp_path / "two")).source)) == 3


@pytest.mark.parametrize("names", [["photos.zip"], ["cat.zip", "dog.zip"], ["train.zip", "test.zip"]])
def test_zips_are_folders(tmp_path, names):
    root = tmp_path / "data"
    root.mkdir()
    for name in names:
        with zipfile.ZipFile(root / name, "w") as archive:
            for member in ("0.png", "1.png") if name in ("cat.zip", "dog.zip") else ("cat/0.png", "dog/1.png"):
                archive.writestr(member, png())
            archive.writestr("__MACOSX/._0.png", b"x")
    data = prepare(root)
    assert names_of(data) == (["cat", "cat", "dog", "dog"] if "cat.zip" in names else ["cat", "dog"])
    assert len(list(prepare_stream(str(root)).source)) == len(data)
    if "train.zip" in names:
        assert split_names(str(root)) == ["train", "test"]
    assert len(prepare(root / names[0])) == 2  # by itself


def test_zips_that_cannot_be_read_say_why(tmp_path):
    (tmp_path / "bad.zip").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match="bad.zip cannot be read as a zip"):
        load_source(str(tmp_path))
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("rows.parquet", b"x")
    with pytest.raises(ValueError, match="holds no pictures, and of zips only pictures are read: unpack it"):
        load_source(str(tmp_path))


@pytest.mark.parametrize(
    "files, splits",
    [
        (["train.parquet", "test.parquet"], ["train", "test"]),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], ["train"]),
        (["data/train-00000-of-00001.parquet", "data/unlabeled-00000-of-00001.parquet"], ["train", "unlabeled"]),
        (["train/0.parquet", "val/0.parquet"], ["train", "validation"]),
        (["0.parquet", "photo-test-1.parquet"], ["train", "test"]),
        (["photos-00000-of-00002.parquet", "photos-00001-of-00002.parquet"], ["train"]),
    ],
)
def test_splits_of_tables(tmp_path, files, splits):
    root = tmp_path / "data set"
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"image": [png()]}).to_parquet(root / file)
    assert split_names(str(root)) == splits
    assert sum(len(prepare(root, split=split)) for split in splits) == len(files)


def test_tables_of_no_split_are_counted(tmp_path):
    for file in ("train.parquet", "extra.parquet"):
        pd.DataFrame({"image": [png()]}).to_parquet(tmp_path / file)
    assert prepare(tmp_path).notes[0].startswith("1 files are of no split and not used, such as extra.parquet")


def test_folders_without_data_say_what_they_lack(tmp_path):
    (tmp_path / "a.xyz").write_text("x")
    with pytest.raises(ValueError, match=r"it holds no pictures, and no files of rows .*1 files .* \(1 .xyz\)"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("form", ["png", "parquet"])
def test_a_file_that_is_written_anew_is_read_anew(tmp_path, declared, form):
    """Also where a README.md names the files, under which `datasets` finds the rows that it keeps of the old ones."""
    root = tmp_path / "data"

    def fill(value):
        put(root, "a.png", png(value)) if form == "png" else pd.DataFrame({"image": [png(value)]}).to_parquet(
            root / "a.parquet"
        )

    root.mkdir()
    if declared:
        put(root, "README.md", f"---\nconfigs:\n- config_name: default\n  data_files: '*.{form}'\n---\n# Data\n")
    for value in (1, 2):
        fill(value)
        time = 1_700_000_000 + value  # as if there were a second between them
        os.utime(next(root.glob(f"a.{form}")), (time, time))
        assert values(prepare(root)) == [value]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_file_that_a_table_names_is_read_anew(tmp_path, form):
    """The rows of the table stay as they are when it changes."""
    root = tmp_path / "data"
    names = [f"pictures/{number}.png" for number in range(3)]
    root.mkdir()
    getattr(pd.DataFrame({"img": names}), f"to_{form}")(root / f"data.{form}", index=False)
    for first in (1, 2):
        for number, name in enumerate(names):
            put(root, name, png(10 * number + first))
            time = 1_700_000_000 + first
            os.utime(root / name, (time, time))
        assert values(prepare(root / f"data.{form}")) == [first, 10 + first, 20 + first]


def test_a_stream_of_a_folder_has_the_rows_of_the_folder(write):
    root = write(*(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(4)))
    stream = prepare_stream(str(root), cache_dir=str(root.parent / "cache"))
    rows = list(stream.source)
    assert [stream.id2label[row["label"]] for row in rows] == names_of(prepare(root))
    assert [row["image"]["path"] for row in rows] == sorted(str(path) for path in root.rglob("*.png"))
    assert stream.source.num_shards == 8
    with pytest.raises(ValueError, match="a stream takes a split as it is"):
        prepare_stream(str(root), split="train[:50%]")
