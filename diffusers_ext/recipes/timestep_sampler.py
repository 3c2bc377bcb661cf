"""Sampling of timesteps for training, with the importance weights that leave the expected loss unchanged.

The batch brings a `time` u in [0, 1) for each image, drawn one by one or stratified over an optimizer step (see
`diffusers_ext.data.batches`). Uniform timesteps are floor(T u); importance sampling takes u through the inverse of the
distribution of its timesteps instead, and logit-normal times through that of theirs, so that both keep the stratification.

References:
    Nichol, Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672, Section 3.3 (importance).
    Esser et al. 2024, Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv 2403.03206, Section
        3.1 (logit-normal) and 5.3.2 (shifted).
"""

import math

import torch
from torch import Tensor, nn


# The second moment of the loss at a timestep is that of its last losses, of this number; until there are as many at each
# timestep, timesteps are uniform.
HISTORY_LENGTH = 10
# Share of the timesteps that stay uniform, so that none whose losses happened to be small is never seen again.
UNIFORM_SHARE = 0.001


class UniformTimesteps(nn.Module):
    """Each of T timesteps with probability 1 / T; or, shifted, more often some than others, with equal weights.

    Uniform in evaluation mode.

    Args:
        shift: s, by which time u becomes s u / (1 + (s - 1) u): more often noisy above 1, and more often clean below it
            (Esser et al. 2024, Section 5.3.2).

    Raises:
        ValueError: if `shift` is not positive.
    """

    def __init__(self, num_timesteps: int, shift: float = 1.0):
        super().__init__()
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"timestep_shift must be positive, got {shift}")
        self.num_timesteps, self.shift = num_timesteps, shift

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps, and the weights 1 / (T p_t) of their losses.

        Args:
            time: In [0, 1), shape `(batch,)`.

        Returns: int64 and float32, shape `(batch,)`.
        """
        if self.training and self.shift != 1:
            time = self.shift * time / (1 + (self.shift - 1) * time)
        return self._of_times(time)

    def _of_times(self, time: Tensor) -> tuple[Tensor, Tensor]:
        time = time.clamp(max=1 - 0.5 / self.num_timesteps)  # which rounding may have made 1
        return (time * self.num_timesteps).long(), torch.ones_like(time, dtype=torch.float32)


class LogitNormalTimesteps(UniformTimesteps):
    """Times sigmoid(mean + std z), z standard normal (Esser et al. 2024, Section 3.1). Uniform in evaluation mode.

    A shift by s, as of `UniformTimesteps`, is ln s more of the mean. As in the paper losses keep the weight 1, so that the loss that is minimised is another one: with the density of these
    times as a further weight of the noise levels.

    Args:
        mean: Of the logit of time; below 0 for cleaner levels.
        std: Of the logit.

    Raises:
        ValueError: if `mean` is not finite or `std` not positive.
    """

    def __init__(self, num_timesteps: int, mean: float = 0.0, std: float = 1.0):
        super().__init__(num_timesteps)
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"logit_mean must be finite and logit_std positive, got {mean} and {std}")
        self.mean, self.std = mean, std

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self._of_times(time)
        logit = self.mean + self.std * torch.special.ndtri(time)  # -inf at 0, whose sigmoid is 0
        return self._of_times(logit.sigmoid())


class ImportanceTimesteps(UniformTimesteps):
    """Timestep t with a probability p_t in proportion to the root of the second moment of its loss.

    Uniform in evaluation mode. The history of the losses is in buffers.
    """

    def __init__(self, num_timesteps: int):
        super().__init__(num_timesteps)
        self.register_buffer("loss_history", torch.zeros(num_timesteps, HISTORY_LENGTH))
        self.register_buffer("loss_count", torch.zeros(num_timesteps, dtype=torch.int64))

    def forward(self, time: Tensor) -> tuple[Tensor, Tensor]:
        uniform, ones = super().forward(time)
        if not self.training:
            return uniform, ones
        probability = self.probabilities()
        sums = probability.to(time.dtype).cumsum(0)
        drawn = torch.searchsorted(sums / sums[-1], time, right=True).clamp(max=self.num_timesteps - 1)
        timesteps = torch.where(self._is_warm(), drawn, uniform)
        return timesteps, 1 / (self.num_timesteps * probability[timesteps])

    def probabilities(self) -> Tensor:
        """p_t of the next batch in training mode, float32, shape `(T,)`."""
        root = self.loss_history.square().mean(1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        probability = (1 - UNIFORM_SHARE) * root / root.sum() + UNIFORM_SHARE / self.num_timesteps
        return torch.where(self._is_warm(), probability, torch.full_like(probability, 1 / self.num_timesteps))

    def _is_warm(self) -> Tensor:
        return (self.loss_count >= HISTORY_LENGTH).all()

    @torch.no_grad()
    def update(self, timesteps: Tensor, loss: Tensor) -> None:
        """Puts the losses, in their order, where the oldest at their timesteps are. Does not wait for the device."""
        order = timesteps.argsort(stable=True)
        timesteps, loss = timesteps[order], loss[order]
        new = torch.zeros_like(self.loss_count).index_add_(0, timesteps, torch.ones_like(timesteps))
        rank = torch.arange(len(timesteps), device=timesteps.device) - torch.searchsorted(timesteps, timesteps)
        column = (self.loss_count[timesteps] + rank) % HISTORY_LENGTH
        # Of more than fit, the last are kept; the others go to a row that is cut off, so that no cell is written twice.
        row = torch.where(rank >= new[timesteps] - HISTORY_LENGTH, timesteps, len(new))
        extended = torch.cat([self.loss_history, self.loss_history[:1]])
        extended[row, column] = loss
        self.loss_history.copy_(extended[:-1])
        self.loss_count.add_(new)
