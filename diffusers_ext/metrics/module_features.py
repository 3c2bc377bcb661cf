"""Features of any network, in the place of those of a classifier of the data, for data without labels above all."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffusers_ext.metrics.features import scaled_samples
from diffusers_ext.value_scale import ValueScale


class ModuleFeatures(nn.Module):
    """What a module gives for a batch, flattened, as features: it stands where a `FeatureClassifierModel` does.

    Args:
        module: Takes samples in [-1, 1], `(batch, *sample_shape)`, and gives a tensor with the batch first.
        sample_shape: `(channels, height, width)` of images, or `(channels, length)` of sequences.
        value_scale: Of sequences, between own units and [-1, 1]; None where the module takes own units.

    Raises:
        ValueError: if the module gives no features of such samples.
    """

    def __init__(self, module: nn.Module, sample_shape: Sequence[int], value_scale: ValueScale | None = None):
        super().__init__()
        self.module, self.image_shape, self.value_scale = module.eval(), tuple(sample_shape), value_scale
        with torch.no_grad():
            given = module(torch.zeros(2, *self.image_shape, device=self.device))
        if not isinstance(given, Tensor) or len(given) != 2 or given.ndim < 2:
            what = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(f"a module of features must give a tensor (batch, features), got {what} for a batch of 2")
        self.feature_dim = given[0].numel()

    @property
    def device(self) -> torch.device:
        tensors = [*self.module.parameters(), *self.module.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def fits(self, image_shape: Sequence[int]) -> bool:
        """Whether the module takes samples of this shape."""
        return self.image_shape == tuple(image_shape)

    def logits(self, features: Tensor) -> None:
        """Of classes, which it has none of."""
        return None

    def ids_among(self, label_names: Sequence[str]) -> Tensor:
        """Of classes, which it has none of."""
        return torch.empty(0, dtype=torch.int64)

    @torch.no_grad()
    def measure(self, images: Tensor, batch_size: int = 256) -> tuple[Tensor, None]:
        """Features, float32, shape `(number, feature_dim)` on the CPU; and None for the labels that it does not know.

        Args:
            images: As for `FeatureClassifierModel.measure`.
        """
        features = torch.empty(len(images), self.feature_dim)
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            sample = scaled_samples(images[rows].to(self.device), self.value_scale)
            features[rows] = self.module(sample).flatten(1).float().cpu()
        return features, None
