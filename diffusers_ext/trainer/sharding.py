"""Runs whose parameters are sharded over the processes by FSDP2, and their full tensors."""

import copy
from collections.abc import Mapping

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process has only its shard of the parameters.

    Raises:
        ValueError: if they are sharded in another way than by FSDP2: the EMA and the samples made while training would
            be wrong or wait without end.
    """
    engine = accelerator.distributed_type
    if engine in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"parameters may be spread over processes by FSDP2, got {engine.value}: launch with --use_fsdp --fsdp_version 2"
        )
    if engine == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("parameters may be spread over processes by FSDP2, got FSDP1: launch with --fsdp_version 2")
    return engine == DistributedType.FSDP


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The full tensors, in every process. Every process calls it."""
    return {name: full(value) for name, value in tensors.items()}


def full(tensor: Tensor) -> Tensor:
    """The full tensor, in every process. Every process calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def scattered(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's shards of full tensors, sharded as those of the same names in `like` are."""
    return {
        name: distribute_tensor(value.to(like[name].device), like[name].device_mesh, like[name].placements)
        if isinstance(like.get(name), DTensor)
        else value
        for name, value in tensors.items()
    }


class UnshardedModel:
    """A copy of a sharded model with its full parameters in every process, for evaluating and saving.

    Args:
        model: Before its parameters are sharded. The copy waits on the CPU.
    """

    def __init__(self, model: nn.Module):
        self._copy = copy.deepcopy(model).to("cpu").eval()

    @torch.no_grad()
    def of(self, parameters: Mapping[str, Tensor], model: nn.Module) -> nn.Module:
        """The copy, with these parameters and the model's buffers, on the model's device. Every process calls it."""
        for name, value in self._copy.named_parameters():
            value.copy_(full(parameters[name]))
        for name, value in self._copy.named_buffers():
            value.copy_(full(model.get_buffer(name)))
        return self._copy.to(next(model.parameters()).device)
