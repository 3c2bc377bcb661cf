"""The last stage of a run: its pipeline is calibrated, in a small part of the time that the training took."""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial

from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

from diffusers_ext.calibration import report as reports
from diffusers_ext.calibration.budget import SHORTEST_TRAINING, budget_of_training, shared
from diffusers_ext.calibration.data import CalibrationOptions, Data
from diffusers_ext.calibration.run import calibrate
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.evaluation.feature_folders import (
    FEATURES_FILE,
    cached_features_folder,
    features_for,
    quick_features,
)
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.hub.cards import CALIBRATION_FILE
from diffusers_ext.trainer.ending import EndingCost
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.run import save_atomically


# Values of all images of a data set up to which a feature classifier is trained as it is kept, which takes some seconds; of
# larger ones another network of features is trained in this share of the time.
MOST_TO_TRAIN_ON, SHARE_OF_FEATURES = 500_000, 0.5


def with_calibration(cost: Callable[[Trainer], EndingCost], wanted: bool | None) -> Callable[[Trainer], EndingCost]:
    """The cost of what follows the training of a run by time, with the calibration if there will be one."""

    def both(trainer: Trainer) -> EndingCost:
        seconds, others = trainer.budget.max_seconds, cost(trainer)
        if math.isinf(seconds) or not is_calibrated(wanted, seconds):
            return others
        return EndingCost(others.fixed + budget_of_training(seconds), others.scalable)

    return both


def is_calibrated(wanted: bool | None, seconds: float) -> bool:
    """Whether a run ends with a calibration, as asked for, or else after a training of so many seconds."""
    return seconds >= SHORTEST_TRAINING if wanted is None else wanted


def calibrate_run(trainer: Trainer, wanted: bool | None, command: str) -> None:
    """Calibrates the pipeline that a run has saved, in its folder, for the number of steps of its sample grids.

    A run that cannot be calibrated ends without, and says why.
    """
    start, folder, say = time.perf_counter(), trainer.output_dir, trainer.accelerator.print
    if trainer.accelerator.is_main_process:  # of the run's pipeline before it went on
        (folder / CALIBRATION_FILE).unlink(missing_ok=True)
    limit = trainer.budget.max_seconds
    seconds = trainer.state.seconds if math.isinf(limit) else limit
    trainer.accelerator.wait_for_everyone()
    if not shared(is_calibrated(wanted, seconds)):
        return
    if not all(gather_object([(folder / "model_index.json").is_file()])):
        say("not calibrated, since its folder is not on the disks of all processes")
        return
    seconds = budget_of_training(shared(seconds))
    say(f"calibrating for {seconds:.0f} s (--no-calibrate leaves it)", flush=True)
    pipe = DiffusionPipeline.from_pretrained(folder).to(trainer.accelerator.device)
    subject, data, error = None, None, None
    try:
        subject = Subject.of(pipe, trainer.config.num_inference_steps, trainer.config.mixed_precision == "bf16")
        data = Data.load(CalibrationOptions().of_run(str(folder), pipe), subject)
    except (ValueError, OSError) as problem:  # of another path, or of data that are no longer there
        error = str(problem)
    errors = [each for each in gather_object([error]) if each is not None]
    if errors:  # of any process, without which the others would wait
        say(f"not calibrated: {errors[0]}")
        return
    data, about = with_features(data, seconds)
    options = {"seed": trainer.config.seed, "run": folder, "start": start, "keeps_time": not wanted, "say": say}
    found = calibrate(subject, data, seconds, **options)
    report = {"command": command, "dataset_name": trainer.config.dataset_name} | about | found
    if trainer.accelerator.is_main_process:
        save_atomically(pipe, folder, also=partial(reports.write, report=report))
    trainer.accelerator.wait_for_everyone()
    say("\n".join(f"  {line}" for line in reports.describe(found)), flush=True)


def with_features(data: Data, seconds: float) -> tuple[Data, dict]:
    """The data with a network of features, if there is time for one; and what is to be said of it."""
    features, about = None, {}
    if _has_features(data.real):
        features, _ = features_for(data.real, None, PartialState())
    elif (quick := quick_features(data.real, SHARE_OF_FEATURES * seconds)) is not None:
        features, about = quick[0], {"quick_features": quick[1]}
    return dataclasses.replace(data, features=features), about


def _has_features(real: RealImages) -> bool:
    """Whether there is a network of features, or a classifier is trained in no time; one without labels takes longer."""
    known = (cached_features_folder(real) / FEATURES_FILE).is_file()
    return known or real.can_be_classified and real.train.images.numel() <= MOST_TO_TRAIN_ON
