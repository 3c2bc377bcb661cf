"""Calibrations of few images and few numbers of steps, the same however slow a machine is."""

import pytest

from diffusers_ext.calibration import guidance, steps, timesteps, variance
from diffusers_ext.calibration.budget import Budget
from diffusers_ext.evaluation import feature_folders


def make_little(patch: pytest.MonkeyPatch) -> None:
    """What is compared is measured in one batch, and nothing that the tests look at is left out for want of time."""
    for name in ("TIMED_IMAGES", "FEWEST_IMAGES", "MOST_IMAGES"):
        patch.setattr(guidance, name, 24)
    patch.setattr(variance, "NUM_POINTS", 16)
    patch.setattr(variance, "BATCH", 32)
    patch.setattr(timesteps, "NUM_FINE_STEPS", 16)
    patch.setattr(timesteps, "NUM_IMAGES", 8)
    patch.setattr(timesteps, "NUMBERS", (1, 2, 4, 8))
    patch.setattr(feature_folders, "QUICK_STEPS", {True: (2, 3), False: (2, 3)})
    choose = steps.choose
    patch.setattr(steps, "choose", lambda measure, those, budget: choose(measure, those, Budget(1e9)))
