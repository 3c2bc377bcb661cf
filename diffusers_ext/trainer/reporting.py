"""The numbers of a run: the values of its steps, and the lines of its log."""

import math
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusers_ext.trainer.page import RunPage
from diffusers_ext.trainer.progress import ProgressBar, SpeedWatch, TimeShares
from diffusers_ext.trainer.run_folder import METRICS_FILE, MetricsLog
from diffusers_ext.trainer.schedule import Budget
from diffusers_ext.trainer.state import RunState


# Of the lists of `RunState`, those that must be finite.
LOSSES = {"losses": "loss", "adversary_losses": "adversary's loss"}


class StepValues:
    """The values of the last steps, left on the device, since reading them waits for it.

    Args:
        state: Gets them, in its lists of the same names.
    """

    def __init__(self, accelerator: Accelerator, state: RunState):
        self._accelerator, self._state = accelerator, state
        self._clear()

    def _clear(self):
        self._values: dict[str, list[Tensor]] = {"losses": [], "norms": [], "adversary_losses": []}

    def add(self, name: str, value: Tensor):
        self._values[name].append(value)

    def read(self, last_checkpoint: Path | None) -> None:
        """Reads the values into the state, as means over the processes.

        Raises:
            FloatingPointError: if a loss is not finite; with the first such step and the checkpoint to go back to.
        """
        if not self._values["losses"]:
            return
        values = torch.stack([value.float() for values in self._values.values() for value in values])
        values = iter(self._accelerator.reduce(values, "mean").tolist())
        read = {name: [next(values) for _ in pending] for name, pending in self._values.items()}
        faults = [
            (self._state.step - len(read[name]) + number, value, described)
            for name, described in LOSSES.items()
            for number, value in enumerate(read[name], start=1)
            if not math.isfinite(value)
        ]
        if faults:
            raise not_finite(*min(faults, key=lambda fault: fault[0]), last_checkpoint)
        for name, numbers in read.items():
            getattr(self._state, name).extend(numbers)
        self._clear()


def not_finite(step: int, loss: float, name: str, last_checkpoint: Path | None) -> FloatingPointError:
    """The error of a run whose loss is not finite after optimizer step `step`."""
    good = f"the last good checkpoint is {last_checkpoint}" if last_checkpoint else "no checkpoint was saved"
    return FloatingPointError(
        f"the {name} is not finite ({loss}) at step {step}, so the run ends; {good}. A lower --learning_rate, a longer "
        "--lr_warmup_steps or --mixed_precision no may help"
    )


class RunLog:
    """`metrics.jsonl`, the trackers, the page and the progress bar, and a warning if the run becomes slow.

    Args:
        state: Where the run starts; a log of steps beyond it is cut.
        images_per_step: Over all processes.
        page: Of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        budget: Budget,
        state: RunState,
        images_per_step: int,
        page: RunPage,
    ):
        is_main = accelerator.is_main_process
        self._accelerator, self._page = accelerator, page
        self._file = MetricsLog(output_dir / METRICS_FILE, state.step) if is_main else None
        self._bar = ProgressBar(budget, images_per_step, steps=state.step, seconds=state.seconds, enabled=is_main)
        self._speed_watch = SpeedWatch(accelerator.device.type)

    def advance(self, step: int, seconds: float):
        """Moves the progress bar."""
        self._bar.advance(step, seconds)

    def write(
        self,
        state: RunState,
        *,
        epoch: float,
        learning_rate: float,
        seconds: float,
        shares: TimeShares,
        metrics: dict[str, float],
    ):
        """Writes a line: the means over the steps since the last one, and further metrics.

        Args:
            seconds: Of the run.
            shares: Of its time.
        """
        record = {"step": state.step, "images": state.position, "epoch": epoch} | state.take_means()
        speed = self._bar.report(state.step, seconds, record["loss"])
        record |= {"learning_rate": learning_rate, "seconds": round(seconds, 3), "images_per_second": round(speed, 1)}
        record |= metrics
        if self._file:
            self._file.write(record)
        self._page.add(record)
        values = {name: value for name, value in record.items() if name != "step" and value is not None}
        self._accelerator.log(values, step=state.step)
        if slow := self._speed_watch.note(state.step, seconds, shares):
            self._accelerator.print(slow)

    def close(self):
        self._bar.close()
        if self._file:
            self._file.close()
