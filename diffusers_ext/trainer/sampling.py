"""Pictures that a pipeline makes of itself. They draw from their own generators, so that training is none the wiser."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from diffusers_ext.trainer.figures import labelled_grid


MAX_ROWS = 16


def draw_samples(
    pipe: DiffusionPipeline,
    path: Path,
    *,
    labels: Sequence[int] | None,
    names: Sequence[str] | None = None,
    columns: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    **settings,
) -> None:
    """A grid of samples with one row for each label, or of as many rows as columns without labels.

    Args:
        labels, names: Of the rows; more than 16 rows are not drawn.
        seed: Picture i is made from seed `seed + i`.
        settings: For the pipeline's call, such as `num_inference_steps` and `guidance_scale`.
    """
    labels = None if labels is None else list(labels)[:MAX_ROWS]
    rows = columns if labels is None else len(labels)
    images = []
    for start in range(0, rows * columns, batch_size):
        numbers = range(start, min(start + batch_size, rows * columns))
        generators = [torch.Generator(pipe.device).manual_seed(seed + number) for number in numbers]
        asked = {"batch_size": len(numbers)}
        if labels is not None:
            asked = {"class_labels": [labels[number // columns] for number in numbers]}
        images.append(pipe(**asked, generator=generators, output_type="pt", **settings).images.float().cpu())
    grid = labelled_grid(torch.cat(images).unflatten(0, (rows, columns)), names if labels is None else names[:rows])
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


def draw_denoising(
    pipe: DiffusionPipeline,
    path: Path,
    *,
    label: int | None,
    num_inference_steps: int,
    columns: int = 8,
    seed: int = 0,
    **settings,
) -> None:
    """A strip with x_t above the predicted x_0, from the first step to the last at evenly spaced ones."""
    last = num_inference_steps - 1
    steps = sorted({round(place * last / max(columns - 1, 1)) for place in range(columns)})
    asked = {"batch_size": 1} if label is None else {"class_labels": [label]}
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
    heads = [f"t = {int(timestep)}" for timestep, _, _ in trajectory]
    labelled_grid([(x_t + 1) / 2, (x0_hat + 1) / 2], ["x_t", "predicted x_0"], heads).save(path)
