"""Training from Python: a config of keywords and a function, as `from diffusers_ext import TrainConfig, train`.

What stands in `docs/commands.md` of the commands holds here too: it is the same code. Nothing is read from the command line, and
an error is an exception.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline, ModelMixin

import diffusers_ext
from diffusers_ext.command_names import started_as
from diffusers_ext.commands import train_ddpm, train_text_to_image, train_vae
from diffusers_ext.commands.train_ddpm import TrainConfig
from diffusers_ext.commands.train_vae import TrainVAEConfig
from diffusers_ext.data.at_hand import AtHand, keep_dataset
from diffusers_ext.recipes.text_to_image import TextConfig
from diffusers_ext.trainer.signals import Interrupted
from diffusers_ext.untrusted import read_json


# What trains by a config, and the command that does the same.
_COMMANDS = {
    TrainConfig: (train_ddpm.main, "diffusers-ext train"),
    TextConfig: (train_text_to_image.main, "diffusers-ext train-text-to-image"),
    TrainVAEConfig: (train_vae.main, "diffusers-ext train-vae"),
}


def train(
    config: TrainConfig | TextConfig | TrainVAEConfig, dataset: AtHand | None = None
) -> DiffusionPipeline | ModelMixin:
    """Trains a model, saves it in the config's `output_dir`, and returns the pipeline; or the autoencoder, by a `TrainVAEConfig`.

        from diffusers_ext import TrainConfig, train

        pipe = train(TrainConfig(dataset_name="path/to/images", resolution=32, max_train_time="10m"))

    Args:
        dataset: A data set at hand in the place of `dataset_name`: a `datasets.Dataset`, any map-style data set of torch whose
            examples are images, pairs (image, label) or dicts, or a dict from names of splits to those. It is kept on disk, by
            its contents, so that the run can be resumed and evaluated (`diffusers_ext.data.at_hand.keep_dataset`). Each example
            is read once: augmentation is `random_flip` and `resize_mode`.

    Raises:
        ValueError: if options contradict one another or the data.
        TypeError: if the config or the data set is none.
        OSError: if files cannot be read or written.
        KeyboardInterrupt: after an interrupt; its message says what is kept and how to go on.
    """
    if type(config) not in _COMMANDS:
        kinds = ", ".join(kind.__name__ for kind in _COMMANDS)
        raise TypeError(f"config must be one of {kinds}, got a {type(config).__name__}")
    main, command = _COMMANDS[type(config)]
    if dataset is not None:
        config = dataclasses.replace(config, dataset_name=str(keep_dataset(dataset)))
    with started_as(command), _state_of_its_own():
        try:
            folder = main(config)
        except SystemExit as exit:  # which is how a run ends after a signal, when it has saved a checkpoint
            kept = "the run was interrupted: its last checkpoint is kept, and resume_from_checkpoint='latest' goes on from there"
            raise Interrupted(kept, exit.code - 128 if isinstance(exit.code, int) else 2) from None
    return load_trained(folder)


def load_trained(folder: Path) -> DiffusionPipeline | ModelMixin:
    """What a run has saved: a pipeline, or a model by itself."""
    if (folder / "model_index.json").is_file():
        return diffusers.DiffusionPipeline.from_pretrained(folder)
    return getattr(diffusers_ext, read_json(folder / "config.json")["_class_name"]).from_pretrained(folder)


@contextmanager
def _state_of_its_own() -> Iterator[None]:
    """Lets a run choose its precision whatever an `Accelerator` of this process has chosen, which has it again afterwards."""
    kept = {state: dict(state._shared_state) for state in (AcceleratorState, GradientState)}
    for state in kept:
        state._shared_state.clear()
    try:
        yield
    finally:
        for state, values in kept.items():
            state._shared_state.clear()
            state._shared_state.update(values)
