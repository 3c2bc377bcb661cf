import numpy as np
import pytest
from PIL import Image

from diffusers_ext.trainer.images import common_mode, fit, image_mode, to_array


def ramp(height, width, channels=1, dtype=np.uint8):
    """Values that rise evenly to the right, so that any resize keeps their mean."""
    top = np.iinfo(dtype).max // 2
    row = np.linspace(0, top, width)
    return np.broadcast_to(row[None, :, None], (height, width, channels)).astype(dtype)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_shrinking_keeps_the_mean_and_the_channels(channels, dtype):
    picture = ramp(40, 40, channels, dtype)
    if channels in (2, 4) and dtype == np.uint8:
        picture = picture.copy()
        picture[..., -1] = 255  # opaque: where alpha is 0 the colour means nothing
    small = fit(picture, (10, 10), "crop")
    assert small.shape == (10, 10, channels) and small.dtype == dtype
    np.testing.assert_allclose(small.mean((0, 1)), picture.mean((0, 1)), rtol=0.03)


def test_padding_centres_the_very_pixels():
    picture = np.random.default_rng(0).integers(0, 256, (28, 26, 1), dtype=np.uint8)
    padded = fit(picture, (32, 33), "pad", pad_value=7)
    np.testing.assert_array_equal(padded[2:30, 3:29], picture)
    padded[2:30, 3:29] = 7
    assert (padded == 7).all()


def test_padding_shrinks_what_is_too_large_and_keeps_its_aspect():
    padded = fit(np.full((20, 40, 3), 200, np.uint8), (16, 16), "pad", pad_value=0)
    assert (padded[4:12] == 200).all() and (padded[:4] == 0).all() and (padded[12:] == 0).all()


def test_cropping_cuts_both_sides_alike():
    picture = np.zeros((10, 30, 1), np.uint8)
    picture[:, 10:20] = 255
    np.testing.assert_array_equal(fit(picture, (10, 10), "crop"), np.full((10, 10, 1), 255))


def test_cropping_enlarges_what_is_too_small():
    assert fit(ramp(4, 8), (8, 8), "crop").shape == (8, 8, 1)


def test_stretching_uses_all_of_the_picture():
    picture = np.zeros((10, 30, 1), np.uint8)
    picture[:, :15] = 255
    stretched = fit(picture, (10, 10), "stretch")
    assert (stretched[:, :4] == 255).all() and (stretched[:, 6:] == 0).all()


def test_unknown_resize_mode_names_the_choices():
    with pytest.raises(ValueError, match="resize_mode must be one of crop, random_crop, pad, stretch, got 'squash'"):
        fit(ramp(4, 4), (8, 8), "squash")


def test_transparent_pixels_show_the_background():
    picture = Image.new("RGBA", (2, 1), (200, 10, 10, 255))
    picture.putpixel((1, 0), (200, 10, 10, 0))
    np.testing.assert_array_equal(to_array(picture, "RGB", background=255)[0], [[200, 10, 10], [255, 255, 255]])
    np.testing.assert_array_equal(to_array(picture, "RGBA")[0, 1, 3], 0)


@pytest.mark.parametrize(
    "mode, read_as",
    [("1", "L"), ("L", "L"), ("P", "RGB"), ("CMYK", "RGB"), ("LA", "LA"), ("I;16", "I;16"), ("I", "I;16")],
)
def test_modes_are_read_as_what_they_show(mode, read_as):
    assert image_mode(Image.new(mode, (2, 2))) == read_as


def test_16_bits_are_kept():
    values = np.array([[0, 300], [40000, 65535]], np.uint16)
    np.testing.assert_array_equal(to_array(Image.fromarray(values), "I;16")[..., 0], values)


def test_common_mode_loses_nothing():
    assert common_mode({"L"}) == "L"
    assert common_mode({"L", "RGB"}) == "RGB"
    assert common_mode({"LA", "RGB"}) == "RGBA"
    with pytest.raises(ValueError, match="16 and of 8 bits do not go together"):
        common_mode({"I;16", "L"})
