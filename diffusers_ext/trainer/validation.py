"""The loss on held-out images."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and back in its own at the end."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """torch's default generators go on afterwards as if nothing had been drawn from them meanwhile."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@torch.no_grad()
def mean_loss(
    compute_loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    accelerator: Accelerator,
) -> float:
    """The mean loss of an image, over the batches of all processes. Every process calls it, with its own batches."""
    losses, counts = [], []
    for batch in batches:
        losses.append(compute_loss(model, batch))
        counts.append(len(batch["time"]))
    means = torch.stack(losses).tolist() if losses else []
    sums = [sum(mean * count for mean, count in zip(means, counts, strict=True)), sum(counts)]
    # Of one type in each process: one without a batch would have integers.
    sums = torch.tensor(sums, dtype=torch.float32, device=accelerator.device)
    total, count = accelerator.reduce(sums).tolist()
    return total / count
