import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.trainer.figures import draw_loss, labelled_grid


@pytest.mark.parametrize("channels, mode", [(1, "RGB"), (3, "RGB"), (4, "RGBA"), (5, "RGB")])
def test_grid_shows_every_pixel_enlarged_by_a_whole_number(channels, mode):
    rows = torch.rand(2, 3, channels, 8, 10, generator=torch.Generator().manual_seed(0))
    grid = labelled_grid(rows)
    assert grid.mode == mode and grid.size == (3 * (60 + 2) + 2, 2 * (48 + 2) + 2)
    pixels = np.asarray(grid)[50 + 2 : 50 + 50, 64 : 64 + 60]  # row 1, column 1
    expected = (
        (rows[1, 1].movedim(0, -1) * 255).round().to(torch.uint8).repeat_interleave(6, 0).repeat_interleave(6, 1)
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
