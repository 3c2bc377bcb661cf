import pytest
import scipy.stats
import torch

from diffusers_ext.metrics import share_difference


@pytest.mark.parametrize(
    "first, second", [([30, 50, 20], [300, 520, 180]), ([5, 0, 9], [1, 4, 3]), ([7, 7], [70, 71])]
)
def test_it_is_pearsons_test_of_homogeneity(first, second):
    found = share_difference(torch.tensor(first), torch.tensor(second))
    expected = scipy.stats.chi2_contingency([first, second], correction=False)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    shares = [torch.tensor(each) / sum(each) for each in (first, second)]
    assert found.distance == pytest.approx((shares[0] - shares[1]).abs().sum().item() / 2, abs=1e-6)


def test_labels_that_no_image_has_count_for_nothing():
    assert share_difference(torch.tensor([3, 0, 4]), torch.tensor([1, 0, 9])) == share_difference(
        torch.tensor([3, 4]), torch.tensor([1, 9])
    )
    assert share_difference(torch.tensor([3, 0]), torch.tensor([9, 0])) == (0.0, 1.0)
    assert share_difference(torch.tensor([3, 0]), torch.tensor([0, 9])).distance == 1


@pytest.mark.parametrize(
    "first, second, message",
    [([1, 2], [1, 2, 3], "same labels"), ([1, -1], [1, 1], "negative"), ([0, 0], [1, 1], "one of each set")],
)
def test_what_is_no_count_is_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        share_difference(torch.tensor(first), torch.tensor(second))
