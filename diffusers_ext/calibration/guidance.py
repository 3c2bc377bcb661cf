"""A search for the guidance and the width of the averaged weights under which images are nearest to held-out ones.

Every set of images is made from the same noise and the same labels, so that two sets differ by what is compared alone.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from diffusers_ext.calibration.budget import Budget, number_that_fits, shared
from diffusers_ext.calibration.examples import Examples
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.generate import generate_images, shared_by_processes
from diffusers_ext.evaluation.label_shares import proportional_labels
from diffusers_ext.evaluation.labelled_images import convert_channels
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.trainer.config import DTYPES


T = TypeVar("T")

# Images of a set, by the time there is.
FEWEST_IMAGES, MOST_IMAGES = 200, 2000
NUM_NEIGHBOURS = 3
TIMED_IMAGES = 50  # by which it is known how long a set takes

# Sets that a search should be able to measure.
NUM_SETS = 16

# Scales that are tried first, in all steps and in an interval of shares of the steps; the best in few trials comes early.
FULL_SCALES, LIMITED_SCALES, FIRST_INTERVAL = (1.5, 2.0, 3.0), (2.0, 3.0, 4.5), (0.2, 0.8)
LARGEST_SCALE = 12.0
SCALE_STEPS, INTERVAL_STEPS = (1.5, 1.2), (0.2, 0.1)

# A share of the distance by which a choice must be better than none, since the least of many is small by chance too.
LEAST_GAIN = 0.03


@dataclass(frozen=True)
class Guidance:
    """A scale, 1 for none, and where it acts: from `start` to `stop`, shares of the steps."""

    scale: float = 1.0
    start: float = 0.0
    stop: float = 1.0

    @property
    def is_full(self) -> bool:
        return (self.start, self.stop) == (0.0, 1.0)

    def call(self, timesteps: list[int]) -> dict:
        """Arguments of a pipeline's call.

        The interval is in timesteps of the training, half-way between those of the steps, so that it means the same noise
        for every number of steps.

        Args:
            timesteps: Of the steps that it was chosen for, descending.
        """
        if self.scale == 1 or self.is_full:
            return {"guidance_scale": self.scale}
        first, end = int(self.start * len(timesteps)), int(self.stop * len(timesteps))
        edges = [timesteps[0] + 1, *((a + b) / 2 for a, b in zip(timesteps, timesteps[1:], strict=False)), 0]
        return {"guidance_scale": self.scale, "guidance_interval": {"timestep": [edges[end], edges[first]]}}


NONE, WEAK = Guidance(), Guidance(1.2)


@dataclass
class Ruler:
    """Measures how far a set of images of a pipeline is from real ones.

    Args:
        evaluator: With the real images; None in all processes but the first, which measures.
        asked: What each image is asked for by, keywords of `generate_images`.
        labels: That the images are to show, int64, or None where that is not known.
        seed: Of their noise.
        channels: Of the real images.
    """

    subject: Subject
    evaluator: Evaluator | None
    asked: dict[str, list]
    labels: Tensor | None
    num_images: int
    seed: int
    channels: int

    @classmethod
    def by(
        cls,
        real: Examples,
        subject: Subject,
        features: FeatureClassifierModel | None,
        num_images: int,
        seed: int,
        kept: Tensor | None = None,
    ) -> "Ruler":
        """A ruler by these real images, of images by label in their proportions, or asked for as they are in turn.

        Args:
            features: None in all processes but the first.
            kept: The features of the real images, as another ruler by them has them; by default they are measured.
        """
        evaluator = None
        if features is not None:
            settings = {"in_pixels": False, "seed": seed, "train_features": kept}
            evaluator = Evaluator(real.images, features, num_images, NUM_NEIGHBOURS, **settings)
        named, labels = real.images.label_names, None
        if subject.asks_as(real):
            drawn = real.draw(num_images, seed)
            asked, labels = subject.asked(drawn), drawn.images.labels if named else None
        else:
            asked = {}
            if (classes := subject.num_classes) is not None:
                counts = torch.bincount(real.images.labels, minlength=classes).tolist() if named else [1] * classes
                asked["labels"] = proportional_labels(num_images, counts)
                labels = torch.tensor(asked["labels"])
        return cls(subject, evaluator, asked, labels, num_images, seed, real.images.images.shape[1])

    def measure(
        self, guidance: Guidance, timesteps: list[int], steps: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """The Fréchet distance, and the share of right labels if there are any.

        Args:
            timesteps: That `guidance` is chosen for.
            steps: Arguments of the call that say which steps it makes, `timesteps` or `num_inference_steps`; by default those
                of `timesteps`.
        """
        images = self.images(guidance, timesteps, steps)
        measures = shared({} if self.evaluator is None else self.evaluator.measure(images, self.labels))
        return {name: measures[name] for name in ("frechet_distance", "label_accuracy") if name in measures}

    def images(
        self,
        guidance: Guidance,
        timesteps: list[int],
        steps: Mapping[str, Any] | None = None,
        number: int | None = None,
    ) -> Tensor:
        """The images that are measured, or the first of them, as the real ones are."""
        pipe = self.subject.pipe
        settings = guidance.call(timesteps) if self.subject.takes_scale else {}
        steps = {"timesteps": timesteps} if steps is None else dict(steps)

        def make(indices: range) -> Tensor:
            return generate_images(
                pipe,
                indices,
                **self.asked,
                settings=settings | steps,
                batch_size=self.subject.batch_size,
                seed=self.seed,
                show_progress=False,
            )

        precision = DTYPES[self.subject.mixed_precision]
        with torch.autocast(pipe.device.type, precision, enabled=precision != torch.float32):
            images = shared_by_processes(number or self.num_images, make)
        return convert_channels(images, self.channels)


@dataclass
class Trials(Generic[T]):
    """What was tried, guidances or other dataclasses, and the distances of its images, in the order in which it was tried."""

    measure: Callable[[T], dict[str, float]]
    budget: Budget

    def __post_init__(self):
        self.tried: dict[T, dict[str, float]] = {}
        self._longest = 0.0

    @property
    def best(self) -> T:
        return min(self.tried, key=lambda each: self.tried[each]["frechet_distance"])

    def best_beside(self, default: T) -> T:
        """The best one, if it is better than the default, which was tried, by more than `LEAST_GAIN`."""
        least, without = (self.tried[each]["frechet_distance"] for each in (self.best, default))
        return self.best if least < (1 - LEAST_GAIN) * without else default

    def try_all(self, candidates: Iterator[T]) -> bool:
        """Tries those that were not yet, while there is time; whether there was for all."""
        for each in candidates:
            if each in self.tried:
                continue
            if self.tried and self.budget.left < self._longest:
                return False
            before = self.budget.used
            self.tried[each] = self.measure(each)
            self._longest = max(self._longest, self.budget.used - before)
        return True

    def records(self) -> list[dict]:
        """As JSON can hold them."""
        return [asdict(each) | measures for each, measures in self.tried.items()]


def search(trials: Trials, default: Guidance = NONE) -> Guidance:
    """The guidance of least distance: first over scales, in all steps and in an interval, then around the best.

    The default unless one is better by more than `LEAST_GAIN`.
    """
    none = NONE
    start, stop = FIRST_INTERVAL
    first = [default, none]
    for full, limited in zip(FULL_SCALES, LIMITED_SCALES, strict=True):
        first += [Guidance(limited, start, stop), Guidance(full)]
    going = trials.try_all(iter(first))
    for factor, shift in zip(SCALE_STEPS, INTERVAL_STEPS, strict=True):
        centre = None
        # Between none and the least scale that was tried there are others.
        while going and centre != (best := WEAK if trials.best == none else trials.best):
            centre = best
            going = trials.try_all(around(centre, factor, shift))
    return trials.best_beside(default)


def around(guidance: Guidance, factor: float, shift: float) -> Iterator[Guidance]:
    """Guidances that differ in one of the three numbers."""
    scale, start, stop = guidance.scale, guidance.start, guidance.stop
    for other in (scale * factor, scale / factor):
        if 1 < other <= LARGEST_SCALE:
            yield Guidance(round(other, 3), start, stop)
    for low, high in ((start + shift, stop), (start - shift, stop), (start, stop + shift), (start, stop - shift)):
        low, high = max(0.0, round(low, 3)), min(1.0, round(high, 3))
        if high - low > 0.05:
            yield Guidance(scale, low, high)


def images_that_fit(seconds_of_image: float, seconds: float, num_sets: int = NUM_SETS) -> int:
    """Images of a set, of which so many are to be measured in this time; at least `FEWEST_IMAGES`."""
    return number_that_fits(seconds, seconds_of_image * num_sets, FEWEST_IMAGES, MOST_IMAGES)
