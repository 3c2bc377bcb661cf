"""The width of the averaged weights, from the snapshots that a run took of averages (Karras et al. 2023, arXiv 2312.02696)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from diffusers_ext.calibration.budget import Budget
from diffusers_ext.calibration.guidance import LEAST_GAIN
from diffusers_ext.trainer.posthoc_ema import list_snapshots, load_averages, models_of, reconstruct


# Widths relative to the run's length, in the order in which they are tried.
WIDTHS = (0.1, 0.05, 0.15, 0.07, 0.2, 0.03)


def choose_width(
    parts: Mapping[str, Any], run: Path, measure: Callable[[], float], budget: Budget
) -> tuple[float | None, list[dict]]:
    """Leaves the weights in the trained network whose images are nearest to the real ones.

    Args:
        parts: Of the pipeline, by their names, with the weights that the run saved, which stay unless others are better by
            `LEAST_GAIN`.
        run: Its folder.
        measure: The distance of images of the pipeline as it is.

    Returns: the width, None for the weights that were saved; and the distances by width, none if the run took no snapshots of
        one of these parts, or of several that it trained together.
    """
    snapshots = list_snapshots(run)
    if not snapshots:
        return None, []
    models = models_of(parts, load_file(snapshots[-1].path))
    if len(models) != 1:
        return None, []
    network, step = models[0], snapshots[-1].step
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
        load_averages(network, averages)
        distance = measure()
        records.append({"ema_std": width, "frechet_distance": distance})
        if distance < least:
            best, best_weights, least = width, averages, distance
        longest = max(longest, budget.used - before)
    load_averages(network, best_weights)
    return best, records
