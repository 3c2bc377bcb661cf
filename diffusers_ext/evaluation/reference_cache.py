"""Features of the real images, kept on disk: they are the same each time a model is measured against them."""

import hashlib
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.data.identity import hash_weights
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.pretrained_features import PretrainedFeatures
from diffusers_ext.machine import own_cache
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.metrics.module_features import ModuleFeatures


_VERSION = b"reference 1"  # raise the number when networks see images in another way


def reference_features(
    features: FeatureClassifierModel | PretrainedFeatures | ModuleFeatures,
    images: LabelledImages,
    weights_sha256: str | None = None,
) -> Tensor:
    """The features of real images, float32, shape `(number, feature_dim)`: measured once and kept.

    All of them and not their mean and covariance alone, which precision, recall and images in other proportions do not
    follow from.

    Args:
        features: The network.
        images: The real images, as they are measured.
        weights_sha256: Of the network, see `hash_weights`; computed if None.

    Warns:
        UserWarning: if they cannot be kept.
    """
    path = reference_path(images, weights_sha256 or hash_weights(features), features.feature_dim)
    kept = _read(path, (len(images), features.feature_dim))
    if kept is not None:
        return kept
    measured, _ = features.measure(images.images)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as partial:
            save_file({"features": measured.contiguous()}, partial)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"the features of the real images are measured again next time: {error}", stacklevel=2)
    return measured


def reference_path(images: LabelledImages, weights_sha256: str, feature_dim: int) -> Path:
    """Where the features are kept: named by the values of the images and of the network's weights, whatever their files."""
    content = hashlib.sha256(_VERSION + weights_sha256.encode() + str(feature_dim).encode())
    content.update(repr((tuple(images.images.shape), str(images.images.dtype), images.value_scale)).encode())
    content.update(images.images.contiguous().numpy().tobytes())
    return own_cache() / "reference" / f"{content.hexdigest()[:32]}.safetensors"


def _read(path: Path, shape: tuple[int, int]) -> Tensor | None:
    """The features that are kept there; None if there are none, or others."""
    try:
        with safe_open(path, framework="pt") as file:
            features = file.get_tensor("features").clone()  # of its own memory, not of the file's
    except (OSError, SafetensorError):
        return None
    fits = tuple(features.shape) == shape and features.dtype == torch.float32 and bool(features.isfinite().all())
    return features if fits else None
