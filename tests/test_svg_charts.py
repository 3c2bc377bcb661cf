import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from diffusers_ext.svg_charts import MAX_POINTS, Curve, line_chart, log_ticks, thinned, ticks


def parsed(chart):
    return ElementTree.fromstring(chart)


def values_of(chart):
    """The points of each curve, read back off the picture by the axes that it states."""
    svg = parsed(chart)
    left, right, top, bottom, x_low, x_high, y_low, y_high, is_log = map(float, svg.get("data-axes").split())
    curves = []
    for line in svg.iter("polyline"):
        x, y = np.array([pair.split(",") for pair in line.get("points").split()], dtype=float).T
        share = (bottom - y) / (bottom - top)
        values = y_low * (y_high / y_low) ** share if is_log else y_low + share * (y_high - y_low)
        curves.append(np.stack([x_low + (x - left) / (right - left) * (x_high - x_low), values], 1))
    return curves


@pytest.mark.parametrize(
    "points", [[(0, 1.0), (10, 3.0), (20, 2.0)], [(0, 5.0), (5, 0.02), (9, 0.3)], [(1, -2.0), (2, 7.0), (4, 0.0)]]
)
def test_the_values_can_be_read_off_the_picture(points):
    (read,) = values_of(line_chart([Curve("loss", points)], "Loss", "step"))
    expected = np.array(points)
    # Coordinates are rounded to a tenth of a unit, of some 200 of them to the height.
    span = math.log(5 / 0.02) * np.abs(expected[:, 1]) if (expected > 0)[:, 1].all() else np.full(3, 9.0)
    assert np.abs(read[:, 0] - expected[:, 0]).max() < 0.05
    assert (np.abs(read[:, 1] - expected[:, 1]) < 1e-3 * span + 1e-9).all()


def test_values_that_span_a_magnitude_are_drawn_on_a_logarithmic_axis_unless_zero_is_asked_for():
    curve = [Curve("rate", [(0, 1e-9), (1, 1e-3)])]
    assert parsed(line_chart(curve, "t", "x")).get("data-axes").endswith(" 1")
    axes = parsed(line_chart(curve, "t", "x", from_zero=True)).get("data-axes").split()
    assert axes[-1] == "0" and float(axes[6]) == 0.0


def test_values_that_are_not_finite_are_left_out():
    (read,) = values_of(
        line_chart([Curve("a", [(0, 1.0), (1, math.nan), (2, math.inf), (3, None), (4, 2.0)])], "t", "x")
    )
    assert read[:, 0] == pytest.approx([0, 4], abs=0.02)
    assert line_chart([Curve("a", [(0, math.nan)])], "t", "x") == "" == line_chart([], "t", "x")


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_single_point_is_a_dot_within_the_picture(value):
    (dot,) = parsed(line_chart([Curve("a", [(5, value)])], "t", "x")).iter("circle")
    assert 0 < float(dot.get("cx")) < 560 and 0 < float(dot.get("cy")) < 250


def test_a_long_curve_is_thinned_to_means_of_its_parts():
    points = [(step, math.sin(step)) for step in range(12 * MAX_POINTS)]
    xy = thinned(points)
    assert xy.shape == (MAX_POINTS, 2)
    assert xy[7] == pytest.approx(np.mean(points[84:96], axis=0))
    assert len(thinned(points[: MAX_POINTS + 1])) == MAX_POINTS


@pytest.mark.parametrize("low, high", [(0, 1), (0, 2000), (-7.3, 5.1), (1e-4, 3e-4), (1234, 1240)])
def test_ticks_are_a_few_round_numbers_within_the_range(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and low <= found[0] + 1e-9 and found[-1] <= high + 1e-9
    step = (found[1] - found[0]) / 10 ** math.floor(math.log10(found[1] - found[0]) + 1e-9)
    assert min(abs(step - round_one) for round_one in (1, 2, 5)) < 1e-6


@pytest.mark.parametrize("low, high", [(0.09, 0.5), (0.011, 2.0), (1e-9, 1e-3), (1e-30, 1e30)])
def test_logarithmic_ticks_are_a_few_within_the_range(low, high):
    found = log_ticks(low, high)
    assert 2 <= len(found) <= 12 and low <= found[0] and found[-1] <= high * (1 + 1e-9)


def test_any_text_is_a_text():
    hostile = "</svg><script>alert('1')</script>\"&"
    svg = parsed(line_chart([Curve(hostile, [(0, 1), (1, 2)]), Curve("b", [(0, 1)])], hostile, hostile))
    texts = [text.text for text in svg.iter("text")]
    assert texts.count(hostile) == 3 and svg.get("aria-label") == hostile
    assert {element.tag for element in svg.iter()} <= {"svg", "text", "line", "polyline", "circle"}
