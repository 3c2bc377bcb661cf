"""The loss of a training batch: which timesteps, which objective, and a record of the loss at each noise level."""

import csv
import math
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.diffusion.losses import (
    DEFAULT_WEIGHTINGS,
    LOSS_WEIGHTINGS,
    OBJECTIVES,
    bound_loss,
    denoising_loss,
    trained_share,
)
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, NoiseSchedule, add_noise
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.variational_bound import bits_per_dim
from diffusers_ext.figures import draw_loss_by_snr


# Nichol & Dhariwal 2021, Section 3.3: the second moment of the loss at a timestep is that of its last so many values,
# and until there are as many at each, timesteps are uniform.
HISTORY_LENGTH = 10
# Share of the timesteps that stay uniform, so that none whose losses happened to be small is never seen again.
UNIFORM_SHARE = 0.001

# Of the noise levels, below which the loss is said to be on too few.
SMALL_SHARE = 0.05

# What a batch may have, beside labels, that the model is called with: texts, encoded or in tokens.
TEXT_CONDITIONS = ("encoder_hidden_states", "encoder_attention_mask", "input_ids", "attention_mask")

# The timesteps are put together to so many intervals, and at each report the losses from before it count so much less.
NUM_INTERVALS, DECAY = 40, 0.9


class DenoisingObjective(nn.Module):
    """The mean loss of a batch, to be called with the model and the batch (see `diffusers_ext.data.batches`).

    It trains nothing of its own. Its state is in buffers: what timesteps are drawn by, the same in all processes after
    each step; and the losses since the last report, the same after `collect`. In evaluation mode timesteps are uniform
    and nothing is recorded.

    Args:
        schedule: The noising path.
        prediction_type: What the model outputs, one of `diffusers_ext.diffusion.noising.PREDICTION_TYPES`.
        objective: "simple": the weighted squared error of the output (DDPM's L_simple and its variants). "vlb": the
            variational bound, in nats per dimension, of a model that learns the variance too. "hybrid": "simple" for
            the mean, and `vlb_weight` times "vlb" for the variance alone (Nichol & Dhariwal 2021). The model has twice
            the channels for the last two, for the variance "learned_range".
        weighting: Of the squared error, one of `diffusers_ext.diffusion.losses.LOSS_WEIGHTINGS`; by default that of the prediction
            type. Not for "vlb".
        snr_gamma, p2_gamma: Of the weightings "min_snr" and "p2".
        vlb_weight: Weight of the bound in "hybrid".
        importance_sampling: Draw timestep t with a probability p_t in proportion to the root of the second moment of
            its loss, and divide by T p_t, which leaves the expected loss as it is and makes it less noisy
            (Nichol & Dhariwal 2021, Section 3.3).
        num_bins: Number of values that the data can have, 256 for 8 bits; None for continuous data (latents).
        accelerator: Collects the losses of all processes; without one there is one process.

    Raises:
        ValueError: If an option is not known or they contradict one another.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: str,
        *,
        objective: str = "simple",
        weighting: str | None = None,
        snr_gamma: float = 5.0,
        p2_gamma: float = 1.0,
        vlb_weight: float = 1e-3,
        importance_sampling: bool = False,
        num_bins: int | None = 256,
        accelerator: Accelerator | None = None,
    ):
        super().__init__()
        if weighting is None:
            weighting = "uniform" if objective == "vlb" else DEFAULT_WEIGHTINGS.get(prediction_type, "uniform")
        for name, value, known in (
            ("prediction_type", prediction_type, PREDICTION_TYPES),
            ("objective", objective, OBJECTIVES),
            ("loss_weighting", weighting, LOSS_WEIGHTINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if objective == "vlb" and weighting != "uniform":
            raise ValueError(f"objective vlb is the bound itself, which no loss_weighting changes, got {weighting!r}")
        if not (math.isfinite(vlb_weight) and vlb_weight > 0):
            raise ValueError(f"vlb_weight must be positive, got {vlb_weight}")
        self.schedule, self.prediction_type, self.objective = schedule, prediction_type, objective
        self.weights = {"weighting": weighting, "snr_gamma": snr_gamma, "p2_gamma": p2_gamma}
        if objective != "vlb":
            self._warn_of_few_levels()
        self.vlb_weight, self.importance_sampling, self.num_bins = vlb_weight, importance_sampling, num_bins
        self.accelerator = accelerator
        self.chain = ReverseChain(schedule) if self.learns_variance else None
        length = len(schedule)
        intervals = min(NUM_INTERVALS, length)
        # Sums of: importance weight, and times it the squared error, the loss, and the bound.
        self.register_buffer("recent_sums", torch.zeros(intervals, 4))
        self.register_buffer("faded_sums", torch.zeros(intervals, 4))
        # What this process has added since they were last collected, if it records alone.
        self.register_buffer("own_sums", torch.zeros(intervals, 4), persistent=False)
        if importance_sampling:
            self.register_buffer("loss_history", torch.zeros(length, HISTORY_LENGTH))
            self.register_buffer("loss_count", torch.zeros(length, dtype=torch.int64))

    def _warn_of_few_levels(self) -> None:
        share = trained_share(self.schedule, prediction_type=self.prediction_type, **self.weights)
        if share < SMALL_SHARE:
            warnings.warn(
                f"loss_weighting {self.weights['weighting']} with prediction_type {self.prediction_type} puts the loss on "
                f"{share:.1%} of the noise levels, so that a model learns next to nothing at the others; the default for "
                f"{self.prediction_type} is {DEFAULT_WEIGHTINGS[self.prediction_type]}",
                stacklevel=3,
            )

    @property
    def learns_variance(self) -> bool:
        """Whether the model has a second half of channels for the variance."""
        return self.objective != "simple"

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x0, eps = batch["images"], batch["noise"]
        timesteps, weight = self.sample_timesteps(batch["time"])
        x_t = add_noise(x0, eps, self.schedule.level(timesteps, x0))
        texts = {name: batch[name] for name in TEXT_CONDITIONS if name in batch}
        output = model(x_t, timesteps, class_labels=batch.get("labels"), **texts).sample
        error, loss, bound = self.losses(output, x0, eps, x_t, timesteps)
        if self.training:
            self._record(timesteps, weight, error, loss, bound)
        return (loss * weight).mean()

    def losses(
        self, output: Tensor, x0: Tensor, eps: Tensor, x_t: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of each sample: the squared error of the prediction, the loss, and the bound in nats per dimension or 0.

        Args:
            output: The model's output at `x_t`, which has `eps` in it.
            timesteps: int64, shape `(batch,)`.
        """
        level = self.schedule.level(timesteps, x0)
        channels = x0.shape[1] * (2 if self.learns_variance else 1)
        if output.shape != (len(x0), channels, *x0.shape[2:]):
            times = "twice the" if self.learns_variance else "the"
            raise ValueError(
                f"objective {self.objective} needs a model whose output has {times} channels of its input, "
                f"{tuple(x0.shape)}, got {tuple(output.shape)}"
            )
        prediction = output[:, : x0.shape[1]]
        if self.objective != "vlb":
            loss = denoising_loss(prediction, x0, eps, level, self.prediction_type, **self.weights)
        if self.objective == "vlb" or self.weights["weighting"] != "uniform":
            error = denoising_loss(prediction.detach(), x0, eps, level, self.prediction_type, weighting="uniform")
        else:
            error = loss.detach()
        if not self.learns_variance:
            return error, loss, torch.zeros_like(error)
        bound = bound_loss(
            *(output, x0, x_t, self.chain, timesteps, self.prediction_type),
            num_bins=self.num_bins,
            detach_mean=self.objective == "hybrid",
        )
        return error, bound if self.objective == "vlb" else loss + self.vlb_weight * bound, bound

    # Timesteps.

    def sample_timesteps(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps and the weights of their losses, from the uniform numbers of a batch.

        Args:
            time: In [0, 1), shape `(batch,)`.

        Returns: int64 and float32, shape `(batch,)`; the weights are 1 / (T p_t), and 1 for uniform timesteps.
        """
        length = len(self.schedule)
        uniform = (time * length).long()
        if not (self.importance_sampling and self.training):
            return uniform, torch.ones_like(time, dtype=torch.float32)
        probability = self.timestep_probabilities()
        sums = probability.to(time.dtype).cumsum(0)
        drawn = torch.searchsorted(sums / sums[-1], time, right=True).clamp(max=length - 1)
        timesteps = torch.where(self._is_warm(), drawn, uniform)
        return timesteps, 1 / (length * probability[timesteps])

    def timestep_probabilities(self) -> Tensor:
        """p_t, which the next batch's timesteps are drawn by in training, float32, shape `(T,)`."""
        length = len(self.schedule)
        if not self.importance_sampling:
            return self.recent_sums.new_full((length,), 1 / length)
        root = self.loss_history.square().mean(1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        probability = (1 - UNIFORM_SHARE) * root / root.sum() + UNIFORM_SHARE / length
        return torch.where(self._is_warm(), probability, torch.full_like(probability, 1 / length))

    def _is_warm(self) -> Tensor:
        return (self.loss_count >= HISTORY_LENGTH).all()

    # The record. Nothing here waits for the device.

    @torch.no_grad()
    def _record(self, timesteps: Tensor, weight: Tensor, error: Tensor, loss: Tensor, bound: Tensor):
        columns = [timesteps, weight, error, loss, bound]
        rows = torch.stack([column.detach().float() for column in columns], dim=1)
        if self.importance_sampling and self.accelerator is not None:  # all processes draw by the losses of all
            rows = self.accelerator.gather(rows)
        timesteps, weight = rows[:, 0].long(), rows[:, 1:2]
        place = timesteps * len(self.recent_sums) // len(self.schedule)
        sums = self.own_sums if self._records_alone else self.recent_sums
        sums.index_add_(0, place, torch.cat([weight, weight * rows[:, 2:]], dim=1))
        if self.importance_sampling:
            self._remember(timesteps, rows[:, 3])

    @property
    def _records_alone(self) -> bool:
        several = self.accelerator is not None and self.accelerator.num_processes > 1
        return several and not self.importance_sampling

    def collect(self):
        """Puts together what the processes have recorded; all of them call it, before the state is saved."""
        if self._records_alone:
            self.recent_sums += self.accelerator.reduce(self.own_sums, "sum")
            self.own_sums.zero_()

    def _remember(self, timesteps: Tensor, loss: Tensor):
        """Puts the losses, in their order, in place of the oldest at their timesteps."""
        order = timesteps.argsort(stable=True)
        timesteps, loss = timesteps[order], loss[order]
        new = torch.zeros_like(self.loss_count).index_add_(0, timesteps, torch.ones_like(timesteps))
        rank = torch.arange(len(timesteps), device=timesteps.device) - torch.searchsorted(timesteps, timesteps)
        column = (self.loss_count[timesteps] + rank) % HISTORY_LENGTH
        # Of more than fit, the last are kept; the others go to a row that is cut off, so that no place is written twice.
        row = torch.where(rank >= new[timesteps] - HISTORY_LENGTH, timesteps, len(new))
        extended = torch.cat([self.loss_history, self.loss_history[:1]])
        extended[row, column] = loss
        self.loss_history.copy_(extended[:-1])
        self.loss_count.add_(new)

    def metrics(self) -> dict[str, float]:
        """Means since the last call, which starts the next: waits for the device. All processes call it.

        `loss_q1` to `loss_q4` are the loss by quarter of the timesteps, the cleanest first; `error_q1` to `error_q4` the
        squared error without weights, if the two differ; `vlb_bits_per_dim` the bound without its prior term, estimated,
        if the variance is learned. What was not drawn is left out.
        """
        self.collect()
        sums = self.recent_sums.cpu().double()
        self.faded_sums.mul_(DECAY).add_(self.recent_sums)
        self.recent_sums.zero_()
        quarter = torch.arange(len(sums)) * 4 // len(sums)
        sums = torch.zeros(4, 4, dtype=torch.float64).index_add_(0, quarter, sums)
        result = {}
        for name, column in (("loss", 2), ("error", 1)):
            if name == "error" and not self._error_differs:
                continue
            for number, row in enumerate(sums, start=1):
                if row[0] > 0:
                    result[f"{name}_q{number}"] = (row[column] / row[0]).item()
        total = sums.sum(0)
        if self.learns_variance and total[0] > 0:
            result["vlb_bits_per_dim"] = bits_per_dim((total[3] / total[0]).item(), 1)
        return result

    @property
    def _error_differs(self) -> bool:
        return self.learns_variance or self.weights["weighting"] != "uniform"

    def curve(self) -> list[dict[str, float]]:
        """The loss at each interval of timesteps that was drawn from, over the last reports, the later the more.

        Without what several processes have recorded since the last of `collect` and `metrics`.

        Each has `first_timestep`, `last_timestep`, `log_snr` (natural, the mean over the interval), `error` and `loss`,
        and with a learned variance `vlb_bits_per_dim`.
        """
        sums = (DECAY * self.faded_sums + self.recent_sums).cpu().double()
        length = len(self.schedule)
        log_snr = 2 * (self.schedule.alpha[:-1] / self.schedule.sigma[:-1]).log()
        place = torch.arange(length) * len(sums) // length
        rows = []
        for number, (weight, error, loss, bound) in enumerate(sums.tolist()):
            timesteps = (place == number).nonzero().flatten()
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
            if self.learns_variance:
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
