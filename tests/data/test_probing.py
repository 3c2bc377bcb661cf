"""How pictures of every kind are read: from a table, as a stream, for evaluation, and as `image=` of a pipeline."""

import shutil
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image

from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.prepare import prepare_images, prepare_stream
from diffusers_ext.data.probing import is_channels_first
from diffusers_ext.data.stream import StreamReader
from diffusers_ext.evaluation.image_folder import read_image_folder
from diffusers_ext.evaluation.real_images import RealImages, load_real_images, to_labelled_images
from diffusers_ext.pipelines.image_inputs import images_to_tensor


RNG = np.random.default_rng(0)
RAMP = np.linspace(0, 65535, 16).astype(np.uint16)[None].repeat(16, 0)
RAMP_IN_8_BITS = (np.arange(16) * 17)[None].repeat(16, 0)


@pytest.fixture
def folder(tmp_path):
    """Writes pictures to a folder, in the order of their names."""

    def write(pictures, suffix="png", **options):
        path = tmp_path / "pictures"
        path.mkdir()
        for number, picture in enumerate(pictures):
            picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
            picture.save(path / f"{number:03}.{suffix}", **options)
        return str(path)

    return write


def parquet(path, column, feature):
    path.mkdir()
    rows = datasets.Dataset.from_dict({"image": column}, features=datasets.Features({"image": feature}))
    rows.to_parquet(path / "train.parquet")
    return str(path)


def in_unit_range(pixels):
    """As the trainer scales them, but to [0, 1]."""
    return pixels / np.iinfo(pixels.dtype).max


def ways_in(path, channels, **options):
    """All pictures of a folder in [0, 1], channels last, by each way in."""
    table = prepare_images(path, **options)
    count = len(table)
    pixels = in_unit_range(table.pixels[np.arange(count)])
    yield "table", pixels
    stream = prepare_stream(path, shuffle_buffer=1, **options)
    read = in_unit_range(np.stack([picture for picture, _ in islice(StreamReader(stream, 0, 0, 1), count)]))
    # The files come in an order of their own.
    yield "stream", read[[np.abs(read - picture).sum((1, 2, 3)).argmin() for picture in pixels]]
    real = RealImages(to_labelled_images(table), None, "x", "crop", (), whites=table.whites, white=table.white)
    yield "evaluation", real.train.images.permute(0, 2, 3, 1).numpy() / 255
    yield "evaluate.py FOLDER", read_image_folder(path, real)[0].permute(0, 2, 3, 1).numpy() / 255
    with_files = [Image.open(file) for file in sorted(Path(path).iterdir())]
    given = images_to_tensor(with_files, channels)
    yield "image=", ((given + 1) / 2).permute(0, 2, 3, 1).numpy()


def kinds():
    """(pictures, format, mode that is asked for, what comes out in [0, 1])."""
    colours = RNG.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    clear = np.concatenate([colours, np.full((3, 8, 8, 1), 255, np.uint8)], -1)
    clear[:, :4, :, 3] = 0
    on_black = np.where(clear[..., 3:] == 255, colours, 0)
    grey = RNG.integers(0, 200, (3, 8, 8), dtype=np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = [np.ascontiguousarray(np.rot90(picture)) for picture in colours]
    return {
        "16 bits": ([RAMP] * 3, "png", {}, None, np.stack([RAMP / 65535] * 3)[..., None]),
        "16 bits as L": ([RAMP] * 3, "png", {}, "L", np.stack([RAMP / 65535] * 3)[..., None]),
        "16 bits as RGB": ([RAMP] * 3, "png", {}, "RGB", np.stack([RAMP / 65535] * 3)[..., None].repeat(3, -1)),
        "int32 of 8 bits": (list(grey.astype(np.int32) + 56), "tiff", {}, None, (grey[..., None] + 56) / 255),
        "int32 of 12 bits": (
            list(grey.astype(np.int32) * 16),
            "tiff",
            {},
            None,
            grey[..., None].astype(int) * 16 / 4095,
        ),
        "floats": (list(grey / np.float32(255)), "tiff", {}, None, grey[..., None] / 255),
        "transparent": ([Image.fromarray(picture) for picture in clear], "png", {}, "RGB", on_black / 255),
        "CMYK": ([Image.fromarray(c).convert("CMYK") for c in colours], "tiff", {}, None, colours / 255),
        "one bit": ([Image.fromarray(g).convert("1") for g in grey], "png", {}, None, None),
        "turned": (turned, "png", {"exif": exif}, None, colours / 255),
    }


@pytest.mark.parametrize("kind", kinds())
def test_a_picture_is_the_same_by_every_way_in(folder, kind):
    pictures, suffix, saving, mode, expected = kinds()[kind]
    if kind == "one bit":
        expected = np.stack([np.asarray(picture) for picture in pictures])[..., None].astype(float)
    path = folder(pictures, suffix, **saving)
    for name, pixels in ways_in(path, expected.shape[-1], mode=mode):
        # Half a step of 8 bits, where it is kept in 8.
        np.testing.assert_allclose(pixels, expected, atol=0.51 / 255, err_msg=name)


def test_16_bits_after_many_of_8_are_scaled_and_end_nothing(folder, capsys):
    path = folder([RAMP_IN_8_BITS.astype(np.uint8)] * 70 + [RAMP])
    for mode in (None, "L"):
        data = prepare_images(path, mode=mode)
        np.testing.assert_array_equal(data.pixels[[70]][0, ..., 0], RAMP_IN_8_BITS)
    assert capsys.readouterr().err.count("left out") == 0


def test_a_float_picture_among_many_is_left_out_by_name_and_ends_nothing(folder, capsys):
    path = folder([RAMP_IN_8_BITS.astype(np.uint8)] * 30)
    Image.fromarray(np.full((16, 16), 200, np.float32)).save(f"{path}/odd.tif")
    assert len(prepare_images(path)) == 30
    err = capsys.readouterr().err
    assert f"image {path}/odd.tif left out: ValueError: float32 values must be in [0, 1], got [200, 200]" in err
    with pytest.raises(ValueError, match=r"1 of 31 images cannot be decoded, the first in .*/odd.tif .*max_bad_share"):
        prepare_images(path, max_bad_share=0)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16", "uint8", "bool"])
def test_columns_of_integers_are_read_in_the_range_that_they_have(tmp_path, dtype):
    top = 1 if dtype == "bool" else 255
    pixels = RNG.integers(0, top + 1, (4, 8, 8)).astype(dtype)
    data = prepare_images(parquet(tmp_path / "data", pixels.tolist(), datasets.Array2D((8, 8), dtype)))
    read = in_unit_range(data.pixels[np.arange(4)])[..., 0]
    if dtype == "uint16":  # which says that 65535 is white: it is said, and can be told otherwise
        np.testing.assert_allclose(read, pixels / 65535, atol=1e-9)
        assert "they are dark, unless --white_value 255 says what is white" in data.notes[0]
        data = prepare_images(str(tmp_path / "data"), white_value=255)
        read = in_unit_range(data.pixels[np.arange(4)])[..., 0]
    np.testing.assert_array_equal(read, pixels / top)
    assert data.dtype == np.uint8
    if dtype in ("int32", "int64"):
        assert data.notes == (
            f"255 is white in {dtype} pixels, of which the largest of the first 4 images is {pixels.max()}; "
            "--white_value says another",
        )


def test_12_bits_in_16_are_as_white_as_is_said_in_table_stream_and_evaluation(tmp_path, folder):
    pixels = RNG.integers(0, 4096, (5, 8, 8)).astype(np.uint16)
    path = folder(pixels)
    assert "--white_value 4095 says" in prepare_images(path).notes[0]
    for name, read in islice(ways_in(path, 1, white_value=4095), 4):
        np.testing.assert_allclose(read[..., 0], pixels / 4095, atol=0.51 / 255, err_msg=name)
    real = load_real_images(DataConfig(dataset_name=path, white_value=4095, cache_dir=str(tmp_path / "cache")))
    assert real.white == 4095
    np.testing.assert_allclose(real.train.images[:, 0] / 255, pixels / 4095, atol=0.51 / 255)


def test_values_beyond_those_of_the_first_pictures_are_a_fault_by_name(tmp_path):
    pixels = np.full((100, 4, 4), 255)
    pixels[80:] = 3000
    path = parquet(tmp_path / "data", pixels.tolist(), datasets.Array2D((4, 4), "int64"))
    with pytest.raises(
        ValueError, match=r"20 of 100 .* row 80 .*int64 values must be in \[0, 255\], got \[3000, 3000\]"
    ):
        prepare_images(path)
    data = prepare_images(path, white_value=3000)
    assert in_unit_range(data.pixels[[0, 99]]).max((1, 2, 3)).round(4).tolist() == [0.085, 1]


def test_held_out_images_are_as_white_as_those_trained_on(tmp_path):
    """The held-out ones alone would be taken for 10 bits."""
    folder, feature = tmp_path / "data", datasets.Array2D((4, 4), "int32")
    parquet(folder, np.full((3, 4, 4), 4000).tolist(), feature)
    rows = datasets.Dataset.from_dict(
        {"image": np.full((3, 4, 4), 1000).tolist()}, datasets.Features({"image": feature})
    )
    rows.to_parquet(folder / "test.parquet")
    real = load_real_images(DataConfig(dataset_name=str(folder), cache_dir=str(tmp_path / "cache")))
    assert real.train.images.unique().tolist() == [round(4000 / 4095 * 255)]
    assert real.held_out.images.unique().tolist() == [round(1000 / 4095 * 255)]


@pytest.mark.parametrize(
    "shape, first",
    [((3, 32, 32), True), ((1, 28, 28), True), ((4, 64, 64), True), ((3, 6, 9), True), ((32, 32, 3), False)]
    + [((28, 28, 1), False), ((4, 6, 5), False), ((7, 7, 5), False), ((28, 28), False), ((3, 9, 3), False)],
)
def test_channels_first_is_told_by_the_shape(shape, first):
    assert is_channels_first(shape) == first


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_arrays_with_their_channels_first_are_read_as_what_they_are(tmp_path, dtype):
    pixels = RNG.integers(0, 256, (3, 3, 6, 8), dtype=np.uint8)
    given = pixels if dtype == "uint8" else pixels / np.float32(255)
    data = prepare_images(parquet(tmp_path / "data", given.tolist(), datasets.Array3D((3, 6, 8), dtype)))
    assert (data.size, data.channels) == ((6, 8), 3)
    np.testing.assert_allclose(in_unit_range(data.pixels[[0, 1, 2]]), np.moveaxis(pixels, 1, -1) / 255, atol=1e-5)
    assert "arrays of shape (3, 6, 8) are read as (channels, height, width)" in data.notes


def test_arrays_of_floats_are_images_only_where_nothing_else_is(tmp_path):
    features = {"image": datasets.Array2D((4, 4), "uint8"), "depth": datasets.Array2D((4, 4), "float32")}
    rows = {"image": np.zeros((2, 4, 4), np.uint8).tolist(), "depth": np.full((2, 4, 4), 0.5).tolist()}
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "data" / "train.parquet")
    assert not prepare_images(str(tmp_path / "data")).pixels[[0]].any()
    depth = prepare_images(str(tmp_path / "data"), image_column="depth")
    np.testing.assert_allclose(in_unit_range(depth.pixels[[0]]), 0.5, atol=1e-5)
    rows["depth"] = np.full((2, 4, 4), 255.0).tolist()
    bad = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    bad.to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"float32 values must be in \[0, 1\], got \[255, 255\]"):
        prepare_images(str(tmp_path / "data"), image_column="depth")


def clear_and_opaque(num_clear, num_opaque):
    """Red, of which the first have nothing but transparent pixels."""
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 250
    clear = Image.fromarray(np.dstack([red, np.zeros((4, 4), np.uint8)]))
    return [clear] * num_clear + [Image.fromarray(red)] * num_opaque


def test_a_few_transparent_pictures_do_not_make_a_model_of_four_channels(folder):
    path = folder(clear_and_opaque(1, 9))
    data = prepare_images(path, pad_value=7)
    assert data.channels == 3 and (data.pixels[[0]] == 7).all()
    assert data.notes == (
        "1 of the first 10 images have an alpha channel: what is transparent shows 7 (--pad_value); --image_mode RGBA keeps "
        "it",
    )
    asked = prepare_images(path, mode="RGBA")
    assert asked.channels == 4 and (asked.pixels[[0]][..., 3] == 0).all()


def test_most_transparent_pictures_do_and_it_is_said(folder):
    path = folder(clear_and_opaque(9, 1))
    data = prepare_images(path)
    assert data.channels == 4 and (data.pixels[[9]][..., 3] == 255).all()
    assert data.notes == (
        "images are read with the alpha channel that 9 of the first 10 have; --image_mode RGB leaves it out",
    )


def test_a_transparent_picture_after_the_first_ones_shows_the_background(folder):
    data = prepare_images(folder(clear_and_opaque(0, 70) + clear_and_opaque(1, 0)), pad_value=9)
    assert (data.pixels[[70]] == 9).all()


@pytest.mark.parametrize(
    "dtype, white, pad_value, border", [(np.uint8, 255, 200, 200), (np.uint16, 65535, 40000, 40000)]
)
@pytest.mark.parametrize("prepare", [prepare_images, prepare_stream])
def test_a_border_is_in_the_range_of_the_images(folder, prepare, dtype, white, pad_value, border):
    path = folder([np.full((6, 6), white, dtype)] * 2)
    options = {"resolution": (8,), "resize_mode": "pad"}
    data = prepare(path, pad_value=pad_value, **options)
    picture = data.pixels[[0]][0] if prepare is prepare_images else next(iter(StreamReader(data, 0, 0, 1)))[0]
    assert picture[0, 0, 0] == border and picture[4, 4, 0] == white
    for wrong in (white + 1, -1):
        with pytest.raises(ValueError, match=rf"pad_value must be in the range .* \[0, {white}\], .* got {wrong}"):
            prepare(path, pad_value=wrong, **options)


def test_a_border_follows_the_white_of_the_images(folder):
    path = folder([np.full((6, 6), 4095, np.uint16)] * 2)
    options = {"resolution": (8,), "resize_mode": "pad", "white_value": 4095}
    data = prepare_images(path, pad_value=2047, **options)
    assert data.pixels[[0]][0, 0, 0, 0] == round(2047 * 65535 / 4095)
    real = RealImages(to_labelled_images(data), None, "x", "pad", (), whites=data.whites, white=data.white)
    assert read_image_folder(path, real, 2047)[0][0, 0, 0, :4].tolist() == [127] * 4
    with pytest.raises(ValueError, match=r"\[0, 4095\], of which 4095 is white, got 4096"):
        prepare_images(path, pad_value=4096, **options)
    # In 8 bits, as the mode asks for, the border is too.
    assert prepare_images(path, mode="L", pad_value=200, **options).pixels[[0]][0, 0, 0, 0] == 200


def test_a_picture_too_large_is_left_out_by_name_with_how_to_allow_it(folder, monkeypatch, capsys):
    path = folder([np.zeros((8, 8), np.uint8)] * 100)
    Image.fromarray(np.zeros((90, 90), np.uint8)).save(f"{path}/large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert len(prepare_images(path, resolution=(8,))) == 100
    err = capsys.readouterr().err
    assert f"image {path}/large.png left out" in err and "DIFFUSERS_EXT_MAX_IMAGE_PIXELS" in err
    monkeypatch.setenv("DIFFUSERS_EXT_MAX_IMAGE_PIXELS", "8100")
    assert len(prepare_images(path, resolution=(8,))) == 101


def test_damaged_files_of_a_folder_to_evaluate_are_named_and_left_out_as_in_training(folder, capsys):
    path = folder([np.full((8, 8), 40, np.uint8)] * 3)
    for name in ("000", "bad"):
        Path(path, f"{name}.png").write_bytes(b"no picture")
    real = RealImages(to_labelled_images(prepare_images("digits", max_samples=4)), None, "digits", "crop", ())
    with pytest.raises(
        ValueError, match=f"{path}/000.png cannot be decoded: UnidentifiedImageError.*, nor 1 more of 4"
    ):
        read_image_folder(path, real, max_bad_share=0.2)
    images, labels = read_image_folder(path, real, max_bad_share=0.5)
    assert images.shape == (2, 1, 8, 8) and images.unique().tolist() == [40] and labels is None
    assert capsys.readouterr().err.count("left out: ") == 2


@pytest.mark.parametrize("archive", [True, False])
def test_pictures_in_an_archive_are_read_like_others(tmp_path, folder, archive):
    """Those in a zip have a path that only `datasets` opens, and no bytes."""
    path = folder([RAMP] * 3)
    if archive:
        (tmp_path / "zipped").mkdir()
        shutil.make_archive(str(tmp_path / "zipped" / "train"), "zip", path)
        path = str(tmp_path / "zipped")
    for data in (prepare_images(path, mode="L"), prepare_images(path, mode="L", read_ahead=True)):
        np.testing.assert_array_equal(data.pixels[[0, 1, 2]][..., 0], np.stack([RAMP_IN_8_BITS] * 3))


def test_very_long_pictures_are_kept_no_longer_than_random_crops_need(folder):
    data = prepare_images(folder([np.zeros((2, 400), np.uint8)]), resolution=(16,), resize_mode="random_crop")
    assert [picture.shape for picture in data.pixels._pictures([0])] == [(16, 64, 1)]
    assert data.notes[0].endswith("of the middle where they are longer than 4 times that")
