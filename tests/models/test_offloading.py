"""Weights that are fetched from disk when their module is called, and are garbage until then."""

import pytest
import torch
from peft import LoraConfig

from diffusers_ext import (
    DiTModel,
    HierarchicalVAEModel,
    LucidrainsUNetModel,
    NoisyClassifierModel,
    UNetModel,
    VAEModel,
)


X = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)
SETS = torch.tensor([[True, False, True], [False, False, False]])
LABELS = torch.tensor([1, 3])


def latents_of(vae):
    return vae.encode(X).latent_dist.mean


def decoded(vae):
    return vae.decode(torch.ones(1, *vae.latent_shape)).sample


def dit(**options):
    return DiTModel(8, 2, 1, hidden_size=16, num_layers=3, num_attention_heads=2, num_classes=3, **options)


def unet():
    return UNetModel(8, 1, 1, block_out_channels=(8, 16, 16), layers_per_block=2, num_classes=3)


def vae(**options):
    return VAEModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, **options)


# A network, and what is computed with it.
CASES = {
    "dit": (dit, lambda m: m(X, 5, SETS).sample),
    "dit, labels in each block": (lambda: dit(embedding_per_block=True), lambda m: m(X, 5, LABELS).sample),
    "unet": (unet, lambda m: m(X, 5, SETS).sample),
    "classifier": (lambda: NoisyClassifierModel(8, 1, 3, (8, 16, 16), 2), lambda m: m(X, 5).logits),
    "encoder": (vae, latents_of),
    "decoder": (vae, decoded),
    "dense encoder": (lambda: vae(architecture="mlp", hidden_dims=(16,)), latents_of),
    "lucidrains": (lambda: LucidrainsUNetModel(8, 1, 1, (8, 16), width=8), lambda m: m(X, 5).sample),
}


def made(name):
    torch.manual_seed(0)
    model = CASES[name][0]()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def offload(model, folder, offload_type):
    number = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload(
        torch.device("cpu"), offload_type=offload_type, offload_to_disk_path=str(folder), **number
    )


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_each_weight_is_there_when_it_is_used(name, offload_type, tmp_path):
    model, compute = made(name), CASES[name][1]
    expected = compute(model)
    offload(model, tmp_path, offload_type)
    assert torch.equal(compute(model), expected)


@torch.no_grad()
def test_levels_of_latents_come_by_layer_alone(tmp_path):
    model = HierarchicalVAEModel(8, 1, 1, (8, 16)).eval()
    expected = model.decode(model.encode(X).latent_dist.latents).sample
    with pytest.raises(ValueError, match="offload_type must be \"leaf_level\", .* got 'block_level'"):
        offload(model, tmp_path, "block_level")
    offload(model, tmp_path, "leaf_level")
    assert torch.equal(model.decode(model.encode(X).latent_dist.latents).sample, expected)


@pytest.mark.parametrize("name", ["dit", "unet"])
@torch.no_grad()
def test_sets_of_labels_are_seen_through_casts_and_adapters(name):
    """By the module that holds their embeddings: that of a set is the sum of its labels'."""
    model, compute = made(name), CASES[name][1]
    expected = compute(model)
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    torch.testing.assert_close(compute(model), expected, rtol=0, atol=0.2 * expected.abs().max().item())

    model = made(name)
    model.add_adapter(LoraConfig(r=2, target_modules=["class_embedding"], init_lora_weights=False))
    assert not torch.allclose(compute(model), expected)
    alone = torch.tensor([[False, True, False], [False, False, False]])
    torch.testing.assert_close(model(X, 5, alone).sample, model(X, 5, LABELS).sample)
    torch.testing.assert_close(model(X, 5).sample, model(X, 5, torch.tensor([3, 3])).sample)
