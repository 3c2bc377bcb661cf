"""Pictures of a training run's samples.

They have generators of their own, so that the training draws the same random numbers without them.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.stream import StreamData
from diffusers_ext.evaluation.animation import as_shown
from diffusers_ext.evaluation.generate import condition_of, sample_images, shared_by_processes
from diffusers_ext.figures import labelled_grid, save_picture
from diffusers_ext.recipes.condition_grids import SAMPLES_OF_EACH, ConditionPictures
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.trainer.ending import EndingCost, seconds_of
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.progress import counting_bar
from diffusers_ext.trainer.run import save_atomically
from diffusers_ext.trainer.trackers import log_picture


MAX_ROWS = 16
MIN_STEPS = 10
MAX_TRIAL_SHARE = 0.01  # of a run's time: a step that takes more is not taken again to know better how long it takes


def draw_samples(
    pipe: DiffusionPipeline,
    path: Path,
    *,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    conditions: ConditionPictures | None = None,
    columns: int = 8,
    seed: int = 0,
    batch_size: int = 64,
    **settings: Any,
) -> Image.Image | None:
    """A grid of samples with one row for each label or text, or of as many rows as columns without either.

    With condition images each has a column: itself, its samples, and the image that it is of.

    All processes call this and share the samples; the main one draws them.

    Args:
        labels, prompts, names: Of the rows; more than 16 rows are not drawn. With condition images, labels and prompts are of
            the columns.
        conditions: Pictures of the columns.
        seed: Picture i is made from seed `seed + i`.
        settings: For the pipeline's call, such as `num_inference_steps` and `guidance_scale`.

    Returns:
        The grid, as saved; None in the other processes.
    """
    rows, columns, each = _pictures_of(columns, labels, prompts, conditions)

    def make(indices: range) -> Tensor:
        asked = {name: [values[i] for i in indices] for name, values in each.items()}
        seeds = [seed + i for i in indices]
        return torch.cat([*sample_images(pipe, seeds, batch_size=batch_size, device=pipe.device, **asked, **settings)])

    images = shared_by_processes(rows * columns, make)
    if not PartialState().is_main_process:
        return None
    drawn = list(images.unflatten(0, (rows, columns)))
    if conditions is None:
        names = names and names[:rows]
    else:
        drawn = [conditions.shown[:columns], *drawn, conditions.images[:columns]]
    grid = labelled_grid(drawn, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(grid, path)
    return grid


def _pictures_of(
    columns: int,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    conditions: ConditionPictures | None = None,
) -> tuple[int, int, dict[str, list]]:
    """Rows and columns of the samples in a grid, and the `labels`, `prompts` or `conditions` of each, row by row."""
    if conditions is not None:
        columns = min(columns, len(conditions))
        of_columns = {"labels": labels, "prompts": prompts, "conditions": conditions.conditions}
        of_columns = {name: list(values[:columns]) for name, values in of_columns.items() if values is not None}
        return SAMPLES_OF_EACH, columns, {name: values * SAMPLES_OF_EACH for name, values in of_columns.items()}
    of_rows = labels if prompts is None else prompts
    if of_rows is None:
        return columns, columns, {}
    of_rows = list(of_rows)[:MAX_ROWS]
    name = "labels" if prompts is None else "prompts"
    return len(of_rows), columns, {name: [row for row in of_rows for _ in range(columns)]}


def rows_by_label(data: ImageData | StreamData) -> dict[str, list | None]:
    """The rows of a grid: one for each label that images have."""
    if data.id2label is None:
        return {"labels": None, "names": None}
    return {"labels": data.used_labels, "names": [data.id2label[label] for label in data.used_labels]}


def first_of(rows: dict[str, Any]) -> dict[str, Any]:
    """The condition of the first picture of a grid, as `draw_denoising` takes it."""
    _, _, each = _pictures_of(1, **{name: value for name, value in rows.items() if name != "names"})
    return {name.removesuffix("s"): values[0] for name, values in each.items()}


def draw_denoising(
    pipe: DiffusionPipeline,
    path: Path,
    *,
    label: int | None = None,
    prompt: str | None = None,
    condition: Tensor | None = None,
    num_inference_steps: int,
    columns: int = 8,
    seed: int = 0,
    **settings,
) -> None:
    """A strip with x_t above the predicted x_0, from the first step to the last at evenly spaced ones.

    Those of a pipeline in latents are decoded, and those of one with statistics shown with the mean of the data.
    """
    last = num_inference_steps - 1
    steps = sorted({round(column * last / max(columns - 1, 1)) for column in range(columns)})
    each = (None if value is None else [value] for value in (label, prompt, condition))
    trajectory = pipe(
        **condition_of(1, *each),
        generator=[torch.Generator(pipe.device).manual_seed(seed)],
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
    labels = None if label is None else torch.tensor([label])
    shown = [as_shown(pipe, row, labels) for row in rows]
    save_picture(labelled_grid(shown, names, heads), path)


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
        grid = draw_samples(pipe, path, **rows, **grid_settings(trainer.config))
    log_picture(trainer.accelerator, "samples", grid, trainer.state.step, _caption(rows))


def _caption(rows: dict[str, Any]) -> str:
    """What the rows or columns of a grid show, for trackers."""
    names = list(rows.get("names") or ())[:MAX_ROWS]
    if rows.get("conditions") is not None:
        return "condition images, samples of each, and the images that they are of"
    return f"a row each of {', '.join(map(str, names))}" if names else "samples"


def drawing_cost(
    pipeline: Callable[[Trainer], AbstractContextManager[DiffusionPipeline]], rows: dict[str, Any], trainer: Trainer
) -> EndingCost:
    """Seconds of `save_and_draw`, from a few steps with the network as it is. Its arguments are those of that."""
    config, accelerator = trainer.config, trainer.accelerator
    num_rows, columns, each = _pictures_of(config.sample_columns, *map(rows.get, ("labels", "prompts", "conditions")))
    share = -(-num_rows * columns // accelerator.num_processes)
    count = min(share, grid_settings(config)["batch_size"])
    steps = config.num_inference_steps
    # What is sampled in the end is loaded anew, and not compiled.
    eager = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
    with pipeline(trainer) as pipe, accelerator.autocast(), eager:

        def seconds(number: int, num_inference_steps: int) -> float:
            condition = condition_of(number, **{name: values[:number] for name, values in each.items()})
            settings = {"guidance_scale": config.grid_guidance_scale, "num_inference_steps": num_inference_steps}
            return seconds_of(lambda: pipe(**condition, output_type="pt", **settings).images.cpu())

        def seconds_of_batch(number: int) -> tuple[float, float]:
            """Of a step, and of what is done once, such as decoding."""
            first = seconds(number, 1)  # the first call of a shape makes ready what the next ones use
            if first > MAX_TRIAL_SHARE * trainer.budget.max_seconds:
                return first, 0.0
            few = min(3, steps)
            one = seconds(number, 1)
            step = (seconds(number, few) - one) / (few - 1) if few > 1 else one
            return max(step, 0.0), max(one - step, 0.0)

        step, once = seconds_of_batch(count)
        strip_step, _ = seconds_of_batch(1)
    decoded = share + 2 * config.sample_columns  # the strip shows x_t and the predicted x_0
    return EndingCost(fixed=once * decoded / count, scalable=steps * (step * share / count + strip_step))


def save_and_draw(
    pipeline: Callable[[Trainer], AbstractContextManager[DiffusionPipeline]],
    rows: dict[str, Any],
    trainer: Trainer,
    **condition,
) -> None:
    """Saves the pipeline, and draws the sample grid, which the processes share, and the denoising strip, from it as saved.

    In a run by time they are drawn in fewer steps, or with fewer columns, if the time is too short for all.

    Args:
        pipeline, rows: Of `draw_while_training`.
        condition: `label`, `prompt` and `condition` of `draw_denoising`.
    """
    config, accelerator, output_dir = trainer.config, trainer.accelerator, trainer.output_dir
    with pipeline(trainer) as pipe:
        if accelerator.is_main_process:
            save_atomically(pipe, output_dir)
    accelerator.wait_for_everyone()
    pipe = DiffusionPipeline.from_pretrained(output_dir).to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    settings = grid_settings(config)
    steps, columns = fitting(trainer.ending.share(), config.num_inference_steps, config.sample_columns)
    if (steps, columns) != (config.num_inference_steps, config.sample_columns):
        accelerator.print(
            f"drawing with {steps} of {config.num_inference_steps} steps and {columns} of {config.sample_columns} "
            "columns, to end within --max_train_time"
        )
    settings |= {"num_inference_steps": steps, "columns": columns}
    num_rows, num_columns, _ = _pictures_of(columns, *map(rows.get, ("labels", "prompts", "conditions")))
    batches = math.ceil(math.ceil(num_rows * num_columns / accelerator.num_processes) / settings["batch_size"])
    bar = counting_bar((batches + 1) * steps, "drawing: step", enabled=accelerator.is_main_process)

    def count(*_):
        bar.update()

    with accelerator.autocast(), closing(bar):
        draw_samples(pipe, output_dir / "samples.png", callback_on_step_end=count, **rows, **settings)
        if accelerator.is_main_process:
            draw_denoising(
                pipe,
                output_dir / "denoising.png",
                **condition,
                num_inference_steps=steps,
                guidance_scale=config.grid_guidance_scale,
                seed=config.seed,
                callback_on_step_end=count,
            )
    # Ends the last gathering everywhere: a process that leaves during it can hang in gloo's destructor.
    accelerator.wait_for_everyone()


def fitting(share: float, steps: int, columns: int) -> tuple[int, int]:
    """Sampling steps and columns of a grid that take about this share of the time of all of them; at least a column.

    First the steps become fewer, down to `MIN_STEPS`, with which a picture still shows something; then the columns.
    """
    fewer = max(math.floor(share * steps), min(MIN_STEPS, steps))
    return fewer, max(1, min(columns, math.floor(columns * share * steps / fewer)))


def grid_settings(config: DenoisingConfig) -> dict[str, Any]:
    """The options of sample grids, as arguments of `draw_samples`."""
    return {
        "columns": config.sample_columns,
        "seed": config.seed,
        "batch_size": config.eval_batch_size or config.train_batch_size,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": config.grid_guidance_scale,
    }
