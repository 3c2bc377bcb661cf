"""Sequences as small multiples: a grid of curves on one scale, in which each row may have a name and each column a head."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor


_CELL = (110, 64)  # pixels of a curve
_GAP = 0.12  # of a cell, between it and the next
_DPI = 100
_NAMED_CHANNELS = 8  # whose ranges are written


def curve_grid(
    rows: Sequence[Tensor],
    names: Sequence[str] | None = None,
    heads: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """A PIL image of rows of curves. All are drawn on one scale, each channel on its own: the range is said at the foot.

    Args:
        rows: Tensors of shape `(columns, channels, length)`, in any unit.
        names: One for each row, on the left.
        heads: One for each column, above.
        title: Above all of it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    values = [row.detach().float().cpu().numpy() for row in rows]
    columns, channels = max(map(len, values)), values[0].shape[1]
    low, high = _range_of(values)
    middle, half = (low + high) / 2, np.where(high > low, (high - low) / 2, 1.0)
    foot = _describe_range(low, high)
    left = 0.0 if names is None else 0.1 * max(map(len, names), default=0) + 0.1
    above, below = 0.05 + 0.2 * (heads is not None) + 0.25 * (title is not None), 0.2
    size = (columns * _CELL[0] / _DPI + left + 0.05, len(values) * _CELL[1] / _DPI + above + below)
    figure = Figure(figsize=size, dpi=_DPI)
    figure.patch.set_facecolor("white")
    # One axes, whose unit is a cell: an axes for each would take seconds.
    axes = figure.add_axes(
        (left / size[0], below / size[1], 1 - (left + 0.05) / size[0], 1 - (above + below) / size[1])
    )
    axes.set(xlim=(0, columns), ylim=(len(values), 0))
    axes.axis("off")
    frames, zeros, lines = [], [], [[] for _ in range(channels)]
    for row, sequences in enumerate(values):
        for column, sequence in enumerate(sequences):
            frames.append(_frame(column, row))
            if channels == 1 and low[0] < 0 < high[0]:
                y = _y_in(row, -middle[0] / half[0])
                zeros.append([(column + _GAP / 2, y), (column + 1 - _GAP / 2, y)])
            x = column + _GAP / 2 + (1 - _GAP) * (np.arange(sequence.shape[1]) + 0.5) / sequence.shape[1]
            for channel, curve in enumerate(sequence):
                y = _y_in(row, np.clip((curve - middle[channel]) / half[channel], -1.05, 1.05))
                lines[channel].append(np.stack([x, y], 1))
    axes.add_collection(LineCollection(frames, colors="0.85", linewidths=0.8))
    axes.add_collection(LineCollection(zeros, colors="0.85", linewidths=0.5))
    for channel, curves in enumerate(lines):
        axes.add_collection(LineCollection(curves, colors=f"C{channel % 10}", linewidths=1.0))
    for row, name in enumerate(names or []):
        axes.text(-0.04, row + 0.5, name, ha="right", va="center", fontsize=9)
    for column, head in enumerate(heads or []):
        axes.text(column + 0.5, -0.06, head, ha="center", va="bottom", fontsize=9)
    axes.text(0, len(values) + 0.05, foot, ha="left", va="top", fontsize=7, color="0.3", clip_on=False)
    if title is not None:
        figure.text(0.5, 1 - 0.02 / size[1], title, ha="center", va="top", fontsize=9, wrap=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _range_of(values: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest value of each channel, of those that are finite."""
    joined = np.concatenate([each.transpose(1, 0, 2).reshape(each.shape[1], -1) for each in values], axis=1)
    joined = np.where(np.isfinite(joined), joined, np.nan)
    joined[np.isnan(joined).all(axis=1)] = 0.0
    return np.nanmin(joined, axis=1), np.nanmax(joined, axis=1)


def _describe_range(low: np.ndarray, high: np.ndarray) -> str:
    if len(low) == 1:
        return f"from {low[0]:.4g} to {high[0]:.4g}"
    each = [f"{a:.3g} to {b:.3g}" for a, b in zip(low[:_NAMED_CHANNELS], high[:_NAMED_CHANNELS], strict=True)]
    more = len(low) - len(each)
    return f"channels from {'; '.join(each)}" + (f"; {more} more" if more else "")


def _frame(column: int, row: int) -> list[tuple[float, float]]:
    x, y, end = column + _GAP / 2, row + _GAP / 2, 1 - _GAP
    return [(x, y), (x + end, y), (x + end, y + end), (x, y + end), (x, y)]


def _y_in(row: int, height: float | np.ndarray) -> float | np.ndarray:
    """Where in a row's cells a height in [-1, 1] is; the axis of the grid goes down."""
    return row + 0.5 - (0.5 - _GAP) * height


def are_sequences(rows: Sequence[Tensor]) -> bool:
    """Whether rows of a grid are sequences and not pictures."""
    return rows[0].ndim == 3
