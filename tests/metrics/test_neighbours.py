import numpy as np
import pytest
import torch

from diffusers_ext.metrics import density_coverage, nearest_distances, precision_recall


def by_definition(real, generated, k):
    """Eqs. 1-3 of the paper as loops over single points."""

    def distance(p, q):
        return np.sqrt(((p - q) ** 2).sum())

    def share(points, centres):
        radii = [
            sorted(distance(centre, other) for j, other in enumerate(centres) if j != i)[k - 1]
            for i, centre in enumerate(centres)
        ]
        inside = [any(distance(p, c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        return np.mean(inside)

    real, generated = real.double().numpy(), generated.double().numpy()
    return share(generated, real), share(real, generated)


def normal(count, dim, seed, scale=1.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("num_real, num_generated, dim", [(40, 60, 2), (60, 25, 10)])
def test_equals_the_definition(k, num_real, num_generated, dim):
    real, generated = normal(num_real, dim, 0), normal(num_generated, dim, 1, scale=0.8) + 0.3
    expected = by_definition(real, generated, k)
    assert 0 < expected[0] < 1 or 0 < expected[1] < 1  # the case tells something
    assert tuple(precision_recall(real, generated, k)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chunk_elements", [1, 100, 1000])
def test_chunks_do_not_change_the_result(monkeypatch, chunk_elements):
    real, generated = normal(70, 6, 0), normal(50, 6, 1)
    whole = precision_recall(real, generated)
    distances = nearest_distances(generated, real)
    monkeypatch.setattr("diffusers_ext.metrics.neighbours.CHUNK_ELEMENTS", chunk_elements)
    assert precision_recall(real, generated) == whole
    torch.testing.assert_close(nearest_distances(generated, real), distances, rtol=1e-12, atol=0)


def test_identical_sets_are_perfect():
    points = normal(30, 4, 0)
    assert precision_recall(points, points.flip(0)) == (1.0, 1.0)


def test_distant_sets_share_nothing():
    points = normal(30, 4, 0)
    assert precision_recall(points, points + 1000) == (0.0, 0.0)


def test_one_mode_of_two_has_full_precision_and_half_recall():
    points = normal(40, 4, 0)
    both = torch.cat([points, points + 1000])
    assert precision_recall(both, points) == (1.0, 0.5)
    assert precision_recall(points, both) == (0.5, 1.0)


def test_repeated_points_are_on_the_edge_of_a_ball_of_radius_zero():
    """Rounding must not push them out."""
    points = normal(20, 500, 0).double() + 10
    repeated = points.repeat(3, 1)
    assert precision_recall(repeated, repeated.flip(0), k=2) == (1.0, 1.0)
    assert precision_recall(repeated, points.repeat_interleave(4, 0), k=2) == (1.0, 1.0)
    assert precision_recall(repeated, repeated + 1e-3, k=2) == (0.0, 0.0)


def test_points_on_the_edge_of_a_ball_are_inside():
    """On a grid each ball of k=2 reaches to the next point, so the points one step outside the grid are on edges."""
    steps = torch.arange(7, dtype=torch.float64) * 0.1 + 0.3
    grid = torch.cartesian_prod(steps[:-1], steps)
    assert precision_recall(grid, torch.cartesian_prod(steps[-1:], steps), k=2).precision == 1.0
    assert precision_recall(grid, torch.cartesian_prod(steps[-1:] + 1e-6, steps), k=2).precision == 0.0


def test_a_common_shift_changes_nothing():
    real, generated = normal(60, 5, 0).double(), normal(60, 5, 1).double()
    assert precision_recall(real + 1e4, generated + 1e4) == precision_recall(real, generated)


def test_nearest_distances_equal_cdist():
    points, reference = normal(20, 7, 0), normal(30, 7, 1)
    expected = torch.cdist(points.double(), reference.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    torch.testing.assert_close(nearest_distances(points, reference), expected, rtol=1e-10, atol=0)
    assert nearest_distances(reference[:3], reference).max() < 1e-6


@pytest.mark.parametrize(
    "real, generated, k, message",
    [
        (normal(5, 2, 0), normal(9, 2, 0), 5, "at least 6 real images, got 5"),
        (normal(9, 2, 0), normal(5, 2, 0), 5, "at least 6 generated images, got 5"),
        (normal(9, 2, 0), normal(9, 3, 0), 5, "same features, got 2 and 3"),
        (normal(9, 2, 0), normal(9, 2, 0), 0, "k must be at least 1, got 0"),
        (normal(9, 2, 0)[None], normal(9, 2, 0), 5, r"real must have shape \(number, dim\), got \(1, 9, 2\)"),
        (normal(9, 2, 0), normal(9, 2, 0) / 0, 5, "generated must be finite"),
    ],
)
def test_bad_input_is_refused(real, generated, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, generated, k)


@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_equal_their_definition(k):
    real, generated = normal(40, 3, 0), normal(30, 3, 1, scale=0.8) + 0.3
    distances = (real[:, None].double() - generated.double()).norm(dim=2)
    own = (real[:, None].double() - real.double()).norm(dim=2).fill_diagonal_(torch.inf)
    inside = distances <= own.sort(1).values[:, k - 1, None]
    density, coverage = density_coverage(real, generated, k)
    assert density == pytest.approx(inside.sum().item() / (k * 30), rel=1e-12)
    assert coverage == pytest.approx(inside.any(1).double().mean().item(), rel=1e-12)

    weights = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weighted = density_coverage(real, generated, k, weights)
    share = weights / weights.sum()
    assert weighted.density == pytest.approx(((inside.sum(1) * share).sum() * 40 / (k * 30)).item(), rel=1e-12)
    assert weighted.coverage == pytest.approx(share[inside.any(1)].sum().item(), rel=1e-12)


def test_density_and_coverage_of_one_law_are_one_and_nearly_one():
    """With as many points in each set, a ball of k neighbours stays empty with probability 2^-k."""
    density, coverage = density_coverage(normal(1500, 2, 0), normal(1500, 2, 1), k=3)
    assert density == pytest.approx(1, abs=0.06)
    assert coverage == pytest.approx(1 - 2**-3, abs=0.04)


def test_an_outlier_among_the_generated_changes_neither_density_nor_coverage_of_the_others():
    """A far real point has a ball so large that precision is full; a far generated one has none."""
    real, generated = normal(50, 3, 0), normal(50, 3, 1)
    outlier = torch.full((1, 3), 1e3)
    with_it = density_coverage(real, torch.cat([generated, outlier]))
    without = density_coverage(real, generated)
    assert with_it.coverage == without.coverage
    assert with_it.density == pytest.approx(without.density * 50 / 51)
