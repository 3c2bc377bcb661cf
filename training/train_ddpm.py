"""Train a Gaussian diffusion model on images, by label if there are labels.

    accelerate launch training/train_ddpm.py
    accelerate launch training/train_ddpm.py --dataset_name ../fashion_mnist --resolution 32 --max_train_time 10m

Without options it trains on scikit-learn's handwritten digits. `--help` lists the options, `--config FILE.yaml` reads
them from a file.
"""

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from accelerate import Accelerator

from diffusers_ext import DiffusionPipeline, ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.betas import BETA_SCHEDULES
from diffusers_ext.losses import LOSS_WEIGHTINGS, denoising_loss
from diffusers_ext.noising import PREDICTION_TYPES, add_noise
from diffusers_ext.trainer.batches import TIMESTEP_SAMPLINGS
from diffusers_ext.trainer.config import TrainerConfig, resolve_for_machine
from diffusers_ext.trainer.data import ImageData
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.options import option, run_script, to_command
from diffusers_ext.trainer.prepare import prepare_data
from diffusers_ext.trainer.run import describe_data, finish_run, make_accelerator, open_run, save_whole
from diffusers_ext.trainer.sampling import draw_denoising, draw_samples
from diffusers_ext.trainer.stream import StreamData


SCHEDULERS = {"ddpm": ExtDDPMScheduler, "ddim": ExtDDIMScheduler}


@dataclass(frozen=True)
class TrainConfig(TrainerConfig):
    """Train a Gaussian diffusion model on images, by label if there are labels."""

    block_out_channels: tuple[int, ...] = option(
        (64, 128, 128), "channels at each resolution, the full one first", "model"
    )
    layers_per_block: int = option(2, "residual blocks at each resolution")
    attention_resolutions: tuple[int, ...] | None = option(
        None, "sides of the maps with attention; by default the largest of at most 16"
    )
    attention_head_dim: int = option(64, "channels of an attention head")
    dropout: float = option(0.0, "share of the features dropped in each residual block")

    num_train_timesteps: int = option(1000, "noise levels", "diffusion", alias="ddpm_num_steps")
    beta_schedule: Literal[BETA_SCHEDULES] = option("cosine", "noise schedule", alias="ddpm_beta_schedule")
    beta_start: float = option(1e-4, "first beta of linear, scaled_linear and sigmoid")
    beta_end: float = option(0.02, "last beta of linear, scaled_linear and sigmoid")
    rescale_betas_zero_snr: bool = option(False, "let the last level be pure noise; not with epsilon")
    prediction_type: Literal[PREDICTION_TYPES] = option("v_prediction", "what the model outputs")
    loss_weighting: Literal[LOSS_WEIGHTINGS] = option(
        "uniform", "weight of the noise levels; see diffusers_ext.losses"
    )
    snr_gamma: float = option(5.0, "where min_snr cuts off")
    p2_gamma: float = option(1.0, "exponent of p2")
    timestep_sampling: Literal[TIMESTEP_SAMPLINGS] = option(
        "stratified", "each image's level by itself, or evenly spread"
    )
    label_dropout: float = option(0.1, "probability of training an image without its label, for guidance")

    scheduler: Literal[tuple(SCHEDULERS)] = option("ddim", "scheduler that is saved with the pipeline", "sampling")
    timestep_spacing: Literal["leading", "trailing", "linspace"] = option(
        "trailing", "timesteps that the scheduler visits"
    )
    num_inference_steps: int = option(50, "steps of the sample grids", alias="ddpm_num_inference_steps")
    guidance_scale: float = option(1.0, "classifier-free guidance of the sample grids; 1 is none")
    sample_columns: int = option(8, "pictures in a row of the sample grids")
    eval_batch_size: int = option(64, "pictures sampled at once")

    FIXED_ON_RESUME: ClassVar[frozenset[str]] = TrainerConfig.FIXED_ON_RESUME.union(
        "block_out_channels layers_per_block attention_resolutions attention_head_dim num_train_timesteps beta_schedule "
        "beta_start beta_end rescale_betas_zero_snr prediction_type loss_weighting snr_gamma p2_gamma timestep_sampling "
        "label_dropout dropout".split()
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout must be in [0, 1), got {self.label_dropout:g}")
        for name in ("num_inference_steps", "sample_columns", "eval_batch_size", "snr_gamma"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_inference_steps > self.num_train_timesteps:
            raise ValueError(
                f"num_inference_steps must be at most num_train_timesteps ({self.num_train_timesteps}), got "
                f"{self.num_inference_steps}"
            )
        for side in self.resolution or ():
            if side % self.size_multiple:
                near = side // self.size_multiple * self.size_multiple
                near = " or ".join(str(other) for other in (near, near + self.size_multiple) if other)
                raise ValueError(
                    f"resolution must be a multiple of {self.size_multiple}, since block_out_channels has "
                    f"{len(self.block_out_channels)} widths and each but the last halves the images, got {side}: take {near}"
                )

    @property
    def size_multiple(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


def main(config: TrainConfig) -> Path:
    """Trains a model and returns the folder of its pipeline."""
    accelerator = make_accelerator(config)
    command = to_command(config, "training/train_ddpm.py")
    config = resolve_for_machine(config)
    with open_run(config, accelerator) as open_folder:
        data = load_data(config, accelerator)
        config = dataclasses.replace(config, resolution=data.size, resize_mode=data.resize_mode)
        open_folder(config)
        model, scheduler = build_model(config, data), build_scheduler(config)
        trainer = Trainer(
            config,
            accelerator,
            model,
            partial(training_loss, config, scheduler),
            data,
            batch_options={"label_dropout": config.label_dropout, "timestep_sampling": config.timestep_sampling},
            on_images=partial(draw_while_training, config, scheduler),
        )
        trainer.train()
        if accelerator.is_main_process:
            with averaged_pipeline(trainer, scheduler) as pipe:
                save_whole(pipe, trainer.output_dir)
            print("drawing samples and the denoising of one of them ...", flush=True)
            draw_figures(config, accelerator, data)
            finish_run(trainer, command, "\n\n".join([describe_data(config, data), *data.notes]))
    return trainer.output_dir


def load_data(config: TrainConfig, accelerator: Accelerator) -> ImageData | StreamData:
    """The images, decoded by the first process of each machine and read by the others, or a stream of them."""
    with accelerator.local_main_process_first():
        data = prepare_data(config, multiple_of=config.size_multiple)
    for note in (describe_data(config, data), *data.notes):
        accelerator.print(note)
    return data


def build_model(config: TrainConfig, data: ImageData) -> UNetModel:
    """A new model with weights that follow from the seed."""
    torch.manual_seed(config.seed)
    return UNetModel(
        sample_size=data.size,
        in_channels=data.channels,
        out_channels=data.channels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        attention_resolutions=config.attention_resolutions,
        attention_head_dim=config.attention_head_dim,
        dropout=config.dropout,
        num_classes=data.num_classes,
    )


def build_scheduler(config: TrainConfig) -> ExtDDPMScheduler | ExtDDIMScheduler:
    """The scheduler that is saved with the pipeline; its noise schedule is the training's."""
    return SCHEDULERS[config.scheduler](
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr,
        prediction_type=config.prediction_type,
        timestep_spacing=config.timestep_spacing,
    )


def training_loss(
    config: TrainConfig, scheduler: ExtDDPMScheduler, model, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The weighted error of the model's output at one timestep for each image (DDPM, Algorithm 1)."""
    x0, eps = batch["images"], batch["noise"]
    timesteps = (batch["time"] * config.num_train_timesteps).long()
    level = scheduler.schedule.level(timesteps, x0)
    output = model(add_noise(x0, eps, level), timesteps, class_labels=batch.get("labels")).sample
    return denoising_loss(
        output,
        x0,
        eps,
        level,
        config.prediction_type,
        weighting=config.loss_weighting,
        snr_gamma=config.snr_gamma,
        p2_gamma=config.p2_gamma,
    ).mean()


@contextmanager
def averaged_pipeline(trainer: Trainer, scheduler: ExtDDPMScheduler):
    """The pipeline as it stands, with the averaged weights if there are any; the model's own come back at the end."""
    with trainer.averaged_model() as model:
        # A copy: sampling sets the timesteps of its scheduler.
        scheduler = type(scheduler).from_config(scheduler.config)
        pipe = GuidedDiffusionPipeline(denoiser=model, scheduler=scheduler, id2label=trainer.data.id2label)
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def draw_while_training(config: TrainConfig, scheduler: ExtDDPMScheduler, trainer: Trainer) -> None:
    """Samples of the averaged weights, at `samples/step-STEP.png`."""
    with averaged_pipeline(trainer, scheduler) as pipe:
        draw_samples(
            pipe,
            trainer.output_dir / "samples" / f"step-{trainer.state.step:07}.png",
            **sample_settings(config, trainer.data),
        )


def draw_figures(config: TrainConfig, accelerator: Accelerator, data: ImageData) -> None:
    """The sample grid and the denoising strip, from the pipeline as saved."""
    output_dir = Path(config.output_dir)
    pipe = DiffusionPipeline.from_pretrained(output_dir).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    with accelerator.autocast():
        draw_samples(pipe, output_dir / "samples.png", **sample_settings(config, data))
        draw_denoising(
            pipe,
            output_dir / "denoising.png",
            label=None if data.id2label is None else 0,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            seed=config.seed,
        )


def sample_settings(config: TrainConfig, data: ImageData) -> dict:
    return {
        "labels": None if data.id2label is None else list(data.id2label),
        "names": None if data.id2label is None else list(data.id2label.values()),
        "columns": config.sample_columns,
        "seed": config.seed,
        "batch_size": config.eval_batch_size,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
    }


if __name__ == "__main__":
    run_script(TrainConfig, main)
