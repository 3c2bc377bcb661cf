"""Distances between images in the features of a network, which see structure where pixels see brightness.

`lpips` is the metric of Zhang et al. (2018) by the package of that name, if it and its weights are at hand. Any data set
with labels has another: the features of a small classifier of its own, made by `training/train_features.py`.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusers_ext.command_names import name_commands
from diffusers_ext.evaluation.feature_folders import load_features
from diffusers_ext.metrics.features import FeatureClassifierModel


class FeatureDistance(nn.Module):
    """The squared distance of unit feature vectors, averaged over positions and summed over a network's layers.

    This is LPIPS (Zhang et al. 2018, Eq. 1) without its learned weights of channels. The network is frozen.

    Args:
        features: A classifier of such images.
    """

    def __init__(self, features: FeatureClassifierModel):
        super().__init__()
        self.features = features.eval().requires_grad_(False)

    def train(self, mode: bool = True):
        return super().train(False)  # batch statistics would make an image's distance depend on the others

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances between images in [-1, 1], shape `(batch,)`."""
        both = self.features.feature_maps(torch.cat([x, y]))
        return sum(_unit_distance(*maps.chunk(2)) for maps in both)


def _unit_distance(x: Tensor, y: Tensor) -> Tensor:
    x, y = (maps.float() * torch.rsqrt(maps.float().square().sum(1, keepdim=True) + 1e-8) for maps in (x, y))
    return (x - y).square().sum(1).mean((1, 2))


class LPIPSDistance(nn.Module):
    """LPIPS by the package `lpips`; grey images are shown to it in three equal channels."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[1] == 1:
            x, y = x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1)
        return self.network(x, y).flatten()


def load_perceptual(name: str, image_shape: tuple[int, int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """A distance between images of shape `(channels, height, width)`.

    Args:
        name: "lpips", or the folder of a classifier of `training/train_features.py`.

    Raises:
        ValueError: if the package or its weights are not at hand, or the images do not fit.
    """
    own = name_commands(
        "name the folder of a classifier of such images instead: accelerate launch training/train_features.py makes one "
        "from a data set with labels"
    )
    if name == "lpips":
        if image_shape[0] not in (1, 3):
            raise ValueError(f"lpips takes grey or RGB images, got {image_shape[0]} channels; {own}")
        try:
            import lpips
        except ImportError as error:
            raise ValueError(f"lpips needs the package lpips, which is not installed ({error}); {own}") from error
        try:
            return LPIPSDistance(lpips.LPIPS(net="vgg", verbose=False))
        except Exception as error:  # what downloading and reading weights raises, which is of many kinds
            raise ValueError(f"the weights of lpips cannot be had ({error}); {own}") from error
    if not Path(name).is_dir():
        raise ValueError(f"perceptual_network must be lpips or a folder of a feature classifier, got {name!r}; {own}")
    features, _ = load_features(name)
    if features.image_shape != tuple(image_shape):
        raise ValueError(
            f"the classifier in {name} takes images of (channels, height, width) {features.image_shape}, but these are "
            f"{tuple(image_shape)}; {own}"
        )
    return FeatureDistance(features)
