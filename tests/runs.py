"""Runs of the training loop so small that they can be compared to the last bit."""

import json

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import nn

from diffusers_ext.trainer.config import TrainerConfig, resolve_for_machine
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.run_folder import read_metrics


class Denoiser(nn.Module):
    """Two convolutions with dropout between them, so that the default generators matter."""

    def __init__(self):
        super().__init__()
        self.first, self.dropout, self.last = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Dropout(0.2),
            nn.Conv2d(4, 1, 3, padding=1),
        )

    def forward(self, x):
        return self.last(self.dropout(self.first(x).relu()))


def squared_error(model, batch):
    time = batch["time"].float().view(-1, 1, 1, 1)
    return (model((1 - time) * batch["images"] + time * batch["noise"]) - batch["noise"]).square().mean()


class CountedError(nn.Module):
    """An objective whose weights follow from its own history."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("since", torch.zeros(2))
        self.drawn = None

    def forward(self, model, batch):
        loss = squared_error(model, batch)
        if self.training:
            self.since += torch.stack([loss.detach(), torch.ones(())])
            self.seen += 1
        return loss / (1 + 0.1 * self.seen)

    def metrics(self):
        total, count = self.since.tolist()
        self.since.zero_()
        return {"unweighted": total / count, "seen": self.seen.item()}

    def draw(self, folder):
        (folder / "objective.txt").write_text(str(self.seen.item()))


def forget_accelerate():
    """accelerate keeps precision and accumulation for the life of a process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def trainer(
    data,
    output_dir,
    loss=squared_error,
    *,
    model=None,
    dropout=0.2,
    on_images=None,
    step_hook=None,
    validation_data=None,
    cpu=True,
    ending_cost=None,
    config_class=TrainerConfig,
    **settings,
):
    defaults = {
        "train_batch_size": 4,
        "max_train_steps": 12,
        "lr_warmup_steps": 2,
        "logging_steps": 3,
        "learning_rate": 0.01,
    }
    config = resolve_for_machine(
        config_class(**defaults | {"mixed_precision": "no", "output_dir": str(output_dir)} | settings)
    )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
    )
    if model is None:
        torch.manual_seed(0)
        model = Denoiser()
        model.dropout.p = dropout
    output_dir.mkdir(exist_ok=True)
    more = {"on_images": on_images, "step_hook": step_hook, "validation_data": validation_data}
    more["ending_cost"] = ending_cost
    return Trainer(config, accelerator, model, loss, data, **more)


def saved(output_dir, step):
    """Everything that a checkpoint holds of networks, averages, optimizers, objective and run."""
    folder = output_dir / f"checkpoint-{step}"
    tensors, groups = {}, []
    for path in sorted(folder.rglob("*.safetensors")):
        tensors |= {f"{path.name}: {name}": value for name, value in load_file(path).items()}
    for path in sorted(folder.glob("optimizer*.bin")):
        optimizer = torch.load(path, weights_only=True)
        groups += optimizer["param_groups"]
        for number, entry in optimizer["state"].items():
            tensors |= {f"{path.name}: {number} {name}": value for name, value in entry.items()}
    state = json.loads((folder / "run_state.json").read_text())
    timed = ("seconds", "warmup_seconds")
    return tensors, {name: value for name, value in state.items() if name not in timed}, groups


def metrics(output_dir):
    timed = ("seconds", "images_per_second")
    records = read_metrics(output_dir / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in timed} for record in records]


def random_states(output_dir, step):
    """Of Python, NumPy and torch, of each process."""
    states = {}
    for path in sorted((output_dir / f"checkpoint-{step}").glob("random_states_*.pkl")):
        state = torch.load(path, weights_only=False)
        numpy = [str(part.tolist() if hasattr(part, "tolist") else part) for part in state["numpy_random_seed"]]
        states[path.name] = (state["random_state"], numpy, state["torch_manual_seed"].tolist(), state["step"])
    return states


def assert_same_run(one, other, step):
    """Bit for bit: weights, averages, optimizers with their learning rates, random states, position, log."""
    tensors, state, groups = saved(one, step)
    tensors_other, state_other, groups_other = saved(other, step)
    assert tensors.keys() == tensors_other.keys() and len(tensors) > 10
    for name in tensors:
        assert torch.equal(tensors[name], tensors_other[name]), name
    assert state == state_other and groups == groups_other
    assert len(random_states(one, step)) > 0 and random_states(one, step) == random_states(other, step)
    assert metrics(one) == metrics(other)


class Preempted(Exception):
    pass


def stop_before_step(run, last_step):
    """Trains until so many steps are done and then breaks off, without a checkpoint there."""
    step = run._step

    def until():
        if run.state.step == last_step:
            raise Preempted
        step()

    run._step = until
    try:
        run.train()
    except Preempted:
        return
    raise AssertionError("the run was not broken off")
