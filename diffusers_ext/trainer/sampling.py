"""Pictures that a pipeline makes of itself. They draw from their own generators, so that training is none the wiser."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ext.latents import decode_latents
from diffusers_ext.trainer.denoising import DenoisingConfig
from diffusers_ext.trainer.figures import labelled_grid, save_picture
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.run import save_whole


MAX_ROWS = 16


def draw_samples(
    pipe: DiffusionPipeline,
    path: Path,
    *,
    accelerator: Accelerator | None = None,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    columns: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    **settings,
) -> Image.Image | None:
    """A grid of samples with one row for each label or text, or of as many rows as columns without either.

    Args:
        accelerator: If given, all processes call this and share the samples; the main one draws them.
        labels, prompts, names: Of the rows; more than 16 rows are not drawn.
        seed: Picture i is made from seed `seed + i`.
        settings: For the pipeline's call, such as `num_inference_steps` and `guidance_scale`.

    Returns:
        The grid, as saved; None in the other processes.
    """
    word, each = ("class_labels", labels) if prompts is None else ("prompt", prompts)
    each = None if each is None else list(each)[:MAX_ROWS]
    rows = columns if each is None else len(each)
    number, index, processes = rows * columns, 0, 1
    if accelerator is not None:
        index, processes = accelerator.process_index, accelerator.num_processes
    share = -(-number // processes)
    # Of one length in each process, as gathering takes it: those beyond the last are the first again.
    mine = [place % number for place in range(index * share, (index + 1) * share)]
    images = []
    for start in range(0, share, batch_size):
        places = mine[start : start + batch_size]
        generators = [torch.Generator(pipe.device).manual_seed(seed + place) for place in places]
        asked = {"batch_size": len(places)}
        if each is not None:
            asked = {word: [each[place // columns] for place in places]}
        images.append(pipe(**asked, generator=generators, output_type="pt", **settings).images.float())
    images = torch.cat(images)
    if accelerator is not None:
        images = accelerator.gather(images.contiguous())
        if not accelerator.is_main_process:
            return None
    images = images[:number].cpu().unflatten(0, (rows, columns))
    grid = labelled_grid(images, names and names[:rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(grid, path)
    return grid


def log_image(accelerator: Accelerator, name: str, image: Image.Image | None, step: int) -> None:
    """Gives a picture to the trackers that take pictures. None, as in processes that have none, is no picture."""
    for tracker in accelerator.trackers if image is not None else ():
        match tracker.name:
            case "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            case "wandb" | "swanlab":
                tracker.log_images({name: [image]}, step=step)
            case "aim":
                tracker.log_images({name: image}, step=step)
            case "clearml":
                tracker.log_images({name: np.asarray(image)}, step=step)


def draw_denoising(
    pipe: DiffusionPipeline,
    path: Path,
    *,
    label: int | None = None,
    prompt: str | None = None,
    num_inference_steps: int,
    columns: int = 8,
    seed: int = 0,
    **settings,
) -> None:
    """A strip with x_t above the predicted x_0, from the first step to the last at evenly spaced ones.

    Those of a pipeline in latents are decoded.
    """
    last = num_inference_steps - 1
    steps = sorted({round(place * last / max(columns - 1, 1)) for place in range(columns)})
    asked = {"batch_size": 1} if label is None else {"class_labels": [label]}
    asked = asked if prompt is None else {"prompt": [prompt]}
    generator = [torch.Generator(pipe.device).manual_seed(seed)]
    trajectory = pipe(
        **asked,
        generator=generator,
        output_type="pt",
        num_inference_steps=num_inference_steps,
        trajectory_steps=steps,
        **settings,
    ).trajectory
    x_t = torch.cat([noisy[:1] for _, noisy, _ in trajectory])
    x0_hat = torch.cat([clean[:1] for _, _, clean in trajectory])
    heads, names, rows = (
        [f"t = {int(timestep)}" for timestep, _, _ in trajectory],
        ["x_t", "predicted x_0"],
        [x_t, x0_hat],
    )
    if getattr(pipe, "vae", None) is not None:
        names = [f"{name}, decoded" for name in names]
        with torch.no_grad():
            rows = [decode_latents(pipe.vae, row) for row in rows]
    save_picture(labelled_grid([(row.float() + 1) / 2 for row in rows], names, heads), path)


def draw_while_training(
    pipeline: Callable[[Trainer], AbstractContextManager[DiffusionPipeline]], rows: dict[str, Any], trainer: Trainer
) -> None:
    """Samples of the averaged weights, at `samples/step-STEP.png` and in the trackers; the processes share them.

    Args:
        pipeline: Gives the pipeline as it stands, with the averaged weights.
        rows: `labels` or `prompts`, and `names`, of `draw_samples`.
    """
    path = trainer.output_dir / "samples" / f"step-{trainer.state.step:07}.png"
    with pipeline(trainer) as pipe:
        grid = draw_samples(pipe, path, accelerator=trainer.accelerator, **rows, **grid_settings(trainer.config))
    log_image(trainer.accelerator, "samples", grid, trainer.state.step)


def save_and_draw(
    pipeline: Callable[[Trainer], AbstractContextManager[DiffusionPipeline]],
    rows: dict[str, Any],
    trainer: Trainer,
    **condition,
) -> None:
    """Saves the pipeline, and draws the sample grid, which the processes share, and the denoising strip, from it as saved.

    Args:
        pipeline, rows: Of `draw_while_training`.
        condition: `label` or `prompt` of `draw_denoising`.
    """
    config, accelerator, output_dir = trainer.config, trainer.accelerator, trainer.output_dir
    with pipeline(trainer) as pipe:
        if accelerator.is_main_process:
            save_whole(pipe, output_dir)
    accelerator.print("drawing samples and the denoising of one of them ...", flush=True)
    accelerator.wait_for_everyone()
    pipe = DiffusionPipeline.from_pretrained(output_dir).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    with accelerator.autocast():
        grid = draw_samples(pipe, output_dir / "samples.png", accelerator=accelerator, **rows, **grid_settings(config))
        log_image(accelerator, "samples", grid, trainer.state.step)
        if accelerator.is_main_process:
            draw_denoising(
                pipe,
                output_dir / "denoising.png",
                **condition,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                seed=config.seed,
            )
    # Ends the last gathering everywhere: a process that leaves during it can hang in gloo's destructor.
    accelerator.wait_for_everyone()


def grid_settings(config: DenoisingConfig) -> dict[str, Any]:
    """What the options say of sample grids, for `draw_samples`."""
    return {
        "columns": config.sample_columns,
        "seed": config.seed,
        "batch_size": config.eval_batch_size or config.train_batch_size,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.guidance_scale,
    }
