"""The options that every training script shares, and what follows from the machine when they are left open."""

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from diffusers_ext.data.config import TrainingDataConfig
from diffusers_ext.draws import check_seed
from diffusers_ext.machine import available_cores, default_device, fastest
from diffusers_ext.options import fixed_option, option
from diffusers_ext.trainer.ema import power_function_exponent
from diffusers_ext.trainer.optimizers import MUON_RATE, OPTIMIZERS
from diffusers_ext.trainer.schedule import LR_SCHEDULERS, Budget, default_warmup_steps, parse_duration
from diffusers_ext.trainer.trackers import tracker_names


DEFAULT_VALIDATION_STEPS = 500


_muon_option = partial(option, needs={"optimizer": ("muon",)})


@dataclass(frozen=True)
class TrainerConfig(TrainingDataConfig):
    """Options of a training run.

    Raises:
        ValueError: if options contradict one another or are out of range.
    """

    dataloader_num_workers: int | None = option(
        None, "processes that make batches; by default 0 on a CPU, else up to 4", at_least=0
    )

    output_dir: str | None = option(None, "folder of the run; by default runs/NAME_OF_THE_DATA_SET", "run")
    overwrite_output_dir: bool = option(False, "remove the run that output_dir holds and start over")
    seed: int = fixed_option(0, "seed of the weights, the order, the noise and all else that is random")
    max_train_steps: int | None = option(
        None, "optimizer steps of the run; by default 1200, if no max_train_time is given"
    )
    max_train_time: str | None = option(
        None,
        "end the run after so long: seconds, or 10m, 1h30m. Counts from the first step, without imports and the preparation "
        "of the data before it, and includes saving, validation and drawing at the end, for which at most a third is "
        "reserved; not an upload",
    )
    train_batch_size: int = option(32, "images of one process in one forward pass", at_least=1)
    gradient_accumulation_steps: int = option(1, "forward passes of one optimizer step", at_least=1)

    optimizer: Literal[OPTIMIZERS] | None = fixed_option(
        None,
        "adamw; or muon for the hidden matrices, with adamw for embeddings, first and last layers, norms and biases; by default "
        "muon for a denoising transformer that starts at random weights, and adamw for all else",
        "optimizer",
    )
    learning_rate: float = option(1e-3, "peak learning rate")
    muon_learning_rate: float | None = _muon_option(
        None, f"peak learning rate of muon's matrices; by default {MUON_RATE:g} times learning_rate"
    )
    muon_momentum: float = _muon_option(0.95, "momentum of muon")
    muon_weight_decay: float = _muon_option(0.0, "weight decay of muon's matrices", at_least=0)
    lr_scheduler: Literal[LR_SCHEDULERS] = option(
        "cosine", "decay after the warm-up, over the steps or the time that the run has left"
    )
    lr_warmup_steps: int | None = option(
        None,
        "optimizer steps of the linear warm-up; by default 100, but at most a tenth of the run",
        at_least=0,
    )
    lr_warmup_share: float | None = option(
        None, "share of the run, in steps or in time, that the warm-up takes instead of lr_warmup_steps", at_least=0
    )
    lr_decay_share: float = option(
        0.2,
        "share of what follows the warm-up that warmup_stable_decay decays in",
        needs={"lr_scheduler": ("warmup_stable_decay",)},
    )
    lr_num_cycles: int = option(
        1, "cycles of cosine_with_restarts", at_least=1, needs={"lr_scheduler": ("cosine_with_restarts",)}
    )
    lr_power: float = option(1.0, "power of polynomial", at_least=0, needs={"lr_scheduler": ("polynomial",)})
    adam_beta1: float = option(0.9, "AdamW's beta_1")
    adam_beta2: float = option(0.99, "AdamW's beta_2")
    adam_weight_decay: float = option(0.0, "AdamW's weight decay", at_least=0)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", at_least=0)
    max_grad_norm: float = option(1.0, "norm to clip gradients at; 0 for no clipping", at_least=0)

    use_ema: bool = fixed_option(
        True, "average the weights; the average is what is sampled and saved", "EMA of the weights"
    )
    ema_std: float | None = fixed_option(
        None,
        "width of a power-function average, relative to the run's length; 0.1 unless ema_decay is given",
        needs="use_ema",
    )
    ema_decay: float | None = fixed_option(
        None,
        "decay of an exponential average, instead of ema_std",
        alias="ema_max_decay",
        needs="use_ema",
    )
    ema_warmup: bool = fixed_option(
        False,
        "let the decay of an exponential average start low: min(decay, (1 + t) / (10 + t))",
        needs="ema_decay",
    )
    ema_snapshot_steps: int | None = fixed_option(
        None,
        "optimizer steps between snapshots of averages, from which training/reconstruct_ema.py makes any other width "
        "afterwards; a few dozen of them are enough, each as large as the model times the number of ema_stds",
        at_least=1,
    )
    ema_stds: tuple[float, ...] | None = fixed_option(
        None,
        "widths of the averages that snapshots are taken of; by default 0.05 and 0.1",
        needs="ema_snapshot_steps",
    )

    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None, "precision of the forward pass; by default bf16 where the hardware is fast at it", "speed"
    )
    channels_last: bool | None = option(None, "memory layout of the images; by default yes on CPUs and CUDA")
    compile: bool = option(False, "compile the model with torch.compile")
    gradient_checkpointing: bool = option(False, "save memory by computing activations twice")
    num_threads: int | None = option(None, "CPU threads of a process; by default the cores are shared out", at_least=1)

    checkpointing_steps: int = option(1000, "optimizer steps between checkpoints", "checkpoints", at_least=1)
    checkpoints_total_limit: int | None = option(2, "number of the last checkpoints to keep", at_least=1)
    checkpoints_keep_every: int | None = option(
        None, "also keep the checkpoints at multiples of this number of steps", at_least=1
    )
    resume_from_checkpoint: str | None = option(
        None, "go on from a checkpoint: latest, or a path; those beyond it are removed at the next save"
    )

    logging_steps: int = option(20, "optimizer steps between the lines of metrics.jsonl", "watching", at_least=1)
    validation_steps: int | None = option(
        None,
        "optimizer steps between such losses; by default 500, and always at the end",
        at_least=1,
        needs="validation_split",
    )
    save_images_steps: int | None = option(None, "optimizer steps between sample grids while training", at_least=1)
    profile: bool = option(
        False, "print what each part of the steps takes, and write a trace of three of them to OUTPUT_DIR/profile"
    )
    report_to: str | None = option(
        None,
        "trackers of accelerate, which must be installed: tensorboard, wandb, trackio, several with commas between, or all "
        "that are there",
        alias="logger",
    )
    tracker_project_name: str = option("diffusers_ext", "project that trackers file the run under", needs="report_to")

    push_to_hub: bool = option(False, "upload the finished pipeline and its card", "Hub")
    push_to_hub_every: int | None = option(
        None,
        "also upload the pipeline of every so many checkpoints, as a branch named like the checkpoint",
        at_least=1,
        needs="push_to_hub",
    )
    hub_model_id: str | None = option(
        None, "repository to push to; by default the name of output_dir", needs="push_to_hub"
    )
    hub_token: str | None = option(None, "token to push with; by default the one that is logged in")
    hub_private_repo: bool = option(False, "make the repository private", needs="push_to_hub")

    DEFAULT_MAX_TRAIN_STEPS: ClassVar[int] = 1200
    # What options were in runs that are older than they, where the default leaves them open.
    OLDER_THAN: ClassVar[dict[str, Any]] = {}
    # What `--help` lists: `--help-all` has the rest.
    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *("dataset_name", "resolution", "random_flip", "streaming", "validation_split"),
        *("output_dir", "seed", "max_train_steps", "max_train_time", "train_batch_size", "learning_rate"),
        *(
            "mixed_precision",
            "resume_from_checkpoint",
            "save_images_steps",
            "report_to",
            "push_to_hub",
            "hub_model_id",
        ),
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("learning_rate", "muon_learning_rate"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name):g}")
        self._check_shares()
        check_seed(self.seed)
        tracker_names(self.report_to)  # refuses unknown ones
        if self.overwrite_output_dir and self.resume_from_checkpoint:
            raise ValueError("overwrite_output_dir and resume_from_checkpoint contradict each other")
        self._check_ema()
        self.budget()

    def _check_shares(self):
        for name in ("adam_beta1", "adam_beta2", "muon_momentum", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value:g}")
        if self.lr_warmup_share is not None and not 0 <= self.lr_warmup_share < 1:
            raise ValueError(f"lr_warmup_share must be in [0, 1), got {self.lr_warmup_share:g}")
        if self.lr_warmup_share is not None and self.lr_warmup_steps is not None:
            raise ValueError("lr_warmup_share and lr_warmup_steps are two lengths of the warm-up: give one of them")
        if not 0 < self.lr_decay_share <= 1:
            raise ValueError(f"lr_decay_share must be in (0, 1], got {self.lr_decay_share:g}")

    def _check_ema(self):
        if self.ema_std is not None and self.ema_decay is not None:
            raise ValueError("ema_std and ema_decay are two kinds of average: give one of them")
        if len(set(self.ema_stds or ())) < len(self.ema_stds or ()):
            raise ValueError(f"ema_stds must be different widths, got {' '.join(map(str, self.ema_stds))}")
        for std in {self.ema_std, *(self.ema_stds or ())} - {None}:
            power_function_exponent(std)  # refuses one out of range

    @property
    def origin(self) -> tuple[str, str | None]:
        """How the weights of the run come to be, as a card says it, and what they began as; None for random ones."""
        name = getattr(self, "pretrained_pipeline", None)  # an option of most scripts
        return ("trained from scratch", None) if name is None else (f"fine-tuned from `{name}`", name)

    def default_optimizer(self) -> str:
        """What is taken if no optimizer is named."""
        return "adamw"

    def budget(self) -> Budget:
        """The end of the run."""
        seconds = None if self.max_train_time is None else parse_duration(self.max_train_time)
        has_end = self.max_train_steps is not None or seconds is not None
        return Budget(self.max_train_steps if has_end else self.DEFAULT_MAX_TRAIN_STEPS, seconds)

    # Options that count steps, and what becomes of a run that is no longer than they say. A default is no reason for
    # a word: a run may well be shorter.
    NEEDS_STEPS: ClassVar[dict[str, str]] = {
        "validation_steps": "the loss on held-out images is taken at the end alone",
        "save_images_steps": "no pictures are made while training",
        "checkpointing_steps": "the only checkpoint is that of the end",
        "ema_snapshot_steps": "the only snapshot of averages is that of the end",
        "checkpoints_keep_every": "no checkpoint is kept for its number",
    }

    def too_long_for(self, num_steps: int) -> list[str]:
        """A line for each option that a run of `num_steps` optimizer steps is too short for."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        # Left open, it is settled to a number by which most runs are not measured.
        defaults["validation_steps"] = DEFAULT_VALIDATION_STEPS
        given = {name: getattr(self, name) for name in self.NEEDS_STEPS}
        return [
            f"{name} {value} is more than the {num_steps} optimizer steps of the run: {self.NEEDS_STEPS[name]}"
            for name, value in given.items()
            if value is not None and value != defaults[name] and value > num_steps
        ]


def default_output_dir(dataset_name: str) -> str:
    """The folder of a run that names none."""
    return f"runs/{os.path.basename(os.path.abspath(dataset_name))}"


def resolve_for_machine(config: TrainerConfig) -> TrainerConfig:
    """Settles what was left open: precision, memory layout and workers, by the machine; optimizer and kind of average."""
    device = default_device()
    changes = {}
    if config.mixed_precision is None:
        # `accelerate launch` says "no" whether or not it was asked to, so only another word of it counts.
        launched_with = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        default = "bf16" if fastest(device).precision == torch.bfloat16 else "no"
        changes["mixed_precision"] = launched_with if launched_with in ("fp16", "bf16") else default
    if device == "cpu" and "fp16" in (config.mixed_precision, changes.get("mixed_precision")):
        raise ValueError("mixed_precision fp16 needs a GPU, and this machine has none: take bf16 or no")
    if config.channels_last is None:
        changes["channels_last"] = fastest(device).channels_last
    if config.dataloader_num_workers is None:
        changes["dataloader_num_workers"] = 0 if device == "cpu" else min(4, len(available_cores()))
    optimizer = config.optimizer or config.default_optimizer()
    changes["optimizer"] = optimizer
    if optimizer == "muon" and config.muon_learning_rate is None:
        changes["muon_learning_rate"] = MUON_RATE * config.learning_rate
    if config.use_ema and config.ema_std is None and config.ema_decay is None:
        changes["ema_std"] = 0.1
    if config.ema_snapshot_steps is not None and config.ema_stds is None:
        changes["ema_stds"] = (0.05, 0.1)
    if config.max_train_steps is None and config.max_train_time is None:
        changes["max_train_steps"] = config.DEFAULT_MAX_TRAIN_STEPS
    if config.lr_warmup_steps is None and config.lr_warmup_share is None and config.max_train_time is None:
        changes["lr_warmup_steps"] = default_warmup_steps(config.budget().max_steps)
    if config.validation_split is not None and config.validation_steps is None:
        changes["validation_steps"] = DEFAULT_VALIDATION_STEPS
    if config.output_dir is None:
        changes["output_dir"] = default_output_dir(config.dataset_name)
    return dataclasses.replace(config, **changes)


DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def describe_speed(config: TrainerConfig, device: str) -> str:
    """A line that says with what a run computes, and what is fastest there if that is something else.

    Args:
        config: The options, settled for this machine.
        device: The kind of device that the run is on.
    """

    def words(precision: torch.dtype, channels_last: bool) -> str:
        name = str(precision).removeprefix("torch.")
        return f"{name}, {'channels_last' if channels_last else 'contiguous'}"

    best = fastest(device)
    used, there = (
        words(DTYPES[config.mixed_precision], config.channels_last),
        words(best.precision, best.channels_last),
    )
    threads = torch.get_num_threads()
    line = f"on {best.hardware}: {used}" + (f", {threads} thread{'s' * (threads > 1)}" if device == "cpu" else "")
    return line if used == there else f"{line}; fastest there: {there}"
