"""What tests on an accelerator share. Where there is none, the same claims are tested on the CPU."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


DEVICES = ["cuda"] if torch.cuda.is_available() else ["cpu"]
# Half precision in which networks are trained there.
PRECISIONS = ["bf16", "fp16"] if torch.cuda.is_available() else ["bf16"]


@contextmanager
def no_host_sync(device: str) -> Iterator[None]:
    """Makes it an error to wait for the accelerator. On the CPU there is nothing to wait for."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(run: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`run` as a CUDA graph, whose result is written to the same tensors at each call; on the CPU `run` itself."""
    if device != "cuda":
        return run
    stream = torch.cuda.Stream()  # tables and kernels are made before, as CUDA wants it
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay():
        graph.replay()
        return result

    return replay


def moved(module: torch.nn.Module, device: str, **options) -> torch.nn.Module:
    """A copy of a module there."""
    return copy.deepcopy(module).to(device, **options)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, tolerance: float):
    """Within a share of the largest expected value."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape and actual.isfinite().all()
    largest = (actual - expected).abs().max().item()
    assert largest <= tolerance * expected.abs().max().item(), (largest, expected.abs().max().item())
