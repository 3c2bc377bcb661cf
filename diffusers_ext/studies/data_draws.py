"""Sampling with something else in the place of the predicted x_0: what the data say of it, in the mean or by a draw.

Given x_t, an image x_0 of the data has the probability softmax(-|x_t - alpha x_0|^2 / (2 sigma^2)). Its mean, E[x_0 | x_t], is what the
best network predicts. A draw in its place makes each step exact whatever its length, since then x_s ~ q(x_s | x_t, x_0) with x_0 ~
p(x_0 | x_t), and ends in an image of the data; a draw that does not look at x_t is a walk through noised images.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from diffusers_ext.diffusion.noising import NoiseLevel, NoiseSchedule, posterior


X0 = Callable[[Tensor, NoiseLevel, int], Tensor]


class DataPosterior:
    """p(x_0 | x_t) over images of the data, perhaps of the label of each sample alone.

    Args:
        images: Clean samples, shape `(images, channels, *size)`.
        image_labels, labels: Of the images and of the samples, int64; None for all images.
    """

    def __init__(self, images: Tensor, image_labels: Tensor | None = None, labels: Tensor | None = None):
        self.images, self.allowed = images, None
        if labels is not None:
            self.allowed = labels[:, None] == image_labels[None]

    def log_weights(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """Logits of the images for each sample, float64, shape `(batch, images)`."""
        x, images = x_t.flatten(1).double(), self.images.flatten(1).double()
        alpha, sigma = level.alpha.double().view(-1)[0], level.sigma.double().view(-1)[0]
        distance = (x.square().sum(1)[:, None] - 2 * alpha * x @ images.T) + alpha**2 * images.square().sum(1)
        logits = -distance / (2 * sigma**2)
        return logits if self.allowed is None else logits.masked_fill(~self.allowed, -torch.inf)

    def mean(self, x_t: Tensor, level: NoiseLevel) -> Tensor:
        """E[x_0 | x_t]."""
        weights = self.log_weights(x_t, level).softmax(1)
        return (weights @ self.images.flatten(1).double()).view_as(x_t).to(x_t)

    def draw(self, x_t: Tensor, level: NoiseLevel, generator: Generator | None = None) -> Tensor:
        """x_0 ~ p(x_0 | x_t)."""
        weights = self.log_weights(x_t, level).softmax(1)
        return self.images[torch.multinomial(weights, 1, generator=generator)[:, 0]].to(x_t)

    def any(self, x_t: Tensor, generator: Generator | None = None) -> Tensor:
        """Any image, of the sample's label."""
        weights = torch.ones(len(x_t), len(self.images)) if self.allowed is None else self.allowed.float()
        return self.images[torch.multinomial(weights, 1, generator=generator)[:, 0]].to(x_t)


def ancestral(
    x0_of: X0, x: Tensor, schedule: NoiseSchedule, timesteps: Sequence[int], generator: Generator | None = None
) -> Tensor:
    """Samples of the ancestral chain whose step t -> s is a draw of q(x_s | x_t, x_0), for any x_0 of x_t.

    Args:
        x0_of: Takes x_t, its level and its timestep.
        x: At the first timestep.
        timesteps: Descending; the last step ends at the x_0 of it.
    """
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        level = schedule.level(t, x)
        x0 = x0_of(x, level, t)
        if s < 0:
            return x0
        noise = torch.randn(x.shape, generator=generator).to(x)
        x = posterior(x0, x, level, schedule.level(s, x)).sample(noise)
    return x


def nearest(samples: Tensor, images: Tensor) -> Tensor:
    """Root mean square difference of each sample from the nearest image, shape `(samples,)`."""
    return torch.cdist(samples.flatten(1), images.flatten(1)).min(1).values / samples[0].numel() ** 0.5
