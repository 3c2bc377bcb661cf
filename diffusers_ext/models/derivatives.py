"""Derivatives that a fast backward pass of one's own does not give: of higher order, forward-mode, batched.

A `torch.autograd.Function` of this package is there for the speed of loss.backward(). Whoever differentiates otherwise
gets the derivatives of plain operators, which PyTorch knows all of:

- within `torch.func` (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap), and for inputs with a forward-mode tangent, the
  forward pass does not call the Function (`needs_plain_operators`);
- in a backward pass that is to be differentiated in turn (`create_graph=True`), or that vmap makes for many gradients at
  once (`is_grads_batched=True`), the Function calls `plain_gradients` (`backward_is_differentiated`).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual


def in_torch_func() -> bool:
    """Whether a transform of `torch.func` is at work eagerly; compiled, plain operators are taken anyway."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_batched(x: Tensor) -> bool:
    """Whether x may stand for many tensors at once, under one of PyTorch's two forms of vmap; such have no layout."""
    if torch.compiler.is_compiling():  # which cannot look at x
        return False
    return in_torch_func() or torch._C._functorch.is_legacy_batchedtensor(x)


def needs_plain_operators(*inputs: Tensor) -> bool:
    """Whether the derivatives to come are none that a backward pass alone can give."""
    if torch.compiler.is_compiling():
        return False
    return in_torch_func() or any(unpack_dual(x).tangent is not None for x in inputs)


def backward_is_differentiated(grad: Tensor) -> bool:
    """Asked in a backward pass of `grad`: whether its result is to be differentiated, or to be of many gradients."""
    return torch.is_grad_enabled() or is_batched(grad)


def plain_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of `function(*inputs)` by autograd, which can be differentiated again.

    Args:
        function: Of plain operators.
        needed: For which of the inputs; the others get `None`.
        grad: Of the result.
    """
    with torch.enable_grad():
        # Views, since the gradient of an input is not to count the way through another input that was made of it.
        views = [x.view_as(x) for x in inputs]
        output = function(*views)
    wanted = [view for view, need in zip(views, needed, strict=True) if need]
    grads = iter(torch.autograd.grad(output, wanted, grad, create_graph=torch.is_grad_enabled()))
    return tuple(next(grads) if need else None for need in needed)
