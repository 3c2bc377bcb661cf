import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffusers_ext.data.images import LONGEST, RESIZE_MODES, common_mode, cover, fit


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


def test_common_mode_is_in_colour_if_any_is_and_else_what_most_are():
    assert common_mode(["L"]) == "L"
    assert common_mode(["L", "L", "RGB"]) == "RGB"
    assert common_mode(["LA", "RGB"]) == "RGB"
    assert common_mode(["LA", "RGB", "RGBA"]) == "RGBA"
    assert common_mode(["RGB"] * 63 + ["RGBA"]) == "RGB"
    assert common_mode(["I;16", "I;16", "L"]) == "I;16"
    assert common_mode(["I;16", "L"]) == "L"


@pytest.mark.parametrize("shape", [(1, 2000, 3), (2000, 1, 1), (1, 300, 5)])
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_a_thin_picture_takes_no_more_than_itself_and_what_comes_out(shape, resize_mode):
    """Scaled to cover before it is cut, 1x2000 at 256 is a picture of 256x512000."""
    picture = ramp(*shape)
    tracemalloc.start()
    fitted = fit(picture, (256, 256), resize_mode)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert fitted.shape == (256, 256, shape[2])
    assert peak < 30 * fitted.nbytes  # floats of several channels, and copies of them
    assert cover(picture, (256, 256)).nbytes <= LONGEST * fitted.nbytes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape, size", [((30, 90), (10, 10)), ((20, 33), (31, 40)), ((5, 80), (16, 24))])
def test_cutting_before_scaling_is_scaling_before_cutting(shape, size, dtype):
    """By Pillow's own `ImageOps.fit`, which cuts the same part, of pictures smooth enough that rounding is all."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    top = np.iinfo(dtype).max
    picture = (top * (0.5 + 0.2 * np.sin(rows / 9) + 0.2 * np.cos(columns / 7))).astype(dtype)
    fitted = fit(picture[..., None], size, "crop")[..., 0]
    whole = Image.fromarray(picture.astype(np.float32))
    by_pillow = np.asarray(ImageOps.fit(whole, size[::-1], Image.Resampling.BICUBIC))
    # The covering picture has whole sides, which moves an edge by up to half a pixel of the result.
    assert np.abs(fitted - by_pillow).max() < 0.03 * top


def test_random_crops_are_of_the_middle_of_what_is_very_long():
    picture = np.broadcast_to(np.arange(100, dtype=np.uint8)[None, :, None], (8, 100, 1))
    kept = cover(picture, (8, 8))
    np.testing.assert_array_equal(kept[0, :, 0], np.arange(34, 66))  # 4 times 8, as they are
    np.testing.assert_array_equal(cover(picture[:, :32], (8, 8)), picture[:, :32])
