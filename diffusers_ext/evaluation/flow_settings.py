"""How the likelihood by the probability flow is measured."""

from dataclasses import dataclass
from typing import Any

from diffusers_ext.diffusion.probability_flow import DEQUANTIZATIONS


@dataclass(frozen=True)
class FlowSettings:
    """How the bound by the probability flow is measured; see `flow_bound`."""

    num_steps: int | None
    tolerance: float | None
    dequantization: str

    @classmethod
    def of(cls, num_steps: int | None, tolerance: float | None, dequantization: str) -> "FlowSettings | None":
        """None where there is nothing to measure.

        Raises:
            ValueError: if both or neither say how the flow is solved, or there is no such dequantisation.
        """
        if dequantization not in DEQUANTIZATIONS:
            raise ValueError(f"dequantization must be one of {', '.join(DEQUANTIZATIONS)}, got {dequantization!r}")
        if num_steps is None and tolerance is None:
            if dequantization != "decoder":
                raise ValueError(
                    f"dequantization {dequantization!r} is of the flow: give num_flow_steps or flow_tolerance"
                )
            return None
        if num_steps is not None and tolerance is not None:
            raise ValueError("num_flow_steps and flow_tolerance both say how the flow is solved: give one of them")
        return cls(num_steps, tolerance, dequantization)

    @property
    def options(self) -> dict[str, Any]:
        steps = {"tolerance": self.tolerance} if self.num_steps is None else {"num_steps": self.num_steps}
        return steps | {"dequantization": self.dequantization}

    def describe(self) -> dict[str, Any]:
        """What it was measured with, for JSON."""
        steps = {"flow_tolerance": self.tolerance} if self.num_steps is None else {"num_flow_steps": self.num_steps}
        return steps | {"dequantization": self.dequantization}
