"""Measures over several seeds: their mean, and how far one set of images is from it."""

import statistics
from collections.abc import Callable, Sequence

from torch import Tensor

from diffusers_ext.evaluation.evaluator import Evaluator


def measure_over_seeds(
    make: Callable[[int], tuple[Tensor, Tensor | None]], evaluator: Evaluator | None, seeds: Sequence[int]
) -> tuple[dict, dict]:
    """The measures of one set of images for each seed, by `mean_and_spread`.

    The real images that they are compared with are the same for all, so that the spread is that of the generated ones.

    Args:
        make: From a seed to images and their labels.
        evaluator: None on processes that generate alone; these get nothing.
    """
    measured = []
    for seed in seeds:
        images, labels = make(seed)
        if evaluator is not None:
            measured.append(evaluator.measure(images, labels))
    return mean_and_spread(measured) if measured else ({}, {})


def mean_and_spread(measured: Sequence[dict[str, float | int]]) -> tuple[dict, dict]:
    """The mean of each measure, and its standard deviation over the sets (of a sample, dividing by n - 1).

    Args:
        measured: What `Evaluator.measure` returns, one for each seed.

    Returns:
        The means, of the measures that all sets have, with `num_images` of one set, and what is true of one taken as true; and
        the standard deviations of the same measures, empty for one set.
    """
    first, *others = measured
    if not others:
        return dict(first), {}
    means, spread = {}, {}
    for name, value in first.items():
        values = [each[name] for each in measured if name in each]
        if isinstance(value, bool):
            means[name] = any(values)
        elif isinstance(value, int):
            means[name] = value
        elif len(values) == len(measured):
            means[name], spread[name] = statistics.fmean(values), statistics.stdev(values)
    for each in others:
        means |= {name: value for name, value in each.items() if value is True}
    return means, spread
