"""The last stage of a run: its pipeline is calibrated, in a small part of the time that the training took."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline

from diffusers_ext.calibration import report as reports
from diffusers_ext.calibration.budget import SHORTEST_TRAINING, budget_of_training, shared
from diffusers_ext.calibration.run import Data, calibrate
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.command_names import name_commands
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.evaluation.feature_folders import FEATURES_FILE, cached_features_folder, features_for
from diffusers_ext.evaluation.options import DataOptions, take_options_of_run
from diffusers_ext.evaluation.pipeline_facts import image_size_of, label_names_of
from diffusers_ext.evaluation.real_images import RealImages, find_held_out_split, load_real_images
from diffusers_ext.hub.cards import CALIBRATION_FILE
from diffusers_ext.trainer.ending import EndingCost
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.run import save_atomically


# Numbers of all pixels of a data set: up to which a feature classifier is trained within a run if there is none, which takes
# some seconds; and up to which the images are read into memory.
MOST_TO_TRAIN_ON, MOST_TO_READ = 500_000, 2_000_000_000


def with_calibration(cost: Callable[[Trainer], EndingCost], wanted: bool | None) -> Callable[[Trainer], EndingCost]:
    """The cost of what follows the training of a run by time, with the calibration if there will be one."""

    def both(trainer: Trainer) -> EndingCost:
        seconds, others = trainer.budget.max_seconds, cost(trainer)
        if math.isinf(seconds) or why_not(trainer, wanted, seconds) is not None:
            return others
        return EndingCost(others.fixed + budget_of_training(seconds), others.scalable)

    return both


def why_not(trainer: Trainer, wanted: bool | None, seconds: float) -> str | None:
    """Why a run is not calibrated, in a clause; None if it is; empty if nobody asked for it.

    Args:
        wanted: Whether it was asked for; None for runs that are long enough for it.
        seconds: Of the training.
    """
    if wanted is False or wanted is None and seconds < SHORTEST_TRAINING:
        return ""
    if trainer.config.has_condition:
        return ""
    if not isinstance(trainer.data, ImageData):
        return "its data are a stream"
    if len(trainer.data.size) == 1:
        return "" if wanted is None else "its data are sequences, and what it measures is of images"
    if len(trainer.data) * trainer.data.channels * math.prod(trainer.data.size) > MOST_TO_READ:
        return "its data are many to be read into memory"
    return None


def calibrate_run(trainer: Trainer, wanted: bool | None, command: str) -> None:
    """Calibrates the pipeline that a run has saved, in its folder, for the number of steps of its sample grids.

    A run that cannot be calibrated ends without, and says why.
    """
    start, folder, say = time.perf_counter(), trainer.output_dir, trainer.accelerator.print
    if trainer.accelerator.is_main_process:  # of the run's pipeline before it went on
        (folder / CALIBRATION_FILE).unlink(missing_ok=True)
    limit = trainer.budget.max_seconds
    seconds = trainer.state.seconds if math.isinf(limit) else limit
    reason = why_not(trainer, wanted, seconds)
    trainer.accelerator.wait_for_everyone()
    if reason is None and not all(gather_object([(folder / "model_index.json").is_file()])):
        reason = "its folder is not on the disks of all processes"
    if reason is not None:
        if reason:
            later = "" if len(trainer.data.size) == 1 else name_commands(f": python training/calibrate.py {folder}")
            say(f"not calibrated, since {reason}{later}")
        return
    seconds = budget_of_training(shared(seconds))
    say(f"calibrating for {seconds:.0f} s (--no-calibrate leaves it)", flush=True)
    try:
        pipe = DiffusionPipeline.from_pretrained(folder).to(trainer.accelerator.device)
        subject = Subject.of(pipe, trainer.config.num_inference_steps)
        data, left_out = load_data(folder, subject)
    except ValueError as error:  # data that are trained on and cannot be measured, such as several labels an image
        say(f"not calibrated: {error}")
        return
    options = {"seed": trainer.config.seed, "run": folder, "start": start, "keeps_time": not wanted, "say": say}
    found = calibrate(subject, data, seconds, **options)
    found["left_out"] += left_out
    report = {"command": command, "dataset_name": trainer.config.dataset_name} | found
    if trainer.accelerator.is_main_process:
        save_atomically(pipe, folder, also=partial(reports.write, report=report))
    trainer.accelerator.wait_for_everyone()
    say("\n".join(f"  {line}" for line in reports.describe(found)), flush=True)


def load_data(folder: Path, subject: Subject) -> tuple[Data, list[str]]:
    """The run's images, and a network of features if it takes next to no time; with what is left out."""
    options = take_options_of_run(DataOptions(resolution=image_size_of(subject.pipe)), folder)
    real = load_real_images(options.for_data(), options.held_out_split, label_names=label_names_of(subject.pipe))
    name = options.held_out_split or find_held_out_split(options.for_data())
    features, left_out = None, []
    if _has_features(real):
        features, _ = features_for(real, None, PartialState())
    else:
        left_out = [name_commands(f"`python training/calibrate.py {folder}` trains one, and chooses by it.")]
    return Data(real, name, features), left_out


def _has_features(real: RealImages) -> bool:
    """Whether there is a network of features, or a classifier is trained in no time; one without labels takes longer."""
    known = (cached_features_folder(real) / FEATURES_FILE).is_file()
    return known or real.can_be_classified and real.train.images.numel() <= MOST_TO_TRAIN_ON
