"""Data whose scores are known in closed form: two Gaussians in the plane, each a label.

The sample is a series of length 1 with 2 channels, so that networks and pipelines take it as it is.
"""

import math

import torch
from torch import nn

from diffusers_ext import UNetModel
from diffusers_ext.diffusion.noising import NoiseLevel, predict_eps, training_target
from diffusers_ext.schedulers.levels import noise_level, prediction_type_of


MEANS, STDS, WEIGHTS = ((-0.7, 0.4), (0.6, 0.3)), (0.35, 0.25), (0.3, 0.7)


def log_density(x_t, level: NoiseLevel):
    """log p(x_t, label) of each label, shape `(batch, 2)`, at x_t of shape `(batch, 2, 1)`."""
    columns = []
    for mean, std, weight in zip(MEANS, STDS, WEIGHTS, strict=True):
        variance = (level.alpha * std).square() + level.sigma.square()
        distance = (x_t - level.alpha * torch.tensor(mean).to(x_t)[:, None]).square() / variance
        columns.append(math.log(weight) - (0.5 * distance + 0.5 * (2 * math.pi * variance).log()).sum((1, 2)))
    return torch.stack(columns, dim=1)


class MixtureDenoiser(UNetModel):
    """The exact network for the mixture; label 2 is the null label."""

    @classmethod
    def make(cls, scheduler, num_classes=2):
        model = cls(1, 2, 2, block_out_channels=(4,), layers_per_block=1, dims=1, num_classes=num_classes)
        model.scheduler = scheduler
        return model

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        level = noise_level(self.scheduler, timestep, sample)
        guesses = []
        for mean, std in zip(MEANS, STDS, strict=True):
            mean = torch.tensor(mean).to(sample)[:, None]
            gain = level.alpha * std**2 / ((level.alpha * std).square() + level.sigma.square())
            guesses.append(mean + gain * (sample - level.alpha * mean))
        shares = log_density(sample, level).softmax(1)
        if class_labels is not None:
            known = nn.functional.one_hot(class_labels, 3)[:, :2].to(shares)
            shares = torch.where((class_labels == 2)[:, None], shares, known)
        x0 = sum(share[:, None, None] * guess for share, guess in zip(shares.unbind(1), guesses, strict=True))
        output = training_target(x0, predict_eps(x0, sample, level), level, prediction_type_of(self.scheduler))
        return (output,)


class MixtureClassifier(nn.Module):
    """The exact p(label | x_t)."""

    def __init__(self, scheduler, dtype=torch.float64):
        super().__init__()
        self.scheduler, self.dtype = scheduler, dtype

    def forward(self, sample, timestep, return_dict=True):
        return (log_density(sample, self.scheduler.schedule.level(timestep, sample)),)
