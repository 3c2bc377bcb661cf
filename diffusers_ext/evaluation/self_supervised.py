"""Training of the network of features without labels, by VICReg (Bardes, Ponce and LeCun 2022, arXiv 2105.04906).

Two views of each image, cut out and changed in brightness at random, are to have the same features. That the features of
different images differ is asked for by the variance of each and by the covariances of all, of a projection that is thrown
away.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from diffusers_ext.evaluation.feature_training import FeatureTraining, new_network
from diffusers_ext.evaluation.labelled_images import LabelledImages, drawn_order
from diffusers_ext.metrics.features import FeatureClassifierModel, scaled_samples


# Of the two views: the least share of the area that is seen, how far the ratio of the sides goes, and how far contrast and
# brightness, on the scale of [-1, 1], do. No noise and no blur: features that do not see them do not see a generator's either.
SMALLEST_AREA, LARGEST_RATIO, CONTRAST, BRIGHTNESS = 0.3, 4 / 3, 0.4, 0.2

# Of the projection that the loss looks at.
PROJECTION = 256

# Weights of the terms (Section 4.2), and what keeps the root of a variance from an infinite slope.
INVARIANCE, VARIANCE, COVARIANCE = 25.0, 25.0, 1.0
SMALL_VARIANCE = 1e-4


def vicreg_loss(first: Tensor, second: Tensor) -> Tensor:
    """25 s(z, z') + 25 (v(z) + v(z')) + c(z) + c(z') (Equation 6), of projections of two views, `(batch, dim)`.

    s is the mean squared difference, v the mean over dimensions of max(0, 1 - sqrt(variance + 1e-4)), and c the sum of squared
    covariances of different dimensions, divided by the number of dimensions.

    Raises:
        ValueError: if the shapes differ, or the batch has fewer than 2 samples, of which there is no variance.
    """
    if first.shape != second.shape or first.ndim != 2 or len(first) < 2:
        raise ValueError(
            "both views must have one shape (batch, dim) with a batch of 2 or more, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}"
        )
    loss = INVARIANCE * F.mse_loss(first, second)
    for z in (first, second):
        z = z - z.mean(0)
        std = (z.square().sum(0) / (len(z) - 1) + SMALL_VARIANCE).sqrt()
        covariance = z.T @ z / (len(z) - 1)
        off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
        loss = loss + VARIANCE * F.relu(1 - std).mean() + COVARIANCE * off_diagonal / z.shape[1]
    return loss


def draw_view(samples: Tensor, generator: Generator, flip: bool = False) -> Tensor:
    """Each sample cut out at random and enlarged to its size, with another contrast and brightness.

    Args:
        samples: In about [-1, 1], shape `(batch, channels, height, width)`, or `(batch, channels, length)` of sequences.
        generator: On the CPU.
        flip: Mirror half of them left to right.
    """
    sequences = samples.ndim == 3
    x = samples.unsqueeze(2) if sequences else samples

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator)

    area, ratio = uniform(SMALLEST_AREA, 1), uniform(-math.log(LARGEST_RATIO), math.log(LARGEST_RATIO)).exp()
    sides = [(area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)]
    if sequences:
        sides[1] = torch.ones(len(x))
    mirrored = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if flip else torch.ones(len(x))
    grid = torch.zeros(len(x), 2, 3)
    for axis, side in enumerate(sides):  # of width and height, on which grid_sample looks from -1 to 1
        grid[:, axis, axis] = side * (mirrored if axis == 0 else 1)
        grid[:, axis, 2] = (1 - side) * uniform(-1, 1)
    contrast, brightness = uniform(1 - CONTRAST, 1 + CONTRAST), uniform(-BRIGHTNESS, BRIGHTNESS)
    positions = F.affine_grid(grid, list(x.shape), align_corners=False).to(x)
    x = F.grid_sample(x, positions, padding_mode="border", align_corners=False)
    x = x * contrast.to(x).view(-1, 1, 1, 1) + brightness.to(x).view(-1, 1, 1, 1)
    return x.squeeze(2) if sequences else x.clamp(-1, 1)


class _Projected(nn.Module):
    """The features, and what the loss looks at."""

    def __init__(self, model: FeatureClassifierModel):
        super().__init__()
        self.model, width = model, model.feature_dim
        self.projector = nn.Sequential(
            *(nn.Linear(width, PROJECTION, bias=False), nn.BatchNorm1d(PROJECTION), nn.ReLU()),
            nn.Linear(PROJECTION, PROJECTION),
        )

    def forward(self, samples: Tensor) -> Tensor:
        return self.projector(self.model(samples))


def fit_features_without_labels(train: LabelledImages, **settings) -> FeatureClassifierModel:
    """Trains a network without classes; its labels, if it has some, are not looked at.

    Args:
        train: The images to train on.
        settings: Of `FeatureTraining`.

    Raises:
        ValueError: if there are too few images, or the loss is not finite.
    """
    training = FeatureTraining(**settings)

    def loss_of(model: nn.Module, images: Tensor, labels: Tensor, generator: Generator) -> Tensor:
        samples = scaled_samples(images, train.value_scale)
        views = [draw_view(samples, generator, training.random_flip) for _ in range(2)]
        projections = model(torch.cat(views))  # one call of the network, as data-parallel training asks for
        with torch.autocast(images.device.type, enabled=False):
            return vicreg_loss(*projections.float().chunk(2))

    def build() -> _Projected:
        return _Projected(new_network(train, None))

    return training.run(train, build, loss_of, "training features without labels").model


@torch.no_grad()
def share_found(model: FeatureClassifierModel, data: LabelledImages, number: int = 500, seed: int = 0) -> float:
    """Share of images, in [0, 1], whose second view has the features nearest to those of the first, by the cosine.

    Args:
        data: Images, of which at most `number` are looked at, drawn by the seed, which draws the views too.
    """
    samples = model.to_sample(data.images[drawn_order(len(data), seed)[:number]])
    generator = Generator().manual_seed(seed)
    first, second = (
        torch.cat([model(part.to(model.device)) for part in draw_view(samples, generator).split(256)])
        for _ in range(2)
    )
    first, second = (F.normalize(each - each.mean(0), dim=1) for each in (first, second))
    nearest = (first @ second.T).argmax(1).cpu()
    return (nearest == torch.arange(len(nearest))).double().mean().item()
