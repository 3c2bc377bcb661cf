import dataclasses

import pytest
import torch

from diffusers_ext import DiTModel, UNetModel
from diffusers_ext.options import fixed_on_resume
from diffusers_ext.recipes.networks import NetworkConfig, build_network


def build(**settings):
    return build_network(NetworkConfig(**settings), sample_size=(8, 16), in_channels=3, out_channels=6, num_classes=4)


@pytest.mark.parametrize("model, kind", [("unet", UNetModel), ("dit", DiTModel)])
def test_the_network_that_was_asked_for_fits_the_data(model, kind):
    network = build(model=model)
    assert type(network) is kind and network.config.num_classes == 4
    out = network(torch.zeros(2, 3, 8, 16), 3, torch.tensor([0, 4])).sample
    assert out.shape == (2, 6, 8, 16)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, (4, 256, 6, 4)),
        ({"patch_size": 2, "num_layers": 1}, (2, 256, 1, 4)),
        ({"hidden_size": 200}, (4, 200, 6, 2)),
        ({"hidden_size": 32}, (4, 32, 6, 1)),
        ({"dit_size": "DiT-S/2", "num_layers": 2}, (2, 384, 2, 6)),
        ({"dit_size": "DiT-XL/8", "num_layers": 1, "hidden_size": 128}, (8, 128, 1, 2)),
        ({"dit_size": "DiT-S/8", "num_layers": 1, "num_attention_heads": 12}, (8, 384, 1, 12)),
    ],
)
def test_a_dit_has_its_default_or_the_size_by_name_as_changed(settings, expected):
    config = NetworkConfig(model="dit", **settings)
    names = ("patch_size", "hidden_size", "num_layers", "num_attention_heads")
    assert tuple(config.dit_options(32)[name] for name in names) == expected


@pytest.mark.parametrize(
    "sample_size, patch_size",
    [
        (8, 1),
        (16, 2),
        (28, 4),
        (32, 4),
        ((32, 16), 4),
        ((16, 16), 2),
        (64, 8),
        (128, 8),
        (30, 5),
        (31, 1),
        ((9, 6), 1),
    ],
)
def test_patches_left_open_are_the_smallest_that_leave_few(sample_size, patch_size):
    config = NetworkConfig(model="dit", num_layers=1)
    assert config.size_multiple == 1
    network = build_network(config, sample_size=sample_size, in_channels=1, out_channels=1, num_classes=None)
    assert network.config.patch_size == patch_size


@pytest.mark.parametrize(
    "settings, multiple",
    [({"patch_size": 3}, 3), ({"dit_size": "DiT-S/8"}, 8), ({"dit_size": "DiT-S/8", "patch_size": 2}, 2)],
)
def test_samples_are_multiples_of_the_patches_that_were_asked_for(settings, multiple):
    assert NetworkConfig(model="dit", **settings).size_multiple == multiple


def test_attention_at_a_side_that_no_map_has_is_refused():
    """A model that was saved so is loaded, with a warning."""
    config = NetworkConfig(block_out_channels=(8, 16, 16), attention_resolutions=(16, 7, 5))
    message = "attention_resolutions must be among the sides of the feature maps, 16, 8, 4, got 7, 5"
    with pytest.raises(ValueError, match=message):
        config.check_sample((12, 16), (12, 16))
    with pytest.warns(UserWarning, match=message):
        UNetModel((12, 16), 1, 1, (8, 16, 16), 1, attention_resolutions=(16, 7, 5))
    for sides in (None, (), (4,), (16, 8)):
        NetworkConfig(block_out_channels=(8, 16, 16), attention_resolutions=sides).check_sample((12, 16), (12, 16))


def test_every_option_of_a_dit_arrives():
    settings = {
        **{"patch_size": 2, "hidden_size": 32, "num_layers": 3, "num_attention_heads": 4},
        **{"mlp_ratio": 2.0, "qk_norm": True, "num_registers": 3, "dropout": 0.25},
        **{"position_embedding": "rope", "norm": "rms", "mlp": "swiglu", "patch_embedding": "conv"},
        **{"value_residual": True, "long_skips": True, "internal_guidance_layer": 1},
    }
    config = build(model="dit", **settings).config
    assert {name: config[name] for name in settings} == settings
    of_dit = {
        field.name for field in dataclasses.fields(NetworkConfig) if field.metadata["needs"] == {"model": ("dit",)}
    }
    assert of_dit | {"dropout"} == set(settings) | {"dit_size"}
    assert fixed_on_resume(NetworkConfig) >= {"model", "dit_size", "layers_per_block", *settings}


def test_the_weights_follow_from_the_seed():
    weights = [build(model="dit", num_layers=1, seed=seed).patch_in.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"model": "dit", "layers_per_block": 3},
            "layers_per_block has no meaning without model unet: give both or neither",
        ),
        ({"model": "dit", "block_out_channels": (8, 16)}, "block_out_channels has no meaning without model unet"),
        ({"patch_size": 2}, "patch_size has no meaning without model dit: give both or neither"),
        ({"qk_norm": True}, "qk_norm has no meaning without model dit"),
        ({"dit_size": "DiT-S/2"}, "dit_size has no meaning without model dit"),
        ({"model": "dit", "dit_size": "DiT-S"}, "the name must be one of DiT-S, .* got 'DiT-S'"),
        ({"model": "dit", "patch_size": 16}, r"patch_size must be in \[1, 8\], got 16"),
        ({"model": "dit", "num_attention_heads": 3}, r"hidden_size must be a multiple of num_attention_heads \(3\)"),
        (
            {"model": "dit", "patch_size": 4, "resolution": (30,)},
            "multiple of 4, since patch_size is 4, got 30: take 28 or 32",
        ),
        ({"resolution": (2, 8)}, "multiple of 4, since block_out_channels has 3 widths .* got 2: take 4"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig(**settings)
