"""The loss of a training batch: noised, seen by the model, compared; and a record of it at each noise level."""

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.losses import (
    DEFAULT_WEIGHTINGS,
    LOSS_WEIGHTINGS,
    OBJECTIVES,
    bound_loss,
    denoising_loss,
    level_weights,
    likelihood_weights,
    trained_share,
)
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, NoiseSchedule, add_noise
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.tables import DeviceTable
from diffusers_ext.recipes.loss_record import LossRecord, RecordedObjective
from diffusers_ext.recipes.model_guidance import ModelGuidance
from diffusers_ext.recipes.timestep_sampler import ImportanceTimesteps, LogitNormalTimesteps, UniformTimesteps


# Share of the noise levels, below which the loss is said to be on too few.
SMALL_SHARE = 0.05

# What a batch may have, beside labels, that the model is called with: texts, encoded or in tokens; a condition image; and what
# was done to the images.
MODEL_CONDITIONS = (
    *("encoder_hidden_states", "encoder_attention_mask", "input_ids", "attention_mask"),
    *("condition_image", "condition_given", "condition_level", "augmentation"),
)


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a batch says of its images, by the names of the model's arguments."""
    inputs = {name: batch[name] for name in MODEL_CONDITIONS if name in batch}
    return inputs if batch.get("labels") is None else inputs | {"class_labels": batch["labels"]}


def check_internal_weight(internal_weight: float) -> None:
    """Refuses a weight of the middle layer's loss that is not finite or is negative."""
    if not (math.isfinite(internal_weight) and internal_weight >= 0):
        raise ValueError(f"internal_guidance_loss_weight must be finite and at least 0, got {internal_weight}")


class DenoisingObjective(RecordedObjective):
    """The mean loss of a batch, to be called with the model and the batch (see `diffusers_ext.data.batches`).

    It trains nothing of its own. Its state is in the buffers of `timestep_sampler`, the same in all processes after each
    step, and of `loss_record`, the same after `collect`. In evaluation mode timesteps are uniform and nothing is recorded.

    Args:
        schedule: The noising path, at the scale at which the model sees x_t.
        prediction_type: What the model outputs, one of `diffusers_ext.diffusion.noising.PREDICTION_TYPES`.
        objective: "simple": the weighted squared error of the output (DDPM's L_simple and its variants). "vlb": the
            variational bound, in nats per dimension, of a model that learns the variance too. "hybrid": "simple" for
            the mean, and `vlb_weight` times "vlb" for the variance alone (Nichol & Dhariwal 2021). The model has twice
            the channels for the last two, for the variance "learned_range".
        weighting: Of the squared error, one of `diffusers_ext.diffusion.losses.LOSS_WEIGHTINGS`; by default that of the prediction
            type. Not for "vlb".
        snr_gamma, p2_gamma: Of the weightings "min_snr" and "p2".
        vlb_weight: Weight of the bound in "hybrid".
        importance_sampling: See `ImportanceTimesteps`.
        logit_normal: Mean and standard deviation of the logit of time, see `LogitNormalTimesteps`; None for even times.
        internal_weight: Weight of the loss of the output of the model's middle layer, `internal_sample`, in the training loss;
            None for a model that has none. The record, and the loss in evaluation mode, are those of the output alone.
        timestep_shift: Of `UniformTimesteps`; not with importance sampling and logit-normal times.
        guidance: Leads the targets of training, so that the network learns its guided prediction; not with "vlb" and "hybrid".
            The record's error, and the loss in evaluation mode, are those of the targets themselves.
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
        logit_normal: tuple[float, float] | None = None,
        internal_weight: float | None = None,
        timestep_shift: float = 1.0,
        guidance: ModelGuidance | None = None,
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
        if importance_sampling and logit_normal is not None:
            raise ValueError(f"timesteps are drawn by importance or logit-normal, not both, got {logit_normal}")
        if guidance is not None and objective != "simple":
            raise ValueError(f"model guidance leads the targets of objective simple, which {objective} is not")
        if not (math.isfinite(vlb_weight) and vlb_weight > 0):
            raise ValueError(f"vlb_weight must be positive, got {vlb_weight}")
        self.schedule, self.prediction_type, self.objective = schedule, prediction_type, objective
        self.weights = {"weighting": weighting, "snr_gamma": snr_gamma, "p2_gamma": p2_gamma}
        if objective != "vlb":
            level_weights(schedule, prediction_type=prediction_type, **self.weights)  # which refuses what is none
        if objective != "simple" and not (schedule.sigma[:-1] > 0).all():
            raise ValueError(
                f"objective {objective} needs noise at each level, by which the bound scales its errors, got sigma 0 at "
                f"timestep {int(schedule.sigma[:-1].argmin())}: take a path whose first beta is above 0"
            )
        if objective != "vlb" and not importance_sampling:  # which draws them as often as the loss is there
            self._warn_of_few_levels()
        if internal_weight is not None:
            check_internal_weight(internal_weight)
        self.vlb_weight, self.num_bins, self.internal_weight = vlb_weight, num_bins, internal_weight
        self.guidance, self.accelerator = guidance, accelerator
        self.chain = ReverseChain(schedule) if self.learns_variance else None
        self._x0_weights = None  # of the timesteps, where the weighting is no function of the level alone
        if weighting == "likelihood":
            self._x0_weights = DeviceTable(likelihood_weights(schedule)[:, None])
        if logit_normal is not None:
            self.timestep_sampler = LogitNormalTimesteps(len(schedule), *logit_normal)
        elif importance_sampling:
            self.timestep_sampler = ImportanceTimesteps(len(schedule))
        else:
            self.timestep_sampler = UniformTimesteps(len(schedule), timestep_shift)
        self.loss_record = LossRecord(
            schedule,
            has_error=self.learns_variance or weighting != "uniform" or guidance is not None,
            has_bound=self.learns_variance,
            accelerator=None if importance_sampling else accelerator,  # importance sampling gathers all losses itself
        )

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
    def progress(self) -> Callable[[], float]:
        """Gives the share of the training that is over, in [0, 1], which guidance waits for."""
        return (lambda: 1.0) if self.guidance is None else self.guidance.progress

    @progress.setter
    def progress(self, value: Callable[[], float]) -> None:
        if self.guidance is not None:
            self.guidance.progress = value

    @property
    def learns_variance(self) -> bool:
        """Whether the model has a second half of channels for the variance."""
        return self.objective != "simple"

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        x0, eps = batch["images"], batch["noise"]
        timesteps, weight = self.timestep_sampler(batch["time"])
        x_t = add_noise(x0, eps, self.schedule.level(timesteps, x0))
        conditions, seen = {"class_labels": None} | model_inputs(batch), self.schedule.labels(timesteps)
        reference = None
        if self.training and self.guidance is not None:
            reference = self.guidance.reference(model, x_t, seen, conditions)
        output = model(x_t, seen, **conditions)
        lead = None
        if reference is not None:
            lead = self.guidance.lead(output.sample, reference, timesteps, len(self.schedule))
        error, loss, bound = self.losses(output.sample, x0, eps, x_t, timesteps, batch.get("units"), lead)
        if self.training:
            self._record(timesteps, weight, error, loss, bound)
        if self.training and self.internal_weight is not None:  # also at 0: each parameter is to get a gradient
            if getattr(output, "internal_sample", None) is None:
                raise ValueError(
                    "internal_guidance_loss_weight needs a model with an output in a middle layer, a DiTModel with "
                    "internal_guidance_layer; this one has none"
                )
            internal = self.losses(output.internal_sample, x0, eps, x_t, timesteps, batch.get("units"))[1]
            loss = loss + self.internal_weight * internal
        return (loss * weight).mean()

    def losses(
        self,
        output: Tensor,
        x0: Tensor,
        eps: Tensor,
        x_t: Tensor,
        timesteps: Tensor,
        units: DataUnits | None = None,
        lead: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error of the prediction, loss, and bound in nats per dimension or 0, of each sample.

        Args:
            output: The model's output at `x_t`, which has `eps` in it.
            timesteps: int64, shape `(batch,)`.
            units: From `x0` to the data, whose bound it is; None if these are the data.
            lead: Added to the target that the loss is of, and not to that of the error.
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
            weights = self.weights
            if self._x0_weights is not None:
                weights = weights | {"x0_weight": self._x0_weights.gather(timesteps, x0)[0]}
            loss = denoising_loss(prediction, x0, eps, level, self.prediction_type, lead=lead, **weights)
        if self.objective == "vlb" or lead is not None or self.weights["weighting"] != "uniform":
            error = denoising_loss(prediction.detach(), x0, eps, level, self.prediction_type, weighting="uniform")
        else:
            error = loss.detach()
        if not self.learns_variance:
            return error, loss, torch.zeros_like(error)
        bound = bound_loss(
            *(output, x0, x_t, self.chain, timesteps, self.prediction_type),
            num_bins=self.num_bins,
            detach_mean=self.objective == "hybrid",
            units=units,
        )
        return error, bound if self.objective == "vlb" else loss + self.vlb_weight * bound, bound

    @torch.no_grad()
    def _record(self, timesteps: Tensor, weight: Tensor, error: Tensor, loss: Tensor, bound: Tensor) -> None:
        """Does not wait for the device."""
        columns = [timesteps, weight, error, loss, bound]
        rows = torch.stack([column.detach().float() for column in columns], dim=1)
        has_history = isinstance(self.timestep_sampler, ImportanceTimesteps)
        if has_history and self.accelerator is not None:  # all processes draw by the losses of all
            rows = self.accelerator.gather(rows)
        timesteps = rows[:, 0].long()
        self.loss_record.add(timesteps, rows[:, 1:2], rows[:, 2:])
        if has_history:
            self.timestep_sampler.update(timesteps, rows[:, 3])

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any):
        """Takes also checkpoints that name the buffers without the modules that they are in."""
        full_names = {name.rpartition(".")[2]: name for name in self.state_dict()}
        return super().load_state_dict(
            {full_names.get(name, name): value for name, value in state_dict.items()}, *args, **kwargs
        )
