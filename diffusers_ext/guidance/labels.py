"""How many labels a network knows."""

from torch import nn


# Where a network's config says how many labels it has: ours; diffusers' DiT; its UNet.
NUM_CLASSES_KEYS = ("num_classes", "num_embeds_ada_norm", "num_class_embeds")


def num_classes_of(network: nn.Module) -> int | None:
    """Number of labels that a network knows, the null label not counted; `None` if it takes none."""
    return next((network.config[key] for key in NUM_CLASSES_KEYS if network.config.get(key) is not None), None)
