"""How networks of features, and plain pixels, order sets of images of known quality: beside the first network, by rank.

    python benchmarks/bench_features.py runs/digits --dataset_name digits --resolution 8 --features a=runs/a b=runs/b

A set has held-out images, as they are, with noise or blurred in three strengths, or images of the PIPELINE in 2, 5, 10 and 25
steps. The table has each set's Fréchet distance from the training images, and Spearman's correlation with the first column.
"""

import argparse

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from scipy.stats import spearmanr
from torch import Generator, Tensor

from diffusers_ext.data.config import DataConfig
from diffusers_ext.evaluation.feature_folders import load_features
from diffusers_ext.evaluation.generate import generate_images
from diffusers_ext.evaluation.real_images import RealImages, load_real_images
from diffusers_ext.evaluation.subject import labels_for, load_pipeline
from diffusers_ext.metrics.frechet import FeatureStatistics, frechet_distance


NOISES = (8, 16, 32)  # standard deviations, on the scale of 256 values
BLURS = (0.5, 0.75, 1.0)  # the same, in pixels
STEPS = (2, 5, 10, 25)
REFERENCE = 10_000  # training images that are looked at, at most


def image_sets(real: RealImages, pipeline, number: int) -> dict[str, Tensor]:
    """Sets of up to `number` images, uint8, shape `(images, channels, height, width)`, by name."""
    held_out = real.held_out.images[:number]
    values, noise = (
        held_out.numpy().astype(np.float32),
        torch.randn(held_out.shape, generator=Generator().manual_seed(0)),
    )
    changed = {f"noise {std}": values + std * noise.numpy() for std in NOISES}
    changed |= {f"blur {std:g}": gaussian_filter1d(gaussian_filter1d(values, std, 2), std, 3) for std in BLURS}
    sets = {name: torch.from_numpy(one).round().clamp(0, 255).to(torch.uint8) for name, one in changed.items()}
    labels, _ = labels_for(real, pipeline.denoiser_num_classes, len(held_out))
    for steps in STEPS:
        sets[f"{steps} steps"] = generate_images(
            pipeline, range(len(held_out)), labels=labels, num_inference_steps=steps, guidance_scale=1.0
        )
    return {"held out": held_out} | sets


def distances(features, train: Tensor, sets: dict[str, Tensor]) -> dict[str, float]:
    """Fréchet distances of sets from training images, by name."""

    def statistics(images: Tensor) -> FeatureStatistics:
        rows = features(images)
        return FeatureStatistics(rows.shape[1]).update(rows)

    reference = statistics(train)
    return {name: frechet_distance(reference, statistics(images)) for name, images in sets.items()}


def table(columns: dict[str, dict[str, float]]) -> str:
    """In Markdown, the correlations last."""
    first = list(next(iter(columns.values())).values())
    lines = [f"| images | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for name in next(iter(columns.values())):
        lines.append(f"| {name} | " + " | ".join(f"{column[name]:.3g}" for column in columns.values()) + " |")
    correlations = [spearmanr(first, list(column.values())).statistic for column in columns.values()]
    return "\n".join([*lines, "| Spearman's correlation | " + " | ".join(f"{one:.2f}" for one in correlations) + " |"])


def main(arguments: argparse.Namespace) -> None:
    data = DataConfig(dataset_name=arguments.dataset_name, resolution=(arguments.resolution,) * 2)
    real = load_real_images(data)
    sets = image_sets(real, load_pipeline(arguments.pipeline), arguments.num_images)
    train = real.train.images[torch.randperm(len(real.train), generator=Generator().manual_seed(1))[:REFERENCE]]
    ways = {}
    for name, folder in (one.split("=", 1) for one in arguments.features):
        network, _ = load_features(folder)
        ways[name] = lambda images, network=network: network.measure(images)[0]
    ways["pixels"] = lambda images: images.flatten(1).float() / 255
    print(table({name: distances(features, train, sets) for name, features in ways.items()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", help="of images by label")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument(
        "--features", nargs="+", required=True, metavar="NAME=FOLDER", help="the first is compared with"
    )
    parser.add_argument("--num_images", type=int, default=1000, help="of each set")
    main(parser.parse_args())
