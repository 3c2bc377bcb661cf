"""Derivatives that a hand-written backward pass does not support: of higher order, forward-mode, batched.

A `torch.autograd.Function` of this package makes loss.backward() fast. All other derivatives are those of plain operators,
which PyTorch differentiates in every way:

- within `torch.func` (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap), and for inputs with a forward-mode tangent, the
  forward pass does not call the Function (`needs_plain_operators`);
- in a backward pass that will be differentiated itself (`create_graph=True`), or that vmap runs for many gradients at
  once (`is_grads_batched=True`), the Function calls `plain_gradients` (`backward_is_differentiated`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def in_torch_func() -> bool:
    """Whether a transform of `torch.func` is active in eager mode; compiled code uses plain operators anyway."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_batched(x: Tensor) -> bool:
    """Whether x is batched by either of PyTorch's two forms of vmap; such a tensor has no memory layout."""
    if torch.compiler.is_compiling():  # the compiler cannot trace the calls below
        return False
    return in_torch_func() or torch._C._functorch.is_legacy_batchedtensor(x)


def needs_plain_operators(*inputs: Tensor) -> bool:
    """Whether derivatives of the inputs may be taken that a hand-written backward pass does not support."""
    if torch.compiler.is_compiling():
        return False
    return in_torch_func() or any(unpack_dual(x).tangent is not None for x in inputs)


def backward_is_differentiated(grad: Tensor) -> bool:
    """Within a backward pass of `grad`, whether it will be differentiated itself, or is batched over gradients."""
    return torch.is_grad_enabled() or is_batched(grad)


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*inputs)` by autograd, which can be differentiated again.

    Args:
        function: Of plain operators.
        needed: Which of the inputs need a gradient; the others get `None`.
        grad: Gradient of the output.
    """
    with torch.enable_grad():
        # Views, since an input may have been computed from another one, which is no path of this function.
        views = [x.view_as(x) for x in inputs]
        output = function(*views)
    wanted = [view for view, need in zip(views, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=torch.is_grad_enabled()))
    return tuple(next(grads) if need else None for need in needed)
