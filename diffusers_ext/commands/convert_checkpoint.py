"""Make a pipeline of a checkpoint of OpenAI's guided-diffusion or improved-diffusion.

The command `diffusers-ext convert`; `training/convert_checkpoint.py` says how it is used.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from diffusers_ext import GuidedDiffusionPipeline
from diffusers_ext.atomic_files import finish_replacing
from diffusers_ext.conversion.guided_diffusion import NOISE_SCHEDULES, convert_unet, load_state, make_scheduler
from diffusers_ext.hub.saved_folder import loading_lines
from diffusers_ext.options import check_options, option, run_script
from diffusers_ext.trainer.run import save_atomically


@dataclass(frozen=True)
class ConvertConfig:
    """Make a pipeline of a checkpoint of guided-diffusion or improved-diffusion."""

    file: str | None = option(
        None, "FILE may also stand first, without --file: the checkpoint, .pt or .safetensors", "files"
    )
    output_dir: str | None = option(None, "folder for the pipeline; by default FILE without its suffix")
    image_size: int | None = option(None, "side of the images", "network", at_least=1)
    num_heads: int | None = option(None, "heads of attention, if their number was given", at_least=1)
    num_head_channels: int | None = option(None, "or the channels of each, if those were", at_least=1)
    use_new_attention_order: bool = option(False, "whether the network was made with it")
    noise_schedule: Literal[NOISE_SCHEDULES] = option("linear", "noise schedule", "diffusion")
    diffusion_steps: int = option(1000, "noise levels", at_least=1)
    predict_xstart: bool = option(False, "whether the network predicts x_0, and not the noise")

    def __post_init__(self):
        check_options(self)
        for name in ("file", "image_size"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be given: convert_checkpoint.py FILE --image_size SIDE")


def main(config: ConvertConfig) -> Path:
    """Converts a checkpoint and returns the folder of its pipeline."""
    output_dir = Path(config.output_dir or Path(config.file).with_suffix(""))
    finish_replacing(output_dir)
    # Hidden files are what a process has left that was ended here.
    if output_dir.exists() and (
        not output_dir.is_dir() or any(not p.name.startswith(".") for p in output_dir.iterdir())
    ):
        raise ValueError(f"output_dir must be a new or an empty folder, got {output_dir}")
    network = convert_unet(
        load_state(config.file),
        config.image_size,
        num_heads=config.num_heads,
        num_head_channels=config.num_head_channels,
        use_new_attention_order=config.use_new_attention_order,
    )
    scheduler = make_scheduler(network, config.noise_schedule, config.diffusion_steps, config.predict_xstart)
    pipe = GuidedDiffusionPipeline(network, scheduler, clip_guided_noise=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_atomically(pipe, output_dir)
    print(loading_lines(output_dir))
    return output_dir


run = partial(run_script, ConvertConfig, main, first="file")
