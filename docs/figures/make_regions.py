"""One label on the left and another on the right: what classifiers of halves of real images find in each half.

python docs/figures/make_regions.py runs/fashion docs/figures/regions.png

Asks the pipeline of a training run for each pair of labels, by regions of half of the image and, beside that, by the same
weights over all of the image; draws the figure and prints the table of docs/conditions.md.
"""

import sys
from collections.abc import Callable
from itertools import permutations

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from diffusers_ext import DiffusionPipeline
from diffusers_ext.evaluation.options import DataOptions, take_options_of_run
from diffusers_ext.evaluation.pipeline_facts import image_size_of, label_names_of
from diffusers_ext.evaluation.real_images import RealImages, load_real_images
from diffusers_ext.figures import labelled_grid, save_picture


GUIDANCE_SCALE, STEPS = 3.0, 20
FIT_ON = 4000  # real images
SHOWN = 8  # pairs


def load(run: str) -> tuple[DiffusionPipeline, RealImages]:
    """The pipeline and the real images of a run."""
    pipe = DiffusionPipeline.from_pretrained(run)
    pipe.set_progress_bar_config(disable=True)
    options = take_options_of_run(DataOptions(resolution=image_size_of(pipe), max_train_samples=FIT_ON), run)
    return pipe, load_real_images(options.for_data(), options.held_out_split, label_names=label_names_of(pipe))


def halves(images: Tensor) -> list[Tensor]:
    """Left and right, shape `(images, values)`, in [0, 1]."""
    return [half.flatten(1).float() / 255 for half in images.chunk(2, dim=3)]


def classifiers_of(real: RealImages) -> tuple[list[Callable[[np.ndarray], np.ndarray]], list[float]]:
    """A classifier of left and one of right halves, fitted on training images, and their shares of right answers on held-out
    ones."""
    from sklearn.svm import SVC

    classify, right = [], []
    for train, held_out in zip(halves(real.train.images), halves(real.held_out.images), strict=True):
        svc = SVC(C=10).fit(train.numpy(), real.train.labels.numpy())
        classify.append(svc.predict)
        right.append(float((svc.predict(held_out.numpy()) == real.held_out.labels.numpy()).mean()))
    return classify, right


def sample(pipe: DiffusionPipeline, pairs: list[tuple[int, int]], steps: int) -> dict[str, Tensor]:
    """An image of each pair, by either way and from the same noise, uint8."""
    width = pipe.denoiser.config.sample_size
    width = width if isinstance(width, int) else width[1]
    left, full = np.zeros((width, width)), np.ones((width, width))
    left[:, : width // 2] = 1
    ways = {
        "a label in each half": lambda a, b: [(left, a, 1.0), (1 - left, b, 1.0)],
        "half of each label everywhere": lambda a, b: [(full, a, 0.5), (full, b, 0.5)],
    }
    images = {}
    for name, regions in ways.items():
        made = [
            pipe(
                regions=regions(*pair),
                num_inference_steps=steps,
                guidance_scale=GUIDANCE_SCALE,
                generator=Generator().manual_seed(seed),
                output_type="pt",
            ).images
            for seed, pair in enumerate(pairs)
        ]
        images[name] = torch.cat(made).mul(255).round().to(torch.uint8)
    return images


def table_of(images: dict[str, Tensor], pairs: list[tuple[int, int]], classify: list, right: list[float]) -> str:
    """How often the classifiers find the label that was asked for."""
    rows = ["| | left | right | both |", "|---|---|---|---|"]
    rows.append(f"| held-out real images | {right[0]:.1%} | {right[1]:.1%} | |")
    for name, made in images.items():
        found = [predict(half.numpy()) == np.array(asked) for predict, half, asked in zip(
            classify, halves(made), zip(*pairs, strict=True), strict=True
        )]  # fmt: skip
        rows.append(f"| {name} | {found[0].mean():.1%} | {found[1].mean():.1%} | {(found[0] & found[1]).mean():.1%} |")
    return "\n".join(rows)


def draw(images: dict[str, Tensor], pairs: list[tuple[int, int]], names: list[str]) -> Image.Image:
    """Some of the pairs, by either way."""
    shown = [round(index) for index in np.linspace(0, len(pairs) - 1, SHOWN)]
    heads = [f"{names[pairs[index][0]]} | {names[pairs[index][1]]}" for index in shown]
    return labelled_grid([made[shown] / 255 for made in images.values()], list(images), heads)


def main(run: str, path: str, steps: int = STEPS) -> str:
    pipe, real = load(run)
    pairs = list(permutations(range(len(real.train.label_names)), 2))
    images = sample(pipe, pairs, steps)
    table = table_of(images, pairs, *classifiers_of(real))
    print(table)
    save_picture(draw(images, pairs, real.train.label_names), path)
    return table


if __name__ == "__main__":
    main(*sys.argv[1:3])
