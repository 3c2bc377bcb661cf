"""Runs of two processes, for test_processes.py; with one process, what to compare with."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import PartialState
from safetensors.torch import save_file
from torch import nn

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.recipes.sample_grids import draw_samples
from diffusers_ext.trainer.adversary import Adversary
from diffusers_ext.trainer.checkpoints import CheckpointError, find_for_all
from runs import Denoiser, forget_accelerate, stop_before_step, trainer
from tiny import tiny_unet


class Contest(nn.Module):
    """An objective with a state that all processes share, and with an adversary."""

    def __init__(self, accelerator):
        super().__init__()
        self.accelerator = accelerator
        self.register_buffer("losses", torch.zeros(2))
        torch.manual_seed(1)
        critic = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3))
        self.adversary = Adversary(critic, self.judge, learning_rate=0.02, start_step=3)

    def forward(self, model, batch):
        batch["guess"] = model(batch["images"] + batch["noise"])
        loss = (batch["guess"] - batch["noise"]).square().mean()
        if self.training:
            self.losses += torch.stack([self.accelerator.reduce(loss.detach(), "mean"), torch.ones(())])
        return loss / (1 + self.losses[1] / 10) - 0.1 * self.adversary.module(batch["guess"]).mean()

    def judge(self, module, batch):
        real, guess = module(torch.cat([batch["images"], batch["guess"]])).chunk(2)
        return ((1 - real).relu() + (1 + guess).relu()).mean()

    def metrics(self):
        total, count = self.losses.tolist()
        return {"mean_so_far": total / count}


SETTINGS = {
    "gradient_accumulation_steps": 2,
    "checkpointing_steps": 7,
    "logging_steps": 1,
    "validation_split": "test",
    "validation_steps": 4,
    "random_flip": True,
    "max_grad_norm": 0.5,
}


def contest(data, folder, dropout=0.0, **settings):
    forget_accelerate()
    objective = Contest(Accelerator(cpu=True, gradient_accumulation_steps=2))
    held_out = prepare_images("digits", split="test", max_samples=11)
    more = {"step_hook": objective.adversary, "validation_data": held_out, "dropout": dropout}
    return trainer(data, folder, objective, **more, **SETTINGS | settings)


def main(folder, resume=True):
    folder.mkdir(exist_ok=True)
    data = prepare_images("digits", max_samples=20)
    batch_size = 4 // Accelerator(cpu=True).num_processes
    contest(data, folder / "whole", train_batch_size=batch_size).train()

    # The same with dropout, which draws from the random states of each process: undisturbed, and broken off.
    if resume:
        dropout = {"dropout": 0.2, "train_batch_size": batch_size}
        contest(data, folder / "undisturbed", **dropout).train()
        stop_before_step(contest(data, folder / "parts", dataloader_num_workers=2, **dropout), 10)
        opened = files_opened()
        run = contest(data, folder / "parts", resume_from_checkpoint="latest", **dropout)
        run.train()
        manifests = [name for name in opened if name.endswith("manifest.json")]
        (folder / f"manifests-{run.accelerator.process_index}.txt").write_text("\n".join(manifests))

    few_held_out_images(data, folder)
    spread(data, folder, batch_size, resume)
    by_time(data, folder)
    with_muon(data, folder, batch_size)

    forget_accelerate()
    Accelerator(cpu=True)
    for labels in (None, [0, 1, 2]):
        pipe = GuidedDiffusionPipeline(
            denoiser=tiny_unet(num_classes=3), scheduler=ExtDDIMScheduler(timestep_spacing="trailing")
        )
        pipe.set_progress_bar_config(disable=True)
        path = folder / f"samples-{labels is not None}.png"
        draw_samples(pipe, path, labels=labels, columns=3, batch_size=2, num_inference_steps=3)
    return data


def files_opened():
    """A list to which this process adds each file that it opens from now on."""
    names = []
    sys.addaudithook(lambda event, details: names.append(str(details[0])) if event == "open" else None)
    return names


def few_held_out_images(data, folder):
    """The loss on two images, which are one batch: a second process has none of them."""
    forget_accelerate()
    held_out = prepare_images("digits", split="test", max_samples=2)
    settings = {"train_batch_size": 2, "validation_split": "test", "validation_data": held_out}
    run = trainer(data, folder / "few", **settings)
    (folder / f"few-{run.accelerator.process_index}.txt").write_text(repr(run.evaluate()))


def spread(data, folder, batch_size, resume):
    """A run whose parameters FSDP2 spreads over the processes, if there are two: with the options of `accelerate launch`.

    accelerate offers it for GPUs only, where torch has it for CPUs too: so these are said to be some.
    """
    options = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
    options |= {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    held_out = prepare_images("digits", split="test", max_samples=11)
    settings = SETTINGS | {"dropout": 0.0, "validation_data": held_out, "train_batch_size": batch_size}

    def run(name, **more):
        forget_accelerate()
        if PartialState(cpu=True).num_processes > 1:
            os.environ |= options
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        return trainer(data, folder / name, **settings | more)

    run("spread").train()
    if resume:
        stop_before_step(run("spread-parts"), 10)
        run("spread-parts", resume_from_checkpoint="latest").train()
    for name in options:
        os.environ.pop(name, None)


def by_time(data, folder):
    """A run by time in processes whose clocks differ; each leaves its weights."""
    forget_accelerate()
    run = trainer(
        data, folder / "by-time", max_train_steps=None, max_train_time="1", checkpointing_steps=2, train_batch_size=2
    )
    now, index = run.clock.now, run.accelerator.process_index
    run.clock.now = lambda: now() + 0.3 * index
    run.train()
    weights = {name: value.contiguous() for name, value in run.module.state_dict().items()}
    save_file(weights, folder / f"by-time-{index}.safetensors")


class Hidden(Denoiser):
    """With a convolution of two fused matrices between the two."""

    _hidden_parts = ("hidden",)

    def __init__(self):
        super().__init__()
        self.hidden = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)))
        self.hidden[0]._fused_layers = {"0": 2}

    def forward(self, x):
        return self.last(self.hidden(self.first(x).relu()).relu())


def with_muon(data, folder, batch_size):
    forget_accelerate()
    torch.manual_seed(0)
    settings = {"optimizer": "muon", "max_train_steps": 6, "train_batch_size": batch_size}
    trainer(data, folder / "muon", model=Hidden(), **settings).train()


def fail_in_one_process(data, folder):
    """Process 1 cannot write at step 6; each process notes how that ends."""
    forget_accelerate()
    run = trainer(data, folder, checkpointing_steps=3, train_batch_size=2)
    index, save_state = run.accelerator.process_index, run.accelerator.save_state

    def save(path):
        save_state(path)
        if index == 1 and run.state.step == 6:
            Path("/dev/full").write_bytes(bytes(10))

    run.accelerator.save_state = save
    try:
        run.train()
        end = "the run was completed"
    except CheckpointError as error:
        end = str(error)
    (folder / f"end-{index}.txt").write_text(end)


def find_in_both(folder):
    """Checkpoints that there are not, or that process 1 does not see; each process notes how that ends."""
    forget_accelerate()
    accelerator = Accelerator(cpu=True)
    index = accelerator.process_index
    os.chdir(folder.parent if index else folder)
    for name, place, request in (("missing", folder, "checkpoint-5"), ("unseen", Path("."), "latest")):
        try:
            end = str(find_for_all(accelerator, place, request))
        except CheckpointError as error:
            end = str(error)
        (folder / f"{name}-{index}.txt").write_text(end)


def run_all(folder):
    """All of it, in each of the two processes."""
    failed = folder / "failed"
    fail_in_one_process(main(folder), failed)
    find_in_both(failed)
