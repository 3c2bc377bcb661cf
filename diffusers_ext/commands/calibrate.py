"""Choose for a trained pipeline what its calls do by default: variances, timesteps, guidance, average of the weights.

The command `diffusers-ext calibrate`; `training/calibrate.py` says how it is used.
"""

import dataclasses
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from diffusers_ext.atomic_files import lock_folder
from diffusers_ext.calibration import report as reports
from diffusers_ext.calibration.data import CalibrationOptions, Data
from diffusers_ext.calibration.run import calibrate
from diffusers_ext.calibration.subject import BATCH_SIZE, Subject
from diffusers_ext.command_names import name_commands
from diffusers_ext.draws import check_seed
from diffusers_ext.evaluation.feature_folders import features_for
from diffusers_ext.evaluation.generate import LARGEST_SEED_OF_SETS
from diffusers_ext.evaluation.pipeline_facts import default_of
from diffusers_ext.evaluation.real_images import is_test_split
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.hub.cards import add_calibration
from diffusers_ext.machine import process_state, runs_in_bf16, set_threads
from diffusers_ext.options import option, parse_config, run_script, to_command
from diffusers_ext.trainer.config import parse_duration
from diffusers_ext.trainer.run import save_atomically
from diffusers_ext.trainer.run_folder import CONFIG_FILE


@dataclass(frozen=True)
class CalibrateConfig(CalibrationOptions):
    """Choose for a trained pipeline what its calls do by default, and save it so."""

    pipeline: str | None = option(None, "PIPELINE may also stand first, without --pipeline", "what is calibrated")
    num_inference_steps: int | None = option(
        None,
        "number of steps that it is calibrated for, and that becomes the default; by default the run's or the pipeline's",
        at_least=1,
    )
    features: str | None = option(
        None,
        "folder of a network of training/train_features.py, or none; by default one is trained on the data set, once, and kept",
    )
    max_time: str = option("5m", "time that it may take, such as 90s or 5m, loading and a feature classifier aside")
    eval_batch_size: int = option(
        BATCH_SIZE, "images to generate at a time; the images do not depend on it", at_least=1
    )
    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "precision that images are made in; by default bf16 where the hardware is fast at it"
    )
    seed: int = option(0, "of the noise and of the draw of images")
    num_threads: int | None = option(None, "CPU threads; by default all cores", at_least=1)
    output_dir: str | None = option(
        None, "folder for the pipeline; by default PIPELINE, which is then replaced", "result"
    )

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *("dataset_name", "resolution", "pipeline", "num_inference_steps", "max_time", "output_dir", "seed"),
    )

    def __post_init__(self):
        if self.pipeline is None:
            raise ValueError(
                name_commands("say what to calibrate: training/calibrate.py PIPELINE, a folder or a name on the Hub")
            )
        super().__post_init__()
        check_seed(self.seed, LARGEST_SEED_OF_SETS - 1000)
        parse_duration(self.max_time)  # which refuses what is none
        if is_test_split(self.held_out_split or ""):
            raise ValueError(
                f"held_out_split must be a split by which may be chosen, got {self.held_out_split}: what was chosen by a test split "
                "could no longer be measured by it"
            )
        if self.output_dir is None and not Path(self.pipeline).is_dir():
            raise ValueError(
                f"{self.pipeline} is no folder here: say by --output_dir where the pipeline is to be saved"
            )

    @property
    def seconds(self) -> float:
        return parse_duration(self.max_time)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or self.pipeline)


def main(config: CalibrateConfig) -> dict:
    """Calibrates and saves, and returns what it found.

    Raises:
        FolderInUse: if another run writes to the folder of the pipeline.
    """
    own = process_state().is_main_process and config.folder.is_dir()
    with lock_folder(config.folder) if own else nullcontext():
        return calibrate_and_save(config)


def calibrate_and_save(config: CalibrateConfig) -> dict:
    state = process_state()
    set_threads(config.num_threads, state.num_processes)
    command = to_command(config, "training/calibrate.py", launcher="python")
    pipe = load_pipeline(config.pipeline).to(state.device)
    how = {"mixed_precision": "bf16" if runs_in_bf16(config.mixed_precision, state.device.type) else "no"}
    # Refuses what cannot be calibrated, before anything is read.
    subject = Subject.of(pipe, 1, batch_size=config.eval_batch_size, **how)
    subject.check_can_be_calibrated()
    config = config.of_run(config.pipeline, subject.pipe, ("num_inference_steps",))
    subject.num_steps = config.num_inference_steps or default_of(pipe, "num_inference_steps")
    data = Data.load(config, subject)
    features, _ = features_for(data.real, config.features, state)
    run = Path(config.pipeline) if Path(config.pipeline).is_dir() else None
    if state.is_main_process:  # which alone measures
        data = dataclasses.replace(data, features=features)
    found = calibrate(
        *(subject, data, config.seconds),
        seed=config.seed,
        run=run,
        start=time.perf_counter(),
        say=state.print,
    )
    found = {"command": command, "dataset_name": config.dataset_name} | found
    if state.is_main_process:
        save(config.folder, subject, found, config.pipeline)
    state.wait_for_everyone()
    state.print("\n".join(["", *(f"- {line}" for line in reports.describe(found)), "", f"saved in {config.folder}"]))
    return found


def save(folder: Path, subject: Subject, found: dict, source: str) -> None:
    """Writes the pipeline, the figures, and the section of the card if there is one."""

    def write(partial: Path):
        options, card = Path(source) / CONFIG_FILE, folder / "README.md"
        if options.is_file() and folder.resolve() != Path(source).resolve():  # so that evaluate.py knows the data
            shutil.copy(options, partial)
        if card.is_file():
            shutil.copy(card, partial)
        reports.write(partial, found)
        add_calibration(partial)

    save_atomically(subject.original, folder, also=write)


parse = partial(parse_config, CalibrateConfig, first="pipeline")
run = partial(run_script, CalibrateConfig, main, first="pipeline")
