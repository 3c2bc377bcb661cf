"""Make an average of the weights of another width, after the run.

The command `diffusers-ext reconstruct-ema`; `training/reconstruct_ema.py` says how it is used.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

import diffusers_ext
from diffusers_ext.command_names import name_commands
from diffusers_ext.hub.saved_folder import SavedFolder, loading_lines
from diffusers_ext.options import option, run_script
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.recipes.training_path import build_scheduler
from diffusers_ext.trainer.posthoc_ema import list_snapshots, load_averages, models_of, reconstruct
from diffusers_ext.trainer.run import save_atomically
from diffusers_ext.trainer.run_folder import CONFIG_FILE
from diffusers_ext.untrusted import read_yaml_mapping


REPORT_FILE = "reconstruction.json"
# Of a run with --path learned, those that its scheduler follows from.
OPTIONS_OF_SCHEDULE = (
    *("path", "num_train_timesteps", "log_snr_max", "log_snr_min", "schedule_features"),
    *("prediction_type", "scheduler", "timestep_spacing", "num_inference_steps", "vae"),
)
INDEX_FILES = ("model_index.json", "config.json")  # of a pipeline, of a model by itself


@dataclass(frozen=True)
class ReconstructConfig:
    """Make an average of the weights of another width from the snapshots of a run."""

    run: str | None = option(None, "RUN may also stand first, without --run: the folder of the run")
    ema_std: float | None = option(None, "width of the power-function average, relative to the run's length")
    step: int | None = option(None, "optimizer step of a snapshot, at which the run is looked at; by default the last")
    output_dir: str | None = option(None, "folder for the pipeline; by default RUN-STD")
    overwrite_output_dir: bool = option(False, "replace the pipeline that output_dir holds")

    def __post_init__(self):
        if self.run is None:
            raise ValueError(name_commands("say which run: training/reconstruct_ema.py RUN --ema_std STD"))
        if self.ema_std is None:
            raise ValueError("ema_std must be given: the width of the average to make, such as 0.07")


def main(config: ReconstructConfig) -> Path:
    """Makes the average and returns the folder of its pipeline."""
    run = Path(config.run)
    output_dir = check_output_dir(config)
    if not any((run / name).is_file() for name in INDEX_FILES):
        raise ValueError(f"{run} holds no pipeline, which a run writes at its end: finish the run first")
    saved = SavedFolder.read(run)
    snapshots = list_snapshots(run)
    if not snapshots:
        raise ValueError(f"{run} holds no snapshots of averages: train with --ema_snapshot_steps")
    step = snapshots[-1].step if config.step is None else config.step
    averages, misfit = reconstruct(snapshots, step, config.ema_std)

    averages, schedule = split_schedule(averages)
    loaded = getattr(diffusers_ext, saved.class_name if saved.is_model else "DiffusionPipeline").from_pretrained(run)
    models = models_of({"": loaded} if saved.is_model else loaded.components, averages)
    if len(models) != 1:
        raise ValueError(
            f"the snapshots are of another model than {run} holds: they must have the names and shapes of the parameters "
            f"of one of its parts, and have those of {len(models)}"
        )
    load_averages(models[0], averages)
    if schedule:
        clip = loaded.scheduler.config.get("clip_sample_range", 1.0)
        loaded.register_modules(scheduler=scheduler_of(run, schedule, clip))
    report = {"run": str(run), "step": step, "ema_std": config.ema_std, "misfit_of_weighting": misfit}

    def write(partial: Path):
        (partial / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        if (run / CONFIG_FILE).is_file():  # so that evaluate.py knows the data
            text = config_of_average(run / CONFIG_FILE, output_dir, config.ema_std)
            (partial / CONFIG_FILE).write_text(text)

    save_atomically(loaded, output_dir, also=write)
    print(
        f"average of std {config.ema_std:g} at step {step}, made of {len(snapshots)} snapshots; its weighting is off by "
        f"{misfit:.2%}; in {output_dir}\n\n{loading_lines(output_dir, saved.class_name if saved.is_model else None)}"
    )
    return output_dir


def split_schedule(averages: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Averages of a model, and those of a noise schedule that was trained with it, by its own names."""
    prefix = "noise_schedule."
    schedule = {name.removeprefix(prefix): value for name, value in averages.items() if name.startswith(prefix)}
    return {name: value for name, value in averages.items() if not name.startswith(prefix)}, schedule


def scheduler_of(run: Path, averages: dict[str, Tensor], largest_x0: float = 1.0) -> SchedulerMixin:
    """The scheduler of a run with --path learned whose schedule is this average; it clips as the run's does."""
    options = read_yaml_mapping(run / CONFIG_FILE)
    config = DenoisingConfig(**{name: options[name] for name in OPTIONS_OF_SCHEDULE})
    noise_schedule = config.make_noise_schedule()
    noise_schedule.load_state_dict(averages)
    return build_scheduler(config, noise_schedule, largest_x0)


def check_output_dir(config: ReconstructConfig) -> Path:
    output_dir = Path(config.output_dir or f"{config.run.rstrip('/')}-{config.ema_std:g}")
    if output_dir.resolve() == Path(config.run).resolve():
        raise ValueError(f"output_dir must be another folder than the run's, got {output_dir}")
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir must be a folder, {output_dir} is a file")
    if list(output_dir.glob("checkpoint-*")):
        raise ValueError(f"output_dir {output_dir} holds another run: choose another one")
    if any((output_dir / name).exists() for name in INDEX_FILES) and not config.overwrite_output_dir:
        raise ValueError(
            f"output_dir {output_dir} holds a pipeline or a model: replace it with --overwrite_output_dir, or choose another one"
        )
    return output_dir


def config_of_average(source: Path, output_dir: Path, std: float) -> str:
    """The options of the run that would have given this average."""
    options = read_yaml_mapping(source)
    options |= {"use_ema": True, "ema_std": std, "ema_decay": None, "ema_warmup": False}
    options["output_dir"] = str(output_dir)
    return yaml.safe_dump(options, sort_keys=False, default_flow_style=None, width=1000)


run = partial(run_script, ReconstructConfig, main, first="run")
