"""Distil a pipeline into a student that makes its images in few steps.

The command `diffusers-ext distill`; `training/distill.py` says how it is used.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from safetensors.torch import load_file

from diffusers_ext import GuidedDiffusionPipeline, TextGuidedDiffusionPipeline
from diffusers_ext.data.captions import captions_of, has_empty_caption
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.latent_cache import SampleSpace
from diffusers_ext.data.stream import StreamData
from diffusers_ext.options import parse_config, run_script, to_command, to_yaml
from diffusers_ext.recipes.distillation import (
    DistillConfig,
    build_objective,
    check_steps,
    complete,
    guided_by_default,
    paired_by_default,
    student_scheduler,
)
from diffusers_ext.recipes.distillation_data import load_student_data
from diffusers_ext.recipes.distillation_objective import check_teacher, digest_of
from diffusers_ext.recipes.sample_grids import (
    draw_while_training,
    drawing_cost,
    first_of,
    rows_by_label,
    save_and_draw,
)
from diffusers_ext.recipes.teacher import Teacher, load_teacher
from diffusers_ext.recipes.text_to_image import PICTURES, some_prompts
from diffusers_ext.trainer.checkpoints import find_checkpoint
from diffusers_ext.trainer.config import resolve_for_machine
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.run import describe_data, finish_run, make_accelerator, open_run
from diffusers_ext.trainer.run_folder import check_same_run
from diffusers_ext.trainer.sharding import is_sharded
from diffusers_ext.trainer.state import OBJECTIVE_FILE


def main(config: DistillConfig) -> Path:
    """Distils a pipeline and returns the folder of the student."""
    command = to_command(config, "training/distill.py")
    config = complete(config)
    accelerator = make_accelerator(config)
    if is_sharded(accelerator):
        raise ValueError("a distillation has its teacher in each process, which FSDP spreads: launch with --multi_gpu")
    with open_run(config, accelerator) as open_folder:
        subject = load_teacher(config.pipeline)
        config = paired_by_default(guided_by_default(config, subject), subject)
        teacher = Teacher(subject.pipe, config.guidance_scale, config.guidance_interval)
        check_steps(config, teacher)
        config, data, held_out, space = load_student_data(config, accelerator, teacher)
        if config.label_dropout is None:
            config = dataclasses.replace(config, label_dropout=0.1 if teacher.subject.can_guide else 0.0)
        no_trackers = {"report_to": None, "tracker_project_name": DistillConfig.tracker_project_name}
        open_folder(dataclasses.replace(resolve_for_machine(config), **no_trackers))  # each stage has its own
        for stage in config.stages():
            folder = Path(stage.output_dir)
            if stage.output_dir != config.output_dir:
                if (folder / "model_index.json").is_file():
                    check_finished(resolve_for_machine(stage))
                    accelerator.print(
                        f"{folder} holds the student of {stage.student_steps} steps: it is not trained anew"
                    )
                    continue
                if accelerator.is_main_process:
                    folder.mkdir(parents=True, exist_ok=True)
                accelerator.wait_for_everyone()
            run_stage(resolve_for_machine(stage), accelerator, data, held_out, space, command)
            accelerator.free_memory()
    return Path(config.output_dir)


def check_finished(stage: DistillConfig) -> None:
    """Refuses to go on from the student of a stage that learned another thing.

    Raises:
        ValueError: if its options were others, or its pipeline had other weights.
    """
    check_same_run(stage, Path(stage.output_dir))
    checkpoint, _ = find_checkpoint(Path(stage.output_dir), "latest")
    if checkpoint is not None:
        before = load_file(checkpoint / OBJECTIVE_FILE)["teacher_digest"]
        check_teacher(before, digest_of(load_teacher(stage.pipeline).pipe.denoiser))


def run_stage(
    config: DistillConfig,
    accelerator: Accelerator,
    data: ImageData | StreamData,
    held_out: ImageData | None,
    space: SampleSpace,
    command: str,
) -> None:
    """Trains a student and saves it as a pipeline, with its card."""
    accelerator.print(f"\n{config.method} distillation of {config.pipeline} to {config.student_steps} steps")
    if config.report_to:
        accelerator.project_configuration.logging_dir = f"{config.output_dir}/logs"
        accelerator.init_trackers(config.tracker_project_name, config={"options": to_yaml(config)})
    pipe = load_teacher(config.pipeline).pipe.to(accelerator.device)
    teacher = Teacher(pipe, config.guidance_scale, config.guidance_interval, accelerator.autocast)
    student = teacher.copy_network()
    if not config.label_dropout and "learned_unconditional" in student.config and not has_unconditional(data):
        student.register_to_config(learned_unconditional=data.id2label is None)
    saved = partial(averaged_student, teacher=pipe, scheduler=student_scheduler(config, teacher), space=space)
    objective, rows = build_objective(config, teacher, accelerator), rows_of(data)
    trainer = Trainer(
        config,
        accelerator,
        student,
        objective,
        data,
        batch_options={"label_dropout": config.label_dropout} | space.batch_options,
        on_images=partial(draw_while_training, saved, rows),
        validation_data=held_out,
        prepare_batch=space.encoder(accelerator.device),
        ending_cost=partial(drawing_cost, saved, rows),
        saved=saved,
    )
    trainer.train()
    save_and_draw(saved, rows, trainer, **first_of(rows))
    if accelerator.is_main_process:
        about = {"pipeline_tag": "text-to-image", "pictures": PICTURES} if teacher.subject.of_texts else {}
        finish_run(trainer, command, "\n\n".join([describe_data(config, data), *data.notes]), **about)
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []


@contextmanager
def averaged_student(
    trainer: Trainer,
    teacher: GuidedDiffusionPipeline | TextGuidedDiffusionPipeline,
    scheduler: SchedulerMixin,
    space: SampleSpace,
) -> Iterator[GuidedDiffusionPipeline | TextGuidedDiffusionPipeline]:
    """The pipeline of the student as it stands, with the averaged weights if there are any."""
    config = teacher.config
    # Said, since texts are guided by more, and scripts take what a run has of it where its pipeline says nothing.
    defaults = {"num_inference_steps": trainer.config.student_steps, "guidance_scale": 1.0}
    if isinstance(teacher, TextGuidedDiffusionPipeline):
        parts = {name: getattr(teacher, name) for name in ("tokenizer", "text_encoder")}
        parts |= {name: config[name] for name in ("max_text_length", "mask_padding")}
    else:
        parts = {"id2label": config.id2label, "value_scale": config.value_scale}
    with trainer.averaged_model() as model:
        pipe = type(teacher)(
            denoiser=model,
            scheduler=type(scheduler).from_config(scheduler.config),
            vae=space.vae,
            statistics=space.statistics,
            call_defaults=defaults,
            clip_guided_noise="always",  # as in the steps that it was trained towards
            **parts,
        )
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def has_unconditional(data: ImageData | StreamData) -> bool:
    """Whether an image has no label, of which it could have several, or an empty text."""
    if getattr(data, "texts", None) is None:
        return data.has_unlabelled
    return has_empty_caption(data)


def rows_of(data: ImageData | StreamData) -> dict[str, list | None]:
    """The rows of a sample grid: one for each label, or some of the captions."""
    if getattr(data, "texts", None) is None:
        return rows_by_label(data)
    prompts = some_prompts(captions_of(data))
    return {"prompts": prompts, "names": prompts}


parse = partial(parse_config, DistillConfig, first="pipeline")
run = partial(run_script, DistillConfig, main, first="pipeline")
