"""A run that trains a LoRA adapter (Hu et al. 2021, arXiv 2106.09685) of its network, and nothing else.

The layers W of the network stay as they are, and W + (alpha / rank) B A is what is called, with B zero at first. The pipeline
that the run saves has the adapter in its weights; beside it lies the adapter by itself.
"""

import copy
import importlib.util
from typing import TYPE_CHECKING

import torch
from diffusers import ModelMixin
from torch import nn

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.draws import derived_seed
from diffusers_ext.models.network import Network
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.recipes.pretrained import read_pretrained
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.run_folder import ADAPTER_FILE


if TYPE_CHECKING:
    from diffusers_ext.recipes.denoising import DenoisingConfig

# Those of attention, in all of our networks.
DEFAULT_TARGETS = ("to_q", "to_kv", "to_out")


def clipped_noise_of_run(config: "DenoisingConfig") -> bool | str:
    """`clip_guided_noise` of the run's pipeline: "always", or that of the pipeline that an adapter is for, whose pictures the two
    make together.
    """
    if config.lora_rank is None:
        return "always"
    return read_pretrained(config.pretrained_pipeline).config.get("clip_guided_noise", False)


def add_adapter(network: ModelMixin, config: "DenoisingConfig") -> ModelMixin:
    """The network with an adapter of the options' rank, which alone is trained, if they ask for one.

    Raises:
        ValueError: if peft is not installed, the network takes no adapter, or has no such layers.
    """
    if config.lora_rank is None:
        return network
    if importlib.util.find_spec("peft") is None:
        raise ValueError("lora_rank needs peft, which is not installed: pip install peft")
    if not isinstance(network, Network):
        raise ValueError(
            f"lora_rank is for UNetModel and DiTModel, got a {type(network).__name__}: leave it out, and all weights are trained"
        )
    from peft import LoraConfig

    targets = list(config.lora_target_modules or DEFAULT_TARGETS)
    layers = {name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            kinds = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"lora_target_modules must be ends of the names of layers of {type(network).__name__}, such as "
                f"{', '.join(kinds)}, got {target}"
            )
    alpha = config.lora_rank if config.lora_alpha is None else config.lora_alpha
    torch.manual_seed(derived_seed(config.seed, 2))
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=targets))
    return network


@torch.no_grad()
def without_adapter(network: ModelMixin) -> ModelMixin:
    """The network with its adapter in its weights, a copy; one that has none is itself."""
    if not getattr(network, "peft_config", None):
        return network
    fused = copy.deepcopy(network)
    fused.fuse_lora()
    fused.unload_lora()
    return fused


def save_adapter(trainer: Trainer) -> None:
    """Writes the averaged adapter by itself into the run's folder, if the run has one; every process calls it."""
    if trainer.config.lora_rank is None:
        return
    from peft import get_peft_model_state_dict

    with trainer.averaged_model() as network:
        if trainer.accelerator.is_main_process:
            (adapter_config,) = network.peft_config.values()
            # safetensors refuses channels_last, and tensors that share memory.
            layers = {name: value.contiguous() for name, value in get_peft_model_state_dict(network).items()}
            with atomic_write(trainer.output_dir / ADAPTER_FILE) as partial:
                GuidedDiffusionPipeline.save_lora_weights(
                    partial.parent, layers, adapter_config.to_dict(), weight_name=partial.name
                )
