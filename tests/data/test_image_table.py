import io
import pickle

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image

from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.label_columns import fair_share, read_labels
from diffusers_ext.data.prepare import prepare_images, prepare_stream
from diffusers_ext.data.sources import load_digits
from diffusers_ext.recipes.sample_grids import rows_by_label


RNG = np.random.default_rng(0)


def pictures(count, height=8, width=8, channels=1):
    return RNG.integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def encode(pixels, format="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format)
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def parquet(tmp_path):
    """Writes columns to a folder of parquet, as a data set on disk would be."""

    def write(columns, features):
        folder = tmp_path / "data"
        folder.mkdir()
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        rows.to_parquet(folder / "train-00000-of-00001.parquet")
        return str(folder)

    return write


def images_of(data):
    return data.pixels[np.arange(len(data))]


def test_options_in_a_config_and_in_the_call_are_the_same():
    config = DataConfig("digits", dataset_split="test", max_train_samples=7, unconditional=True)
    data = prepare_images(config)
    others = [
        prepare_images("digits", split="test", max_samples=7, unconditional=True),
        prepare_images(DataConfig("digits", dataset_split="test"), max_train_samples=7, unconditional=True),
    ]
    for other in others:
        assert len(other) == 7 and other.labels is None and other.notes == data.notes
        np.testing.assert_array_equal(images_of(other), images_of(data))
    with pytest.raises(TypeError, match="max_sample"):
        prepare_images("digits", max_sample=7)


def test_digits_are_scikit_learns():
    from sklearn import datasets as sklearn_datasets

    digits = sklearn_datasets.load_digits()
    data, train, test = (prepare_images("digits", split=split) for split in ("train+test", "train", "test"))
    np.testing.assert_allclose(images_of(data)[..., 0] * (16 / 255), digits.images, atol=0.5 * 16 / 255)
    np.testing.assert_array_equal(data.labels, digits.target)
    assert (len(train), train.size, train.channels, train.num_classes) == (1500, (8, 8), 1, 10)

    def rows(part):
        return sorted((pixels.tobytes(), label) for pixels, label in zip(images_of(part), part.labels, strict=True))

    assert sorted(rows(train) + rows(test)) == rows(data)
    assert min(np.bincount(test.labels)) >= 28  # as many of each digit as there are, to 1
    with pytest.raises(ValueError, match="the split of digits must be one of train, test, train.test, got 'valid'"):
        load_digits("valid")


@pytest.mark.parametrize("shape", [(8, 8, 1), (6, 10, 3), (12, 4, 4)])
def test_parquet_gives_the_very_pixels_and_labels(parquet, shape):
    pixels = pictures(5, *shape)
    if shape[2] == 4:
        pixels[..., 3] = 255
    folder = parquet(
        {"picture": [encode(picture) for picture in pixels], "kind": [1, 0, 2, 1, 1]},
        {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])},
    )
    data = prepare_images(folder)
    np.testing.assert_array_equal(images_of(data), pixels)
    np.testing.assert_array_equal(data.pixels[[3, 0, 3]], pixels[[3, 0, 3]])
    assert data.labels.tolist() == [1, 0, 2, 1, 1] and data.id2label == {0: "a", 1: "b", 2: "c"}
    assert data.notes == ()


def test_image_folder_with_folders_as_labels(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(pictures(1, 10, 10, 3)[0]).save(tmp_path / name / f"{number}.png")
    data = prepare_images(str(tmp_path), resolution=(8,))
    assert (len(data), data.size, data.channels) == (4, (8, 8), 3)
    assert data.id2label == {0: "cat", 1: "dog"} and data.labels.tolist() == [0, 0, 1, 1]
    assert data.notes == ("10x10 images are scaled to cover 8x8 and cropped to it (--resize_mode crop)",)


def test_columns_of_arrays_take_any_number_of_channels(parquet):
    pixels = RNG.integers(0, 60000, (3, 4, 6, 5), dtype=np.uint16)
    folder = parquet({"bands": pixels.tolist()}, {"bands": datasets.Array3D((4, 6, 5), "uint16")})
    data = prepare_images(folder)
    np.testing.assert_array_equal(images_of(data), pixels)
    assert data.labels is None and data.id2label is None


def test_16_bit_pictures_keep_16_bits(parquet):
    pixels = RNG.integers(0, 65536, (3, 8, 8), dtype=np.uint16)
    file = io.BytesIO()
    Image.fromarray(pixels[0]).save(file, "PNG")
    folder = parquet({"image": [{"bytes": file.getvalue(), "path": None}]}, {"image": datasets.Image()})
    np.testing.assert_array_equal(images_of(prepare_images(folder))[0, ..., 0], pixels[0])


def test_images_of_their_own_size_get_a_border_up_to_what_the_model_takes(parquet):
    folder = parquet({"image": [encode(picture) for picture in pictures(2, 6, 7)]}, {"image": datasets.Image()})
    data = prepare_images(folder, multiple_of=4, pad_value=3)
    assert data.size == (8, 8) and (images_of(data)[:, 0] == 3).all()
    assert data.notes == ("6x7 images are centred on 8x8 with a border of 3 (--resize_mode pad)",)


@pytest.mark.parametrize("side, resolution, mode", [(28, 32, "pad"), (20, 32, "crop"), (40, 32, "crop")])
def test_auto_pads_small_differences_only(parquet, side, resolution, mode):
    folder = parquet({"image": [encode(picture) for picture in pictures(2, side, side)]}, {"image": datasets.Image()})
    assert prepare_images(folder, resolution=(resolution,)).resize_mode == mode


def test_images_of_several_sizes_need_a_resolution(parquet):
    cells = [encode(pictures(1, 8, 8)[0]), encode(pictures(1, 8, 12)[0])]
    folder = parquet({"image": cells}, {"image": datasets.Image()})
    with pytest.raises(ValueError, match=r"of several sizes \(8x8, 8x12, ...\): give --resolution"):
        prepare_images(folder)
    assert prepare_images(folder, resolution=(8,)).size == (8, 8)


def test_another_size_behind_the_first_images_is_no_size_that_nobody_gave(parquet, capsys):
    """A picture of it is left out by name, as one that cannot be decoded; with a resolution it is brought to that."""
    rows = [encode(picture) for picture in (*pictures(150), *pictures(1, 20, 8))]
    folder = parquet({"image": rows}, {"image": datasets.Image()})
    data = prepare_images(folder)
    assert len(data) == 150 and "1 of 151 images could not be decoded and are left out" in data.notes
    reason = "a size of 20x8 where the first images are all 8x8: give --resolution to bring all of them to one size"
    assert f"image of row 150 left out: ValueError: {reason}" in capsys.readouterr().err
    assert len(prepare_images(folder, resolution=(8,))) == 151
    with pytest.raises(ValueError, match="1 of 151 images .* give --resolution .*--max_bad_share"):
        prepare_images(folder, max_bad_share=0.0)


def test_options_that_images_have_no_use_for_are_refused_or_said(parquet):
    folder = parquet({"image": [encode(picture) for picture in pictures(3)]}, {"image": datasets.Image()})
    for name, value in (("sequence_scale", "mean_max"), ("sequence_layout", "length_channels")):
        for prepare in (prepare_images, prepare_stream):
            with pytest.raises(ValueError, match=f"{name} is of sequences, and .* holds images, got {value}"):
                prepare(folder, **{name: value})
    notes = prepare_images(folder, white_value=300).notes
    assert "white_value 300 has no effect on pixels of 8 bits, as those of the first images are" in notes


def test_grey_and_colour_together_become_colour(parquet):
    cells = [encode(pictures(1, 8, 8, 1)[0]), encode(pictures(1, 8, 8, 3)[0])]
    folder = parquet({"image": cells}, {"image": datasets.Image()})
    assert prepare_images(folder).channels == 3
    data = prepare_images(folder, mode="L")
    assert data.channels == 1 and "read as L; the narrowest mode that loses nothing is RGB" in data.notes[0]


def test_a_data_set_that_is_not_there_says_where_it_was_looked_for(tmp_path, parquet):
    with pytest.raises(ValueError, match="'nobody/nothing' cannot be loaded; it is no local folder, so .* the Hub"):
        prepare_images("nobody/nothing")
    folder = parquet({"image": [encode(pictures(1)[0])]}, {"image": datasets.Image()})
    with pytest.raises(ValueError, match="the split 'test' of the data set .* cannot be loaded: Unknown split"):
        prepare_images(folder, split="test")


def test_data_without_images_names_its_columns(parquet):
    folder = parquet(
        {"text": ["a"], "size": [1.0]}, {"text": datasets.Value("string"), "size": datasets.Value("float32")}
    )
    with pytest.raises(ValueError, match=r"no column of images; its columns are: text \(string\), size \(float32\)"):
        prepare_images(folder)


def test_a_column_that_holds_no_images_is_refused(parquet):
    folder = parquet(
        {"image": [encode(pictures(1)[0])], "text": ["a"]},
        {"image": datasets.Image(), "text": datasets.Value("string")},
    )
    with pytest.raises(
        ValueError, match=r"image_column 'text' holds no images; its columns are: image \(Image\), text"
    ):
        prepare_images(folder, image_column="text")
    with pytest.raises(ValueError, match="image_column 'img' is not in the data set"):
        prepare_images(folder, image_column="img")


def test_several_columns_of_images_must_be_told_apart(parquet):
    cells = [encode(pictures(1)[0])]
    folder = parquet({"left": cells, "right": cells}, {"left": datasets.Image(), "right": datasets.Image()})
    with pytest.raises(ValueError, match=r"several columns hold images \(left, right\): name one with --image_column"):
        prepare_images(folder)
    assert len(prepare_images(folder, image_column="right")) == 1


def labelled(values, feature):
    return datasets.Dataset.from_dict({"label": values}, features=datasets.Features({"label": feature}))


def test_names_become_labels_in_alphabetical_order():
    labels, names = read_labels(labelled(["dog", "cat", "dog"], datasets.Value("string")))
    assert labels.tolist() == [1, 0, 1] and names == {0: "cat", 1: "dog"}


def test_integers_are_labels_in_their_order_and_keep_their_numbers_as_names():
    for values, expected in (([1, 0, 2], [1, 0, 2]), ([10, 2, 9, 2], [2, 0, 1, 0]), ([2020, 2018], [1, 0])):
        labels, names = read_labels(labelled(values, datasets.Value("int32")))
        assert labels.tolist() == expected and labels.dtype == np.int64
        assert [int(names[label]) for label in labels] == values and len(names) == len(set(values))


def test_names_that_are_all_numbers_are_in_the_order_of_these():
    labels, names = read_labels(labelled(["10", "9", "100"], datasets.Value("string")))
    assert labels.tolist() == [1, 0, 2] and names == {0: "9", 1: "10", 2: "100"}


def test_label_names_that_are_integers_are_those_in_the_column():
    values = labelled([2020, 2018], datasets.Value("int64"))
    assert read_labels(values, label_names=["2018", "2019", "2020"])[0].tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"holds 2018, which is not in label_names \(2019, 2020\)"):
        read_labels(values, label_names=["2019", "2020"])


@pytest.mark.parametrize("feature", [datasets.ClassLabel(names=list("abc")), datasets.Value("string")])
def test_a_fair_share_has_of_each_label_its_part_whatever_the_order(feature):
    values = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    source = labelled(values, feature)
    for count in (10, 20, 37, 100, 1000):
        rows = fair_share(source, count)
        assert rows.tolist() == sorted(set(rows.tolist())) and len(rows) == min(count, 100)
        shares = [sum(values[row] == label for row in rows) for label in "abc"]
        assert np.abs(np.array(shares) - len(rows) * np.array([0.6, 0.3, 0.1])).max() <= 1
        assert (fair_share(source, count) == rows).all()
    assert fair_share(source, 20).tolist()[:12] != list(range(12))  # not the first of each


def test_a_fair_share_without_labels_is_drawn_from_all_rows():
    rows = fair_share(datasets.Dataset.from_dict({"text": list(map(str, range(1000)))}), 100)
    assert len(set(rows.tolist())) == 100 and 400 < rows.mean() < 600


def test_a_part_of_the_images_has_of_each_label_its_share(parquet):
    folder = parquet(
        {"image": [encode(picture) for picture in pictures(30)], "kind": [0] * 20 + [1] * 10},
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])},
    )
    data, everything = prepare_images(folder, max_samples=6), prepare_images(folder)
    assert np.bincount(data.labels).tolist() == [4, 2]
    assert data.notes == ("6 of 30 images are taken, of each label its share",)
    np.testing.assert_array_equal(images_of(data), everything.pixels[data.rows])
    unlabelled = prepare_images(folder, max_samples=6, unconditional=True)
    assert (unlabelled.rows == data.rows).all()  # the same, whether or not the labels are used


def test_class_labels_without_images_are_named_and_keep_their_ids(parquet):
    folder = parquet(
        {"image": [encode(picture) for picture in pictures(2)], "kind": [0, 2]},
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])},
    )
    data = prepare_images(folder)
    assert (data.num_classes, data.used_labels, data.labels.tolist()) == (3, [0, 2], [0, 2])
    assert data.notes == ("1 of 3 labels have no images and are not drawn: b",)
    assert rows_by_label(data) == {"labels": [0, 2], "names": ["a", "c"]}


@pytest.mark.parametrize(
    "values, feature, message",
    [
        ([0.5, 1.0], datasets.Value("float32"), "'label' must hold integers or names, got float32"),
        (
            [[[1]], [[2]]],
            datasets.List(datasets.List(datasets.Value("int64"))),
            "'label' must hold integers or names, or lists of them, got List",
        ),
        ([True, False], datasets.Value("bool"), "'label' must hold integers or names, got bool"),
        ([0, -1], datasets.Value("int64"), "'label' must hold integers from 0 on, got -1"),
        ([0, None], datasets.Value("int64"), "'label' must hold a label in every row, got 1 empty"),
    ],
)
def test_other_labels_are_refused(values, feature, message):
    with pytest.raises(ValueError, match=f"label_column {message}"):
        read_labels(labelled(values, feature), "label")


def test_a_label_column_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match="label_column 'kind' is not in the data set; its columns are label"):
        read_labels(labelled([1], datasets.Value("int64")), "kind")


def broken_folder(parquet, count, broken):
    cells = [encode(picture) for picture in pictures(count)]
    for row in broken:
        cells[row] = {"bytes": b"no picture", "path": None}
    return parquet(
        {"image": cells, "label": list(range(count))}, {"image": datasets.Image(), "label": datasets.Value("int64")}
    )


def test_an_image_that_cannot_be_decoded_is_named_counted_and_left_out(parquet, capsys):
    folder = broken_folder(parquet, 200, [3])
    data = prepare_images(folder)
    assert "image of row 3 left out: UnidentifiedImageError" in capsys.readouterr().err
    assert data.notes[0] == "1 of 200 images could not be decoded and are left out"
    assert data.notes[1] == "1 of 200 labels have no images and are not drawn: 3"
    assert data.labels.tolist() == [row for row in range(200) if row != 3]
    assert images_of(data).any((1, 2, 3)).all()


def test_too_many_images_that_cannot_be_decoded_end_the_run(parquet):
    folder = broken_folder(parquet, 50, [7, 20])
    with pytest.raises(
        ValueError, match=r"2 of 50 images cannot be decoded, the first in row 7 .*\(--max_bad_share\)"
    ):
        prepare_images(folder)
    assert len(prepare_images(folder, max_bad_share=0.1)) == 48


def test_decoded_images_are_kept_between_runs_and_mapped_not_copied(parquet):
    folder = parquet({"image": [encode(picture) for picture in pictures(2500)]}, {"image": datasets.Image()})
    data = prepare_images(folder)
    again = prepare_images(folder)
    assert again.pixels._table.cache_files == data.pixels._table.cache_files != []
    np.testing.assert_array_equal(data.pixels[[0, 999, 1000, 2499]], again.pixels[[0, 999, 1000, 2499]])
    assert len(data.pixels._chunks) == 3 and not any(chunk.flags.owndata for chunk in data.pixels._chunks)


@pytest.mark.parametrize("shape, dtype", [((9, 14, 1), "uint8"), ((7, 7, 5), "uint16"), ((11, 5, 3), "uint16")])
def test_uncropped_rows_are_cut_in_the_middle_or_where_it_is_said(parquet, shape, dtype):
    """Pictures that cover 7x5 as they are (a side fits), so that each cut is a part of the very pixels."""
    pixels = RNG.integers(0, 60000 if dtype == "uint16" else 256, (3, *shape), dtype=dtype)
    size = (min(shape[0], 9), 5) if shape[0] != 7 else (7, 5)
    folder = parquet({"bands": pixels.tolist()}, {"bands": datasets.Array3D(shape, dtype)})
    data = prepare_images(folder, resolution=size, resize_mode="random_crop")
    assert (data.resize_mode, data.size, data.dtype) == ("random_crop", size, dtype)
    places = np.array([[0.0, 0.0], [0.999, 0.999], [0.5, 0.5]])
    cut = pickle.loads(pickle.dumps(data)).pixels.crop([2, 0, 1], places)
    rest = shape[0] - size[0], shape[1] - size[1]
    np.testing.assert_array_equal(cut[0], pixels[2, : size[0], : size[1]])
    np.testing.assert_array_equal(cut[1], pixels[0, rest[0] :, rest[1] :])
    top, left = ((side + 1) // 2 for side in rest)
    np.testing.assert_array_equal(cut[2], pixels[1, top : top + size[0], left : left + size[1]])
    top, left = (side // 2 for side in rest)
    np.testing.assert_array_equal(data.pixels[[1]][0], pixels[1, top : top + size[0], left : left + size[1]])


def test_uncropped_pictures_of_several_sizes_keep_their_aspect(parquet):
    cells = [encode(np.full((height, width, 1), 7 * height, np.uint8)) for height, width in ((8, 24), (20, 8), (4, 4))]
    folder = parquet({"image": cells}, {"image": datasets.Image()})
    data = prepare_images(folder, resolution=(8,), resize_mode="random_crop")
    assert [picture.shape for picture in data.pixels._pictures([0, 1, 2])] == [(8, 24, 1), (20, 8, 1), (8, 8, 1)]
    assert data.pixels[[0, 1, 2]].mean((1, 2, 3)).tolist() == [56, 140, 28]


def test_photographs_are_turned_as_their_camera_was(parquet):
    """Orientation 6: the first row of the file is the right side of the picture."""
    upright = pictures(1, 6, 4)[0]
    exif, file = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(np.rot90(upright)[..., 0]).save(file, "PNG", exif=exif)
    folder = parquet({"image": [{"bytes": file.getvalue(), "path": None}]}, {"image": datasets.Image()})
    np.testing.assert_array_equal(images_of(prepare_images(folder))[0], upright)


def test_names_of_labels_can_be_given():
    names = ["cow", "cat", "dog"]
    labels, id2label = read_labels(labelled(["dog", "cat", "dog"], datasets.Value("string")), label_names=names)
    assert labels.tolist() == [2, 1, 2] and id2label == {0: "cow", 1: "cat", 2: "dog"}
    labels, id2label = read_labels(labelled([0, 1], datasets.Value("int64")), label_names=names)
    assert labels.tolist() == [0, 1] and len(id2label) == 3
    with pytest.raises(ValueError, match="label_column 'label' holds 'cat', which is not in label_names"):
        read_labels(labelled(["dog", "cat"], datasets.Value("string")), label_names=["dog"])
    with pytest.raises(ValueError, match="label_column 'label' holds 5, which is not in label_names"):
        read_labels(labelled([0, 5], datasets.Value("int64")), label_names=names)
    unlabelled = datasets.Dataset.from_dict({"text": ["a"]})
    with pytest.raises(ValueError, match="there are names for labels, but the data set has no labels"):
        read_labels(unlabelled, label_names=names)


def test_colour_after_many_grey_pictures_is_not_lost_silently(parquet):
    """The mode is found on the first 64; a later picture that holds more is a fault, unless the mode is asked for."""
    grey, colour = pictures(70), pictures(2, channels=3)
    cells = [encode(picture) for picture in grey] + [encode(picture) for picture in colour]
    folder = parquet({"image": cells}, {"image": datasets.Image()})
    with pytest.raises(
        ValueError, match="the first in row 70 .*mode RGB, where the first ones are all L: give --image"
    ):
        prepare_images(folder)
    data = prepare_images(folder, mode="RGB")
    assert (data.pixels[[70, 71]] == colour).all() and (data.pixels[[3]] == grey[3]).all()
    assert len(prepare_images(folder, max_bad_share=0.1)) == 70
