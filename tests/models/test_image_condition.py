"""Networks with a condition image beside x_t."""

import pytest
import torch

from diffusers_ext import DiTModel, UNetModel
from tiny import assert_same_output, assert_same_weights


def network(kind, **options):
    torch.manual_seed(0)
    common = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_classes": 3} | options
    if kind == "unet":
        model = UNetModel(block_out_channels=(8, 16), layers_per_block=1, **common)
    else:
        model = DiTModel(hidden_size=16, num_layers=2, num_attention_heads=2, **common)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def inputs(count=3, channels=2):
    generator = torch.Generator().manual_seed(0)
    x, image = (torch.randn(count, c, 8, 8, generator=generator) for c in (1, channels))
    return x, torch.tensor(400), image


@pytest.mark.parametrize("kind", ["unet", "dit"])
@torch.no_grad()
def test_none_is_another_input_than_any_image_and_each_sample_has_its_own(kind):
    model, (x, t, image) = network(kind, condition_channels=2, condition_level=True), inputs()
    labels, level = torch.tensor([0, 1, 2]), torch.tensor([0.0, 0.3, 0.3])
    together = model(x, t, labels, condition_image=image, condition_level=level).sample
    without = model(x, t, labels).sample
    black = model(x, t, labels, condition_image=torch.zeros_like(image)).sample
    for one, other in ((together, without), (without, black), (together, black)):
        assert ((one - other).abs().amax((1, 2, 3)) > 1e-3).all()
    given = torch.tensor([True, False, True])
    mixed = model(x, t, labels, condition_image=image, condition_given=given, condition_level=level).sample
    assert_same_output(mixed, torch.where(given.view(-1, 1, 1, 1), together, without))
    alone = model(x[1:2], t, labels[1:2], condition_image=image[1:2], condition_level=level[1:2]).sample
    assert_same_output(alone, together[1:2])
    other_level = model(x, t, labels, condition_image=image, condition_level=torch.tensor([0.0, 0.3, 0.1])).sample
    assert_same_output(other_level[:2], together[:2])
    assert (other_level[2] - together[2]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["unet", "dit"])
@torch.no_grad()
def test_it_is_saved_and_loaded_with_the_network(kind, tmp_path):
    model, (x, t, image) = network(kind, condition_channels=2, condition_level=True), inputs()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_weights(loaded, model)
    assert_same_output(loaded(x, t, condition_image=image).sample, model(x, t, condition_image=image).sample)


@torch.no_grad()
def test_a_series_has_one_too():
    model = UNetModel(
        8, 1, 1, block_out_channels=(8,), layers_per_block=1, dims=1, condition_channels=2, fourier_features=(1,)
    )
    torch.nn.init.normal_(model.conv_out.weight)
    x, image = torch.randn(2, 1, 8), torch.randn(2, 2, 8)
    assert not torch.equal(model(x, 3, condition_image=image).sample, model(x, 3).sample)


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_what_a_network_was_not_built_for_is_refused(kind):
    x, t, image = inputs()
    with pytest.raises(ValueError, match="condition_image was given to a model without: .* condition_channels=0"):
        network(kind)(x, t, condition_image=image)
    with pytest.raises(ValueError, match=r"condition_image must be given: .* \(condition_dropout was 0\)"):
        network(kind, condition_channels=2, learned_without_image=False)(x, t)
    model = network(kind, condition_channels=2)
    with pytest.raises(ValueError, match=r"condition_image must have shape \(3, 2, 8, 8\), got \(3, 2, 4, 4\)"):
        model(x, t, condition_image=image[..., :4, :4])
    with pytest.raises(ValueError, match=r"condition_given must be one for each of the 3 samples, got \(2,\)"):
        model(x, t, condition_image=image, condition_given=torch.ones(2))
    with pytest.raises(ValueError, match="condition_level was given to a model that takes none"):
        model(x, t, condition_image=image, condition_level=torch.ones(3))
    with pytest.raises(ValueError, match="condition_level is the noise level of condition images"):
        network(kind, condition_level=True)
    with pytest.raises(ValueError, match="condition_channels must be at least 0, got -1"):
        network(kind, condition_channels=-1)


def test_a_dit_with_condition_images_is_no_dit_of_diffusers():
    with pytest.raises(ValueError, match="condition_channels must be 0"):
        network("dit", condition_channels=1).to_diffusers()
