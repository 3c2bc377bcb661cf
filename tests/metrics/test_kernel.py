import numpy as np
import pytest
import torch

from diffusers_ext.metrics import kernel_distance


def normal(count, dim, seed, mean=0.0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def by_loops(real, generated, degree=3):
    """The unbiased estimate as sums over pairs of different samples."""
    real, generated = real.numpy(), generated.numpy()

    def k(x, y):
        return (x @ y / len(x) + 1) ** degree

    def within(points):
        return np.mean([k(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j])

    return within(real) + within(generated) - 2 * np.mean([k(x, y) for x in real for y in generated])


@pytest.mark.parametrize("degree", [1, 3])
def test_equals_the_sums_over_pairs(degree, monkeypatch):
    real, generated = normal(23, 5, 0), normal(17, 5, 1, mean=0.4)
    expected = by_loops(real, generated, degree)
    assert kernel_distance(real, generated, degree=degree).value == pytest.approx(expected, rel=1e-10)
    monkeypatch.setattr("diffusers_ext.metrics.kernel.CHUNK_ELEMENTS", 40)
    assert kernel_distance(real, generated, degree=degree).value == pytest.approx(expected, rel=1e-10)


def test_with_degree_one_it_is_the_distance_of_the_means():
    """E|m_x - m_y|^2 / dim, of which the estimate has no bias."""
    estimates = [
        kernel_distance(normal(30, 4, 2 * s), normal(20, 4, 2 * s + 1, mean=0.5), degree=1) for s in range(300)
    ]
    values = torch.tensor([each.value for each in estimates])
    spread = values.std()
    assert values.mean().item() == pytest.approx(0.25, abs=4 * spread.item() / 300**0.5)
    errors = torch.tensor([each.standard_error for each in estimates])
    assert errors.square().mean().sqrt().item() == pytest.approx(spread.item(), rel=0.2)


def test_it_is_zero_on_average_for_one_law():
    values = torch.tensor([kernel_distance(normal(25, 3, 2 * s), normal(25, 3, 2 * s + 1)).value for s in range(200)])
    assert abs(values.mean()) < 4 * values.std() / 200**0.5
    assert (values < 0).any()


def test_integer_weights_count_as_repeated_samples_that_are_no_pairs_with_themselves():
    real, generated = normal(12, 3, 0), normal(15, 3, 1, mean=0.3)
    weights = torch.tensor([0, 2, 1, 1, 3, 1, 0, 1, 1, 2, 1, 1])

    def k(x, y):
        return (x @ y.T / 3 + 1) ** 3

    pairs = (weights[:, None] * weights).double().fill_diagonal_(0)
    within = (pairs * k(real, real)).sum() / pairs.sum()
    across = (weights[:, None] * k(real, generated)).sum() / (weights.sum() * 15)
    own = k(generated, generated)
    expected = within + (own.sum() - own.diagonal().sum()) / (15 * 14) - 2 * across
    assert kernel_distance(real, generated, real_weights=weights).value == pytest.approx(expected.item(), rel=1e-10)
    equal = kernel_distance(real, generated, real_weights=torch.full((12,), 0.1))
    assert equal.value == pytest.approx(kernel_distance(real, generated).value, rel=1e-10)


@pytest.mark.parametrize(
    "real, generated, options, message",
    [
        (normal(3, 2, 0), normal(9, 2, 1), {}, "at least 4 real"),
        (normal(9, 2, 0), normal(9, 3, 1), {}, "same features"),
        (normal(9, 2, 0), normal(9, 2, 1) / 0, {}, "finite"),
        (normal(9, 2, 0), normal(9, 2, 1), {"degree": 0}, "degree"),
        (normal(9, 2, 0), normal(9, 2, 1), {"real_weights": torch.ones(8)}, "one for each of 9"),
    ],
)
def test_what_cannot_be_compared_is_refused(real, generated, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(real, generated, **options)
