"""The losses of students of few steps, beside a frozen teacher; and their record at each noise level.

References: those of `diffusers_ext.diffusion.distillation`.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_ext.data.identity import hash_weights
from diffusers_ext.diffusion.distillation import (
    CONSISTENCY_WEIGHTINGS,
    consistency_weights,
    ddim_step,
    doublings_until_neighbours,
    noise_ratio,
    partner_timesteps,
    pseudo_huber,
    two_steps_in_one,
)
from diffusers_ext.diffusion.losses import denoising_loss
from diffusers_ext.diffusion.noising import add_noise, predict_eps, predict_x0
from diffusers_ext.diffusion.tables import DeviceTable
from diffusers_ext.diffusion.timesteps import check_timesteps
from diffusers_ext.recipes.denoising_objective import model_inputs
from diffusers_ext.recipes.loss_record import LossRecord, RecordedObjective
from diffusers_ext.recipes.teacher import Teacher, call_network
from diffusers_ext.trainer.validation import random_state_kept


# Those of Salimans & Ho 2022 that leave the level without signal a weight, and equal weights of x_0.
DISTILLATION_WEIGHTINGS = ("truncated_snr", "snr_plus_one", "sample")

# Optimizer steps that a student needs at least for each doubling. Fashion-MNIST in 400 steps of 32 images: with one doubling the
# images of one call improve from a Fréchet distance of 55 to 29, with ten they lose their labels and all that they show.
STEPS_A_DOUBLING = 300

# Without being asked for more. Fashion-MNIST in 300 s of a core, some 2000 steps, in one and two calls: with four doublings 3.9 and
# 2.5, with seven 17 and 24, as gradients grow with the weight of pairs that are near (docs/few_calls.md).
DOUBLINGS = 4

# Where the cleaner of two points comes from: the noisier one's image and noise, or the teacher's step from it.
CONSISTENCY_PAIRS = ("data", "teacher")

# Of x_0 in its output: at the data the prediction is what the network is given, whatever it says.
WITH_BOUNDARY_CONDITION = ("v_prediction", "flow")


def digest_of(network: nn.Module) -> Tensor:
    """A digest of the weights, uint8."""
    return torch.tensor(list(bytes.fromhex(hash_weights(network))), dtype=torch.uint8)


def check_teacher(before: Tensor, now: Tensor) -> None:
    """Refuses to go on with another teacher.

    Args:
        before, now: Of `digest_of`.

    Raises:
        ValueError: if they differ.
    """
    if not torch.equal(before.cpu(), now.cpu()):
        raise ValueError(
            "the checkpoint is of a run with another pipeline to distil, whose weights are others: give the same one, or "
            "start a new run in another --output_dir"
        )


class StudentObjective(RecordedObjective):
    """The mean loss of a batch, to be called with the student and the batch (see `diffusers_ext.data.batches`).

    Its state is in the buffers of `loss_record`, the same in all processes after `collect`; and a digest of the teacher's
    weights, so that a run goes on with the teacher that it had.

    Args:
        teacher: Whose path and prediction type are the student's.
        accelerator: Collects the losses of all processes; without one there is one process.
    """

    def __init__(self, teacher: Teacher, accelerator: Accelerator | None = None):
        super().__init__()
        self.teacher, self.schedule, self.prediction_type = teacher, teacher.schedule, teacher.prediction_type
        self.loss_record = LossRecord(teacher.schedule, accelerator=accelerator)
        self.register_buffer("teacher_digest", digest_of(teacher.network))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        timesteps, loss = self.losses(model, batch)
        if self.training:
            values = torch.stack([loss.detach(), loss.detach(), torch.zeros_like(loss)], dim=1).float()
            self.loss_record.add(timesteps, torch.ones_like(values[:, :1]), values)
        return loss.mean()

    @abstractmethod
    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The timesteps of a batch, int64, and the loss of each sample, both of shape `(batch,)`."""

    def _output(self, model: nn.Module, x_t: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return call_network(model, x_t, self.schedule.labels(timesteps), inputs)

    def load_state_dict(self, state_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any):
        """Refuses the state of a run with another teacher.

        Raises:
            ValueError: if it is one.
        """
        check_teacher(state_dict["teacher_digest"], self.teacher_digest)
        return super().load_state_dict(state_dict, *args, **kwargs)


class ProgressiveObjective(StudentObjective):
    """The student's one DDIM step ends where two of the teacher's do (Salimans & Ho 2022).

    Args:
        timesteps: That the teacher visits, descending, an even number of them; the student visits every other, from the first.
        weighting: Of the squared error of x_0, one of `DISTILLATION_WEIGHTINGS`.

    Raises:
        ValueError: if the timesteps are no such list.
    """

    def __init__(
        self,
        teacher: Teacher,
        timesteps: list[int],
        weighting: str = "truncated_snr",
        accelerator: Accelerator | None = None,
    ):
        super().__init__(teacher, accelerator)
        listed = check_timesteps(timesteps, len(teacher.schedule))
        if len(listed) % 2:
            raise ValueError(f"the teacher's timesteps must be an even number of them, got {len(listed)}")
        if weighting not in DISTILLATION_WEIGHTINGS:
            raise ValueError(f"loss_weighting must be one of {', '.join(DISTILLATION_WEIGHTINGS)}, got {weighting!r}")
        # A row for each of the student's: where its step begins, the teacher's goes through, and both end.
        steps = torch.tensor([*listed.tolist(), -1])
        self._steps = DeviceTable(torch.stack([steps[:-1:2], steps[1::2], steps[2::2]], dim=1))
        self.weighting = weighting

    def __len__(self) -> int:
        return len(self._steps.values)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        index = (batch["time"] * len(self)).long().clamp(max=len(self) - 1)
        timesteps = self._steps.on(index.device, torch.int64)[index].unbind(1)
        x0, inputs, t = batch["images"], model_inputs(batch), timesteps[0]
        level = self.schedule.level(t, x0)
        x_t = add_noise(x0, batch["noise"], level)
        target = self.target(x_t, timesteps, inputs)
        output = self._output(model, x_t, t, inputs)
        eps = predict_eps(target, x_t, level)
        return t, denoising_loss(output, target, eps, level, self.prediction_type, weighting=self.weighting)

    @torch.no_grad()
    def target(self, x_t: Tensor, timesteps: tuple[Tensor, Tensor, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """The x_0 of the teacher's two steps at once.

        Args:
            timesteps: Of x_t, of the teacher's second step, and where it ends, -1 for the data; each int64, shape `(batch,)`.
        """
        t, u, s = (self.schedule.level(each, x_t) for each in timesteps)
        x0_t = self.teacher.x0(x_t, timesteps[0], inputs)
        x0_u = self.teacher.x0(ddim_step(x0_t, x_t, t, u), timesteps[1], inputs)
        return two_steps_in_one(x0_t, x0_u, t, u, s)


def check_pairs(pairs: str, guidance_scale: float) -> None:
    """Refuses pairs that are unknown, and those of the data for a teacher that is guided.

    Raises:
        ValueError: if they are such.
    """
    if pairs not in CONSISTENCY_PAIRS:
        raise ValueError(f"consistency_pairs must be one of {', '.join(CONSISTENCY_PAIRS)}, got {pairs!r}")
    if pairs == "data" and guidance_scale != 1:
        raise ValueError(
            f"consistency_pairs must be teacher for a guidance_scale of {guidance_scale:g}, since pairs of the data know nothing "
            "of guidance, got data: leave it out, or give --guidance_scale 1"
        )


class ConsistencyObjective(StudentObjective):
    """The student predicts the x_0 at t that it predicts at a cleaner r, which comes to t as the training goes on (ECT).

    x_r has the noise that x_t has, or is where the teacher's step from x_t leads (Song et al. 2023, consistency distillation).
    With the former the student learns the trajectories of the data, whatever the teacher makes of them; with the latter those
    of the teacher, so that it is led to guided images without being guided.

    Args:
        pairs: What x_r is, one of `CONSISTENCY_PAIRS`: "data" or "teacher".
        doublings: How often r comes nearer by a factor of 2, evenly over the training; by default `DOUBLINGS` times, or as
            often as it takes for each timestep to be paired with its neighbour, but not before `STEPS_A_DOUBLING` steps for each.
        noise_mean, noise_std: Of log(sigma / alpha) of t.
        bend: Of `pseudo_huber`.
        weighting: One of `diffusers_ext.diffusion.distillation.CONSISTENCY_WEIGHTINGS`.

    Attributes:
        progress: Gives the share of the training that is over, in [0, 1].
        steps: Gives the optimizer steps so far, by which the doublings of the default are held back.

    Raises:
        ValueError: if the prediction type lacks the boundary condition, if the pairs or the weighting are unknown, or if a
            teacher is guided and the pairs are of the data.
    """

    def __init__(
        self,
        teacher: Teacher,
        *,
        pairs: str = "data",
        doublings: int | None = None,
        noise_mean: float = -1.1,
        noise_std: float = 2.0,
        bend: float = 1e-3,
        weighting: str = "unit_scale",
        accelerator: Accelerator | None = None,
    ):
        super().__init__(teacher, accelerator)
        if self.prediction_type not in WITH_BOUNDARY_CONDITION:
            raise ValueError(
                "the network of a consistency model must predict v or flow, which at the data mean x_0 = x_t whatever it "
                f"says, got {self.prediction_type}"
            )
        if weighting not in CONSISTENCY_WEIGHTINGS:
            raise ValueError(
                f"consistency_weighting must be one of {', '.join(CONSISTENCY_WEIGHTINGS)}, got {weighting!r}"
            )
        check_pairs(pairs, teacher.guidance_scale)
        self.pairs = pairs
        self.noise_mean, self.noise_std, self.bend = noise_mean, noise_std, bend
        most = min(DOUBLINGS, doublings_until_neighbours(self.schedule))
        self.doublings = most if doublings is None else doublings
        partners = [partner_timesteps(self.schedule, number) for number in range(self.doublings + 1)]
        self._partners = DeviceTable(torch.stack(partners))
        self._weights = DeviceTable(
            torch.stack([consistency_weights(self.schedule, each, weighting) for each in partners])
        )
        self._noise = DeviceTable(noise_ratio(self.schedule))
        self.held_back = doublings is None
        self.progress: Callable[[], float] = lambda: 1.0
        self.steps: Callable[[], float] = lambda: math.inf

    @property
    def done_doublings(self) -> int:
        """As often r came nearer so far."""
        done = min(int(self.progress() * (self.doublings + 1)), self.doublings)
        return int(min(done, self.steps() // STEPS_A_DOUBLING)) if self.held_back else done

    def timesteps(self, time: Tensor) -> Tensor:
        """Those of uniform times in [0, 1), shape `(batch,)`, by the log-normal distribution of their noise; int64."""
        noise = (self.noise_mean + self.noise_std * torch.special.ndtri(time)).exp()
        return torch.searchsorted(self._noise.on(time.device, time.dtype), noise).clamp(max=len(self.schedule) - 1)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x0, eps, inputs = batch["images"], batch["noise"], model_inputs(batch)
        t = self.timesteps(batch["time"])
        r = self._partners.on(t.device, torch.int64)[self.done_doublings][t]
        level_t, level_r = self.schedule.level(t, x0), self.schedule.level(r, x0)
        x_t = add_noise(x0, eps, level_t)
        # The state of the generators is that of the student's own call, so that dropout is the same in both.
        with torch.no_grad(), random_state_kept(x0.device):
            if self.pairs == "data":
                x_r = add_noise(x0, eps, level_r)
            else:
                x_r = ddim_step(self.teacher.x0(x_t, t, inputs), x_t, level_t, level_r)
            # At the data, where there is no timestep, the network counts for nothing.
            output = self._output(model, x_r, r.clamp(min=0), inputs)
            target = predict_x0(output, x_r, level_r, self.prediction_type)
        output = self._output(model, x_t, t, inputs)
        difference = predict_x0(output, x_t, level_t, self.prediction_type) - target
        weight = self._weights.on(t.device, difference.dtype)[self.done_doublings][t]
        return t, weight * pseudo_huber(difference, self.bend)

    def metrics(self) -> dict[str, float]:
        return super().metrics() | {"doublings": self.done_doublings}
