"""The beginning and the end of a run: devices, its folder, the saved model, the card."""

import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline, ModelMixin

from diffusers_ext.atomic_files import lock_folder, replace_files
from diffusers_ext.command_names import name_commands
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.sources import is_local
from diffusers_ext.data.stream import StreamData
from diffusers_ext.figures import draw_loss
from diffusers_ext.hub import cards
from diffusers_ext.hub import push as hub
from diffusers_ext.hub.remote_code import add_code
from diffusers_ext.hub.saved_folder import SavedFolder, loading_lines
from diffusers_ext.machine import set_threads
from diffusers_ext.options import describe_preset, to_yaml
from diffusers_ext.trainer.checkpoints import list_checkpoints
from diffusers_ext.trainer.config import TrainerConfig, describe_speed, resolve_for_machine
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.milestones import hub_access, hub_name
from diffusers_ext.trainer.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    PAGE_FILE,
    check_output_dir,
    clear_output_dir,
    read_metrics,
)
from diffusers_ext.trainer.signals import Interrupted, sigterm_as_interrupt
from diffusers_ext.trainer.trackers import installed_trackers, log_saved_pictures
from diffusers_ext.untrusted import one_line


def make_accelerator(config: TrainerConfig) -> Accelerator:
    """accelerate's engine for this machine, with as many CPU threads as there are cores to share."""
    config = resolve_for_machine(config)
    trackers = installed_trackers(config.report_to)  # accelerate itself says nothing of those that are not
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=trackers or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=f"{config.output_dir}/logs"),
    )
    set_threads(config.num_threads, accelerator.num_processes)
    accelerator.print(describe_speed(config, accelerator.device.type))
    if preset := describe_preset(config):
        accelerator.print(preset)
    return accelerator


@contextmanager
def open_run(config: TrainerConfig, accelerator: Accelerator) -> Iterator[Callable[[TrainerConfig], None]]:
    """Checks that the run may write to its folder, before anything long begins.

    Yields a function that claims the folder for the config as resolved; until it is called, nothing is written. From then on
    no other run may write there.

    Raises:
        ValueError: as `check_output_dir`.
        OSError: if another run writes to the folder, or nothing can be written there.
    """
    check_output_dir(config, accelerator.is_main_process)
    opened, claim = False, ExitStack()
    if config.push_to_hub and accelerator.is_main_process:
        prepare_repo(config)

    def open_folder(config: TrainerConfig):
        nonlocal opened
        path = Path(config.output_dir)
        accelerator.wait_for_everyone()  # all have checked
        if accelerator.is_main_process:
            claim.enter_context(lock_folder(path))
            if config.overwrite_output_dir:
                clear_output_dir(path)
        if config.report_to:
            accelerator.init_trackers(config.tracker_project_name, config={"options": to_yaml(config)})
        opened = True
        accelerator.wait_for_everyone()

    try:
        # Of several processes each dies of it at once, since one that waits for another would not come to an end.
        with claim, sigterm_as_interrupt(enabled=accelerator.num_processes == 1):
            yield open_folder
    except SystemExit:  # after a signal all processes end together, so that none waits for another
        _end(accelerator)
        raise
    except KeyboardInterrupt as interrupt:  # before the training or after it: while it lasts, a signal is a request
        for tracker in accelerator.trackers:
            tracker.finish()
        number = getattr(interrupt, "signal_number", signal.SIGINT)
        raise Interrupted(_interrupted(Path(config.output_dir), opened), number) from None
    _end(accelerator)


def _interrupted(output_dir: Path, opened: bool) -> str:
    """A line that says which checkpoint is kept, and how to go on."""
    checkpoints = list_checkpoints(output_dir)
    if checkpoints and opened:
        return (
            f"interrupted: {output_dir} keeps {checkpoints[-1].name}; the same command with --resume_from_checkpoint latest "
            "goes on from there, and makes what is missing"
        )
    if opened:
        return (
            f"interrupted before the first checkpoint, so {output_dir} keeps none; the same command with "
            "--overwrite_output_dir starts again"
        )
    return f"interrupted before the training; nothing was written to {output_dir}, and the same command starts again"


def _end(accelerator: Accelerator) -> None:
    # A process that left right after a gather could hang: gloo's thread still holds the tensors, for which it needs the
    # interpreter, while this one waits for the thread. A barrier holds none.
    accelerator.wait_for_everyone()
    accelerator.end_training()


def prepare_repo(config: TrainerConfig) -> str:
    """Makes sure that the run can be pushed at its end, and returns the full id of where to."""
    return hub.prepare_repo(hub_name(config), **hub_access(config))


def describe_data(config: TrainerConfig, data: ImageData | StreamData) -> str:
    """The data in a line."""
    channels = {1: "grey", 3: "RGB"}.get(data.channels, f"{data.channels}-channel")
    what, size = "images", f"{'x'.join(map(str, data.size))} {channels}"
    if len(data.size) == 1:
        what, size = "sequences", f"length {data.size[0]}, {data.channels} channel{'s' * (data.channels > 1)}"
    kind = "labels" if getattr(data, "texts", None) is None else "different captions"
    labels = "no labels" if data.id2label is None else f"{data.num_classes} {kind}"
    labels += ", of which an image can have several" if data.has_label_sets else ""
    count = "a stream of" if data.num_images is None else len(data)
    return f"{one_line(data.name)}, split {config.dataset_split}: {count} {what}, {size}, {labels}"


def save_atomically(
    saved: DiffusionPipeline | ModelMixin, output_dir: Path, also: Callable[[Path], None] | None = None
) -> None:
    """Saves a pipeline or a model. A folder that has its `model_index.json` or `config.json` is complete.

    Args:
        also: Writes files that belong to it into the folder that it is given.

    Raises:
        OSError: if it cannot be saved; what was there is as it was.
    """

    def write(folder: Path):
        saved.save_pretrained(folder)
        if isinstance(saved, ModelMixin):  # pipelines do it themselves
            add_code(folder)
        if also is not None:
            also(folder)

    replace_files(output_dir, "config.json" if isinstance(saved, ModelMixin) else "model_index.json", write)


DENOISING_PICTURES = {
    "samples.png": "samples, a row for each label if there are labels",
    "denoising.png": "x_t and the predicted x_0 on the way, decoded if they are latents",
}


def finish_run(
    trainer: Trainer,
    command: str,
    data: str,
    pictures: Mapping[str, str] = DENOISING_PICTURES,
    pipeline_tag: str = "unconditional-image-generation",
    limitations: str = cards.DEFAULT_LIMITATIONS,
    measured: Sequence[str] = (),
) -> None:
    """Draws the loss, ends the page, writes the card, pushes if asked to, and says where everything is.

    The trackers get the pictures.

    Args:
        command: The command line of the run.
        data: What it was trained on, in Markdown.
        pictures: Those in the folder, with what they show; the first goes into the card.
        pipeline_tag: The Hub's name of the task.
        limitations: In Markdown, for the card.
        measured: What was measured beside the loss, in Markdown, for the card.
    """
    config, output_dir, state = trainer.config, trainer.output_dir, trainer.state
    origin, base_model = config.origin
    draw_loss(read_metrics(output_dir / METRICS_FILE), output_dir / "loss.png")
    has_curve = (output_dir / "loss.png").exists()
    if hasattr(trainer.objective, "draw"):
        pictures = {**pictures, **(trainer.objective.draw(output_dir) or {})}
    trainer.page.finish(pictures, state.step, state.seconds)
    log_saved_pictures(trainer.accelerator, output_dir, pictures, state.step)
    repo_id = hub_name(config) if config.push_to_hub else None
    with suppress(Exception):  # the Hub may be out of reach, which is no reason to lose the rest
        repo_id = prepare_repo(config) if config.push_to_hub else None
    cards.write_card(
        output_dir,
        data=data,
        training=cards.TrainingRun(
            command=command,
            commit=cards.source_commit(),
            seed=config.seed,
            num_steps=state.step,
            seconds=state.seconds,
            hardware=cards.describe_machine(),
            options_file=CONFIG_FILE,
            origin=origin,
            base_model=base_model,
        ),
        measured=[*_loss_on_held_out(config, output_dir), *measured],
        sample_grid=output_dir / next(iter(pictures)),
        pictures={**pictures, "loss.png": "the training loss by optimizer step"},
        limitations=limitations,
        repo_id=repo_id,
        dataset_id=None if is_local(config.dataset_name) else config.dataset_name,
        pipeline_tag=pipeline_tag,
    )
    lines = [
        "",
        f"trained for {state.step} steps, {state.position} images, {_duration(state.seconds)}; in {output_dir}:",
        *(f"  {name:<20} {shown}" for name, shown in pictures.items()),
        *(["  loss.png             the loss curve; its numbers are in metrics.jsonl"] if has_curve else []),
        f"  {PAGE_FILE:<20} all of it on one page, with the samples as they came",
        "  README.md            the model card; the options are in train_config.yaml",
    ]
    if trainer.snapshots:
        makes_averages = name_commands("training/reconstruct_ema.py makes averages of other widths of them")
        lines.append(f"  ema_snapshots/       {makes_averages}")
    if config.push_to_hub:
        url, fault = hub.push_patiently(output_dir, repo_id, **hub_access(config))
        lines.append(f"  pushed to            {url}" if url else f"\n{fault}")
        lines += trainer.milestones.finish()
    saved = SavedFolder.read(output_dir)
    how = loading_lines(output_dir, saved.class_name if saved.is_model else None)
    print("\n".join([*lines, "", how]), file=sys.stdout, flush=True)


def _loss_on_held_out(config: TrainerConfig, output_dir: Path) -> list[str]:
    """A line on the last loss on held-out images; none without."""
    records = [record for record in read_metrics(output_dir / METRICS_FILE) if "val_loss" in record]
    if not records:
        return []
    last = records[-1]
    split = f"the loss on held-out data of the split {config.validation_split}"
    return [
        f"After step {last['step']} {split} was {last['val_loss']:.4g}; `{METRICS_FILE}` has it along the training."
    ]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.floor(seconds), 60)
    return f"{minutes} min {rest} s"
