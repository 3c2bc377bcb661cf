"""Let a trained pipeline start below its noisiest level, from a distribution fitted to the data (arXiv 2202.09671).

The command `diffusers-ext fit-prior`; `training/fit_prior.py` says how it is used.
"""

import dataclasses
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from diffusers import AutoModel
from torch import Tensor, nn

from diffusers_ext import GaussianPriorModel, GuidedDiffusionPipeline
from diffusers_ext.calibration.examples import Examples
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.command_names import name_commands
from diffusers_ext.evaluation.options import DataOptions, take_options_of_run
from diffusers_ext.evaluation.pipeline_facts import default_of, image_size_of, label_names_of
from diffusers_ext.evaluation.real_images import load_real_images
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.hub.cards import renew_card
from diffusers_ext.machine import process_state, set_threads
from diffusers_ext.options import option, parse_config, run_script
from diffusers_ext.pipelines.truncation import check_prior, truncated_timesteps
from diffusers_ext.trainer.run import save_atomically
from diffusers_ext.trainer.run_folder import CONFIG_FILE


@dataclass(frozen=True)
class FitPriorConfig(DataOptions):
    """Let a trained pipeline start below its noisiest level, from a distribution fitted to the data."""

    pipeline: str | None = option(None, "PIPELINE may also stand first, without --pipeline", "what it is fitted for")
    start_timestep: int | None = option(None, "timestep at which calls start by default", at_least=0)
    num_inference_steps: int | None = option(
        None, "number of steps that becomes the default; as it is if left open", at_least=1
    )
    by_label: bool = option(False, "a mean and covariance of each label, besides those of all images")
    rank: int | None = option(
        None,
        "directions of the covariance, beside a variance of each pixel; by default all for small images, else 64",
        at_least=0,
    )
    max_images: int = option(20000, "images that it is fitted to, drawn by the seed", at_least=2)
    vae_prior: str | None = option(
        None, "in place of a normal distribution, the folder of an autoencoder of training/train_vae.py"
    )
    seed: int = option(0, "of the draw of images")
    num_threads: int | None = option(None, "CPU threads; by default all cores", at_least=1)
    output_dir: str | None = option(
        None, "folder for the pipeline; by default PIPELINE, which is then replaced", "result"
    )

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *(
            "dataset_name",
            "resolution",
            "pipeline",
            "start_timestep",
            "num_inference_steps",
            "by_label",
            "rank",
            "seed",
        ),
        *("output_dir",),
    )

    def __post_init__(self):
        if self.pipeline is None:
            raise ValueError(
                name_commands(
                    "say what to fit a prior for: training/fit_prior.py PIPELINE, a folder or a name on the Hub"
                )
            )
        if self.start_timestep is None:
            raise ValueError("start_timestep must be given: the timestep at which sampling is to start, such as 600")
        super().__post_init__()
        if self.vae_prior is not None and (self.by_label or self.rank is not None):
            raise ValueError("by_label and rank are of a normal distribution: leave them or vae_prior out")
        if self.output_dir is None and not Path(self.pipeline).is_dir():
            raise ValueError(
                f"{self.pipeline} is no folder here: say by --output_dir where the pipeline is to be saved"
            )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir or self.pipeline)


@torch.no_grad()
def main(config: FitPriorConfig) -> Path:
    """Fits and saves, and returns the folder of the pipeline."""
    state = process_state()
    set_threads(config.num_threads, state.num_processes)
    pipe = load_pipeline(config.pipeline)
    if not isinstance(pipe, GuidedDiffusionPipeline):
        raise ValueError(f"{config.pipeline} must be a GuidedDiffusionPipeline, got a {type(pipe).__name__}")
    pipe.to(state.device)
    num_steps = config.num_inference_steps or default_of(pipe, "num_inference_steps")
    truncated_timesteps(pipe.scheduler, num_steps, config.start_timestep)  # which refuses what cannot be visited
    if config.vae_prior is not None:
        prior, what = load_autoencoder(config.vae_prior), f"the autoencoder {config.vae_prior}"
    else:
        x0, labels = clean_samples(config, pipe)
        number = pipe.denoiser_num_classes if config.by_label else None
        prior = GaussianPriorModel.fit(x0, labels, number, config.rank)
        of_label = " for each label and all" if config.by_label else ""
        what = f"a normal distribution of rank {prior.config.rank}{of_label}, fitted to {len(x0)} images"
    check_prior(prior, pipe.denoiser, pipe.vae is not None, pipe.denoiser_num_classes)
    pipe.register_modules(prior=prior)
    defaults = dict(pipe.config.call_defaults or {}) | {"start_timestep": config.start_timestep}
    if config.num_inference_steps is not None:
        defaults["num_inference_steps"] = config.num_inference_steps
    pipe.register_to_config(call_defaults=defaults)
    save(config, pipe)
    print(f"calls start at timestep {config.start_timestep} from {what}; saved in {config.folder}")
    return config.folder


def load_autoencoder(folder: str) -> nn.Module:
    """Raises: ValueError: if the folder holds none of this package."""
    try:
        autoencoder = AutoModel.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"vae_prior {folder} cannot be loaded as an autoencoder: {error}") from error
    return autoencoder.eval()


def clean_samples(config: FitPriorConfig, pipe: GuidedDiffusionPipeline) -> tuple[Tensor, Tensor | None]:
    """x_0 of the training images, on the scale of the network, and their labels if they are asked for.

    Raises:
        ValueError: if labels are asked for, and the pipeline or the images have none.
    """
    config = take_options_of_run(config, config.pipeline)
    if config.resolution is None:
        config = dataclasses.replace(config, resolution=image_size_of(pipe))
    real = load_real_images(config.for_data(), config.held_out_split, label_names=label_names_of(pipe))
    known = pipe.denoiser_num_classes is not None and len(real.train.label_names) == pipe.denoiser_num_classes
    if config.by_label and not known:
        raise ValueError(
            f"by_label needs a pipeline and images with the same labels, got {pipe.denoiser_num_classes or 'none'} and "
            f"{len(real.train.label_names) or 'none'}"
        )
    images = Examples(real.train).at_most(config.max_images, config.seed).images
    x0 = Subject(pipe, pipe, 1).x0(images, images.labels if known else None)
    return x0.cpu(), images.labels if config.by_label else None


def save(config: FitPriorConfig, pipe: nn.Module) -> None:
    """Writes the pipeline, with the options of its run, so that evaluate.py knows the data.

    A card that lies there lists the prior then, and drops figures of images that started elsewhere.
    """
    config.folder.mkdir(parents=True, exist_ok=True)
    options, card = Path(config.pipeline) / CONFIG_FILE, config.folder / "README.md"

    def write(partial: Path):
        if options.is_file() and config.folder.resolve() != Path(config.pipeline).resolve():
            shutil.copy(options, partial)
        if card.is_file():
            shutil.copy(card, partial)
            results = f"No figure was measured since calls start at timestep {config.start_timestep}, from the prior; pictures are of before."
            if renew_card(partial, results) is None:
                print(f"{card} is no card of diffusers_ext, and was left as it is: it says nothing of the prior")

    save_atomically(pipe, config.folder, also=write)


parse = partial(parse_config, FitPriorConfig, first="pipeline")
run = partial(run_script, FitPriorConfig, main, first="pipeline")
