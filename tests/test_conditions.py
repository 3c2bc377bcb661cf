"""Condition images: how they are made, and what a network sees of them."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.conditions import (
    ImageCondition,
    add_condition_noise,
    line_art,
    lower_resolution,
    luma,
    parse_condition,
)


def images(*shape):
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1


def test_low_resolution_is_the_mean_of_squares_and_is_shown_as_squares():
    condition = ImageCondition.parse("lowres:4", 3, (8, 16))
    made = condition.of_images(full := images(2, 3, 8, 16))
    assert made.shape == (2, 3, 2, 4) and condition.size == (2, 4) and condition.channels == 3
    torch.testing.assert_close(made[1, 2, 1, 3], full[1, 2, 4:8, 12:16].mean())
    shown = condition.shown(made)
    assert shown.shape == full.shape
    torch.testing.assert_close(lower_resolution(shown, 4), made)


def test_grey_is_the_luma_of_pil_and_keeps_alpha():
    pixels = np.random.default_rng(0).integers(256, size=(6, 5, 3)).astype(np.uint8)
    expected = torch.from_numpy(np.asarray(Image.fromarray(pixels).convert("L")).copy()).float() / 127.5 - 1
    rgb = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(luma(rgb)[0, 0], expected, rtol=0, atol=1.5 / 127.5)  # PIL rounds to bytes
    rgba = torch.cat([rgb, images(1, 1, 6, 5)], 1)
    assert torch.equal(luma(rgba)[:, 1:], rgba[:, 3:]) and torch.equal(luma(rgba)[:, :1], luma(rgb))
    assert ImageCondition.parse("grey", 4, (6, 5)).channels == 2


def test_line_art_is_black_where_any_channel_steps_and_white_elsewhere():
    picture = torch.full((1, 3, 9, 9), -1.0)
    picture[:, 1, :, 5:] = 1  # a step from black to white in green alone
    lines = line_art(picture)
    assert lines.shape == (1, 1, 9, 9)
    assert (lines[..., 4:6] == -1).all() and (lines[..., :4] == 1).all() and (lines[..., 6:] == 1).all()
    torch.testing.assert_close(line_art(0.1 * picture)[0, 0, 3, 4], torch.tensor(1 - 2 * 2 * 0.1))
    torch.testing.assert_close(line_art(picture.transpose(2, 3)), lines.transpose(2, 3))
    assert (line_art(torch.full((1, 4, 8, 8), 0.3)) == 1).all()


def test_noise_of_a_level_keeps_unit_variance():
    clean, eps, level = images(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.6, 1.0])
    noised = add_condition_noise(clean, eps, level)
    torch.testing.assert_close(noised, torch.stack([clean[0], 0.8 * clean[1] + 0.6 * eps[1], eps[2]]))


def test_a_latent_sees_each_pixel_that_it_stands_for():
    condition = ImageCondition.parse("edges", 3, (8, 8))
    made = condition.of_images(images(2, 3, 8, 8))
    seen = condition.for_network(made, (4, 4))
    assert seen.shape == (2, condition.network_channels((4, 4)), 4, 4) == (2, 4, 4, 4)
    assert torch.equal(seen[0, :, 1, 2], made[0, 0, 2:4, 4:6].flatten())
    assert torch.equal(condition.for_network(made, (8, 8)), made)
    with pytest.raises(ValueError, match="images of 8x8 must be a multiple of the samples, 3x3"):
        condition.for_network(made, (3, 3))


def test_a_condition_is_saved_as_plain_values():
    condition = ImageCondition.parse("lowres:2", 1, (8, 4), noise=0.3)
    config = condition.to_config()
    assert config["image_size"] == [8, 4] and ImageCondition.of_config(config) == condition
    assert condition.describe() == "images of low resolution of 4x2 in 1 channel"
    with pytest.raises(ValueError, match="image_condition must be a dict of kind"):
        ImageCondition.of_config({"kind": "grey"})


@pytest.mark.parametrize("text", ["lowres", "lowres:1", "lowres:x", "lowres:-2", "gray", "grey:2", "given", ""])
def test_other_conditions_are_refused(text):
    with pytest.raises(ValueError, match="condition must be lowres:K with K of at least 2, grey or edges, got"):
        parse_condition(text)


def test_conditions_that_images_do_not_have_are_refused():
    with pytest.raises(ValueError, match="condition grey needs images of colour, of 3 or 4 channels, got 1"):
        ImageCondition.parse("grey", 1, (8, 8))
    with pytest.raises(ValueError, match="condition lowres:3 needs images whose sides it divides, got 8x9"):
        ImageCondition.parse("lowres:3", 1, (8, 9))
    with pytest.raises(ValueError, match="made from images of 1 channels of 8x8, got 1 channels of 8x16"):
        ImageCondition.parse("edges", 1, (8, 8)).of_images(images(1, 1, 8, 16))
    with pytest.raises(ValueError, match="cannot be made from an image: it was trained with those of a column"):
        ImageCondition("given", 1, 3, (8, 8)).of_images(images(1, 3, 8, 8))
