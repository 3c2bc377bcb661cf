"""Labels and contexts that a network does not take are refused by both, in the same words."""

import pytest
import torch

from diffusers_ext import DiTModel, UNetModel


DENOISERS = {
    "dit": lambda **options: DiTModel(8, 2, 1, hidden_size=16, num_layers=1, num_attention_heads=2, **options),
    "unet": lambda **options: UNetModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, **options),
}
X = torch.zeros(2, 1, 8, 8)


@pytest.fixture(params=DENOISERS)
def make(request):
    return DENOISERS[request.param]


@pytest.mark.parametrize(
    "class_labels, message",
    [
        ([0, 4], r"in \[0, 3\], got \[4\]"),
        ([-1, 5], r"in \[0, 3\], got \[-1, 5\]"),
        ([0, 1, 2], r"one for each of the 2 samples, or sets of labels of shape \(2, 3\), got \(3,\)"),
        ([1], r"one for each of the 2 samples, .* got \(1,\)"),
        ([[True, False], [True, True]], r"sets of labels of shape \(2, 3\), got \(2, 2\)"),
        ([[0.5, 0, 1], [1, 0, -1]], r"must be zeros and ones, got \[0\.5, -1\.0\]"),
    ],
)
def test_labels_that_do_not_fit_are_refused(make, class_labels, message):
    with pytest.raises(ValueError, match=f"class_labels .*{message}"):
        make(num_classes=3)(X, 5, torch.tensor(class_labels))


def test_labels_of_a_model_without_are_refused_and_so_is_a_null_label_that_was_not_learned(make):
    with pytest.raises(ValueError, match="num_classes=None"):
        make()(X, 5, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"in \[0, 2\], since the model has no null label, got \[3\]"):
        make(num_classes=3, learned_unconditional=False)(X, 5, torch.tensor([0, 3]))


@pytest.mark.parametrize("shape", [(2, 3, 9), (3, 3, 8), (2, 8)])
def test_a_context_that_does_not_fit_is_refused(make, shape):
    with pytest.raises(ValueError, match=r"encoder_hidden_states must have shape \(2, tokens, 8\), got"):
        make(cross_attention_dim=8)(X, 5, None, torch.zeros(shape))
