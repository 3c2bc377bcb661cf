"""Options that make steps faster or smaller and leave what is learnt as it is."""

import psutil
import pytest
import torch
from torch._dynamo.utils import counters

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.machine import (
    INSTRUCTIONS,
    available_cores,
    cpu_instructions,
    fast_precision,
    fastest,
    is_fast_at_bf16,
    set_threads,
)
from diffusers_ext.models.unet import UNetBlock
from diffusers_ext.trainer.config import TrainerConfig, describe_speed, resolve_for_machine
from diffusers_ext.trainer.run import make_accelerator
from runs import forget_accelerate, metrics, saved, trainer
from tiny import tiny_unet


@pytest.fixture(scope="module")
def data():
    return prepare_images("digits", max_samples=20)


def unet_error(model, batch):
    time = batch["time"].float()
    x_t = batch["images"] + time.view(-1, 1, 1, 1) * batch["noise"]
    return (model(x_t, 1000 * time, class_labels=batch["labels"]).sample - batch["noise"]).square().mean()


def train_unet(data, folder, **settings):
    """4 steps of a U-Net; gives the run and for each call of a convolution whether it was in autocast."""
    forget_accelerate()
    model, calls = tiny_unet(num_classes=10), []
    block = next(module for module in model.modules() if isinstance(module, UNetBlock))
    block.conv_2.register_forward_pre_hook(lambda module, inputs: calls.append(torch.is_autocast_enabled("cpu")))
    run = trainer(data, folder, unet_error, model=model, max_train_steps=4, learning_rate=1e-3, **settings)
    run.train()
    return run, calls


def test_gradient_checkpointing_computes_activations_twice_and_learns_the_same(data, tmp_path):
    _, once = train_unet(data, tmp_path / "plain")
    _, twice = train_unet(data, tmp_path / "checkpointed", gradient_checkpointing=True)
    assert (len(once), len(twice)) == (4, 8)
    plain, checkpointed = saved(tmp_path / "plain", 4)[0], saved(tmp_path / "checkpointed", 4)[0]
    for name in plain:
        assert torch.equal(plain[name], checkpointed[name]), name


def test_bf16_is_the_precision_of_the_forward_pass_alone(data, tmp_path):
    _, full = train_unet(data, tmp_path / "no")
    run, half = train_unet(data, tmp_path / "bf16", mixed_precision="bf16")
    assert not any(full) and all(half)
    tensors = saved(tmp_path / "bf16", 4)[0]
    for name, value in tensors.items():
        assert value.dtype == (torch.int64 if name.endswith("num_updates") else torch.float32), name
    losses = [metrics(tmp_path / name)[-1]["loss"] for name in ("no", "bf16")]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.05)
    with run.averaged_model() as model, torch.no_grad():
        output = model(torch.zeros(1, 1, 8, 8), 3, class_labels=torch.tensor([1])).sample
    assert output.dtype == torch.float32 and half[-1] and len(half) == len(full) + 1


def test_fp16_is_refused_without_a_gpu():
    if torch.accelerator.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="mixed_precision fp16 needs a GPU, .* take bf16 or no"):
        resolve_for_machine(TrainerConfig(mixed_precision="fp16"))


def test_one_function_decides_what_is_fastest_and_a_run_says_what_it_computes_with(monkeypatch, capsys, tmp_path):
    """By what the CPU has: bfloat16 where it multiplies matrices in it. The line names what the options changed."""

    def lines(*instructions, **settings):
        capabilities = {name: name in instructions for name in INSTRUCTIONS}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
        config = resolve_for_machine(TrainerConfig(output_dir=str(tmp_path), **settings))
        line = describe_speed(config, "cpu").replace(f", {torch.get_num_threads()} thread", ", N thread")
        return line.replace("threads", "thread")

    assert lines("avx2", "avx512_f") == "on a CPU with avx512_f: float32, channels_last, N thread"
    assert lines("avx2", "avx512_bf16") == "on a CPU with avx512_bf16: bfloat16, channels_last, N thread"
    assert lines(*INSTRUCTIONS) == "on a CPU with amx_bf16: bfloat16, channels_last, N thread"
    assert fast_precision("cpu") == fastest("cpu").precision == torch.bfloat16 and is_fast_at_bf16("cpu")
    assert lines(*INSTRUCTIONS, mixed_precision="no", channels_last=False) == (
        "on a CPU with amx_bf16: float32, contiguous, N thread; fastest there: bfloat16, channels_last"
    )
    assert "float32" in lines() and fast_precision("cpu") == torch.float32 and not is_fast_at_bf16("cpu")
    monkeypatch.undo()
    assert fastest("mps").precision == torch.float32 and not fastest("mps").channels_last
    if not torch.accelerator.is_available():
        make_accelerator(TrainerConfig(output_dir=str(tmp_path)))
        forget_accelerate()
        assert capsys.readouterr().out.startswith(f"on a CPU with {cpu_instructions()}: ")


def test_cores_are_shared_by_the_processes_of_one_machine(monkeypatch):
    """Of 64 processes on 64 machines each has all cores; on one machine they have one each."""
    physical = psutil.cpu_count(logical=False) or len(available_cores())
    cores, before = min(physical, len(available_cores())), torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        for local, expected in ((1, cores), (64, max(1, cores // 64))):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
            torch.set_num_threads(3)
            set_threads(None, 64)
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


def test_a_compiled_model_learns_the_same(data, tmp_path):
    """float32 sums in another order, hence the tolerance."""
    settings = {"max_train_steps": 4, "dropout": 0.0}
    trainer(data, tmp_path / "plain", **settings).train()
    before = counters["stats"]["unique_graphs"]
    trainer(data, tmp_path / "compiled", compile=True, **settings).train()
    assert counters["stats"]["unique_graphs"] > before
    plain, compiled = saved(tmp_path / "plain", 4)[0], saved(tmp_path / "compiled", 4)[0]
    assert plain.keys() == compiled.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], compiled[name], rtol=1e-3, atol=1e-5)
