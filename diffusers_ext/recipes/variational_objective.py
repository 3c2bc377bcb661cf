"""Training of a network together with its noise schedule, by the variational bound (Kingma et al. 2021).

    -log p(x_0) <= prior + reconstruction + diffusion

    prior           KL(q(x_1 | x_0) || N(0, 1)) at the noisiest level, gamma_1
    reconstruction  -log p(x_0 | x at gamma_0), by the noise of that level alone
    diffusion       E[ gamma'(t) / 2 |eps - eps_hat|^2 ] over t in [0, 1], or with a chain of T steps from t to s = t - 1/T
                    E[ T / 2 (exp(gamma(t) - gamma(s)) - 1) |eps - eps_hat|^2 ]

Network and endpoints follow the gradient of the bound; the interior of the schedule that of the mean squared diffusion loss,
which is its variance up to what the interior does not change.

The network is not given gamma but tau = (T - 1) (gamma - gamma_0) / (gamma_1 - gamma_0), for its timestep. So whatever the
schedule becomes, timesteps 0 to T - 1 are levels evenly spaced in log snr between its endpoints: a table of betas, which
every sampler reads.

Reference: Kingma, Salimans, Poole, Ho 2021, Variational Diffusion Models, arXiv 2107.00630.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.noising import NoiseSchedule, Normal, add_noise, training_target, x0_error_scale
from diffusers_ext.diffusion.variational_bound import decoder_nats, prior_nats
from diffusers_ext.models.learned_schedule import LearnedSchedule, level_of, schedule_of_log_snr
from diffusers_ext.recipes.denoising_objective import MODEL_CONDITIONS
from diffusers_ext.recipes.loss_record import LossRecord
from diffusers_ext.recipes.running_sums import RunningSums


class VariationalTerms(NamedTuple):
    """The bound of each sample in nats per dimension, and what is logged of it, each of shape `(batch,)`.

    `error` is the squared error of the network's own output, and `tau` the timestep that it was given.
    """

    diffusion: Tensor
    prior: Tensor
    reconstruction: Tensor
    error: Tensor
    tau: Tensor

    @property
    def total(self) -> Tensor:
        return self.diffusion + self.prior + self.reconstruction


class VariationalModel(nn.Module):
    """A denoiser and the noise schedule that is trained with it, as one network whose output is its bound.

    Args:
        denoiser: Called `denoiser(x_t, tau, class_labels=..., ...)`.
        noise_schedule: Trained with it.
        prediction_type: What the denoiser outputs.
        num_train_timesteps: T of tau.
        num_steps: Of the chain whose bound it is; None for infinitely many, continuous time.
        num_bins: Number of values that the data can have, 256 for 8 bits; None for continuous data.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        noise_schedule: LearnedSchedule,
        prediction_type: str,
        *,
        num_train_timesteps: int = 1000,
        num_steps: int | None = None,
        num_bins: int | None = 256,
    ):
        super().__init__()
        self.denoiser, self.noise_schedule, self.prediction_type = denoiser, noise_schedule, prediction_type
        self.num_train_timesteps, self.num_steps, self.num_bins = num_train_timesteps, num_steps, num_bins
        self._no_split_modules = list(getattr(denoiser, "_no_split_modules", None) or ())  # where FSDP may cut

    def forward(
        self, x0: Tensor, eps: Tensor, time: Tensor, units: DataUnits | None = None, **conditions
    ) -> VariationalTerms:
        """The terms of each sample.

        Args:
            x0, eps: Clean samples and standard normal noise, shape `(batch, channels, ...)`.
            time: In [0, 1), shape `(batch,)`.
            units: From `x0` to the data, which are in [-1, 1]; None if these are the data.
            conditions: For the denoiser.
        """
        schedule, weigh = self.noise_schedule, _GradientWeight()
        gamma_0, gamma_1 = schedule.endpoints
        time = time.to(torch.promote_types(x0.dtype, torch.float32))
        if self.num_steps is not None:
            time = ((time * self.num_steps).floor() + 1) / self.num_steps
        share, slope = map(weigh, schedule.interior(time))
        gamma = gamma_0 + (gamma_1 - gamma_0) * share
        if self.num_steps is None:
            weight = 0.5 * (gamma_1 - gamma_0) * slope
        else:
            before = gamma_0 + (gamma_1 - gamma_0) * weigh(schedule.interior(time - 1 / self.num_steps).share)
            weight = 0.5 * self.num_steps * (gamma - before).expm1()

        level, tau = level_of(gamma, x0), share * (self.num_train_timesteps - 1)
        output = self.denoiser(add_noise(x0, eps, level), tau, **conditions).sample
        target = training_target(x0, eps, level, self.prediction_type)
        error = (output.to(target.dtype) - target).square().flatten(1).mean(1)
        # |eps - eps_hat|^2 = snr |x_0 - x0_hat|^2
        diffusion = weight * (level.snr * x0_error_scale(level, self.prediction_type)).flatten() * error
        weigh.by(diffusion.detach())
        return VariationalTerms(diffusion, *self._ends(x0, eps, gamma_0, gamma_1, units), error.detach(), tau.detach())

    def _ends(
        self, x0: Tensor, eps: Tensor, gamma_0: Tensor, gamma_1: Tensor, units: DataUnits | None
    ) -> tuple[Tensor, Tensor]:
        """The prior and the reconstruction, which know nothing of the denoiser."""
        clean, noisy = level_of(gamma_0.reshape(1), x0), level_of(gamma_1.reshape(1), x0)
        std = clean.sigma / clean.alpha
        reconstruction = decoder_nats(x0, Normal(x0 + std * eps, std), self.num_bins, units)
        return prior_nats(x0, noisy).flatten(1).mean(1), reconstruction.flatten(1).mean(1)

    def enable_gradient_checkpointing(self):
        self.denoiser.enable_gradient_checkpointing()

    def compile(self, *args, **kwargs):
        """Compiles the denoiser."""
        self.denoiser.compile(*args, **kwargs)


class _GradientWeight:
    """Multiplies the gradients of tensors of shape `(batch,)` by numbers that are known only after they were used.

    With those of the mean loss and 2 L_i / mean(L) for sample i, a parameter behind the tensors gets the gradient of the mean
    of L_i^2 in units of the mean loss.
    """

    def __init__(self):
        self._factor = None

    def __call__(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        seen = tensor.view_as(
            tensor
        )  # so that what else follows from the tensor, such as another one of these, keeps its own
        seen.register_hook(lambda gradient: gradient * self._factor.to(gradient))
        return seen

    def by(self, losses: Tensor) -> None:
        self._factor = 2 * losses / losses.mean().clamp(min=torch.finfo(losses.dtype).tiny)


class VariationalObjective(nn.Module):
    """The mean bound of a batch in nats per dimension, to be called with a `VariationalModel` and the batch.

    It trains nothing of its own; see `diffusers_ext.recipes.denoising_objective.DenoisingObjective`.

    Args:
        noise_schedule: That of the model, for the log.
        num_train_timesteps: T of the timesteps that the denoiser is given.
        accelerator: Of the processes; without one there is one process.
    """

    def __init__(
        self, noise_schedule: LearnedSchedule, num_train_timesteps: int, accelerator: Accelerator | None = None
    ):
        super().__init__()
        # Not as a submodule: it belongs to the model that is trained.
        self._noise_schedule: Callable[[], LearnedSchedule] = lambda: noise_schedule
        self.num_train_timesteps = num_train_timesteps
        self.loss_record = LossRecord(self.schedule, has_error=True, has_bound=True, accelerator=accelerator)
        # Of the diffusion loss: how many, their sum, and that of their squares; and the sums of the other two terms.
        self.moments = RunningSums(accelerator, moments=5)

    @property
    def schedule(self) -> NoiseSchedule:
        """The levels of the timesteps, as the schedule stands."""
        return schedule_of_log_snr(self._noise_schedule().log_snr_table(self.num_train_timesteps))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        conditions = {name: batch[name] for name in MODEL_CONDITIONS if name in batch}
        sample = batch["images"], batch["noise"], batch["time"], batch.get("units")
        terms = model(*sample, class_labels=batch.get("labels"), **conditions)
        terms = VariationalTerms(*terms)
        if self.training:
            self._record(terms)
        return terms.total.mean()

    @torch.no_grad()
    def _record(self, terms: VariationalTerms) -> None:
        loss = terms.diffusion.detach().float()
        total = terms.total.detach().float()
        values = torch.stack([terms.error.float(), loss, total], 1)
        self.loss_record.add(terms.tau.round().long(), torch.ones_like(values[:, :1]), values)
        rest = [terms.prior.detach().float().sum(), terms.reconstruction.detach().float().sum()]
        sums = [torch.ones_like(loss).sum(), loss.sum(), loss.square().sum(), *rest]
        self.moments.summand("moments").add_(torch.stack(sums))

    # The trainer's side, see `diffusers_ext.trainer.loop.Trainer`.

    def collect(self) -> None:
        self.loss_record.collect()
        self.moments.collect()

    def metrics(self) -> dict[str, float]:
        """Those of the loss record; the terms in nats per dimension and the standard deviation of the diffusion loss over the
        samples since the last call; and the log snr of both ends as they are."""
        metrics = self.loss_record.metrics()
        self.moments.collect()
        number, mean, square, prior, reconstruction = self.moments.moments.double().tolist()
        self.moments.clear()
        if number:
            mean, square = mean / number, square / number
            metrics |= {
                "diffusion_loss": mean,
                "diffusion_loss_std": max(square - mean**2, 0.0) ** 0.5,
                "prior_loss": prior / number,
                "reconstruction_loss": reconstruction / number,
            }
        gamma_0, gamma_1 = self._noise_schedule().endpoints.tolist()
        return metrics | {"log_snr_max": -gamma_0, "log_snr_min": -gamma_1}

    def draw(self, folder: str | Path) -> dict[str, str]:
        self.loss_record.schedule = self.schedule  # where it has come to
        return self.loss_record.draw(folder)
