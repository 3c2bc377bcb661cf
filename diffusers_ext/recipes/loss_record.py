"""The training loss by noise level: for the log since its last line, and as a curve over the last lines."""

import csv
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.diffusion.variational_bound import bits_per_dim
from diffusers_ext.figures import draw_loss_by_snr


# The curve has at most this number of intervals of timesteps, and losses from before a line of the log count DECAY times
# as much after it.
NUM_INTERVALS, DECAY = 40, 0.9


class LossRecord(nn.Module):
    """Sums of losses by interval of the timesteps, in buffers, the same in all processes after `collect`.

    Args:
        schedule: The noising path.
        has_error: Whether the squared error without weights is another number than the loss.
        has_bound: Whether there is a variational bound.
        accelerator: Of the processes that record different samples; None if each records all of them.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        has_error: bool = False,
        has_bound: bool = False,
        accelerator: Accelerator | None = None,
    ):
        super().__init__()
        self.schedule, self.has_error, self.has_bound = schedule, has_error, has_bound
        self.accelerator = accelerator if accelerator is not None and accelerator.num_processes > 1 else None
        intervals = min(NUM_INTERVALS, len(schedule))
        # Sums of: importance weight, and times it the squared error, the loss, and the bound.
        self.register_buffer("recent_sums", torch.zeros(intervals, 4))
        self.register_buffer("faded_sums", torch.zeros(intervals, 4))
        # What this process has added since they were last collected, if there are others.
        self.register_buffer("own_sums", torch.zeros(intervals, 4), persistent=False)

    @torch.no_grad()
    def add(self, timesteps: Tensor, weight: Tensor, values: Tensor) -> None:
        """Adds samples. Does not wait for the device.

        Args:
            timesteps: int64, shape `(batch,)`.
            weight: Importance weights, shape `(batch, 1)`.
            values: Squared error, loss and bound, shape `(batch, 3)`.
        """
        interval = timesteps * len(self.recent_sums) // len(self.schedule)
        sums = self.recent_sums if self.accelerator is None else self.own_sums
        sums.index_add_(0, interval, torch.cat([weight, weight * values], dim=1))

    def collect(self) -> None:
        """Adds up what the processes have recorded; all of them call it."""
        if self.accelerator is not None:
            self.recent_sums += self.accelerator.reduce(self.own_sums, "sum")
            self.own_sums.zero_()

    def metrics(self) -> dict[str, float]:
        """Means since the last call, which starts the next: waits for the device. All processes call it.

        `loss_q1` to `loss_q4` are the loss by quarter of the timesteps, the cleanest first; `error_q1` to `error_q4` the
        squared error without weights, if the two differ; `vlb_bits_per_dim` the bound without its prior term, estimated,
        if there is one. Quarters that nothing was drawn from are left out.
        """
        self.collect()
        sums = self.recent_sums.cpu().double()
        self.faded_sums.mul_(DECAY).add_(self.recent_sums)
        self.recent_sums.zero_()
        quarter = torch.arange(len(sums)) * 4 // len(sums)
        sums = torch.zeros(4, 4, dtype=torch.float64).index_add_(0, quarter, sums)
        result = {}
        for name, column in (("loss", 2), *([("error", 1)] if self.has_error else [])):
            for number, row in enumerate(sums, start=1):
                if row[0] > 0:
                    result[f"{name}_q{number}"] = (row[column] / row[0]).item()
        total = sums.sum(0)
        if self.has_bound and total[0] > 0:
            result["vlb_bits_per_dim"] = bits_per_dim((total[3] / total[0]).item(), 1)
        return result

    def curve(self) -> list[dict[str, float]]:
        """The loss at each interval of timesteps that was drawn from, over the last lines of the log, the later the more.

        Without what several processes have recorded since the last of `collect` and `metrics`.

        Each has `first_timestep`, `last_timestep`, `log_snr` (natural, the mean over the interval), `error` and `loss`,
        and `vlb_bits_per_dim` if there is a bound.
        """
        sums = (DECAY * self.faded_sums + self.recent_sums).cpu().double()
        length = len(self.schedule)
        log_snr = 2 * (self.schedule.alpha[:-1] / self.schedule.sigma[:-1]).log()
        interval = torch.arange(length) * len(sums) // length
        rows = []
        for number, (weight, error, loss, bound) in enumerate(sums.tolist()):
            timesteps = (interval == number).nonzero().flatten()
            levels = log_snr[timesteps]
            levels = levels[levels.isfinite()]  # none at zero terminal SNR
            if weight == 0 or not len(levels):
                continue
            row = {
                "first_timestep": int(timesteps[0]),
                "last_timestep": int(timesteps[-1]),
                "log_snr": levels.mean().item(),
                "error": error / weight,
                "loss": loss / weight,
            }
            if self.has_bound:
                row["vlb_bits_per_dim"] = bits_per_dim(bound / weight, 1)
            rows.append(row)
        return rows

    def draw(self, folder: str | Path) -> dict[str, str]:
        """Draws `loss_by_snr.png` and writes its numbers to `loss_by_snr.csv`; nothing if there was no training.

        Returns: What the picture shows, by its name.
        """
        rows = self.curve()
        if not rows:
            return {}
        with atomic_write(Path(folder, "loss_by_snr.csv")) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        draw_loss_by_snr(rows, Path(folder, "loss_by_snr.png"))
        return {"loss_by_snr.png": "the loss at each noise level; its numbers are in loss_by_snr.csv"}


class RecordedObjective(nn.Module):
    """An objective with a `loss_record`: what `diffusers_ext.trainer.loop.Trainer` asks of it is asked of the record."""

    loss_record: LossRecord

    def collect(self) -> None:
        self.loss_record.collect()

    def metrics(self) -> dict[str, float]:
        return self.loss_record.metrics()

    def curve(self) -> list[dict[str, float]]:
        return self.loss_record.curve()

    def draw(self, folder: str | Path) -> dict[str, str]:
        return self.loss_record.draw(folder)
