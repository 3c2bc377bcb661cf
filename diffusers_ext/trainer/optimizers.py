"""The optimizer of a run: AdamW, or Muon for the hidden matrices with AdamW for the rest.

References:
    Loshchilov, Hutter 2019, Decoupled Weight Decay Regularization, arXiv 1711.05101 (AdamW).
    Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks,
        https://kellerjordan.github.io/posts/muon (Muon).
    Liu et al. 2025, Muon is Scalable for LLM Training, arXiv 2502.16982 (its weight decay).
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffusers_ext.machine import is_fast_at_bf16
from diffusers_ext.trainer.ema import trained_parameters


if TYPE_CHECKING:
    from diffusers_ext.trainer.config import TrainerConfig


OPTIMIZERS = ("adamw", "muon")

# Muon's learning rate beside that of AdamW: 0.02 beside 0.001. Of a DiT on Fashion-MNIST, half as much is worse and twice as
# much is as good (docs/speedrun.md).
MUON_RATE = 20.0

# Of the quintic p(s) = a s + b s^3 + c s^5 (Jordan et al. 2024). Five times applied to a singular value s in [0.002, 1] it
# is in [0.68, 1.21]; one near 0 becomes 485 times as large.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# On CPUs, so that what is multiplied stays in their caches. In half precision, by tile registers, the products are so short that
# it takes many at once to keep the threads busy: of a DiT of width 192 with 6 blocks, 72 matrices, 20 ms for 86 of 2**16
# elements at once (2 cores with AMX); in float32 67 to 81 ms, whatever their number.
ELEMENTS_AT_ONCE = {2: 2**21, 4: 2**18, 8: 2**18}  # by the bytes of a number
# From so many columns for a row on, the iterations are cheaper over the gram: of 128 x 512 in 7.1 ms for 11.7 (4 of them, one
# core of an AMD Zen 3). In half precision its small eigenvalues would be lost.
WIDE = 3
SMALLEST_NORM = 1e-7  # of a matrix that is raised to unit size


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly U V^T of each matrix U S V^T, shape `(batch, rows, columns)` to the same, in the precision that it is given in.

    Its singular values are those of the matrix over its Frobenius norm, five times through the quintic of
    `NEWTON_SCHULZ`.
    """
    is_cpu = matrices.device.type == "cpu"
    at_once = max(1, ELEMENTS_AT_ONCE[matrices.dtype.itemsize] // matrices[0].numel()) if is_cpu else len(matrices)
    return torch.cat([_iterated(part) for part in matrices.split(at_once)])


def _iterated(matrices: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=SMALLEST_NORM)
    if x.shape[2] >= WIDE * x.shape[1] and x.dtype.itemsize >= 4:
        x = _factor(x @ x.mT) @ x
        return x.mT if is_tall else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _factor(gram: Tensor) -> Tensor:
    """What the iterations multiply x by, from the left, by `gram` = x x^T alone, shape `(batch, rows, rows)` to the same.

    Each multiplies x by a polynomial q of the gram, and so the gram by q^2, with which q commutes.
    """
    a, b, c = NEWTON_SCHULZ
    factor = None
    for step in range(NEWTON_SCHULZ_STEPS):
        q = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        q.diagonal(dim1=1, dim2=2).add_(a)
        factor = q if factor is None else q @ factor
        if step < NEWTON_SCHULZ_STEPS - 1:
            gram = q @ (gram @ q)
    return factor


def hidden_matrices(model: nn.Module) -> dict[str, int]:
    """The weights of a model that Muon is for, by name, with the number of matrices that each consists of.

    They are those of the linear layers and convolutions in the parts that a module names in `_hidden_parts`: between the
    first layer and the last, without embeddings. A layer that computes several things at once, such as keys and values, is
    as many matrices one above the other; the module that has it names their number in `_fused_layers`.
    """
    found = {}
    for outer, module in model.named_modules():
        for part in getattr(module, "_hidden_parts", ()):
            for inner, parent in getattr(module, part, nn.Identity()).named_modules():
                fused = getattr(parent, "_fused_layers", {})
                for child, layer in parent.named_children():
                    if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd) and layer.weight.requires_grad:
                        name = ".".join(filter(None, (outer, part, inner, child, "weight")))
                        found[name] = fused.get(child, 1)
    return found


class MuonAdamW(torch.optim.AdamW):
    """Muon for some groups of parameters, and AdamW for the others.

    Muon (Jordan et al. 2024) averages gradients with momentum, as Nesterov does, makes each matrix of the average nearly
    orthogonal, and adds it times the learning rate and sqrt(max(1, rows / columns)). Kernels of convolutions are matrices
    of their output channels. Differs from `torch.optim.Muon` in three things: matrices of one shape go through the iteration
    together; a parameter may consist of several; and the iteration is in bfloat16 only where the hardware is fast at it.

    Args:
        groups: Of parameters. `num_matrices` of one says that it is Muon's: each parameter of it consists of so many
            matrices, one above the other. Of such a group, `momentum` is Muon's. `lr` and `weight_decay` are of both kinds.
        defaults: Those of `torch.optim.AdamW`.

    Raises:
        ValueError: if a parameter of Muon's is no such matrix.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults):
        super().__init__([{"num_matrices": None, "momentum": 0.95} | group for group in groups], **defaults)
        # The fused AdamW undoes the scale of fp16 by itself, and Muon cannot.
        self._step_supports_amp_scaling = False
        for group in self._groups_of_muon():
            for parameter in group["params"]:
                if parameter.ndim < 2 or len(parameter) % group["num_matrices"]:
                    raise ValueError(
                        f"a parameter of Muon must be {group['num_matrices']} matrices, one above the other, got shape "
                        f"{tuple(parameter.shape)}"
                    )

    def _groups_of_muon(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["num_matrices"] is not None]

    @torch.no_grad()
    def step(self, closure=None):
        """Performs a step of all groups; `closure` computes the loss again, which is given back."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if group["num_matrices"] is None]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        by_shape = defaultdict(list)
        for group in self._groups_of_muon():
            for parameter, matrices in self._directions(group):
                by_shape[matrices.shape[1:]].append((group, parameter, matrices))
        for (rows, columns), entries in by_shape.items():
            matrices = torch.cat([matrices for *_, matrices in entries])
            fast = torch.bfloat16 if is_fast_at_bf16(matrices.device.type) else torch.float32
            orthogonal = orthogonalize(matrices.to(fast)).split([len(matrices) for *_, matrices in entries])
            size = math.sqrt(max(1.0, rows / columns))
            for (group, parameter, _), update in zip(entries, orthogonal, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * size)
        return loss

    def _directions(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """The parameters of a group, and where Nesterov's momentum points, shape `(num_matrices, rows, columns)`."""
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                self.state[parameter]["step"] = torch.zeros(())  # which AdamW reads of every parameter that it loads
            self.state[parameter]["step"] += 1
        gradients = [parameter.grad for parameter in parameters]
        averages = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, averages, group["momentum"])
        for parameter, direction in zip(parameters, directions, strict=True):
            count = group["num_matrices"]
            yield parameter, direction.reshape(count, len(parameter) // count, -1)


def make_optimizer(config: "TrainerConfig", model: nn.Module, *, sharded: bool = False) -> torch.optim.AdamW:
    """The optimizer that the options ask for, of the parameters of a model that are trained.

    Args:
        sharded: Whether they will be spread over processes.

    Raises:
        ValueError: if it is Muon, and the model has no matrices for it, or its matrices will be spread.
    """
    parameters = trained_parameters(model)
    device = next(iter(parameters.values())).device.type
    options = {"eps": config.adam_epsilon, "betas": (config.adam_beta1, config.adam_beta2)}
    options |= {"lr": config.learning_rate, "fused": device in ("cpu", "cuda")}
    if config.optimizer != "muon":
        return torch.optim.AdamW(parameters.values(), weight_decay=config.adam_weight_decay, **options)
    if sharded:
        raise ValueError(
            "optimizer muon needs matrices that each process has in full, and FSDP spreads them: take adamw"
        )
    hidden = hidden_matrices(model)
    if not hidden:
        raise ValueError(f"optimizer muon is for hidden matrices, and {type(model).__name__} names none: take adamw")
    groups = [{"params": [value for name, value in parameters.items() if name not in hidden]}]
    for count in sorted(set(hidden.values())):
        of_count = [parameters[name] for name, number in hidden.items() if number == count]
        groups.append({"params": of_count, "num_matrices": count})
    optimizer = MuonAdamW(groups, **options)
    set_options(optimizer, config)
    return optimizer


def set_options(optimizer: torch.optim.Optimizer, config: "TrainerConfig") -> None:
    """Sets what a run may change when it goes on; a checkpoint brings what it had before."""
    for group in optimizer.param_groups:
        is_muon = group.get("num_matrices") is not None
        group["weight_decay"] = config.muon_weight_decay if is_muon else config.adam_weight_decay
        group["betas"], group["eps"] = (config.adam_beta1, config.adam_beta2), config.adam_epsilon
        if is_muon:
            group["momentum"] = config.muon_momentum


def set_learning_rate(optimizer: torch.optim.Optimizer, config: "TrainerConfig", rate: float) -> None:
    """Sets the rate of a step.

    Args:
        rate: Of AdamW; Muon's is as much less than its peak.
    """
    ratio = MUON_RATE if config.muon_learning_rate is None else config.muon_learning_rate / config.learning_rate
    for group in optimizer.param_groups:
        is_muon = group.get("num_matrices") is not None
        group["lr"] = rate * ratio if is_muon else rate
