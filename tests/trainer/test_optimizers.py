"""Muon against singular values, torch's own and AdamW; which matrices it is for; runs with it."""

import pytest
import torch
from torch import nn

from diffusers_ext import (
    DiTModel,
    ExtDDIMScheduler,
    GuidedDiffusionPipeline,
    NoisyClassifierModel,
    UNetModel,
    VAEModel,
)
from diffusers_ext.commands.train_ddpm import TrainConfig
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer.config import TrainerConfig, resolve_for_machine
from diffusers_ext.trainer.optimizers import MuonAdamW, hidden_matrices, make_optimizer, orthogonalize
from runs import assert_same_run, forget_accelerate, stop_before_step, trainer


def tiny_dit():
    torch.manual_seed(0)
    options = {"hidden_size": 8, "num_layers": 2, "num_attention_heads": 2, "num_classes": 10}
    return DiTModel(sample_size=8, patch_size=4, in_channels=1, **options)


def error_of_dit(model, batch):
    output = model(batch["images"] + batch["noise"], batch["time"].float(), class_labels=batch["labels"]).sample
    return (output - batch["noise"]).square().mean()


def shapes_of(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def steps(optimizer, gradients):
    """A step for each tuple of gradients of all parameters, in the order of the groups."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return parameters


@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 4, 9), (2, 9, 4), (1, 1, 5), (2, 4, 16), (2, 16, 4)])
def test_an_orthogonalized_matrix_has_its_singular_vectors_and_values_near_one(shape):
    """Its singular values are those of the matrix through the quintic, which a decomposition shows in float64."""
    (matrices,) = shapes_of(shape)
    matrices = matrices.double()
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    orthogonal = orthogonalize(matrices)
    torch.testing.assert_close(orthogonal, u @ (s[..., None] * vh), rtol=0, atol=1e-8)
    values = torch.linalg.svdvals(orthogonal)
    assert 0.68 < values.min() and values.max() < 1.21
    torch.testing.assert_close(orthogonalize(1e6 * matrices), orthogonal)
    assert torch.equal(orthogonalize(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


def test_many_matrices_are_orthogonalized_as_each_by_itself():
    """Of 2^15 elements each, so that a CPU takes them two at a time."""
    (matrices,) = shapes_of((5, 128, 256))
    each = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    torch.testing.assert_close(orthogonalize(matrices), each, rtol=0, atol=1e-4)


@pytest.mark.parametrize("columns", [128, 512])
def test_a_matrix_of_one_singular_value_keeps_it_alone_in_float32(columns):
    """The others are 0, and what rounding makes of them is raised 485 times."""
    u, v = shapes_of((64,), (columns,))
    u, v = u / u.norm(), v / v.norm()
    value = 1.0
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    orthogonal = orthogonalize(3 * torch.outer(u, v)[None])[0]
    assert (orthogonal - value * torch.outer(u, v)).norm() < 1e-3


def test_fused_matrices_move_as_separate_ones_do():
    """Six of 4 x 3, one above the other; the separate ones have other neighbours of their shape, which is all the same."""
    (start, *gradients) = shapes_of((24, 3), (24, 3), (24, 3), (24, 3))
    options = {"lr": 0.1, "weight_decay": 0.5}
    fused = MuonAdamW([{"params": [nn.Parameter(start.clone())], "num_matrices": 6}], **options)
    parts = [nn.Parameter(part.clone()) for part in start.chunk(6)]
    separate = MuonAdamW([{"params": parts, "num_matrices": 1}], **options)
    (whole,) = steps(fused, [[gradient] for gradient in gradients])
    steps(separate, [gradient.chunk(6) for gradient in gradients])
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)
    # As one matrix they would move otherwise.
    one = MuonAdamW([{"params": [nn.Parameter(start.clone())], "num_matrices": 1}], **options)
    (otherwise,) = steps(one, [[gradient] for gradient in gradients])
    assert (otherwise - whole).abs().max() > 0.01


def test_a_kernel_of_a_convolution_is_a_matrix_of_its_output_channels():
    start, gradient = shapes_of((6, 2, 3, 3), (6, 2, 3, 3))
    kernel = nn.Parameter(start.clone().to(memory_format=torch.channels_last))
    matrix = nn.Parameter(start.flatten(1))
    steps(MuonAdamW([{"params": [kernel], "num_matrices": 1}], lr=0.1), [[gradient], [gradient + 1]])
    steps(
        MuonAdamW([{"params": [matrix], "num_matrices": 1}], lr=0.1),
        [[gradient.flatten(1)], [gradient.flatten(1) + 1]],
    )
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has its own from 2.9 on")
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)])
def test_it_is_the_one_of_torch(shape):
    """Up to the bfloat16 in which torch's iterates, whose rounding of 2^-8 the iteration raises."""
    start, *gradients = shapes_of(shape, shape, shape, shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    gradients = [[gradient] for gradient in gradients]
    steps(MuonAdamW([{"params": [ours], "num_matrices": 1}], lr=0.1, weight_decay=0.1), gradients)
    steps(torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.95), gradients)
    assert (ours - theirs).norm() < 0.05 * (ours - start).norm() and (ours - start).norm() > 0.3


def test_the_other_parameters_are_adamws_bit_for_bit():
    start, *gradients = shapes_of((5,), (5,), (5,), (5,))
    matrix, ours, theirs = nn.Parameter(torch.eye(3)), nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.1, "fused": True}
    groups = [{"params": [ours]}, {"params": [matrix], "num_matrices": 1}]
    steps(MuonAdamW(groups, **options), [[gradient, torch.ones(3, 3)] for gradient in gradients])
    steps(torch.optim.AdamW([theirs], **options), [[gradient] for gradient in gradients])
    assert torch.equal(ours, theirs) and not torch.equal(ours, start)


def test_gradients_that_overflowed_in_fp16_change_nothing():
    start = shapes_of((4, 3), (3,))
    parameters = [nn.Parameter(value.clone()) for value in start]
    groups = [{"params": parameters[1:]}, {"params": parameters[:1], "num_matrices": 1}]
    optimizer = MuonAdamW(groups, lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(sum((factor * parameter).square().sum() for parameter in parameters)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(now, then) != moves for now, then in zip(parameters, start, strict=True))


DIT_BLOCK = {
    **{"modulation": 6, "attn.to_q": 1, "attn.to_kv": 2, "attn.to_out": 1},
    **{"ff.net.0.proj": 1, "ff.net.2": 1},
}


def test_the_hidden_matrices_of_each_network():
    """Those of its blocks; embeddings, the first and the last layer, norms and biases are AdamW's."""
    expected = {f"transformer_blocks.{i}.{name}.weight": count for i in (0, 1) for name, count in DIT_BLOCK.items()}
    assert hidden_matrices(tiny_dit()) == expected
    wrapped = nn.ModuleDict({"denoiser": tiny_dit(), "schedule": nn.Linear(3, 3)})
    assert hidden_matrices(wrapped) == {f"denoiser.{name}": count for name, count in expected.items()}

    small = {"sample_size": 8, "in_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1}
    unet = UNetModel(**small, out_channels=1, num_classes=3, cross_attention_dim=4)
    found = hidden_matrices(unet)
    others = {name for name, value in unet.named_parameters() if value.ndim > 1 and name not in found}
    embeddings = {f"time_embedding.{name}.weight" for name in ("linear_1", "linear_2", "class_embedding")}
    assert others == {"conv_in.weight", "conv_out.weight", *embeddings}
    fused = {name.split(".")[-2]: count for name, count in found.items() if count > 1}
    assert fused == {"to_kv": 2, "scale_shift": 2}
    assert {"encoder.level1_down.conv.weight", "decoder.level1_up.conv.weight"} <= found.keys()
    assert all(name.endswith(".weight") and unet.get_parameter(name).ndim > 1 for name in found)

    classifier = hidden_matrices(NoisyClassifierModel(**small, num_classes=3))
    assert classifier and all(name.startswith(("encoder.", "middle.")) for name in classifier)
    vae = hidden_matrices(VAEModel(**small, out_channels=1, latent_channels=2))
    assert vae and all(name.startswith(("encoder.stack.", "decoder.stack.")) for name in vae)


def test_what_muon_is_not_for_is_refused():
    config = TrainerConfig(optimizer="muon")
    with pytest.raises(ValueError, match="muon is for hidden matrices, and Linear names none: take adamw"):
        make_optimizer(config, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="FSDP spreads them: take adamw"):
        make_optimizer(config, tiny_dit(), sharded=True)
    with pytest.raises(ValueError, match="must be 4 matrices, one above the other, got shape"):
        MuonAdamW([{"params": [nn.Parameter(torch.ones(6, 2))], "num_matrices": 4}])
    for options, message in [
        ({"muon_learning_rate": 0.1}, "muon_learning_rate has no meaning without optimizer muon"),
        ({"optimizer": "muon", "muon_learning_rate": 0.0}, "muon_learning_rate must be positive, got 0"),
        ({"optimizer": "muon", "muon_momentum": 1.0}, r"muon_momentum must be in \[0, 1\), got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainerConfig(**options)


def test_by_default_muon_trains_transformers_that_start_at_random_weights(tmp_path, monkeypatch):
    GuidedDiffusionPipeline(denoiser=tiny_dit(), scheduler=ExtDDIMScheduler()).save_pretrained(tmp_path)

    def resolved(**options):
        return resolve_for_machine(TrainConfig(**options))

    transformer = resolved(model="dit", learning_rate=5e-4)
    assert transformer.optimizer == "muon" and transformer.muon_learning_rate == pytest.approx(0.01)
    assert resolved(model="dit", optimizer="muon", muon_learning_rate=0.1).muon_learning_rate == 0.1
    for options in ({}, {"model": "dit", "optimizer": "adamw"}, {"pretrained_pipeline": str(tmp_path)}):
        other = resolved(**options)
        assert other.optimizer == "adamw" and other.muon_learning_rate is None
    assert resolved(pretrained_pipeline=str(tmp_path)).model == "dit"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert resolved(model="dit").optimizer == "adamw"


MUON = {"optimizer": "muon", "muon_learning_rate": 0.05, "logging_steps": 1, "checkpointing_steps": 4}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of 8 steps with accumulation, warm-up, decay and an average."""
    data, folder = prepare_images("digits", max_samples=20), tmp_path_factory.mktemp("muon") / "whole"
    settings = MUON | {"max_train_steps": 8, "gradient_accumulation_steps": 2}
    trainer(data, folder, error_of_dit, model=tiny_dit(), **settings).train()
    return data, folder, settings


def test_a_run_with_muon_resumes_bit_for_bit(whole, tmp_path):
    data, folder, settings = whole
    forget_accelerate()
    stop_before_step(trainer(data, tmp_path, error_of_dit, model=tiny_dit(), **settings), 6)
    forget_accelerate()
    settings = settings | {"resume_from_checkpoint": "latest"}
    run = trainer(data, tmp_path, error_of_dit, model=tiny_dit(), **settings)
    run.train()
    assert_same_run(folder, tmp_path, 8)


def test_both_learning_rates_follow_the_schedule(whole):
    data, folder, settings = whole
    optimizer = torch.load(folder / "checkpoint-4" / "optimizer.bin", weights_only=True)
    rates = [group["lr"] for group in optimizer["param_groups"]]
    assert [group["num_matrices"] for group in optimizer["param_groups"]] == [None, 1, 2, 6]
    assert rates[1:] == pytest.approx([5 * rates[0]] * 3) and 0 < rates[0] < 0.01


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_options_that_are_changed_when_a_run_goes_on_take_effect(whole, tmp_path, optimizer):
    """A checkpoint of an optimizer brings the options that it had."""
    data, _, settings = whole
    forget_accelerate()
    settings = MUON | settings if optimizer == "muon" else {"checkpointing_steps": 4, "max_train_steps": 8}
    stop_before_step(trainer(data, tmp_path, error_of_dit, model=tiny_dit(), **settings), 5)
    forget_accelerate()
    settings = settings | {"adam_weight_decay": 0.3, "adam_beta2": 0.95, "resume_from_checkpoint": "latest"}
    if optimizer == "muon":
        settings |= {"muon_weight_decay": 0.2, "muon_momentum": 0.5}
    run = trainer(data, tmp_path, error_of_dit, model=tiny_dit(), **settings)
    run.train()
    first, *others = run.optimizer.param_groups
    assert (first["weight_decay"], first["betas"]) == (0.3, (0.9, 0.95))
    assert len(others) == (3 if optimizer == "muon" else 0)
    assert all((group["weight_decay"], group["momentum"]) == (0.2, 0.5) for group in others)
