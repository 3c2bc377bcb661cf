"""What somebody asks of the demo, checked as a person would say it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any


MAX_IMAGES, MAX_STEPS, MAX_SCALE, MAX_SEED = 16, 1000, 100.0, 2**32 - 1
AS_SAVED = "as saved"  # the scheduler of the pipeline itself


@dataclass(frozen=True)
class Settings:
    """The settings of a call. A field of a page may hold anything, so everything is checked.

    Attributes:
        labels: Names or ids of labels that the images have in turn; none for images without a label.
        prompt: The text of all images, for pipelines with texts.
        scheduler: `AS_SAVED`, or one of `Studio.schedulers`.
        guidance_scale: Weight of classifier-free guidance, at least 0; 1 is none.
        guidance_start, guidance_stop: Where to guide, as fractions of the steps.
        seed: Of the first image; the next ones have the seeds after it.

    Raises:
        ValueError: with a sentence for the user.
    """

    labels: Sequence[str] = ()
    prompt: str = ""
    num_images: int = 4
    scheduler: str = AS_SAVED
    num_steps: int = 25
    guidance_scale: float = 1.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    seed: int = 0

    def __post_init__(self):
        def settle(name: str, value: Any):
            object.__setattr__(self, name, value)

        settle("labels", tuple(map(str, self.labels or ())))
        settle("prompt", str(self.prompt or ""))
        settle("num_images", whole_number("The number of images", self.num_images, 1, MAX_IMAGES))
        settle("num_steps", whole_number("The number of steps", self.num_steps, 1, MAX_STEPS))
        settle("guidance_scale", number("The guidance scale", self.guidance_scale, 0.0, MAX_SCALE))
        settle("seed", whole_number("The seed", self.seed, 0, MAX_SEED))
        settle("guidance_start", number("The start of the guidance", self.guidance_start, 0.0, 1.0))
        settle("guidance_stop", number("The end of the guidance", self.guidance_stop, 0.0, 1.0))
        if not self.guidance_start < self.guidance_stop:
            raise ValueError(
                f"The guidance must end after its start, got {self.guidance_start:g} to {self.guidance_stop:g} of the steps."
            )

    @property
    def seeds(self) -> list[int]:
        return [(self.seed + number) % (MAX_SEED + 1) for number in range(self.num_images)]

    @property
    def guidance(self) -> dict[str, Any]:
        """As keywords of a pipeline's call."""
        interval = (self.guidance_start, self.guidance_stop)
        is_limited = interval != (0.0, 1.0) and self.guidance_scale != 1.0
        return {"guidance_scale": self.guidance_scale} | ({"guidance_interval": interval} if is_limited else {})


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number in [low, high].

    Raises:
        ValueError: with a sentence.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {_said(value)}.")
    return float(value)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """A whole number in [low, high]; 3.0 is one.

    Raises:
        ValueError: with a sentence.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not (low <= value <= high) or value != int(value):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {_said(value)}.")
    return int(value)


def _said(value: Any) -> str:
    return "nothing" if value is None or value == "" else f"{value:g}" if isinstance(value, float) else repr(value)
