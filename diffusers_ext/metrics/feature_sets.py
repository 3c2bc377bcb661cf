"""Two sets of features that are to be compared."""

import torch
from torch import Tensor


# Pairs of samples whose values are held at a time: 64 MB in float64, whatever the sizes of the sets.
CHUNK_ELEMENTS = 2**23


def check_feature_sets(first: Tensor, second: Tensor, names: tuple[str, str] = ("real", "generated")) -> None:
    """Refuses features that cannot be compared.

    Raises:
        ValueError: unless both have the shape `(number, dim)`, of one `dim`, and are finite.
    """
    for name, points in zip(names, (first, second), strict=True):
        if points.ndim != 2:
            raise ValueError(f"{name} must have shape (number, dim), got {tuple(points.shape)}")
        if not torch.isfinite(points).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity: look at the images behind the features")
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same features, got {first.shape[1]} and {second.shape[1]}"
        )
