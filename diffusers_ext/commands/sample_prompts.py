"""Draw texts at several guidance scales, as one picture.

The command `diffusers-ext sample-prompts`; `training/sample_prompts.py` says how it is used.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from diffusers_ext import TextGuidedDiffusionPipeline
from diffusers_ext.command_names import name_commands
from diffusers_ext.draws import check_seed
from diffusers_ext.evaluation.generate import sample_images
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.figures import labelled_grid, save_picture
from diffusers_ext.guidance.guided_denoiser import check_guidance_scale
from diffusers_ext.options import check_options, option, run_script


@dataclass(frozen=True)
class SampleConfig:
    """Draw texts at several guidance scales, as one picture."""

    run: str | None = option(None, "RUN may also stand first, without --run: folder or name of the pipeline")
    prompts: tuple[str, ...] | None = option(None, "the texts, one for each row")
    negative_prompt: str | None = option(None, "what to lead away from, in place of the empty text")
    guidance_scales: tuple[float, ...] = option((1.0, 2.0, 4.0, 8.0), "one for each column; 1 is no guidance")
    num_images_per_prompt: int = option(1, "pictures of a text at a scale, side by side", at_least=1)
    num_inference_steps: int = option(50, "steps of the sampler", at_least=1)
    seed: int = option(0, "picture k of each text is made from seed + k")
    output: str | None = option(None, "where to save the picture; by default RUN/guidance_scales.png")

    def __post_init__(self):
        if self.run is None:
            raise ValueError(name_commands("say which pipeline: training/sample_prompts.py RUN --prompts TEXT ..."))
        if not self.prompts:
            raise ValueError("prompts must be given: --prompts TEXT ...")
        check_options(self)
        check_seed(self.seed)
        if self.output is None and not Path(self.run).is_dir():
            raise ValueError("output must be given for a pipeline that is not in a folder")
        if not self.guidance_scales:
            raise ValueError("guidance_scales must be given: --guidance_scales 1 2 4")
        for scale in self.guidance_scales:
            check_guidance_scale(scale)
        if self.output is not None and Path(self.output).suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"output must be the path of a picture, such as samples.png, got {self.output}")
        if self.negative_prompt is not None and 1.0 in self.guidance_scales:
            raise ValueError("negative_prompt has no meaning at a guidance scale of 1: leave that scale out")


def main(config: SampleConfig) -> Path:
    """Draws the picture and returns its path."""
    pipe = load_pipeline(config.run)
    if not isinstance(pipe, TextGuidedDiffusionPipeline):
        raise ValueError(f"{config.run} must be a pipeline that makes images from texts, got a {type(pipe).__name__}")
    if pipe.guider is not None:
        print(f"the pipeline's own guider, {type(pipe.guider).__name__}, gives way to the guidance scales")
        pipe.register_modules(guider=None)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    path = Path(config.output or Path(config.run) / "guidance_scales.png")
    picture = draw_guidance_scales(
        pipe,
        config.prompts,
        config.guidance_scales,
        columns=config.num_images_per_prompt,
        seed=config.seed,
        num_inference_steps=config.num_inference_steps,
        negative_prompt=config.negative_prompt,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(picture, path)
    print(f"{len(config.prompts)} texts at {len(config.guidance_scales)} guidance scales: {path}")
    return path


def draw_guidance_scales(
    pipe: TextGuidedDiffusionPipeline,
    prompts: tuple[str, ...],
    scales: tuple[float, ...],
    *,
    columns: int = 1,
    seed: int = 0,
    **settings,
) -> Image.Image:
    """A row for each text, and `columns` pictures from the same noise for each scale.

    Args:
        settings: For the pipeline's call.
    """
    seeds = [seed + k for _ in prompts for k in range(columns)]
    each = [prompt for prompt in prompts for _ in range(columns)]
    by_scale = []
    for scale in scales:
        (images,) = sample_images(
            pipe,
            seeds,
            prompts=each,
            batch_size=len(seeds),
            device=pipe.device,
            guidance_scale=scale,
            **settings,
        )
        by_scale.append(images.unflatten(0, (len(prompts), columns)))
    heads = [f"w = {scale:g}" if k == 0 else "" for scale in scales for k in range(columns)]
    return labelled_grid(torch.cat(by_scale, dim=1), list(prompts), heads)


run = partial(run_script, SampleConfig, main, first="run")
