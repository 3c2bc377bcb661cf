"""Files of checkpoints, read without running what is in them."""

from collections.abc import Mapping
from typing import Any

import torch


def load_checkpoint(file: str) -> dict[str, Any]:
    """What a checkpoint holds by name, from a file of safetensors or of torch, of which no code is run.

    Raises:
        ValueError: if it cannot be read so, or holds nothing by name.
    """
    if str(file).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises depends on where the file is broken
        if not isinstance(error, OSError):
            raise ValueError(f"{file} cannot be read as weights alone: {error}") from error
        raise
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"{file} must hold tensors by name, the state dict of a network, got {type(checkpoint).__name__}"
        )
    return dict(checkpoint)
