import io
import zlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from diffusers_ext.pixels import (
    MAX_PIXELS,
    Whites,
    image_mode,
    lowest_white,
    open_picture,
    to_array,
    to_images,
    to_range,
)


RAMP = np.linspace(0, 65535, 16).astype(np.uint16)[None].repeat(2, 0)
IN_8_BITS = np.arange(16) * 17  # 65535 / 15 is 257 * 17


def stored(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_chunk(png, kind, content):
    """A PNG with one more chunk behind its header."""
    chunk = len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize(
    "mode, read_as",
    [("1", "L"), ("L", "L"), ("P", "RGB"), ("CMYK", "RGB"), ("LA", "LA"), ("La", "LA"), ("RGBa", "RGBA")]
    + [(mode, "I;16") for mode in ("I;16", "I;16B", "I;16L", "I", "F")],
)
def test_modes_are_read_as_what_they_show(mode, read_as):
    image = Image.new(mode, (3, 2))
    assert image_mode(image) == read_as
    for target, channels in {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "I;16": 1}.items():
        array = to_array(image, target)
        assert array.shape == (2, 3, channels) and array.dtype == (np.uint16 if target == "I;16" else np.uint8)


def test_a_mode_without_a_conversion_is_refused_by_its_name():
    with pytest.raises(ValueError, match="PIL's mode LAB are not read; convert them to L, RGB or RGBA"):
        image_mode(Image.new("LAB", (2, 2)))


@pytest.mark.parametrize("order", ["<u2", ">u2"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_16_bits_are_scaled_to_8_and_not_cut(order, mode):
    array = to_array(Image.fromarray(RAMP.astype(order)), mode)
    np.testing.assert_array_equal(array[0, :, 0], IN_8_BITS)
    if mode == "RGBA":
        assert (array[..., 3] == 255).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_kept_whatever_the_format(format):
    """PPM comes out of Pillow as mode I, whose values would say nothing of their range."""
    np.testing.assert_array_equal(to_array(open_picture(stored(Image.fromarray(RAMP), format)), "I;16")[..., 0], RAMP)
    dark = open_picture(stored(Image.fromarray(RAMP // 100), format))
    np.testing.assert_array_equal(to_array(dark, "I;16")[..., 0], RAMP // 100)


def test_8_bits_among_16_are_widened_exactly():
    array = to_array(Image.fromarray(IN_8_BITS[None].astype(np.uint8)), "I;16")
    np.testing.assert_array_equal(array[0, :, 0], RAMP[0])


@pytest.mark.parametrize(
    "largest, white", [(0, 1), (1, 1), (2, 255), (255, 255), (256, 1023), (4095, 4095), (4096, 16383)]
)
def test_integers_that_say_nothing_of_their_range_take_the_lowest_that_holds_them(largest, white):
    assert lowest_white(largest) == white
    values = np.array([[0, largest]])
    for dtype in (np.int32, np.int64, np.uint32):
        scaled = to_range(values.astype(dtype), np.uint8)
        assert scaled.tolist() == [[0, round(largest * 255 / white)]]


def test_types_that_say_their_range_are_not_judged_by_their_values():
    dark = np.array([[0, 200]])
    assert to_range(dark.astype(np.uint16), np.uint8).tolist() == [[0, 1]]
    assert to_range(dark.astype(np.uint8), np.uint16).tolist() == [[0, 200 * 257]]
    assert to_range(np.array([[False, True]]), np.uint8).tolist() == [[0, 255]]
    assert to_range(np.array([[0.0, 0.2, 1.0]], np.float32), np.uint8).tolist() == [[0, 51, 255]]


@pytest.mark.parametrize("top", [255, 65535])
@pytest.mark.parametrize("white", [1000, 4095, 65535])
def test_scaling_rounds_to_the_nearest(top, white):
    values = np.arange(white + 1).astype(np.uint16)
    scaled = to_range(values, np.dtype(np.uint8 if top == 255 else np.uint16), Whites(sixteen=white))
    assert np.abs(scaled - values * (top / white)).max() <= 0.5


def test_a_set_of_pictures_has_one_white():
    int64, uint16 = np.dtype(np.int64), np.dtype(np.uint16)
    whites = Whites.found({int64: 3000.0, uint16: 90.0})
    assert whites == Whites(sixteen=65535, integers=4095)
    assert to_range(np.array([[100]]), np.uint16, whites).tolist() == [[round(100 * 65535 / 4095)]]
    assert Whites.found({int64: 3000.0}, 10_000) == Whites(10_000, 10_000, 10_000)
    assert Whites.found({}) == Whites()


@pytest.mark.parametrize(
    "values, message",
    [
        (np.array([[-1, 3]]), r"int64 values must be in \[0, 255\], got \[-1, 3\]"),
        (np.array([[70000]]), r"int64 values must be in \[0, 65535\], got \[70000, 70000\]"),
        (
            np.array([[0.0, 255.0]]),
            r"float64 values must be in \[0, 1\], got \[0, 255\]: divide them, or .*white_value",
        ),
        (np.array([[np.nan, 1.0]]), r"float64 values must be in \[0, 1\], got \[nan, nan\]"),
        (np.array([[5000]], np.uint16), r"uint16 values must be in \[0, 4095\], got \[5000, 5000\]"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        to_range(values, np.uint8, Whites(sixteen=4095))


def transparent(kind):
    """A picture whose first pixel is opaque and grey 200, and whose second is transparent with a grey 100 behind."""
    grey = np.array([[200, 100]], np.uint8)
    match kind:
        case "LA":
            return Image.fromarray(np.stack([grey, np.array([[255, 0]], np.uint8)], -1), "LA")
        case "RGBA":
            return transparent("LA").convert("RGBA")
        case "tRNS of grey":
            return open_picture(stored(Image.fromarray(grey), transparency=100))
        case "tRNS of RGB":
            return open_picture(stored(Image.fromarray(grey).convert("RGB"), transparency=(100, 100, 100)))
        case "tRNS of a palette":
            return open_picture(stored(Image.fromarray(grey).convert("P"), transparency=100))
        case "tRNS of 16 bits":
            return open_picture(stored(Image.fromarray(grey.astype(np.uint16) * 257), transparency=100 * 257))


@pytest.mark.parametrize("kind", ["LA", "RGBA", "tRNS of grey", "tRNS of RGB", "tRNS of a palette", "tRNS of 16 bits"])
def test_transparent_pixels_show_the_background(kind):
    picture = transparent(kind)
    for mode, channels in {"L": 1, "RGB": 3}.items():
        assert to_array(picture, mode, background=30)[0].tolist() == [[200] * channels, [30] * channels]
    assert to_array(picture, "I;16", background=30 * 257)[0, :, 0].tolist() == [200 * 257, 30 * 257]
    if kind != "tRNS of 16 bits":  # which are read for their depth
        assert image_mode(picture).endswith("A")
        assert to_array(picture, "RGBA")[0, :, 3].tolist() == [255, 0]


def test_a_transparent_colour_of_16_bits_is_found_in_the_8_that_pillow_keeps():
    """Written by hand: Pillow writes no PNG of three channels in 16 bits."""

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    pixels = np.array([[[65535, 0, 257], [25700, 25700, 25700]]], ">u2")
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes([0, 0, 0, 2, 0, 0, 0, 1, 16, 2, 0, 0, 0]))
    png += chunk(b"tRNS", pixels[0, 1].tobytes()) + chunk(b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))
    picture = open_picture(png + chunk(b"IEND", b""))
    assert to_array(picture, "RGB", background=7).tolist() == [[[255, 0, 1], [7, 7, 7]]]
    assert to_array(picture, "RGBA").tolist() == [[[255, 0, 1, 255], [100, 100, 100, 0]]]


def test_photographs_are_turned_as_their_camera_was_held():
    """Orientation 6: the first row of the file is the right side of the picture."""
    upright = np.random.default_rng(0).integers(0, 65536, (6, 4)).astype(np.uint16)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for pixels, mode in ((upright, "I;16"), ((upright >> 8).astype(np.uint8), "L")):
        file = stored(Image.fromarray(np.ascontiguousarray(np.rot90(pixels))), exif=exif)
        np.testing.assert_array_equal(to_array(open_picture(file), mode)[..., 0], pixels)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_large_texts_in_a_png_are_passed_over(tmp_path, kind):
    """Two million letters, which Pillow refuses."""
    text = zlib.compress(b"a" * 2_000_000)
    content = b"Comment\0\0" + text if kind == b"zTXt" else b"Comment\0\1\0\0\0" + text
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    file = with_chunk(stored(Image.fromarray(pixels)), kind, content)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(file)).load()
    np.testing.assert_array_equal(open_picture(file), pixels)
    (tmp_path / "a.png").write_bytes(file)
    np.testing.assert_array_equal(open_picture(tmp_path / "a.png"), pixels)


def test_pictures_beyond_the_limit_of_pixels_are_refused_unless_allowed(monkeypatch):
    file = stored(Image.new("L", (40, 50)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 900)
    with pytest.raises(ValueError, match=f"2000 pixels.* set the environment variable {MAX_PIXELS} to as many"):
        open_picture(file)
    monkeypatch.setenv(MAX_PIXELS, "2000")
    assert open_picture(file).size == (40, 50) and Image.MAX_IMAGE_PIXELS == 900
    monkeypatch.setenv(MAX_PIXELS, "1999")
    with pytest.raises(ValueError, match=f"40x50 pixels, where {MAX_PIXELS} allows 1999"):
        open_picture(file)
    monkeypatch.setenv(MAX_PIXELS, "many")
    with pytest.raises(ValueError, match=f"{MAX_PIXELS} must be a number of pixels, got 'many'"):
        open_picture(file)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_pixels_of_either_type_are_images_from_minus_1_to_1(dtype, wide):
    top = torch.iinfo(dtype).max
    pixels = torch.arange(top + 1, dtype=torch.int32).to(dtype)
    images = to_images(pixels, wide)
    assert images.dtype == wide and images[0] == -1 and images[-1] == 1 and pixels.dtype == dtype
    expected = [2 * Fraction(value, top) - 1 for value in (1, top // 3, top // 2)]
    got = images[[1, top // 3, top // 2]]
    torch.testing.assert_close(got, torch.tensor([float(value) for value in expected], dtype=wide), rtol=0, atol=1e-7)
