"""The last stage of a run: its pipeline is calibrated, in a small part of the time that the training took."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

from diffusers_ext.calibration import report as reports
from diffusers_ext.calibration.budget import SHORTEST_TRAINING, budget_of_training, shared
from diffusers_ext.calibration.data import CalibrationOptions, Data
from diffusers_ext.calibration.run import calibrate
from diffusers_ext.calibration.subject import BATCH_SIZE, Subject
from diffusers_ext.evaluation.feature_folders import (
    FEATURES_FILE,
    cached_features_folder,
    load_features,
    quick_features,
    train_and_save_features,
)
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

    A run that cannot be calibrated ends without, and says why: what it saved stays as it is.
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
    try:
        report = calibrate_in_folder(trainer, seconds, start, keeps_time=not wanted)
    except NotCalibrated as error:
        say(f"not calibrated: {error}")
    except Exception as error:  # whatever it is, the run is to be finished, of which nothing is lost
        if trainer.accelerator.num_processes > 1:  # the others wait for this one, and end with it
            resumed = "--resume_from_checkpoint latest --no-calibrate"
            print(f"calibrating failed; {resumed} finishes the run without, whose pipeline is saved", file=sys.stderr)
            raise
        say(f"not calibrated: {type(error).__name__}: {error}")
    else:
        reported = {"command": command, "dataset_name": trainer.config.dataset_name} | report.found
        if trainer.accelerator.is_main_process:
            save_atomically(report.pipe, folder, also=partial(reports.write, report=reported))
        trainer.accelerator.wait_for_everyone()
        say("\n".join(f"  {line}" for line in reports.describe(reported)), flush=True)


class NotCalibrated(Exception):
    """Says why a run cannot be calibrated, in all processes alike."""


class Calibrated(NamedTuple):
    """A pipeline with what was chosen in it, and what was found."""

    pipe: DiffusionPipeline
    found: dict


def calibrate_in_folder(trainer: Trainer, seconds: float, start: float, *, keeps_time: bool) -> Calibrated:
    """The pipeline of the run's folder, calibrated in so many seconds from `start` on; nothing is written.

    Raises:
        NotCalibrated: if its path is none that is calibrated, or its data are no longer there or cannot be measured.
    """
    config, folder, error = trainer.config, trainer.output_dir, None
    pipe = DiffusionPipeline.from_pretrained(folder).to(trainer.accelerator.device)
    how = {
        "mixed_precision": config.mixed_precision,
        "batch_size": min(config.eval_batch_size or config.train_batch_size, BATCH_SIZE),
    }
    subject = data = None
    try:
        subject = Subject.of(pipe, config.num_inference_steps, **how)
        data = Data.load(CalibrationOptions().of_run(str(folder), subject.pipe), subject)
    except (ValueError, OSError) as problem:
        error = str(problem)
    errors = [each for each in gather_object([error]) if each is not None]
    if errors:
        raise NotCalibrated(errors[0])
    about: dict = {}
    if trainer.accelerator.is_main_process:  # which alone measures, and on whose disk features are kept
        data, about = with_features(data, seconds)
    options = {"seed": config.seed, "run": folder, "start": start, "keeps_time": keeps_time}
    found = calibrate(subject, data, seconds, **options, say=trainer.accelerator.print)
    return Calibrated(pipe, about | found)


def with_features(data: Data, seconds: float) -> tuple[Data, dict]:
    """The data with a network of features, if there is time for one; and what is to be said of it. In one process alone."""
    folder = cached_features_folder(data.real)
    is_kept = (folder / FEATURES_FILE).is_file()
    if not is_kept and data.real.can_be_classified and data.real.train.images.numel() <= MOST_TO_TRAIN_ON:
        train_and_save_features(data.real, folder, alone=True)
        is_kept = True
    if is_kept:
        features, _ = load_features(folder)
        return dataclasses.replace(data, features=features.to(PartialState().device)), {}
    quick = quick_features(data.real, SHARE_OF_FEATURES * seconds)
    if quick is None:
        return data, {}
    return dataclasses.replace(data, features=quick[0], keeps_features=False), {"quick_features": quick[1]}
