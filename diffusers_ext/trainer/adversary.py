"""A second network that learns against the first, with an optimizer of its own."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from diffusers_ext.trainer.hooks import StepHook


class Adversary(StepHook):
    """A network whose loss is taken after that of the main one, on the same batch.

    The main network's loss may call `module`: gradients pass through it to the main network and none stays in it. What
    that loss puts into the batch, such as a reconstruction, arrives here without its graph, and while this loss is
    computed the main network is frozen: so no gradient reaches it.

    Args:
        module: Whose parameters are trained, by AdamW.
        loss: Takes the prepared module and the batch; gives the mean loss of the batch. It should call the module once,
            on all it compares together, since the processes average gradients at the end of one backward pass.
        learning_rate: Peak; it follows the run's schedule.
        start_step: Optimizer steps of the main network before this one begins to learn.
        betas, weight_decay: AdamW's.

    Attributes:
        active: Whether it learns at the present step.
    """

    name = "adversary"

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
        *,
        learning_rate: float,
        start_step: int = 0,
        betas: tuple[float, float] = (0.5, 0.9),
        weight_decay: float = 0.0,
    ):
        if learning_rate <= 0 or start_step < 0:
            raise ValueError(
                "the adversary's learning_rate must be positive and its start_step not negative, got "
                f"{learning_rate:g} and {start_step}"
            )
        self.module, self.loss, self.learning_rate, self.start_step = module, loss, learning_rate, start_step
        self.betas, self.weight_decay = betas, weight_decay
        self.active = start_step == 0

    def prepare(self, accelerator: Accelerator, *, channels_last: bool = False) -> None:
        """Brings the network to its device and to its processes, after the main one.

        Raises:
            ValueError: if the run is sharded, or in fp16: accelerate has these for one network and one optimizer.
        """
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"a run with an adversary cannot be sharded, got {accelerator.distributed_type.value}: launch it with "
                "--multi_gpu"
            )
        if accelerator.mixed_precision == "fp16":
            raise ValueError(
                "a run with an adversary needs --mixed_precision no or bf16, got fp16: it has one loss scale"
            )
        self.module.to(accelerator.device)
        if channels_last:
            self.module.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        self._accelerator = accelerator
        self.model, self.optimizer = accelerator.prepare(self.module, optimizer)
        self.models = (self.model,)

    def begin_step(self, step: int, share_of_peak: float) -> None:
        """Sets the learning rate, and whether this network learns at step `step`."""
        self.active = step >= self.start_step
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * share_of_peak

    def around_loss(self) -> AbstractContextManager:
        return frozen(self.module)

    def after_backward(self, module: nn.Module, batch: dict[str, Tensor], max_grad_norm: float) -> Tensor:
        """A forward and a backward pass, and the optimizer's step where accumulation ends."""
        with frozen(module):
            detached = {name: value.detach() if isinstance(value, Tensor) else value for name, value in batch.items()}
            loss = self.loss(self.model, detached)
            self._accelerator.backward(loss)
        if self._accelerator.sync_gradients:
            self._accelerator.clip_grad_norm_(self.model.parameters(), max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """The parameters need no gradient meanwhile."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
