"""Adapters of peft in our networks and pipelines: put in, fused, taken out, saved and loaded as diffusers does."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict

from diffusers_ext import DiTModel, ExtDDIMScheduler, GuidedDiffusionPipeline, TextGuidedDiffusionPipeline
from tiny import assert_same_weights, image_of, tiny_unet
from tiny_text import tiny_stable_diffusion


TARGETS = ["to_q", "to_kv", "to_out"]


def tiny_dit():
    torch.manual_seed(0)
    model = DiTModel(8, 4, 1, None, 16, 2, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def with_adapter(network, alpha=6):
    """With numbers in its second matrix too, which is zero as it is made."""
    torch.manual_seed(1)
    network.add_adapter(LoraConfig(r=3, lora_alpha=alpha, target_modules=TARGETS))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def output_of(network):
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.eval()(x, torch.tensor([3, 700])).sample


@pytest.mark.parametrize("make", [tiny_unet, tiny_dit])
def test_a_network_says_the_same_with_its_adapter_beside_its_weights_and_in_them(make):
    plain = output_of(make())
    network = with_adapter(make())
    beside = output_of(network)
    assert (beside - plain).abs().max() > 1e-3
    network.fuse_lora()
    torch.testing.assert_close(output_of(network), beside, rtol=0, atol=1e-5)
    network.unfuse_lora()
    torch.testing.assert_close(output_of(network), beside, rtol=0, atol=1e-5)
    network.disable_lora()
    torch.testing.assert_close(output_of(network), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_unet, tiny_dit])
def test_an_adapter_is_saved_and_loaded_with_its_weight(make, tmp_path):
    network = with_adapter(make())
    network.save_lora_adapter(tmp_path)
    other = make()
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(output_of(other), output_of(network), rtol=0, atol=1e-5)


def test_a_pipeline_loads_weighs_fuses_and_unloads_adapters(tmp_path):
    network = with_adapter(tiny_unet())
    expected = image_of(GuidedDiffusionPipeline(network, ExtDDIMScheduler()))
    (config,) = network.peft_config.values()
    GuidedDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(network), config.to_dict())
    assert (tmp_path / LORA_WEIGHT_NAME_SAFE).is_file()

    pipe = GuidedDiffusionPipeline(tiny_unet(), ExtDDIMScheduler())
    plain = image_of(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert np.abs(image_of(pipe) - expected).max() < 1e-4 < np.abs(plain - expected).max()
    pipe.set_adapters("style", 0.0)
    assert np.abs(image_of(pipe) - plain).max() < 1e-4
    pipe.set_adapters("style", 1.0)
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1 and np.abs(image_of(pipe) - expected).max() < 1e-4
    with pytest.raises(
        ValueError, match=r"UNetModel with adapters \(style\) cannot be saved as it is: save the adapter by"
    ):
        pipe.save_pretrained(tmp_path / "pipe")
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipe")
    loaded = GuidedDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert np.abs(image_of(loaded) - expected).max() < 1e-4
    assert_same_weights(loaded.denoiser, pipe.denoiser)


def test_an_adapter_of_a_pipeline_of_diffusers_is_found_by_its_own_names(tmp_path):
    """Those begin with `unet`; one that has nothing for the denoiser is refused, and not loaded to no effect."""
    stock = tiny_stable_diffusion(DDIMScheduler())
    pipe = TextGuidedDiffusionPipeline.from_pipe(stock)
    options = {"prompt": "red dot", "num_inference_steps": 2, "output_type": "np"}
    pipe.set_progress_bar_config(disable=True)

    def made():
        return pipe(generator=torch.Generator().manual_seed(0), **options).images

    plain = made()
    torch.manual_seed(0)
    layers = {
        f"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_{name}.weight": torch.randn(shape)
        for name, shape in (("A", (2, 16)), ("B", (16, 2)))
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    pipe.load_lora_weights(tmp_path / "lora", adapter_name="theirs")
    assert set(pipe.denoiser.peft_config) == {"theirs"} and np.abs(made() - plain).max() > 1e-4
    pipe.unload_lora_weights()
    assert np.array_equal(made(), plain)
    with pytest.raises(ValueError, match="begin with one of denoiser, unet, transformer, and this one has none"):
        pipe.load_lora_weights({f"text_encoder.{name}": value for name, value in layers.items()})
