"""How soon a network of features orders guidances as one does that is fully trained, with labels and without.

    python benchmarks/bench_quick_features.py runs/a runs/b --dataset_name path/to/images --resolution 32 --features runs/features

Sets of images of each PIPELINE, from the same noise and under eight guidances, are compared with held-out images. The table has
Spearman's correlation of their Fréchet distances with those in --features, and the distance in these of the set that the network
puts first, divided by the least: what choosing by that network costs. Without guidance that is the last line.
"""

import argparse
import time

import torch
from scipy.stats import spearmanr
from torch import Tensor

from diffusers_ext.calibration.guidance import FIRST_INTERVAL, FULL_SCALES, LIMITED_SCALES
from diffusers_ext.data.config import DataConfig
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.feature_folders import load_features
from diffusers_ext.evaluation.feature_training import fit_feature_classifier
from diffusers_ext.evaluation.generate import generate_images
from diffusers_ext.evaluation.real_images import load_real_images
from diffusers_ext.evaluation.self_supervised import fit_features_without_labels
from diffusers_ext.evaluation.subject import labels_for, load_pipeline


# As a calibration tries them first, and one more in all steps.
GUIDANCES = [
    *({"guidance_scale": scale} for scale in (1.0, *FULL_SCALES, 4.0)),
    *({"guidance_scale": scale, "guidance_interval": FIRST_INTERVAL} for scale in LIMITED_SCALES),
]
NUM_NEIGHBOURS = 3
FITS = {"with labels": fit_feature_classifier, "without": fit_features_without_labels}


def compared(wanted: list[float], found: list[float]) -> tuple[float, float]:
    """Spearman's correlation of two rows of distances, and what choosing by the second costs in the first."""
    chosen = min(range(len(found)), key=found.__getitem__)
    return float(spearmanr(wanted, found).statistic), wanted[chosen] / min(wanted)


def row(name: str, pairs: list[tuple[float, float]], seconds: float | None) -> str:
    """In Markdown."""
    cells = [f"{correlation:.2f}, {cost:.2f}" for correlation, cost in pairs]
    return f"| {name} | {'' if seconds is None else f'{seconds:.0f} s'} | {' | '.join(cells)} |"


def main(arguments: argparse.Namespace) -> None:
    real = load_real_images(DataConfig(dataset_name=arguments.dataset_name, resolution=(arguments.resolution,) * 2))
    sets: list[list[Tensor]] = []
    for name in arguments.pipelines:
        pipe = load_pipeline(name)
        labels, _ = labels_for(real, pipe.denoiser_num_classes, arguments.num_images)
        make = {"labels": labels, "num_inference_steps": arguments.num_inference_steps, "seed": arguments.seed}
        sets.append([generate_images(pipe, range(len(labels)), settings=settings, **make) for settings in GUIDANCES])

    def distances(network) -> list[list[float]]:
        evaluator = Evaluator(real.held_out, network, arguments.num_images, NUM_NEIGHBOURS, in_pixels=False)
        asked = torch.tensor(labels)
        return [[evaluator.measure(images, asked)["frechet_distance"] for images in each] for each in sets]

    wanted = distances(load_features(arguments.features)[0])
    print(f"| features, steps | trained in | {' | '.join(arguments.pipelines)} |\n|---|---|{'---|' * len(sets)}")
    for kind, fit in FITS.items():
        for num_steps in arguments.steps:
            start = time.perf_counter()
            network = fit(real.train, num_steps=num_steps, show_progress=False)
            seconds = time.perf_counter() - start
            pairs = [compared(*each) for each in zip(wanted, distances(network), strict=True)]
            print(row(f"{kind}, {num_steps}", pairs, seconds), flush=True)
    costs = " | ".join(f"{each[0] / min(each):.2f}" for each in wanted)
    print(f"| no guidance | | {costs} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipelines", nargs="+", help="of images by label")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--resolution", type=int, required=True)
    parser.add_argument("--features", required=True, help="folder of a network that is fully trained")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 100, 200, 400], help="of the training of others")
    parser.add_argument("--num_images", type=int, default=400, help="of each set")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=501, help="of the noise of the sets")
    main(parser.parse_args())
