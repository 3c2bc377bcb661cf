"""Train the network whose features `training/evaluate.py` measures generated images in.

The command `diffusers-ext train-features`; `training/train_features.py` says how it is used.
"""

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from diffusers_ext.command_names import name_commands
from diffusers_ext.draws import check_seed
from diffusers_ext.evaluation.feature_folders import train_and_save_features
from diffusers_ext.evaluation.options import DataOptions
from diffusers_ext.evaluation.real_images import load_real_images
from diffusers_ext.machine import process_state, set_threads
from diffusers_ext.options import option, run_script


@dataclass(frozen=True)
class FeaturesConfig(DataOptions):
    """Train a small network, for measuring generated images in its features: a classifier of the labels, or without labels."""

    unconditional: bool = option(False, "leave the labels out", "data")
    output_dir: str | None = option(None, "folder of the model; by default runs/features-NAME_OF_THE_DATA_SET", "run")
    overwrite_output_dir: bool = option(False, "replace what output_dir holds")
    num_train_epochs: int | None = option(
        None,
        "passes over the images; by default enough for 275 000 images, at most 20",
        at_least=1,
    )
    train_batch_size: int | None = option(
        None,
        "images of a step, over all processes; by default 128, or fewer for less than 3000 images",
        at_least=2,  # for batch normalisation
    )
    learning_rate: float = option(2e-3, "peak learning rate")
    adam_weight_decay: float = option(0.05, "AdamW's weight decay", at_least=0)
    random_flip: bool = option(False, "mirror every other image left to right, at random")
    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "precision of the forward pass; by default bf16 where the hardware is fast at it"
    )
    num_threads: int | None = option(None, "CPU threads of a process; by default the cores are shared out", at_least=1)
    seed: int = option(0, "seed of the weights, the order and the flips", at_least=0)

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *("dataset_name", "resolution", "output_dir", "overwrite_output_dir", "num_train_epochs", "train_batch_size"),
        *("learning_rate", "random_flip", "mixed_precision", "seed"),
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate:g}")


def main(config: FeaturesConfig) -> dict:
    """Trains, saves and prints the accuracy on held-out images."""
    check_seed(config.seed)
    data = config.for_data()
    name = os.path.basename(os.path.abspath(data.dataset_name))
    folder = Path(config.output_dir or f"runs/features-{name}")
    if folder.is_dir() and any(folder.iterdir()) and not config.overwrite_output_dir:
        raise ValueError(f"output_dir {folder} is not empty: give another one, or --overwrite_output_dir")

    state = process_state()
    set_threads(config.num_threads, state.num_processes)
    with state.main_process_first():
        real = load_real_images(data, config.held_out_split)
    start = time.perf_counter()
    about = train_and_save_features(
        real,
        folder,
        num_epochs=config.num_train_epochs,
        batch_size=config.train_batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.adam_weight_decay,
        random_flip=config.random_flip,
        bf16=None if config.mixed_precision is None else config.mixed_precision == "bf16",
        seed=config.seed,
    )
    if state.is_main_process:
        for note in real.notes:
            print(note)
        if "held_out_accuracy" in about:
            measured = (
                f"{about['held_out_accuracy']:.2%} of {about['num_held_out_images']} held-out images get their label"
            )
        else:
            measured = f"without labels; {about['held_out_share_found']:.2%} of held-out images are found by another view of them"
        print(
            name_commands(
                f"{measured}, after {time.perf_counter() - start:.0f} s\n"
                f"saved in {folder}; measure with: python training/evaluate.py PIPELINE --features {folder}"
            )
        )
    return about


run = partial(run_script, FeaturesConfig, main)
