import pickle
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusers_ext.metrics import FeatureStatistics, extrapolated_frechet_distance, frechet_distance


def statistics_of(features):
    return FeatureStatistics(features.shape[1]).update(features)


def given_statistics(mean, covariance, count=10_000):
    """Statistics with exactly this mean and covariance."""
    statistics = FeatureStatistics(len(mean))
    statistics.count = count
    statistics.mean = torch.as_tensor(mean, dtype=torch.float64)
    statistics.scatter = torch.as_tensor(covariance, dtype=torch.float64) * (count - 1)
    return statistics


def random_covariance(dim, rank, seed):
    factor = torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return torch.randn(500, 6, generator=generator, dtype=torch.float64) @ mixing + 3


def test_one_pass_equals_numpy(features):
    statistics = FeatureStatistics(6)
    for batch in features.split([1, 7, 0, 300, 192]):
        statistics.update(batch)
    assert statistics.count == 500
    np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("sizes", [(500, 0), (250, 250), (3, 100, 397)])
def test_merged_parts_equal_one_pass(features, sizes):
    merged = FeatureStatistics(6)
    for part in reversed(features.split(sizes)):
        merged.merge(pickle.loads(pickle.dumps(statistics_of(part))))  # as between processes
    whole = statistics_of(features)
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-13)


def test_small_covariance_beside_a_large_mean_is_kept():
    """Sums of squares would lose it: 1e-3 squared beside 1e6 squared is below float64's 16 digits."""
    noise = torch.randn(400, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-3
    shifted = FeatureStatistics(3)
    for batch in (noise + 1e6).split(37):
        shifted.update(batch)
    torch.testing.assert_close(shifted.covariance, statistics_of(noise).covariance, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 5, 40])
def test_distance_matches_scipy_sqrtm(dim):
    covariances = [random_covariance(dim, 2 * dim, seed).numpy() for seed in (1, 2)]
    means = [np.random.default_rng(seed).normal(size=dim) for seed in (3, 4)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    actual = frechet_distance(*[given_statistics(m, c) for m, c in zip(means, covariances, strict=True)])
    assert actual == pytest.approx(expected, rel=1e-9)


def test_diagonal_covariances_have_a_closed_form():
    """Per coordinate, (mean_a - mean_b)^2 + (std_a - std_b)^2."""
    a = given_statistics([0.0, 1.0, 2.0], np.diag([4.0, 9.0, 0.0]))
    b = given_statistics([1.0, 1.0, 0.0], np.diag([1.0, 25.0, 16.0]))
    assert frechet_distance(a, b) == pytest.approx((1 + 0 + 4) + (1 + 4 + 16), rel=1e-12)


@pytest.mark.parametrize("rank", [2, 8], ids=["rank-deficient", "full-rank"])
def test_equal_covariances_leave_the_squared_shift(rank):
    covariance = random_covariance(8, rank, seed=5)
    a = given_statistics(torch.zeros(8), covariance)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(a, given_statistics(torch.full((8,), 0.5), covariance)) == pytest.approx(2, rel=1e-12)


def test_rank_deficient_covariances_of_different_spaces():
    """Orthogonal spaces share nothing, so only the traces remain."""
    a = given_statistics(torch.zeros(4), np.diag([1.0, 2.0, 0.0, 0.0]))
    b = given_statistics(torch.zeros(4), np.diag([0.0, 0.0, 3.0, 4.0]))
    assert frechet_distance(a, b) == pytest.approx(10, rel=1e-12)


def test_distance_is_symmetric(features):
    a, b = statistics_of(features[:200]), statistics_of(2 * features[200:] + 1)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_too_few_samples_warn_and_enough_do_not(features):
    whole = statistics_of(features)
    with pytest.warns(UserWarning, match="6 features is unreliable from 6 samples"):
        frechet_distance(whole, statistics_of(features[:6]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(whole, statistics_of(features[:7]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FeatureStatistics(0), "dim must be at least 1, got 0"),
        (lambda: FeatureStatistics(3).update(torch.zeros(2, 4)), r"shape \(batch, 3\), got \(2, 4\)"),
        (lambda: FeatureStatistics(3).update(torch.zeros(3)), r"shape \(batch, 3\), got \(3,\)"),
        (lambda: FeatureStatistics(1).update(torch.tensor([[torch.nan]])), "features must be finite"),
        (lambda: FeatureStatistics(3).merge(FeatureStatistics(4)), "3 features cannot be merged with those of 4"),
        (lambda: FeatureStatistics(3).update(torch.zeros(1, 3)).covariance, "at least 2 samples, got 1"),
        (lambda: frechet_distance(FeatureStatistics(3), FeatureStatistics(4)), "same features, got 3 and 4"),
        (lambda: frechet_distance(FeatureStatistics(3), FeatureStatistics(3)), "at least 2 samples a side, got 0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_distance_of_infinitely_many_images_has_little_of_the_bias():
    """Two equal Gaussians: the distance of N images is positive, and falls as 1 / N."""
    dim, law = 8, given_statistics(np.zeros(8), np.eye(8))
    drawn = [torch.randn(400, dim, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in range(40)]
    plain = np.mean([frechet_distance(law, statistics_of(each)) for each in drawn])
    extrapolated = np.array([extrapolated_frechet_distance(law, each) for each in drawn])
    assert plain > 0.05
    assert abs(extrapolated.mean()) < 0.1 * plain + 4 * extrapolated.std() / 40**0.5
    assert extrapolated.std() < plain


def test_a_line_in_one_over_n_is_read_at_its_end(monkeypatch):
    seen = []

    def on_a_line(real, generated):
        seen.append(generated.count)
        return 3 + 700 / generated.count

    monkeypatch.setattr("diffusers_ext.metrics.frechet.frechet_distance", on_a_line)
    value = extrapolated_frechet_distance(given_statistics(np.zeros(2), np.eye(2)), torch.zeros(1000, 2))
    assert value == pytest.approx(3, rel=1e-10)
    assert min(seen) == 500 and max(seen) == 1000 and seen.count(500) == 2


def test_too_few_images_are_not_extrapolated():
    law = given_statistics(np.zeros(8), np.eye(8))
    with pytest.raises(ValueError, match="more than 16 images.*got 16"):
        extrapolated_frechet_distance(law, torch.randn(16, 8))
    with pytest.raises(ValueError, match="smallest_share"):
        extrapolated_frechet_distance(law, torch.randn(100, 8), smallest_share=1.0)
