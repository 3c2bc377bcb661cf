"""The options of a distillation, its stages, the data of the pipeline that is distilled, and the students that are saved."""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from diffusers_ext.calibration.subject import STUDENT_STEPS, Subject
from diffusers_ext.command_names import name_commands
from diffusers_ext.data.config import DataConfig
from diffusers_ext.diffusion.distillation import CONSISTENCY_WEIGHTINGS, angle_timesteps, noise_ratio
from diffusers_ext.diffusion.timesteps import make_timesteps
from diffusers_ext.evaluation.options import OF_MACHINE
from diffusers_ext.guidance.guided_denoiser import check_guidance_scale
from diffusers_ext.options import fixed_option, given_names, option
from diffusers_ext.recipes.distillation_objective import (
    CONSISTENCY_PAIRS,
    DISTILLATION_WEIGHTINGS,
    DOUBLINGS,
    STEPS_A_DOUBLING,
    ConsistencyObjective,
    ProgressiveObjective,
    StudentObjective,
    check_pairs,
)
from diffusers_ext.recipes.teacher import Teacher
from diffusers_ext.schedulers import ConsistencyScheduler, ExtDDIMScheduler, FlowScheduler
from diffusers_ext.schedulers.levels import is_linear, model_schedule
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.run_folder import CONFIG_FILE, STAGES
from diffusers_ext.trainer.schedule import parse_duration
from diffusers_ext.untrusted import read_yaml_mapping


METHODS = ("progressive", "consistency")

# Numbers of steps for which the scheduler of a consistency model has timesteps.
MOST_CONSISTENCY_STEPS = 8

_progressive_option = partial(fixed_option, needs={"method": ("progressive",)})
_consistency_option = partial(fixed_option, needs={"method": ("consistency",)})


@dataclass(frozen=True)
class DistillConfig(TrainerConfig):
    """Distil a pipeline into a student that makes its images in few steps.

    Raises:
        ValueError: if options contradict one another or are out of range.
    """

    dataset_name: str | None = option(
        None,
        "images to distil with: digits, a data set on the Hub, a local folder or file, or a folder of latents; by default "
        "those that the pipeline was trained on, read as they were then",
        "data",
        alias="train_data_dir",
    )
    learning_rate: float = option(3e-4, "peak learning rate, of each stage", "optimizer")

    # Not fixed on resume: a folder may be moved, and the checkpoints know the weights that were in it.
    pipeline: str | None = option(None, "PIPELINE may also stand first, without --pipeline", "what is distilled")
    method: Literal[METHODS] = fixed_option(
        "progressive",
        "progressive: students of half the steps, each learning from the one before; consistency: easy tuning to a model "
        "that predicts the end of its trajectory",
        "distillation",
    )
    student_steps: int = fixed_option(2, "steps of the student, and of its calls by default", at_least=1)
    teacher_steps: int = _progressive_option(
        32,
        "steps of the pipeline that the first student learns from: student_steps times a power of 2; fine ones make the nearest "
        "students (docs/few_calls.md)",
        at_least=2,
    )
    steps_per_stage: int | None = option(
        None,
        "optimizer steps of each halving; by default these share max_train_steps and max_train_time evenly",
        at_least=1,
        needs={"method": ("progressive",)},
    )
    loss_weighting: Literal[DISTILLATION_WEIGHTINGS] = _progressive_option(
        "truncated_snr", "weight of the squared error of x_0 by noise level: max(snr, 1), snr + 1, or 1"
    )
    guidance_scale: float | None = fixed_option(
        None,
        "classifier-free guidance of the pipeline, which the student learns to do without; 1 is none. By default that of the "
        "pipeline's calls, which calibration chose",
    )
    guidance_interval: tuple[float, ...] | None = fixed_option(
        None,
        "noise levels sigma / alpha in which the pipeline is guided, the lower first; by default all, or the pipeline's",
    )
    label_dropout: float | None = fixed_option(
        None,
        "probability of distilling an image without its label or text; by default 0.1 if the pipeline makes images without, else 0",
    )
    caption_column: str | None = fixed_option(
        None,
        "column of the captions, for a pipeline that makes images from texts; by default the run's, or found as in training",
    )
    doublings: int | None = _consistency_option(
        None,
        f"how often the two noise levels of the loss come nearer by a factor of 2; by default at most {DOUBLINGS} times, each after "
        f"{STEPS_A_DOUBLING} optimizer steps at the soonest; some 10 make them neighbours",
        at_least=0,
    )
    consistency_pairs: Literal[CONSISTENCY_PAIRS] | None = _consistency_option(
        None,
        "what the student's cleaner point is: the image with less of its noise (data), or where the pipeline's step leads "
        "(teacher), by which the student learns its guidance; by default teacher where it is guided, in its calls or in its "
        "training, else data",
    )
    noise_mean: float = _consistency_option(-1.1, "mean of log(sigma / alpha) of the noisier one")
    noise_std: float = _consistency_option(2.0, "standard deviation of it")
    huber_bend: float = _consistency_option(
        1e-3, "root mean square below which the loss is a squared error, and above which a distance"
    )
    consistency_weighting: Literal[CONSISTENCY_WEIGHTINGS] = _consistency_option(
        "unit_scale",
        "weight of the loss: one over the distance of both points, at unit scale, or ECT's in sigma / alpha",
    )

    sample_columns: int = option(8, "pictures in a row of the sample grids", "sampling", at_least=1)
    eval_batch_size: int | None = option(None, "pictures sampled at once; by default train_batch_size", at_least=1)

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *TrainerConfig.ESSENTIAL,
        *(
            "pipeline",
            "method",
            "student_steps",
            "teacher_steps",
            "steps_per_stage",
            "guidance_scale",
            "sample_columns",
        ),
    )

    def __post_init__(self):
        if self.pipeline is None:
            raise ValueError(
                name_commands("say what to distil: training/distill.py PIPELINE, a folder or a name on the Hub")
            )
        if self.steps_per_stage is not None and self.method == "progressive":
            total = self.steps_per_stage * self.num_stages
            if self.max_train_steps not in (None, total):
                raise ValueError(
                    f"steps_per_stage {self.steps_per_stage} and max_train_steps {self.max_train_steps} both say how many "
                    "optimizer steps there are: give one of them"
                )
            object.__setattr__(self, "max_train_steps", total)
        super().__post_init__()
        if self.method == "progressive" and self.student_steps << self.num_stages != self.teacher_steps:
            fitting = [self.student_steps << number for number in range(1, 5)]
            raise ValueError(
                f"teacher_steps must be student_steps times a power of 2, {', '.join(map(str, fitting))} and so on with "
                f"student_steps {self.student_steps}, got {self.teacher_steps}"
            )
        if self.method == "consistency" and self.student_steps > MOST_CONSISTENCY_STEPS:
            raise ValueError(
                f"student_steps must be at most {MOST_CONSISTENCY_STEPS} with method consistency, got {self.student_steps}"
            )
        self._check_guidance()
        if not 0 <= (self.label_dropout or 0) < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout:g}")
        for name in ("noise_std", "huber_bend"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name):g}")
        if self.num_stages > 1 and self.resume_from_checkpoint not in (None, "latest"):
            raise ValueError(
                f"resume_from_checkpoint must be latest for {self.num_stages} stages, which says the one that was broken off, got "
                f"{self.resume_from_checkpoint}"
            )
        if self.output_dir is not None and Path(self.output_dir).resolve() == Path(self.pipeline).resolve():
            raise ValueError(f"output_dir must be another folder than that of the pipeline, {self.pipeline}")

    def _check_guidance(self) -> None:
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        interval = self.guidance_interval
        if interval is None:
            return
        if len(interval) != 2 or not 0 <= interval[0] < interval[1]:
            raise ValueError(
                f"guidance_interval must be two noise levels of at least 0, the lower first, got {' '.join(map(str, interval))}"
            )
        if self.guidance_scale in (None, 1):
            raise ValueError("guidance_interval has no meaning without a guidance_scale: give both or neither")

    @property
    def num_stages(self) -> int:
        """Halvings of the number of steps, or 1."""
        if self.method == "consistency":
            return 1
        return max(1, (self.teacher_steps // self.student_steps).bit_length() - 1)

    @property
    def num_inference_steps(self) -> int:
        """Of the sample grids."""
        return self.student_steps

    @property
    def origin(self) -> tuple[str, str | None]:
        return f"distilled from `{self.pipeline}`", self.pipeline

    @property
    def grid_guidance_scale(self) -> float:
        """Of the sample grids: a student is not guided."""
        return 1.0

    def stages(self) -> list["DistillConfig"]:
        """Each stage as a distillation of its own, in which a pipeline becomes a student of half its steps.

        The first one's pipeline is that of the options, and the folder of the last one theirs; the others are in
        `OUTPUT_DIR/stages`. Only the first is guided: its student has the guidance in it.
        """
        number, budget = self.num_stages, self.budget()
        if number == 1:
            return [self]
        each: dict[str, Any] = {"steps_per_stage": None, "overwrite_output_dir": False, "max_train_steps": None}
        if math.isfinite(budget.max_steps):
            each["max_train_steps"] = math.ceil(budget.max_steps / number)
        if self.max_train_time is not None:
            each["max_train_time"] = f"{parse_duration(self.max_train_time) / number:.3f}s"
        stages, pipeline = [], self.pipeline
        for index in reversed(range(number)):
            steps = self.student_steps << index
            more = each | {"pipeline": pipeline, "teacher_steps": 2 * steps, "student_steps": steps}
            if stages:
                more |= {"guidance_scale": 1.0, "guidance_interval": None}
            if index:
                more |= {
                    "output_dir": str(Path(self.output_dir) / STAGES / f"{steps}_steps"),
                    "push_to_hub": False,
                    **dict.fromkeys(("push_to_hub_every", "hub_model_id")),
                    "hub_private_repo": False,
                }
            stages.append(dataclasses.replace(self, **more))
            pipeline = stages[-1].output_dir
        return stages


def options_of_run(pipeline: str) -> dict[str, Any]:
    """The options of the run that the pipeline is of, as its folder has them; none for other folders."""
    path = Path(pipeline) / CONFIG_FILE
    return read_yaml_mapping(path) if path.is_file() else {}


def complete(config: DistillConfig) -> DistillConfig:
    """The options with the data, where they are left open, as the run has them that the pipeline is of.

    Raises:
        ValueError: if neither names a data set.
    """
    saved = options_of_run(config.pipeline)
    changes: dict[str, Any] = {}
    if config.dataset_name in (None, saved.get("dataset_name")):
        given = {*given_names(config), *OF_MACHINE, "sequence_scale"}  # the pipeline itself knows the last
        names = ["caption_column", *(field.name for field in dataclasses.fields(DataConfig))]
        for name in [name for name in names if name not in given]:
            value = saved.get(name)
            if value is not None:
                changes[name] = tuple(value) if isinstance(value, list) else value
    if config.dataset_name is None and "dataset_name" not in changes:
        raise ValueError(f"{config.pipeline} has no {CONFIG_FILE} that names its data set: give --dataset_name")
    if config.output_dir is None:
        changes["output_dir"] = f"runs/{Path(config.pipeline).resolve().name}_{config.method}"
    return dataclasses.replace(config, **changes)


def build_objective(
    config: DistillConfig, teacher: Teacher, accelerator: Accelerator | None = None
) -> StudentObjective:
    """The loss of a stage."""
    if config.method == "consistency":
        return ConsistencyObjective(
            teacher,
            pairs=config.consistency_pairs or "data",
            doublings=config.doublings,
            noise_mean=config.noise_mean,
            noise_std=config.noise_std,
            bend=config.huber_bend,
            weighting=config.consistency_weighting,
            accelerator=accelerator,
        )
    timesteps = make_timesteps("trailing", config.teacher_steps, len(teacher.schedule)).tolist()
    return ProgressiveObjective(teacher, timesteps, config.loss_weighting, accelerator)


def student_scheduler(config: DistillConfig, teacher: Teacher) -> SchedulerMixin:
    """The sampler of the student, which visits the timesteps that it was trained for.

    A progressive student's are every other one of its teacher's; a consistency model's are evenly apart in atan(sigma / alpha).
    """
    length, source = len(teacher.schedule), teacher.pipe.scheduler.config
    cls = FlowScheduler if is_linear(teacher.pipe.scheduler) else ExtDDIMScheduler
    numbers = [config.student_steps]
    if config.method == "consistency":
        cls = ConsistencyScheduler
        numbers = range(1, min(MOST_CONSISTENCY_STEPS, length) + 1)
        lists = {str(number): angle_timesteps(teacher.schedule, number) for number in numbers}
    else:
        rows = {number: torch.from_numpy(make_timesteps("trailing", number, length)) for number in numbers}
        lists = {str(number): teacher.schedule.labels(each).tolist() for number, each in rows.items()}
    measured = ["analytic_variance", "optimal_timesteps", "multistep_order"]  # of the teacher
    if source.get("variance_type") == "analytic":
        measured.append("variance_type")
    source = {key: value for key, value in source.items() if key not in measured}
    chosen = {"spacing": "trailing", "trajectory": lists}
    scheduler = cls.from_config(source, timestep_spacing="optimal", optimal_timesteps=chosen)
    scheduler.register_to_config(**{STUDENT_STEPS: config.student_steps})
    return scheduler


def guided_by_default(config: DistillConfig, subject: Subject) -> DistillConfig:
    """The options with the guidance of the pipeline's own calls, if they say none.

    Raises:
        ValueError: if that is a guider, which no student is trained for.
    """
    if config.guidance_scale is not None:
        return config
    pipe = subject.pipe
    if pipe.guider is not None:
        raise ValueError(
            f"the pipeline is guided by its {type(pipe.guider).__name__}, which is not what a student learns: say by "
            "--guidance_scale how its calls are guided, 1 for not at all"
        )
    scale = subject.default_scale
    interval = (pipe.config.get("call_defaults") or {}).get("guidance_interval")
    if scale == 1 or interval is None:
        return dataclasses.replace(config, guidance_scale=scale)
    (unit, bounds), *_ = interval.items()
    if unit == "timestep":
        schedule = model_schedule(pipe.scheduler)
        first, last = (max(bound - schedule.first_label, 0) for bound in bounds)
        bounds = noise_ratio(schedule)[math.ceil(first) : math.floor(last) + 1][[0, -1]].tolist()
    return dataclasses.replace(config, guidance_scale=scale, guidance_interval=tuple(bounds))


def paired_by_default(config: DistillConfig, subject: Subject) -> DistillConfig:
    """The options with the pairs of a consistency model, if they say none; those of `guided_by_default` come first.

    A student too may have learned guidance, which the data know nothing of.

    Raises:
        ValueError: if pairs of the data are asked for, and guidance.
    """
    if config.method != "consistency":
        return config
    if config.consistency_pairs is None:
        learned = options_of_run(config.pipeline).get("model_guidance_scale") is not None
        learned = learned or subject.pipe.scheduler.config.get(STUDENT_STEPS) is not None
        is_guided = config.guidance_scale != 1
        return dataclasses.replace(config, consistency_pairs="teacher" if is_guided or learned else "data")
    check_pairs(config.consistency_pairs, config.guidance_scale)
    return config


def check_steps(config: DistillConfig, teacher: Teacher) -> None:
    """Refuses more steps than the path has timesteps, and a path that the student's sampler does not have."""
    if config.method == "consistency" and is_linear(teacher.pipe.scheduler):
        raise ValueError(
            "method consistency is for paths of betas, whose points at unit scale its scheduler goes between, got a pipeline on "
            "the linear path: take method progressive, or train one with --path vp"
        )
    name = "teacher_steps" if config.method == "progressive" else "student_steps"
    if getattr(config, name) > len(teacher.schedule):
        raise ValueError(
            f"{name} must be at most the number of timesteps of the pipeline's path, {len(teacher.schedule)}, got "
            f"{getattr(config, name)}"
        )
