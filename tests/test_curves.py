"""Grids of sequences: each curve in its cell, on one scale, with its row's name."""

import numpy as np
import torch

from diffusers_ext.curves import curve_grid
from diffusers_ext.figures import labelled_grid


def coloured(grid):
    """Where a pixel has a colour, as curves have and frames, names and heads have not."""
    pixels = np.asarray(grid).astype(int)
    return np.ptp(pixels, axis=-1) > 60


def test_a_grid_of_sequences_is_one_of_curves_on_one_scale():
    low, high = torch.full((1, 1, 8), -5.0), torch.full((1, 1, 8), 1000.0)
    there = coloured(labelled_grid([low, high]))
    height = there.shape[0] // 2
    rows = np.flatnonzero(there.any(1))
    # The lowest value lies at the foot of its cell, in the first row of the grid, the highest at the head of its own.
    assert rows.min() > 0.6 * height and rows.max() < 1.5 * height
    ramp = torch.linspace(0, 1, 50).expand(1, 1, -1)
    there = coloured(labelled_grid([ramp]))
    columns = np.flatnonzero(there.any(0))
    heights = [np.flatnonzero(there[:, column]).mean() for column in columns]
    assert len(columns) > 80 and heights[0] > heights[-1] + 30 and np.all(np.diff(heights) < 1.5)


def test_names_heads_and_a_title_make_room_for_themselves():
    rows = [torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))] * 2
    bare, full = curve_grid(rows), curve_grid(rows, ["a", "a long name"], ["t = 1", "t = 2", "t = 3"], "a title")
    assert full.width > bare.width + 50 and full.height > bare.height + 30
    assert abs(coloured(full).sum() / coloured(bare).sum() - 1) < 0.1


def test_a_value_that_is_none_leaves_a_gap_and_no_error():
    rows = [torch.tensor([[[0.0, 1.0, float("nan"), 1.0]], [[float("nan")] * 4]])]
    assert coloured(curve_grid(rows)).any()
    assert not coloured(curve_grid([torch.full((1, 1, 4), float("nan"))])).any()
