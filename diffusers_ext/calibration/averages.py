"""The width of the averaged weights, from the snapshots that a run took of averages (Karras et al. 2023, arXiv 2312.02696)."""

from collections.abc import Callable
from pathlib import Path

from diffusers_ext.calibration.budget import Budget
from diffusers_ext.calibration.guidance import LEAST_GAIN
from diffusers_ext.trainer.posthoc_ema import is_of, list_snapshots, load_averages, reconstruct


# Widths relative to the run's length, in the order in which they are tried.
WIDTHS = (0.1, 0.05, 0.15, 0.07, 0.2, 0.03)


def choose_width(network, run: Path, measure: Callable[[], float], budget: Budget) -> tuple[float | None, list[dict]]:
    """Leaves the weights in the network whose images are nearest to the real ones.

    Args:
        network: With the weights that the run saved, which stay unless others are better by `LEAST_GAIN`.
        run: Its folder.
        measure: The distance of images of the network as it is.

    Returns: the width, None for the weights that were saved; and the distances by width, none if the run took no snapshots of
        this network.
    """
    snapshots = list_snapshots(run)
    if not snapshots:
        return None, []
    step = snapshots[-1].step
    saved = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    best, best_weights, longest = None, saved, 0.0
    records = [{"ema_std": None, "frechet_distance": measure()}]
    least = (1 - LEAST_GAIN) * records[0]["frechet_distance"]
    for width in WIDTHS:
        before = budget.used
        if budget.left < longest:
            break
        try:
            averages, _ = reconstruct(snapshots, step, width)
        except ValueError:  # out of the reach of these snapshots
            continue
        if not is_of(network, averages):
            return None, []
        load_averages(network, averages)
        distance = measure()
        records.append({"ema_std": width, "frechet_distance": distance})
        if distance < least:
            best, best_weights, least = width, averages, distance
        longest = max(longest, budget.used - before)
    load_averages(network, best_weights)
    return best, records
