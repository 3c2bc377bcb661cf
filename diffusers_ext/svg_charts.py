"""Line charts as SVG text, small and without a library: for pages that are written again and again while a run goes on.

Colours and line widths are classes (`c0`, `c1`, ..., `faint`, `axis`, `grid`), which the page's style sheet fills in.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np


WIDTH, HEIGHT = 560, 250  # units of the view box
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 24, 34, 40  # around the area of the curves
NUM_COLOURS = 6
MAX_POINTS = 400  # of a curve; longer ones are drawn as means of neighbours
_LOG_FROM = 4  # times that the largest value is the smallest
_TICKS = 5


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: In the legend.
        points: `(x, y)` in order of x; those that are not finite are left out.
        faint: Drawn thin and pale, in the colour of the curve after it, and without a name in the legend.
    """

    name: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


def line_chart(curves: Sequence[Curve], title: str, x_label: str, *, from_zero: bool = False) -> str:
    """An `<svg>` element of curves on common axes; the y axis is logarithmic where values above 0 span some magnitude.

    The element's `data-axes` has what a script needs to read values off it: the box of the curves (left, right, top, bottom),
    the ranges of x and y in it, and whether y is logarithmic. Without a finite point there is no chart, but an empty text.

    Args:
        curves: At most `NUM_COLOURS` that are not faint; names, title and label may be any text.
        from_zero: Draw a linear y axis that begins at 0 or below.
    """
    points = [thinned(curve.points) for curve in curves]
    joined = np.concatenate(points) if points else np.empty((0, 2))
    if not len(joined):
        return ""
    (x_low, y_low), (x_high, y_high) = joined.min(axis=0), joined.max(axis=0)
    if from_zero:
        y_low = min(0.0, y_low)
    is_log = y_low > 0 and y_high > _LOG_FROM * y_low
    x_low, x_high = _widened(x_low, x_high)
    y_low, y_high = _with_margin(y_low, y_high, is_log)
    axes = _Axes(x_low, x_high, y_low, y_high, is_log)
    parts = [axes.opening(title), f'<text class="title" x="{_LEFT}" y="14">{escape(title)}</text>']
    parts += _grid(axes, x_label)
    colour, legend = 0, []
    for curve, xy in zip(curves, points, strict=True):
        if len(xy):
            parts.append(_line(axes, xy, f"c{colour % NUM_COLOURS}" + " faint" * curve.faint, curve.name))
        if not curve.faint:
            legend.append((f"c{colour % NUM_COLOURS}", curve.name))
            colour += 1
    if len(legend) > 1:
        parts += _legend(legend)
    return "".join([*parts, "</svg>"])


def thinned(points: Iterable[tuple[float, float]]) -> np.ndarray:
    """The finite points of a curve, shape `(points, 2)`; of more than `MAX_POINTS`, means over runs of equal length."""
    xy = np.array([(x, math.nan if y is None else y) for x, y in points], dtype=float).reshape(-1, 2)
    xy = xy[np.isfinite(xy).all(axis=1)]
    if len(xy) <= MAX_POINTS:
        return xy
    starts = np.linspace(0, len(xy), MAX_POINTS, endpoint=False).astype(int)
    counts = np.diff([*starts, len(xy)])
    return np.add.reduceat(xy, starts, axis=0) / counts[:, None]


def ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Round numbers in [low, high]: multiples of 1, 2 or 5 times a power of ten, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], and of a narrow range also round multiples of them."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    each = (1, 1.5, 2, 3, 5, 7) if high < 15 * low else (1, 2, 5) if len(powers) <= 4 else (1,)
    step = max(1, len(powers) // 8)
    found = [factor * 10.0**power for power in powers if power % step == 0 for factor in each]
    return [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


@dataclass(frozen=True)
class _Axes:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    is_log: bool

    def x(self, value):
        return _LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value):
        low, high, value = (np.log(each) if self.is_log else each for each in (self.y_low, self.y_high, value))
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def opening(self, title: str) -> str:
        box = (_LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM)
        ranges = (self.x_low, self.x_high, self.y_low, self.y_high)
        data = " ".join([*map(str, box), *(f"{value:.6g}" for value in ranges), str(int(self.is_log))])
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" data-axes="{data}" '
            f'aria-label="{escape(title, quote=True)}">'
        )


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is no single number."""
    return (low, high) if high > low else (low - max(1.0, abs(low) / 2), high + max(1.0, abs(high) / 2))


def _with_margin(low: float, high: float, is_log: bool) -> tuple[float, float]:
    if is_log:
        margin = (high / low) ** 0.05
        return low / margin, high * margin
    if high == low:
        low, high = low - max(abs(low) / 10, 1e-12), high + max(abs(high) / 10, 1e-12)
    margin = (high - low) * 0.06
    return min(low, max(0.0, low - margin)) if low >= 0 else low - margin, high + margin


def _grid(axes: _Axes, x_label: str) -> list[str]:
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    at_y = log_ticks(axes.y_low, axes.y_high) if axes.is_log else ticks(axes.y_low, axes.y_high)
    parts = []
    for value in at_y:
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{value:.4g}</text>')
    for value in ticks(axes.x_low, axes.x_high):
        x = axes.x(value)
        parts.append(f'<text class="tick" text-anchor="middle" x="{x:.1f}" y="{bottom + 16}">{_plain(value)}</text>')
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text class="tick" text-anchor="middle" x="{middle}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    return parts


def _plain(value: float) -> str:
    """A step as people write it: 12000, not 1.2e+04."""
    return f"{value:.0f}" if value == round(value) and abs(value) < 1e9 else f"{value:.4g}"


def _line(axes: _Axes, xy: np.ndarray, classes: str, name: str) -> str:
    x, y = axes.x(xy[:, 0]), axes.y(xy[:, 1])
    label = f'data-name="{escape(name, quote=True)}"'
    if len(xy) == 1:
        return f'<circle class="{classes}" {label} cx="{x[0]:.1f}" cy="{y[0]:.1f}" r="3"/>'
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<polyline class="{classes}" {label} points="{points}"/>'


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    """Names from the right edge to the left, on the line under the title."""
    parts, x = [], WIDTH - _RIGHT
    for colour, name in reversed(entries):
        parts.append(f'<text class="tick" text-anchor="end" x="{x:.0f}" y="28">{escape(name)}</text>')
        x -= 6.2 * len(name) + 6
        parts.append(f'<line class="{colour}" x1="{x - 16:.0f}" x2="{x:.0f}" y1="24" y2="24"/>')
        x -= 28
    return parts
