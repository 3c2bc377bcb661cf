"""Steps of second order for samplers without noise: what such a scheduler remembers of its last step, and when it counts."""

from torch import Tensor

from diffusers_ext.diffusion.betas import check_integer
from diffusers_ext.diffusion.multistep import LastStep, second_order_factor
from diffusers_ext.diffusion.noising import Factor, Transition


MULTISTEP_ORDERS = (1, 2)


class MultistepMixin:
    """For schedulers with `multistep_order` in their config.

    At 2 a scheduler remembers the step that it made last, until `set_timesteps` or the end of the run, and samples one run at a
    time: for two in turn, take two schedulers. A step after another one than that which ends where it starts is of first order,
    such as the first of a run or a repeated one.
    """

    _last_step: LastStep | None = None

    def _second_order_terms(
        self, at: Transition, x0: Tensor, is_noisy: bool = False
    ) -> tuple[tuple[Factor, Tensor], ...]:
        """What a step adds to that of first order, as terms of `weighted_sum`; and remembers this one.

        Args:
            x0: Predicted, as the step takes it.
            is_noisy: Whether the step draws noise, so that it is of first order, and the one after it too.
        """
        if self.config.multistep_order == 1:
            return ()
        last, self._last_step = self._last_step, None
        if is_noisy or isinstance(at.s.sigma, float) and at.s.sigma == 0:  # the end of a run
            return ()
        # A copy, since what the caller gets, or the network's own output, may be written to.
        self._last_step = LastStep(at.t, at.s, x0.clone())
        if last is None or (last.x0.shape, last.x0.device) != (x0.shape, x0.device):
            return ()
        factor = second_order_factor(last, at)
        return () if isinstance(factor, float) and factor == 0 else ((factor, x0), (-factor, last.x0))


def check_order(order: int) -> None:
    """Refuses a `multistep_order` that there is none of."""
    check_integer("multistep_order", order)
    if order not in MULTISTEP_ORDERS:
        raise ValueError(f"multistep_order must be 1 or 2, got {order}")
