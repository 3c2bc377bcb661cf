import pytest
import torch

from diffusers_ext.metrics import classifier_score


def test_it_is_the_number_of_classes_for_sure_and_even_answers_and_one_for_equal_ones():
    sure = 200.0 * torch.eye(7).repeat(3, 1)
    assert classifier_score(sure) == pytest.approx(7)
    assert classifier_score(sure[:1].repeat(9, 1)) == pytest.approx(1)
    assert classifier_score(torch.zeros(5, 4)) == pytest.approx(1)


def test_it_is_the_exponential_of_the_mutual_information():
    """H(mean) - mean H, the other way to write the same."""
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    of_mean = -(p.mean(0) * p.mean(0).log()).sum()
    assert classifier_score(logits) == pytest.approx((of_mean - entropy).exp().item(), rel=1e-12)


def test_a_class_that_never_comes_does_not_count():
    logits = torch.tensor([[800.0, 0.0, -900.0], [0.0, 800.0, -900.0]])
    assert classifier_score(logits) == pytest.approx(2)


@pytest.mark.parametrize(
    "logits", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(3, 1), torch.full((2, 2), torch.nan)]
)
def test_what_are_no_logits_is_refused(logits):
    with pytest.raises(ValueError, match="logits must"):
        classifier_score(logits)
