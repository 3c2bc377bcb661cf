"""The parts of a checkpoint: the state of a run, its networks and optimizers, its EMA, its objective and its data."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_ext.data.identity import IDENTITY_FILE, describe_change
from diffusers_ext.data.stream import save_stream_state
from diffusers_ext.options import to_yaml
from diffusers_ext.trainer.checkpoints import CheckpointError
from diffusers_ext.trainer.ema import WeightAverage
from diffusers_ext.trainer.posthoc_ema import AverageSnapshots
from diffusers_ext.trainer.run_folder import CONFIG_FILE
from diffusers_ext.trainer.sharding import gathered, scattered
from diffusers_ext.untrusted import from_mapping, read_json


STATE_FILE, AVERAGE_FILE, OBJECTIVE_FILE = "run_state.json", "average.safetensors", "objective.safetensors"


@dataclass
class RunState:
    """Where a run stands.

    Attributes:
        step: Optimizer steps done.
        position: Images seen, by all processes together; the next batch starts there.
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

    def take_means(self) -> dict[str, float | None]:
        """The means since the last line of the log; the next ones begin here."""
        # With fp16's scaled loss a norm that is not finite is of a step that was left out, as a lower scale is sought.
        norms = [norm for norm in self.norms if math.isfinite(norm)]
        means = {"loss": fmean(self.losses), "grad_norm": fmean(norms) if norms else None}
        if self.adversary_losses:
            means["adversary_loss"] = fmean(self.adversary_losses)
        self.losses, self.norms, self.adversary_losses = [], [], []
        return means


def save_run(
    folder: Path,
    accelerator: Accelerator,
    *,
    state: RunState,
    config: Any,
    identity: dict[str, Any],
    stream: dict[str, Any] | None = None,
    average: WeightAverage | None = None,
    snapshots: AverageSnapshots | None = None,
    objective: nn.Module | None = None,
) -> None:
    """Writes this process's part of a checkpoint. Every process calls it: gathering what is sharded takes all of them.

    Args:
        accelerator: Writes the models and optimizers that it has prepared, the gradient scaler and the random states.
        state: Of the run.
        config: Its options.
        identity: Of its data, see `diffusers_ext.data.identity`.
        stream: The position in a stream of images, of this process.
        average: The EMA.
        snapshots: The averages that snapshots are taken of.
        objective: The loss, if it has buffers.
    """
    accelerator.save_state(str(folder))
    save_stream_state(stream, folder, accelerator.process_index)
    tensors = {} if average is None else {AVERAGE_FILE: gathered(average.state_dict())}
    if hasattr(objective, "collect"):
        objective.collect()
    if not accelerator.is_main_process:
        return
    (folder / STATE_FILE).write_text(json.dumps(dataclasses.asdict(state), indent=2) + "\n")
    (folder / CONFIG_FILE).write_text(to_yaml(config))
    (folder / IDENTITY_FILE).write_text(json.dumps(identity, ensure_ascii=False) + "\n")
    if objective is not None:
        # safetensors refuses tensors that share memory or lie in another order.
        tensors[OBJECTIVE_FILE] = {name: value.contiguous().clone() for name, value in objective.state_dict().items()}
    for name, values in tensors.items():
        save_file(values, folder / name)
    if snapshots is not None:
        snapshots.save(folder)


def load_run(
    folder: Path,
    accelerator: Accelerator,
    *,
    state: RunState,
    warmup_steps: int,
    average: WeightAverage | None = None,
    snapshots: AverageSnapshots | None = None,
    objective: nn.Module | None = None,
) -> None:
    """Reads a checkpoint into what is given, which are the parts that `save_run` has written.

    Args:
        warmup_steps: At which the warm-up of the learning rate ended, for a checkpoint that does not have it.

    Raises:
        ValueError: if the checkpoint is of a run with another objective, or its state is none.
        CheckpointError: if a file of it is none that was saved so. No code in it is run.
    """
    if objective is not None and not (folder / OBJECTIVE_FILE).exists():
        raise ValueError(f"{folder} has no {OBJECTIVE_FILE}, so it is of a run without one: give the same objective")
    try:
        accelerator.load_state(str(folder))
        average_state = None if average is None else load_file(folder / AVERAGE_FILE)
        if snapshots is not None:
            snapshots.load(folder)
        objective_state = None if objective is None else load_file(folder / OBJECTIVE_FILE)
    except Exception as error:  # libraries report files that are none of theirs as what they like
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{folder} cannot be read: {type(error).__name__}: {reason}") from error
    given = read_json(folder / STATE_FILE)
    saved = from_mapping(RunState, given, folder / STATE_FILE)
    if min(saved.step, saved.position) < 0 or not 0 <= saved.seconds < math.inf:
        raise ValueError(f"{folder / STATE_FILE} must have a step, a position and seconds of at least 0")
    if saved.step > warmup_steps and "warmup_steps" not in given:
        saved.warmup_steps = warmup_steps
    for field_ in dataclasses.fields(saved):
        setattr(state, field_.name, getattr(saved, field_.name))
    if average is not None:
        average.load_state_dict(scattered(average_state, like=average.state_dict()))
    if objective is not None:
        objective.load_state_dict(objective_state)


def check_same_data(folder: Path, name: str, num_images: int | None, identify: Callable[[], dict]) -> list[str]:
    """Compares the data with those of the run that a checkpoint is from.

    Args:
        name: Of the data.
        identify: Gives their identity, which takes long.

    Returns: a line, if the checkpoint does not say.

    Raises:
        ValueError: if they differ.
    """
    path = folder / IDENTITY_FILE
    if path.exists():
        change = describe_change(read_json(path), identify())
    else:
        saved = read_json(folder / STATE_FILE).get("num_images")
        change = None if saved == num_images else f"it had {saved} images, and has {num_images}"
    if change:
        raise ValueError(
            f"{folder} is of a run on other data than {name} holds: {change}. Give the same data, or start a new run in "
            "another --output_dir"
        )
    if path.exists():
        return []
    return [f"{folder} has no {IDENTITY_FILE}: it is not known whether the data are those of the run"]
