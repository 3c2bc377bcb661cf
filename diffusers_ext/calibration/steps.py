"""The order of the steps and the timesteps under which images are nearest to held-out ones, with the guidance that was chosen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffusers_ext.calibration.budget import Budget
from diffusers_ext.calibration.guidance import Trials
from diffusers_ext.calibration.subject import Subject


@dataclass(frozen=True)
class Stepping:
    """An order, of `multistep_order`, and where the timesteps are from: "spacing", the scheduler's own, or "trajectory"."""

    order: int = 1
    timesteps: str = "spacing"


OWN = Stepping()  # what a scheduler does by itself, and where there are no images to compare with


def candidates(own: list[int], found: list[int], has_orders: bool) -> list[Stepping]:
    """Those that differ, the scheduler's own first, and then what may gain most.

    Args:
        own: Timesteps of the scheduler's spacing.
        found: The list that is nearest to a fine trajectory.
        has_orders: Whether the scheduler draws no noise and so has steps of second order.
    """
    every = [OWN, Stepping(2), Stepping(2, "trajectory"), Stepping(1, "trajectory")]
    return [
        each for each in every if (has_orders or each.order == 1) and (found != own or each.timesteps == "spacing")
    ]


def choose(
    measure: Callable[[Stepping], dict[str, float]], those: list[Stepping], budget: Budget
) -> tuple[Stepping, list[dict]]:
    """The one of least distance, the scheduler's own unless another is better by more than `LEAST_GAIN`.

    Returns: it, the scheduler's own too if there was no time to compare two; and all that were compared with their distances.
    """
    trials = Trials(measure, budget)
    if len(those) > 1:
        trials.try_all(iter(those))
    if len(trials.tried) < 2:
        return OWN, []
    return trials.best_beside(OWN), trials.records()


def fewest_by_trajectory(
    measure: Callable[[int, str], float], numbers: Sequence[int], budget: Budget
) -> tuple[int, list[dict]]:
    """From how many steps on images are nearer at the timesteps near the trajectory, by sets of both kinds.

    Few steps end near a fine trajectory by ends that are means of images, which are no images.

    Args:
        measure: The distance in so many steps at the timesteps of "spacing" or "trajectory".
        numbers: Descending. They are near at the first, and the others are looked at until they are not, or while there is time.

    Returns: the least number at which they are, and what was measured.
    """
    least, tried, longest = numbers[0], [], 0.0
    for number in numbers[1:]:
        before = budget.used
        if budget.left <= longest:
            break
        distances = {kind: measure(number, kind) for kind in ("spacing", "trajectory")}
        tried.append({"num_inference_steps": number} | distances)
        if distances["trajectory"] > distances["spacing"]:
            break
        least, longest = number, budget.used - before
    return least, tried


def has_orders(subject: Subject) -> bool:
    """Whether the pipeline's own scheduler makes steps of second order: as it is called it draws no noise."""
    config = subject.pipe.scheduler.config
    return "multistep_order" in config and not config.get("stochastic_sampling")
