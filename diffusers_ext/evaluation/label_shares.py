"""Which labels images are asked for by, and how often: in the proportions of the training images."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction


# Classes of which the largest has at most this many times the images of the smallest are taken as equal, as those of a
# random split of a balanced data set: shares of one in ten are then off by at most half a percent.
NEARLY_EQUAL = 1.1

EQUALLY_OFTEN, AS_IN_TRAINING = "equally often", "as often as in the training images"


def balanced_labels(num_images: int, labels: int | Sequence[int]) -> list[int]:
    """Labels in turn, so that their counts differ by at most 1.

    Args:
        labels: Those to take; a number stands for 0, 1, ... below it.
    """
    labels = range(labels) if isinstance(labels, int) else labels
    return [labels[index % len(labels)] for index in range(num_images)]


def proportional_labels(num_images: int, counts: Sequence[int]) -> list[int]:
    """Labels as often as a data set has them, so that a generator is not measured as one of another mix.

    A label gets its share of the images, rounded up for those of the largest remainders and down for the others
    (Hamilton's method). A label of no image gets none, and one may be too rare for any of so few images. Where the
    numbers are equal or nearly so (see `NEARLY_EQUAL`), labels come in turn, as from `balanced_labels`.

    Args:
        num_images: Labels to return.
        counts: Images that the data set has of the labels 0, 1, 2, ...

    Returns:
        One label for each image. The first of each label come first, and the others follow evenly.

    Raises:
        ValueError: if a count is negative or all are 0.
    """
    shares = _shares(counts)
    quotas = {label: num_images * share for label, share in shares.items()}
    numbers = {label: math.floor(quota) for label, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda label: (numbers[label] - quotas[label], label))
    for label in by_remainder[: num_images - sum(numbers.values())]:
        numbers[label] += 1
    positions = [(k / shares[label], label) for label, number in numbers.items() for k in range(number)]
    return [label for _, label in sorted(positions)]


def describe_labels(labels: Sequence[int], counts: Sequence[int]) -> dict[str, str | int]:
    """In which proportions labels are asked for, as JSON and model cards have it.

    Returns:
        `proportions`, which is `EQUALLY_OFTEN` or `AS_IN_TRAINING`; `num_labels` that the data set has images of;
        `num_asked`, those asked for at all; `fewest` and `most` images of one of those.
    """
    asked = Counter(labels).values()
    return {
        "proportions": EQUALLY_OFTEN if _are_nearly_equal(counts) else AS_IN_TRAINING,
        "num_labels": sum(count > 0 for count in counts),
        "num_asked": len(asked),
        "fewest": min(asked),
        "most": max(asked),
    }


def _are_nearly_equal(counts: Sequence[int]) -> bool:
    there = [count for count in counts if count]
    return max(there) <= NEARLY_EQUAL * min(there)


def _shares(counts: Sequence[int]) -> dict[int, Fraction]:
    """The exact share of each label that has images; equal ones where the counts are nearly equal."""
    if min(counts, default=0) < 0 or not any(counts):
        raise ValueError(f"counts must not be negative, and one of them positive, got {list(counts)}")
    there = {label: int(count) for label, count in enumerate(counts) if count}
    if _are_nearly_equal(counts):
        there = dict.fromkeys(there, 1)
    total = sum(there.values())
    return {label: Fraction(count, total) for label, count in there.items()}
