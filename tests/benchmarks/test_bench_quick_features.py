"""What choosing by another network costs is counted in the first one's distances."""

import pytest


@pytest.fixture(scope="module")
def bench(script):
    return script("bench_quick_features")


def test_the_cost_is_the_distance_of_what_is_chosen_over_the_least(bench):
    wanted = [4.0, 3.0, 2.0, 5.0]
    assert bench.compared(wanted, [8.0, 6.0, 4.0, 10.0]) == (pytest.approx(1.0), 1.0)
    correlation, cost = bench.compared(wanted, [-4.0, -3.0, -2.0, -5.0])
    assert (correlation, cost) == (pytest.approx(-1.0), 2.5)
    assert bench.row("without, 100", [(0.5, 1.25), (1.0, 1.0)], 9.6) == (
        "| without, 100 | 10 s | 0.50, 1.25 | 1.00, 1.00 |"
    )
    assert len(bench.GUIDANCES) == 8 and bench.GUIDANCES[0] == {"guidance_scale": 1.0}
