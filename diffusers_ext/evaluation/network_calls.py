"""How often a pipeline asks its networks, which is what a sample costs whatever its sampler calls a step."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


# From x_t to a prediction, under the names that pipelines of this package and of diffusers have them by.
NETWORKS = ("denoiser", "unet", "transformer", "weak_denoiser", "classifier")


@contextmanager
def counted_calls(pipeline) -> Iterator[dict[str, int]]:
    """Counts the samples that each of a pipeline's networks is called with, from x_t to a prediction.

    Conditional and unconditional predictions of one batch count as two, since they cost two; a sampler that asks twice
    in a step, such as Heun's, counts twice.

    Args:
        pipeline: Of this package or of diffusers.

    Yields:
        The counts so far, by the names of those of `NETWORKS` that the pipeline has a place for; 0 where it is empty.
    """
    parts = {name: getattr(pipeline, name) for name in NETWORKS if hasattr(pipeline, name)}
    counts = dict.fromkeys(parts, 0)
    networks = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}

    def counting(name: str):
        def count(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            given = (*arguments, *keywords.values())
            counts[name] += next(len(value) for value in given if isinstance(value, Tensor) and value.ndim > 1)

        return count

    handles = [
        network.register_forward_pre_hook(counting(name), with_kwargs=True) for name, network in networks.items()
    ]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
