import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.figures import draw_loss, enlarged, labelled_grid
from diffusers_ext.lettering import font_of, wrapped
from diffusers_ext.recipes.sample_grids import draw_denoising
from tiny_vae import tiny_vae


@pytest.mark.parametrize("channels, mode", [(1, "RGB"), (3, "RGB"), (4, "RGBA"), (5, "RGB")])
def test_grid_shows_every_pixel_enlarged_by_a_whole_number(channels, mode):
    rows = torch.rand(2, 3, channels, 8, 10, generator=torch.Generator().manual_seed(0))
    grid = labelled_grid(rows)
    assert grid.mode == mode and grid.size == (3 * (80 + 2) + 2, 2 * (64 + 2) + 2)
    pixels = np.asarray(grid)[66 + 2 : 66 + 66, 84 : 84 + 80]  # row 1, column 1
    expected = (
        (rows[1, 1].movedim(0, -1) * 255).round().to(torch.uint8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    )
    shown = expected if channels in (3, 4) else expected[..., :1].expand(-1, -1, 3)
    np.testing.assert_array_equal(pixels, shown.numpy())


def test_names_and_heads_get_room_of_their_own():
    rows = torch.zeros(2, 3, 1, 64, 64)
    plain = labelled_grid(rows)
    named = labelled_grid(rows, names=["a rather long name", "b"], heads=["t = 999", "t = 500", "t = 0"])
    assert named.width > plain.width + 60 and named.height > plain.height + 10
    pictures = np.asarray(named.convert("L")) == 0
    assert pictures[-3, -3] and not pictures[-3, :5].any()


def test_a_title_gets_room_above_all():
    rows = torch.zeros(2, 3, 1, 64, 64)
    plain, titled = labelled_grid(rows), labelled_grid(rows, title="what these are, in more than one line of letters")
    assert titled.width == plain.width and titled.height > plain.height + 30
    title = np.asarray(titled.convert("L"))[: -plain.height]
    assert 0.01 < (title < 128).mean() < 0.3  # letters


@pytest.mark.parametrize("size, zoom", [((8, 8), 8), ((28, 28), 3), ((64, 64), 1), ((100, 20), 4), ((200, 300), 1)])
def test_small_pictures_are_enlarged_pixel_by_pixel(size, zoom):
    pixels = np.random.default_rng(0).integers(0, 256, size[::-1], dtype=np.uint8)
    np.testing.assert_array_equal(enlarged(Image.fromarray(pixels)), pixels.repeat(zoom, 0).repeat(zoom, 1))


@pytest.mark.parametrize("text", ["Ångström", "Šnek", "Ελληνικά", "Русский", "naïve café", "20 € – ½"])
def test_letters_beyond_ascii_are_drawn_and_not_as_boxes(text):
    shown, font = font_of(text, 14)
    assert shown == text
    box = bytes(font.getmask("\U0010ffff"))  # which no font has
    assert all(bytes(font.getmask(letter)) != box for letter in text if letter != " ")


def test_letters_that_no_font_has_are_escaped():
    assert font_of("a\U0010ffffb", 14)[0] == "a\\U0010ffffb"


def test_long_names_are_broken_into_lines_and_cut():
    text = "a very long caption of a red heart with an arrow through it and incomprehensibilities-of-one-word"
    _, font = font_of(text, 14)
    lines = wrapped(text, font, 100, 99).split("\n")
    assert max(map(font.getlength, lines)) <= 100
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = wrapped(text, font, 100, 2).split("\n")
    assert cut[0] == lines[0] and cut[1].endswith("…") and font.getlength(cut[1]) <= 100
    assert wrapped("short", font, 100, 1) == "short" and wrapped("", font, 100, 1) == ""
    grid = labelled_grid(torch.zeros(1, 2, 1, 64, 64), [text * 5])
    assert grid.width < 2 * 66 + 260


@pytest.mark.parametrize("in_latents", [True, False])
def test_the_denoising_strip_ends_in_the_picture(tmp_path, in_latents):
    """At the last step DDIM goes to the predicted x_0; in latents it is a picture after decoding only."""
    channels, side = (4, 4) if in_latents else (3, 8)
    torch.manual_seed(0)
    unet = UNetModel(
        sample_size=side, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1
    )
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = tiny_vae(scaling_factor=1.0) if in_latents else None
    scheduler = ExtDDIMScheduler(clip_sample=not in_latents, timestep_spacing="trailing")
    pipe = GuidedDiffusionPipeline(unet, scheduler, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    draw_denoising(pipe, tmp_path / "strip.png", num_inference_steps=3, columns=3, seed=1)
    last = pipe(num_inference_steps=3, generator=[torch.Generator().manual_seed(1)]).images[0]
    strip = np.asarray(Image.open(tmp_path / "strip.png").convert("RGB"), int)
    # A head is wider than the picture, which stands in the middle below it.
    corner = strip[-66:-2, -76:]
    shown = np.asarray(enlarged(last), int)
    starts = [x for x in range(13) if np.abs(corner[:, x : x + 64] - shown).max() <= 1]
    assert len(starts) == 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_few_points_of_a_short_run_can_be_seen(tmp_path, count):
    records = [{"step": step + 1, "loss": 0.5 + 0.01 * step, "learning_rate": 1e-3} for step in range(count)]
    draw_loss(records, tmp_path / "loss.png")
    curve = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"), int)
    blue, orange = (curve[..., 2] > curve[..., 0] + 80), (curve[..., 0] > curve[..., 2] + 80)
    legend = 100  # pixels of its blue line and dot, about
    assert blue.sum() > legend + 20 * count and orange.sum() > 20 * count


def test_loss_curve_is_drawn(tmp_path):
    records = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3} for step in range(1, 50)]
    draw_loss(records, tmp_path / "loss.png")
    draw_loss(records[:1], tmp_path / "one.png")
    curve, one = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("loss.png", "one.png"))
    blue = (curve[..., 2] > 120) & (curve[..., 0] < 100)
    assert blue.any(0).mean() > 0.6  # the curve runs through most columns
    assert curve.shape == one.shape


@pytest.mark.parametrize("number", [1, 2, 5])
def test_few_losses_are_points_that_can_be_seen(tmp_path, number):
    """In the upper axes in the loss's colour, one blot for each, and in the lower ones in that of the learning rate."""
    records = [{"step": 20 * (i + 1), "loss": 2.0 - i / 10, "learning_rate": 1e-3} for i in range(number)]
    draw_loss(records, tmp_path / "loss.png")
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB")).astype(int)
    for colour in ((31, 119, 180), (255, 127, 14)):  # matplotlib's C0 and C1
        is_ink = (abs(picture - colour).max(-1) < 40).sum(0)
        # The line of the legend, if any, is thinner than a point.
        starts = (np.diff((is_ink >= 5).astype(int)) == 1).sum()
        assert number <= starts <= number + 1, (colour, starts)


def test_a_run_without_losses_has_no_curve(tmp_path):
    draw_loss([], tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())
