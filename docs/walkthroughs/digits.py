"""A diffusion model of digits: how it is trained from Python, and what its sampler does on the way from noise to digit.

python docs/walkthroughs/digits.py docs/figures/digits_steps.png
python docs/walkthroughs/digits.py docs/figures/digits_steps.png runs/my_digits

Draws the figure and prints the table of docs/walkthroughs/digits.md, of the model that ships with the package, or of one that it
trains first, into a folder.
"""

import sys

import torch
from diffusers import DPMSolverMultistepScheduler

import diffusers_ext
from diffusers_ext import GuidedDiffusionPipeline, TrainConfig, train
from diffusers_ext.figures import labelled_grid, save_picture


def train_digits(folder: str, **options) -> GuidedDiffusionPipeline:
    """A transformer of the digits of scikit-learn, which come with it."""
    config = TrainConfig(
        dataset_name="digits",
        model="dit",
        output_dir=folder,
        overwrite_output_dir=True,
        **({"max_train_steps": 800, "train_batch_size": 64, "hidden_size": 128, "num_layers": 4} | options),
    )
    return train(config)


def make_images(pipe, num_steps: int, columns: int, guidance_scale: float = 2.0) -> torch.Tensor:
    """An image of each of the first labels, each from a noise of its own: the same whatever the number of steps."""
    generators = [torch.Generator().manual_seed(index) for index in range(columns)]
    images = pipe(
        class_labels=list(range(columns)),
        generator=generators,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        output_type="pt",
    ).images
    return images.cpu()


def follow(pipe, label: int, num_steps: int) -> list[torch.Tensor]:
    """x_t after each step of one image."""
    seen = []

    def look(pipe, step, timestep, values):
        seen.append((values["latents"].clamp(-1, 1) + 1) / 2)
        return values

    generator = [torch.Generator().manual_seed(label)]
    pipe(class_labels=[label], generator=generator, num_inference_steps=num_steps, callback_on_step_end=look)
    return seen


def compare(pipe, columns: int = 10, steps: tuple[int, ...] = (1, 2, 5, 10, 50)) -> dict[str, torch.Tensor]:
    """Rows of images by their names, the last but one by another solver, and the last an image on its way."""
    rows = {f"DDIM, {n} step{'s' * (n > 1)}": make_images(pipe, n, columns) for n in steps}
    scheduler = pipe.scheduler
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)  # any solver of diffusers
    rows["DPM-Solver, 10 steps"] = make_images(pipe, 10, columns)
    pipe.scheduler = scheduler
    return rows | {"x_t of a 3, step by step": torch.cat(follow(pipe, label=3, num_steps=columns))}


def table_of(rows: dict[str, torch.Tensor]) -> str:
    """In Markdown, the root mean square distance of each row of images from that of most steps, the last of DDIM."""
    *images, _ = rows.items()
    _, exact = images[-2]
    lines = [f"| {name} | {(row - exact).square().mean().sqrt():.3f} |" for name, row in images]
    return "\n".join(["| sampler | distance |", "|---|---|", *lines])


def main(path: str, folder: str | None = None) -> None:
    pipe = diffusers_ext.example("digits") if folder is None else train_digits(folder)
    pipe.set_progress_bar_config(disable=True)
    rows = compare(pipe)
    print(table_of(rows))
    save_picture(labelled_grid(list(rows.values()), names=list(rows)), path)


if __name__ == "__main__":
    main(*sys.argv[1:])
