"""The tokens of an image spread over processes, by `enable_parallelism` of diffusers."""

import inspect

import pytest
import torch
from diffusers import ContextParallelConfig
from diffusers.guiders import SmoothedEnergyGuidance
from diffusers.hooks import FirstBlockCacheConfig
from torch import distributed

from diffusers_ext import DiTModel, ExtDDIMScheduler, GuidedDiffusionPipeline
from processes import in_ranks


def make(**options):
    torch.manual_seed(0)
    model = DiTModel(8, 2, 1, hidden_size=16, num_layers=2, num_attention_heads=2, **options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_the_plan_names_modules_inputs_and_dimensions_that_there_are():
    """The tokens, with the registers, are split before the first block and gathered after the output layer."""
    split, gather = DiTModel._cp_plan["transformer_blocks.0"], DiTModel._cp_plan["patch_out"]
    assert list(split) == ["hidden_states"] and list(DiTModel._cp_plan["transformer_blocks.*"]) == ["rotation"]
    model, shapes = make(num_registers=2), []
    first, last = (model.get_submodule(name) for name in ("transformer_blocks.0", "patch_out"))
    assert next(iter(inspect.signature(first.forward).parameters)) == "hidden_states"
    first.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape))
    last.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    model(torch.zeros(1, 1, 8, 8), 5)
    tokens = split["hidden_states"]
    assert shapes[0][tokens.split_dim] == shapes[1][gather.gather_dim] == 4 * 4 + 2
    assert [len(shape) for shape in shapes] == [tokens.expected_dims, gather.expected_dims]


def refuse_what_cannot_be_shared(spread):
    """By a sentence in each process, before they wait for one another."""
    with pytest.raises(ValueError, match="a cache must not be enabled where tokens are spread"):
        spread.enable_cache(FirstBlockCacheConfig())
    cached = make()
    cached.enable_cache(FirstBlockCacheConfig())
    for model, config, message in (
        (cached, ContextParallelConfig(ulysses_degree=2), "a cache must not be enabled where tokens are spread"),
        (
            make(),
            ContextParallelConfig(ring_degree=2),
            "ring_degree above 1 needs a backend of attention .*, got native",
        ),
        (
            make(),
            ContextParallelConfig(ulysses_degree=4),
            "ulysses_degree must divide the 2 heads of attention, got 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            model.enable_parallelism(config=config)
        assert model._parallel_config is None
    uneven = make(num_registers=1)
    uneven.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    with pytest.raises(ValueError, match="must be a multiple of the 2 processes .*, got 17 with the registers"):
        uneven(torch.zeros(1, 1, 8, 8), 5)
    guider = SmoothedEnergyGuidance(seg_guidance_layers=[0])
    pipe = GuidedDiffusionPipeline(spread, ExtDDIMScheduler())
    with pytest.raises(ValueError, match="SmoothedEnergyGuidance blurs over the tokens of an image"):
        pipe(class_labels=1, guider=guider, num_inference_steps=3, output_type="latent")


def compute_alone_and_together():
    """In each of two processes: the same numbers, from half of the tokens."""
    torch.accelerator.device_count = lambda: 1  # none is counted on CPUs, on which gloo has all that is needed
    distributed.init_process_group("gloo")
    x, context = torch.linspace(-1, 1, 192).reshape(3, 1, 8, 8), torch.linspace(-2, 2, 3 * 5 * 6).reshape(3, 5, 6)
    for options, arguments in (
        ({}, {}),
        ({"position_embedding": "rope", "num_registers": 2, "value_residual": True}, {}),
        ({"num_classes": 4, "num_registers": 2, "qk_norm": True}, {"class_labels": torch.tensor([0, 3, 4])}),
        (
            {"cross_attention_dim": 6},
            {"encoder_hidden_states": context, "encoder_attention_mask": context[..., 0] < 1},
        ),
        ({"internal_guidance_layer": 1, "num_classes": 4}, {"class_labels": torch.tensor([0, 3, 4])}),
    ):
        model, tokens = make(**options), []
        for block in model.transformer_blocks:
            block.ff.register_forward_hook(
                lambda module, inputs, output, tokens=tokens: tokens.append(output.shape[1])
            )
        alone = model(x, 500, **arguments)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        together = model(x, 500, **arguments)
        assert ("internal_sample" in alone) == ("internal_guidance_layer" in options)
        for name, value in alone.items():
            torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-5)  # sums in another order
        whole = 16 + options.get("num_registers", 0)
        assert tokens == [whole, whole, whole // 2, whole // 2]
    refuse_what_cannot_be_shared(model)
    print("the same")
    distributed.destroy_process_group()


def test_two_processes_with_half_of_the_tokens_each_compute_the_same():
    with torch.no_grad():
        assert in_ranks(compute_alone_and_together).count("the same") == 2
