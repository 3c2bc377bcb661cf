"""Make a pipeline of a checkpoint of guided-diffusion, improved-diffusion or denoising_diffusion_pytorch.

The command `diffusers-ext convert`; `training/convert_checkpoint.py` says how it is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

from diffusers_ext import GuidedDiffusionPipeline
from diffusers_ext.atomic_files import finish_replacing
from diffusers_ext.conversion import guided_diffusion, lucidrains
from diffusers_ext.conversion.files import load_checkpoint
from diffusers_ext.hub.saved_folder import loading_lines
from diffusers_ext.options import check_options, option, run_script
from diffusers_ext.trainer.run import save_atomically


@dataclass(frozen=True)
class ConvertConfig:
    """Make a pipeline of a checkpoint of guided-diffusion, improved-diffusion or denoising_diffusion_pytorch."""

    file: str | None = option(
        None, "FILE may also stand first, without --file: the checkpoint, .pt or .safetensors", "files"
    )
    output_dir: str | None = option(None, "folder for the pipeline; by default FILE without its suffix")
    image_size: int | None = option(None, "side of the images", "network", at_least=1)
    noise_schedule: Literal[lucidrains.NOISE_SCHEDULES] | None = option(
        None,
        "noise schedule, linear by default; denoising_diffusion_pytorch saves it beside the network, and it is given for a "
        "network alone",
        "diffusion",
    )
    diffusion_steps: int = option(1000, "noise levels, where the checkpoint does not say", at_least=1)

    num_heads: int | None = option(
        None, "heads of attention, if their number was given", "of guided-diffusion and improved-diffusion", at_least=1
    )
    num_head_channels: int | None = option(None, "or the channels of each, if those were", at_least=1)
    use_new_attention_order: bool = option(False, "whether the network was made with it")
    predict_xstart: bool = option(False, "whether the network predicts x_0, and not the noise")
    rescale_timesteps: bool | None = option(
        None,
        "whether the network was given timesteps of 1000, whatever diffusion_steps is: the default of improved-diffusion, and "
        "not of guided-diffusion; asked for where diffusion_steps is not 1000",
    )

    use_ema: bool = option(
        True, "take the averaged weights of a trainer's checkpoint", "of denoising_diffusion_pytorch"
    )
    objective: Literal[lucidrains.OBJECTIVES] | None = option(
        None, "what the network predicts, where the checkpoint does not say"
    )
    sinusoidal_pos_emb_theta: float = option(10000.0, "as the network was made with it")

    def __post_init__(self):
        check_options(self)
        for name in ("file", "image_size"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be given: convert_checkpoint.py FILE --image_size SIDE")

    def refuse(self, names: tuple[str, ...], project: str) -> None:
        """Refuses options of another project's checkpoints.

        Raises:
            ValueError: with the option.
        """
        defaults = {each.name: each.default for each in fields(self)}
        for name in names:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} is of checkpoints of {project}, and {self.file} is none: leave it out")


OF_GUIDED_DIFFUSION = (
    "num_heads",
    "num_head_channels",
    "use_new_attention_order",
    "predict_xstart",
    "rescale_timesteps",
)
OF_LUCIDRAINS = ("use_ema", "objective", "sinusoidal_pos_emb_theta")


def main(config: ConvertConfig) -> Path:
    """Converts a checkpoint and returns the folder of its pipeline."""
    output_dir = Path(config.output_dir or Path(config.file).with_suffix(""))
    finish_replacing(output_dir)
    # Hidden files are what a process has left that was ended here.
    if output_dir.exists() and (
        not output_dir.is_dir() or any(not p.name.startswith(".") for p in output_dir.iterdir())
    ):
        raise ValueError(f"output_dir must be a new or an empty folder, got {output_dir}")
    checkpoint = load_checkpoint(config.file)
    pipe = (_of_lucidrains if lucidrains.is_lucidrains(checkpoint) else _of_guided_diffusion)(config, checkpoint)
    output_dir.mkdir(parents=True, exist_ok=True)
    save_atomically(pipe, output_dir)
    print(loading_lines(output_dir))
    return output_dir


def _of_guided_diffusion(config: ConvertConfig, checkpoint: Mapping[str, Any]) -> GuidedDiffusionPipeline:
    config.refuse(OF_LUCIDRAINS, "denoising_diffusion_pytorch")
    network = guided_diffusion.convert_unet(
        guided_diffusion.tensors_of(checkpoint, config.file),
        config.image_size,
        num_heads=config.num_heads,
        num_head_channels=config.num_head_channels,
        use_new_attention_order=config.use_new_attention_order,
    )
    scheduler = guided_diffusion.make_scheduler(
        network,
        config.noise_schedule or "linear",
        config.diffusion_steps,
        config.predict_xstart,
        config.rescale_timesteps,
    )
    return GuidedDiffusionPipeline(network, scheduler, clip_guided_noise=True)


def _of_lucidrains(config: ConvertConfig, checkpoint: Mapping[str, Any]) -> GuidedDiffusionPipeline:
    config.refuse(OF_GUIDED_DIFFUSION, "guided-diffusion and improved-diffusion")
    found = lucidrains.read_checkpoint(checkpoint, config.use_ema)
    network = lucidrains.convert_network(found.weights, config.image_size, max_period=config.sinusoidal_pos_emb_theta)
    scheduler = lucidrains.make_scheduler(
        found,
        network,
        objective=config.objective,
        noise_schedule=config.noise_schedule,
        diffusion_steps=config.diffusion_steps,
    )
    return GuidedDiffusionPipeline(network, scheduler)


run = partial(run_script, ConvertConfig, main, first="file")
