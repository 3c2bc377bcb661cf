"""What a run has to remember: its state, saved beside that of its networks and optimizers, and loaded from there."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from diffusers_ext.data.identity import IDENTITY_FILE, describe_change
from diffusers_ext.data.stream import load_stream_state, save_stream_state
from diffusers_ext.options import to_yaml
from diffusers_ext.trainer.run_folder import CONFIG_FILE
from diffusers_ext.trainer.sharding import gathered, scattered


if TYPE_CHECKING:
    from diffusers_ext.trainer.loop import Trainer


STATE_FILE, AVERAGE_FILE, OBJECTIVE_FILE = "run_state.json", "average.safetensors", "objective.safetensors"


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        position: Images looked at, by all processes together; the next batch starts there.
        num_images: Of the data set, on which the meaning of a position depends; None for a stream.
        seconds: Time of the run, from the first step on, over all its parts.
        warmup_steps, warmup_seconds: `step` and `seconds` when the warm-up of the learning rate ended; None and 0 before.
        losses, norms, adversary_losses: Of each step since the last line of the log.
    """

    step: int = 0
    position: int = 0
    num_images: int | None = 0
    seconds: float = 0.0
    warmup_steps: int | None = None
    warmup_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    adversary_losses: list[float] = field(default_factory=list)

    @property
    def warmup_end(self) -> tuple[int, float] | None:
        """For `LearningRate.at`."""
        return None if self.warmup_steps is None else (self.warmup_steps, self.warmup_seconds)


def save_run(trainer: "Trainer", folder: Path) -> None:
    """Writes this process's part of a checkpoint. Every process calls it: gathering what is sharded takes all of them."""
    accelerator = trainer.accelerator
    accelerator.save_state(str(folder))
    save_stream_state(trainer._stream.state, folder, accelerator.process_index)
    average = gathered(trainer.average.state_dict()) if trainer.average else None
    if hasattr(trainer.objective, "collect"):
        trainer.objective.collect()
    if not accelerator.is_main_process:
        return
    (folder / STATE_FILE).write_text(json.dumps(dataclasses.asdict(trainer.state), indent=2) + "\n")
    (folder / CONFIG_FILE).write_text(to_yaml(trainer.config))
    (folder / IDENTITY_FILE).write_text(json.dumps(trainer.data_identity, ensure_ascii=False) + "\n")
    if average:
        save_file(average, folder / AVERAGE_FILE)
    if trainer.snapshots:
        trainer.snapshots.save(folder)
    if trainer.objective:
        state = trainer.objective.state_dict()
        # safetensors refuses tensors that share memory or lie in another order.
        save_file({name: value.contiguous().clone() for name, value in state.items()}, folder / OBJECTIVE_FILE)


def _check_same_data(trainer: "Trainer", folder: Path) -> None:
    """Refuses other data than those that the checkpoint's run is on."""
    path = folder / IDENTITY_FILE
    if not path.exists():
        trainer.accelerator.print(
            f"{folder} has no {IDENTITY_FILE}: it is not known whether the data are those of the run"
        )
        return
    change = describe_change(json.loads(path.read_text()), trainer.data_identity)
    if change:
        raise ValueError(
            f"{folder} is of a run on other data than {trainer.data.name} holds: {change}. Give the same data, or start a "
            "new run in another --output_dir"
        )


def load_run(trainer: "Trainer", folder: Path) -> dict[str, Any] | None:
    """Brings a trainer to where a checkpoint was written; gives the state of its stream of images, if it is one.

    Raises:
        ValueError: if the checkpoint is of a run with other data or another objective.
    """
    saved, data = json.loads((folder / STATE_FILE).read_text()), trainer.data
    if saved["num_images"] != data.num_images:
        raise ValueError(
            f"{folder} is of a run on {saved['num_images']} images, the data set {data.name} has {data.num_images}: give "
            "the same data, or start a new run in another --output_dir"
        )
    _check_same_data(trainer, folder)
    if trainer.objective and not (folder / OBJECTIVE_FILE).exists():
        raise ValueError(f"{folder} has no {OBJECTIVE_FILE}, so it is of a run without one: give the same objective")
    trainer.accelerator.load_state(str(folder))
    for name, value in saved.items():
        setattr(trainer.state, name, value)
    # A state without the step at which the warm-up ended is of a run whose warm-up was a number of steps.
    warmup_steps = trainer.learning_rate.warmup_steps
    if "warmup_steps" not in saved and trainer.state.step > warmup_steps:
        trainer.state.warmup_steps = warmup_steps
    if trainer.average:
        average = scattered(load_file(folder / AVERAGE_FILE), like=trainer.average.state_dict())
        trainer.average.load_state_dict(average)
    if trainer.snapshots:
        trainer.snapshots.load(folder)
    if trainer.objective:
        trainer.objective.load_state_dict(load_file(folder / OBJECTIVE_FILE))
    return None if data.num_images is not None else load_stream_state(folder, trainer.accelerator.process_index)
