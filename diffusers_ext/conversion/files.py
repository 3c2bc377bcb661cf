"""Checkpoints of other projects: files, read without running what is in them, and weights, put into a network whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def load_checkpoint(file: str) -> dict[str, Any]:
    """What a checkpoint holds by name, from a file of safetensors or of torch, of which no code is run.

    Raises:
        ValueError: if it cannot be read so, or holds nothing by name.
    """
    if not Path(file).is_file():
        raise ValueError(f"the checkpoint must be a file, .pt or .safetensors, and there is none at {file}")
    try:
        if str(file).endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what is raised depends on where the file is broken
        if isinstance(error, OSError):
            raise
        # Without its words: those of torch are a number, or advise to run the code that there is in the file.
        raise ValueError(
            f"{file} must hold weights alone, as torch.save or safetensors write a state dict: it is damaged, or holds "
            f"something else ({type(error).__name__})"
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(
            f"{file} must hold tensors by name, the state dict of a network, got {type(checkpoint).__name__}"
        )
    return dict(checkpoint)


def load_all(network: nn.Module, weights: Mapping[str, Tensor], whose: str) -> None:
    """Puts weights into a network that has the same, none more and none fewer.

    Args:
        whose: The layers of the network are, in words.

    Raises:
        ValueError: with some that only one of them has, or that have another shape.
    """
    expected = network.state_dict()
    wrong = sorted(expected.keys() ^ weights.keys()) or [
        name for name, value in expected.items() if value.shape != weights[name].shape
    ]
    if wrong:
        raise ValueError(
            f"the checkpoint has layers that {whose} has not, or the other way round, such as {', '.join(wrong[:3])}"
        )
    network.load_state_dict(weights)
