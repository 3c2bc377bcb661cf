"""The objective of a classifier of noisy samples, and its accuracy at each noise level."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.diffusion.noising import NoiseSchedule, add_noise
from diffusers_ext.figures import save_picture
from diffusers_ext.recipes.running_sums import RunningSums


NUM_LEVELS = 20  # of the accuracy curve


class ClassifierObjective(RunningSums):
    """The mean cross-entropy of a batch in nats, each image at the noise level of its time.

    It trains nothing of its own. In training mode it counts how often the label is the likeliest, for the log.

    Args:
        schedule: The noising path, at the scale at which the model sees x_t.
        accelerator: Collects the counts of all processes; without one there is one process.
    """

    def __init__(self, schedule: NoiseSchedule, accelerator: Accelerator | None = None):
        # By quarter of the timesteps: labels right, and labels.
        super().__init__(accelerator, counts=(4, 2))
        self.schedule = schedule

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        timesteps = (batch["time"] * len(self.schedule)).long()
        logits = noisy_logits(model, batch["images"], batch["noise"], timesteps, self.schedule)
        if self.training:
            with torch.no_grad():
                right = (logits.argmax(1) == batch["labels"]).to(self.counts)
                quarter = timesteps * 4 // len(self.schedule)
                self.summand("counts").index_add_(0, quarter, torch.stack([right, torch.ones_like(right)], dim=1))
        return F.cross_entropy(logits, batch["labels"])

    def metrics(self) -> dict[str, float]:
        """Accuracy since the last call, `accuracy_q1` to `accuracy_q4` by quarter of the timesteps, the cleanest first."""
        self.collect()
        counts = self.counts.tolist()
        self.clear()
        return {
            f"accuracy_q{number}": right / total for number, (right, total) in enumerate(counts, start=1) if total > 0
        }


def noisy_logits(model: nn.Module, x0: Tensor, eps: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The classifier's logits for clean samples with this noise, float32, shape `(batch, num_classes)`."""
    x_t = add_noise(x0, eps, schedule.level(timesteps, x0))
    return model(x_t, schedule.labels(timesteps)).logits.float()


@torch.no_grad()
def accuracy_by_level(
    model: nn.Module, batches: Iterable[dict[str, Tensor]], schedule: NoiseSchedule, num_levels: int = NUM_LEVELS
) -> list[dict[str, float]]:
    """How often the likeliest label is the right one, at timesteps spread evenly over the path, the cleanest first.

    Args:
        model: In evaluation mode.
        batches: Dicts of `images` in [-1, 1], `noise` and `labels`; each image is seen at every level, with the same
            noise.

    Returns:
        For each level: `timestep`, `log_snr` (natural), `accuracy` and `cross_entropy` in nats.
    """
    timesteps = (
        torch.linspace(0, len(schedule) - 1, min(num_levels, len(schedule)), dtype=torch.float64).round().long()
    )
    sums, count = torch.zeros(len(timesteps), 2, dtype=torch.float64), 0
    for batch in batches:
        labels = batch["labels"]
        count += len(labels)
        for row, timestep in zip(sums, timesteps, strict=True):
            at = timestep.to(labels.device).expand(len(labels))
            logits = noisy_logits(model, batch["images"], batch["noise"], at, schedule)
            row[0] += (logits.argmax(1) == labels).sum().item()
            row[1] += F.cross_entropy(logits, labels, reduction="sum").item()
    levels = schedule.level(timesteps, torch.zeros(1, dtype=torch.float64))
    return [
        {"timestep": timestep, "log_snr": log_snr, "accuracy": right / count, "cross_entropy": nats / count}
        for timestep, log_snr, (right, nats) in zip(
            timesteps.tolist(), levels.snr.log().tolist(), sums.tolist(), strict=True
        )
    ]


def save_accuracy(rows: Sequence[dict[str, float]], folder: Path, *, num_classes: int, images: str) -> None:
    """Writes `accuracy.csv`, and `accuracy.png` with the curve.

    Args:
        rows: Of `accuracy_by_level`.
        num_classes: For the line of guessing.
        images: What it was measured on.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    with atomic_write(folder / "accuracy.csv") as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["timestep"] for row in rows], [row["accuracy"] for row in rows], marker=".", label=images)
    axes.axhline(1 / num_classes, color="grey", linestyle=":", label="guessing")
    axes.set_xlabel("timestep")
    axes.set_ylabel("share of the labels that are right")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    save_picture(figure, folder / "accuracy.png")
