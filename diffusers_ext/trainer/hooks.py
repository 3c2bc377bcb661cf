"""A hook into the optimizer step, for what learns or watches beside the model."""

from contextlib import AbstractContextManager, nullcontext

from accelerate import Accelerator
from torch import Tensor, nn


class StepHook:
    """The methods of a hook, in the order in which each optimizer step calls them. Here they do nothing.

    Attributes:
        models: The hook's own models, prepared by accelerate, whose gradients accumulate as those of the main one.
        active: Whether `after_backward` is called in this step.
        name: Of the time that `after_backward` takes, in the profile.
    """

    models: tuple[nn.Module, ...] = ()
    active: bool = False
    name: str = ""

    def prepare(self, accelerator: Accelerator, *, channels_last: bool = False) -> None:
        """Called once, after accelerate has prepared the main model."""

    def begin_step(self, step: int, share_of_peak: float) -> None:
        """Called before the first batch of a step.

        Args:
            step: Optimizer steps done.
            share_of_peak: The learning rate of the step relative to its peak.
        """

    def around_loss(self) -> AbstractContextManager:
        """Entered for the forward and the backward pass of each batch."""
        return nullcontext()

    def after_backward(self, module: nn.Module, batch: dict[str, Tensor], max_grad_norm: float) -> Tensor:
        """Called after the backward pass of each batch, before the optimizer's step.

        Args:
            module: The main model, not wrapped.
            batch: As the main loss has left it.

        Returns: A loss without a graph, which the log has as `adversary_loss` and which must be finite.
        """
        raise NotImplementedError
