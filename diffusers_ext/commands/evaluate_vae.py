"""Measure an autoencoder on images that it was not trained on.

The command `diffusers-ext evaluate-vae`; `training/evaluate_vae.py` says how it is used.
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffusers_ext import HierarchicalVAEModel, VAEModel
from diffusers_ext.atomic_files import atomic_write, finish_replacing
from diffusers_ext.command_names import name_commands
from diffusers_ext.data.sequences import refuse_sequences
from diffusers_ext.diffusion.variational_bound import bits_per_dim
from diffusers_ext.draws import check_seed
from diffusers_ext.evaluation.evaluator import format_table
from diffusers_ext.evaluation.feature_folders import features_for
from diffusers_ext.evaluation.labelled_images import drawn_order
from diffusers_ext.evaluation.options import DataOptions, take_options_of_run
from diffusers_ext.evaluation.perceptual_distance import LPIPS_NETWORKS, load_distance
from diffusers_ext.evaluation.real_images import RealImages, load_real_images
from diffusers_ext.evaluation.report import describe_network, name_network
from diffusers_ext.hub.cards import Figure, add_figures
from diffusers_ext.machine import process_state, set_threads
from diffusers_ext.metrics.frechet import FeatureStatistics, frechet_distance
from diffusers_ext.metrics.reconstruction import multi_scale_ssim, psnr, rmse, ssim
from diffusers_ext.models.vae_likelihood import vae_likelihood
from diffusers_ext.options import option, parse_config, run_script, to_command
from diffusers_ext.pixels import to_images
from diffusers_ext.recipes.hierarchical_vae import LevelStatistics
from diffusers_ext.recipes.vae_objective import ACTIVE_VARIANCE, BINARIZATIONS, binarize
from diffusers_ext.recipes.vae_scale import LatentStatistics
from diffusers_ext.sizes import as_size
from diffusers_ext.untrusted import read_json


LEVELS = 256  # of the pixels of `LabelledImages`
# Rows of latents that are decoded at once.
ROWS_AT_ONCE = 512

# How a model card names the measures.
METRICS = {
    "elbo_bits_per_dim": "negative ELBO, bits/dim",
    "iwae_bits_per_dim": "negative importance-weighted bound of {k} draws, bits/dim",
    "elbo_nats": "negative ELBO, nats an image",
    "distortion_nats": "of these the distortion, -log p(x given z)",
    "rate_nats": "and the rate, KL divergence from the prior",
    "iwae_nats": "negative importance-weighted bound of {k} draws, nats an image",
    "rmse": "RMSE of reconstructions, of 256 values",
    "psnr": "PSNR of reconstructions, dB",
    "ssim": "SSIM of reconstructions",
    "ms_ssim": "MS-SSIM of reconstructions",
    "lpips": "LPIPS of reconstructions by {lpips}",
    "frechet_distance": "Fréchet distance of reconstructions from their images, features of {features}",
    "active_latents": "active latents of {latents}",
}
RATE_OF_LEVEL = "rate_of_level_{number}_nats"

# And its metadata, which the Hub shows in its tables.
METRIC_NAMES = {
    "elbo_bits_per_dim": "bits/dim by the ELBO",
    "iwae_bits_per_dim": "bits/dim by the IWAE bound",
    "elbo_nats": "negative ELBO in nats",
    "distortion_nats": "distortion in nats",
    "rate_nats": "rate in nats",
    "iwae_nats": "negative IWAE bound in nats",
    "rmse": "RMSE",
    "psnr": "PSNR in dB",
    "ssim": "SSIM",
    "ms_ssim": "MS-SSIM",
    "lpips": "LPIPS",
    "frechet_distance": "Fréchet distance of reconstructions",
    "active_latents": "active latents",
}


@dataclass(frozen=True)
class EvaluateVAEConfig(DataOptions):
    """Measure an autoencoder on held-out images: likelihood, closeness of what it decodes, and its latents."""

    model: str | None = option(None, "MODEL may also stand first, without --model", "what is measured")
    num_images: int | None = option(
        None, "held-out images to measure on, drawn by the seed; by default all", at_least=1
    )
    num_likelihood_images: int = option(
        1000, "of these, images to take the bounds on, which needs many passes", at_least=1
    )
    num_samples: int = option(64, "draws of the importance-weighted bound", at_least=1)
    binarize: Literal[BINARIZATIONS] | None = option(
        None, "how images become black and white; by default as in training"
    )
    features: str | None = option(
        None,
        "folder of a network of training/train_features.py, or none; by default one is trained on the data set and kept",
    )
    lpips: Literal[tuple(LPIPS_NETWORKS)] | None = option(
        None, "measure LPIPS of reconstructions too, by this network"
    )
    eval_batch_size: int = option(64, "images at a time", at_least=1)
    seed: int = option(0, "of all draws")
    num_threads: int | None = option(None, "CPU threads; by default the cores are shared out", at_least=1)
    output_file: str | None = option(None, "by default evaluation.json in MODEL")

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *("dataset_name", "resolution", "model", "num_images", "num_likelihood_images", "num_samples", "features"),
        *("eval_batch_size", "seed", "output_file"),
    )

    def __post_init__(self):
        if self.model is None:
            raise ValueError(name_commands("say what to evaluate: training/evaluate_vae.py MODEL, a folder"))
        super().__post_init__()
        check_seed(self.seed)


def main(config: EvaluateVAEConfig) -> dict | None:
    """Measures, prints and writes. Returns what it wrote, on the main process, and None on the others."""
    start = time.perf_counter()
    state = process_state()
    set_threads(config.num_threads, state.num_processes)
    given, config = config, take_options_of_run(config, config.model, ["binarize"])
    how = config.binarize or "none"
    if how != "none" and config.features not in (None, "none"):
        raise ValueError(
            f"features have no meaning for images in black and white, got {config.features} with binarize {how}: leave features out"
        )
    vae = load_autoencoder(config.model).to(state.device).eval()
    with state.main_process_first():
        real = load_real_images(config.for_data(), config.held_out_split)
        refuse_sequences(real, "training/evaluate_vae.py")
    images = held_out_images(config, real, vae)
    features, about_features = (None, None) if how != "none" else features_for(real, config.features, state)
    if features is not None and len(images) < 2:
        raise ValueError(
            f"num_images must be at least 2, got {len(images)}: the Fréchet distance is of means and covariances"
        )
    lpips = load_distance(config.lpips, real.image_shape, state)
    if not state.is_main_process:
        return None
    result = {
        "model": config.model,
        "dataset_name": config.dataset_name,
        "binarize": how,
        "likelihood": vae.config.likelihood,
        "num_images": len(images),
        "num_likelihood_images": min(len(images), config.num_likelihood_images),
        "num_samples": config.num_samples,
        "latent_shape": [list(level.shape) for level in vae.levels] if has_levels(vae) else list(vae.latent_shape),
        "features": about_features,
        **({} if lpips is None else {"lpips_network": lpips.name}),
        **measure(vae, images, config, features, lpips),
        "seconds": round(time.perf_counter() - start, 1),
    }
    report(given, result)
    return result


def load_autoencoder(folder: str) -> VAEModel | HierarchicalVAEModel:
    """An autoencoder of ours.

    Raises:
        ValueError: if the folder has none.
    """
    finish_replacing(folder)
    path = Path(folder, "config.json")
    if not path.is_file():
        raise ValueError(f"{folder} is no folder of a VAEModel or HierarchicalVAEModel: it has no config.json")
    name = read_json(path).get("_class_name")
    classes = {each.__name__: each for each in (VAEModel, HierarchicalVAEModel)}
    if name not in classes:
        raise ValueError(f"{folder} is no folder of a {' or '.join(classes)}: it has a {name}")
    return classes[name].from_pretrained(folder)


def has_levels(vae: VAEModel | HierarchicalVAEModel) -> bool:
    """Whether its latents are of several levels."""
    return isinstance(vae, HierarchicalVAEModel)


def held_out_images(config: EvaluateVAEConfig, real: RealImages, vae: VAEModel | HierarchicalVAEModel) -> Tensor:
    """uint8, shape `(number, channels, height, width)`.

    Raises:
        ValueError: if there are none, or the autoencoder takes images of another shape.
    """
    if real.held_out is None:
        raise ValueError(f"{real.name} has no split of images that were not trained on: name one by --held_out_split")
    shape = (vae.config.in_channels, *as_size(vae.config.sample_size))
    if real.image_shape != shape:
        raise ValueError(
            f"the autoencoder takes images of (channels, height, width) {shape}, those of {real.name} are "
            f"{real.image_shape}: give --resolution, as in training"
        )
    order = drawn_order(len(real.held_out), config.seed)
    return real.held_out.images[order[: config.num_images]]


@torch.no_grad()
def measure(
    vae: VAEModel | HierarchicalVAEModel, images: Tensor, config: EvaluateVAEConfig, features=None, lpips=None
) -> dict[str, float | int | None]:
    """Every measure of these images, uint8.

    Returns:
        `elbo_nats` with its terms `distortion_nats` and `rate_nats`, and `iwae_nats`, all of them upper bounds on
        -log p(x), averaged over images; the same two bounds in `..._bits_per_dim`, None for grey images under
        "bernoulli"; `rmse` of 256 values, of the mean squared error of all images; `psnr` (dB), `ssim`, `ms_ssim` and, with a network, `lpips`, averaged over images; `frechet_distance`, None without features;
        `active_latents`; with levels of latents, the rate of each too.
    """
    how, num_dims = config.binarize or "none", images[0].numel()
    generator = torch.Generator(vae.device).manual_seed(config.seed)
    latents = LevelStatistics(vae) if has_levels(vae) else LatentStatistics(vae.latent_shape)
    decoded, bounds, closeness = torch.empty_like(images), [], []
    for start in range(0, len(images), config.eval_batch_size):
        rows = slice(start, start + config.eval_batch_size)
        x = to_images(images[rows].to(vae.device))
        x = binarize(x, how, torch.randn(x.shape, generator=generator, device=x.device))
        posterior = vae.encode(x).latent_dist
        latents.update(posterior)
        shown = (vae.decode(posterior.mode()).sample.float() / 2 + 0.5).clamp(0, 1).mul(255).round()
        decoded[rows] = shown.to("cpu", torch.uint8)
        pair = x / 2 + 0.5, shown / 255
        of_each = [(255 * rmse(*pair)).square(), *(each(*pair) for each in (psnr, ssim, multi_scale_ssim))]
        if lpips is not None:
            of_each.append(lpips.measure((x * 127.5 + 127.5).round().to(torch.uint8), decoded[rows]).to(of_each[0]))
        closeness.append(torch.stack(of_each).cpu())
        if (left := config.num_likelihood_images - start) > 0:
            chunk_size = max(1, ROWS_AT_ONCE // len(x))
            settings = {"num_samples": config.num_samples, "chunk_size": chunk_size, "generator": generator}
            estimate = vae_likelihood(vae, x[:left], levels=LEVELS, **settings)
            bounds.append(torch.stack([*estimate.bound, estimate.importance_weighted, *estimate.rates]).cpu())
    distortion, rate, iwae, *rates = torch.cat(bounds, dim=1).mean(1).tolist()
    error, *means = torch.cat(closeness, dim=1).mean(1).tolist()
    is_probability = vae.config.likelihood != "bernoulli" or how != "none"
    return {
        "elbo_nats": distortion + rate,
        "distortion_nats": distortion,
        "rate_nats": rate,
        **(_by_level(rates) if has_levels(vae) else {}),
        "iwae_nats": iwae,
        "elbo_bits_per_dim": bits_per_dim(distortion + rate, num_dims) if is_probability else None,
        "iwae_bits_per_dim": bits_per_dim(iwae, num_dims) if is_probability else None,
        "rmse": error**0.5,
        **dict(zip(("psnr", "ssim", "ms_ssim", "lpips"), means, strict=False)),
        "frechet_distance": None if features is None else _distance(features, images, decoded),
        **_activity(latents),
    }


def _by_level(rates: list[float]) -> dict[str, float]:
    return {RATE_OF_LEVEL.format(number=len(rates) - index): rate for index, rate in enumerate(rates)}


def _activity(latents: LatentStatistics | LevelStatistics) -> dict[str, int]:
    """Of one level by the variance of their means (see `ACTIVE_VARIANCE`), of several by what they spend (`ACTIVE_NATS`)."""
    if isinstance(latents, LevelStatistics):
        measured = latents.rates()
        return {"active_latents": sum(measured.num_active), "num_latents": sum(measured.num_latents)}
    mean_var = latents.moments().mean_var
    return {"active_latents": int((mean_var > ACTIVE_VARIANCE).sum()), "num_latents": mean_var.numel()}


def metrics_of(result: dict) -> dict[str, str]:
    """`METRICS` of this result, with the rates of its levels after the rate."""
    levels = result["latent_shape"] if isinstance(result["latent_shape"][0], list) else []
    of_levels = {
        RATE_OF_LEVEL.format(number=number): f"of which level {number}" for number in range(len(levels), 0, -1)
    }
    names = list(METRICS)
    split = names.index("rate_nats") + 1
    return {name: (METRICS | of_levels)[name] for name in [*names[:split], *of_levels, *names[split:]]}


def _distance(features, images: Tensor, decoded: Tensor) -> float:
    both = (FeatureStatistics(features.feature_dim).update(features.measure(part)[0]) for part in (images, decoded))
    return frechet_distance(*both)


def report(config: EvaluateVAEConfig, result: dict):
    """Prints the measures and writes them to a file in one go; the model card of a training run gets them too."""
    folder = Path(config.model)
    path = Path(config.output_file) if config.output_file else folder / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")
    print(format_table({"held-out": {name: result[name] for name in metrics_of(result) if name in result}}))
    if result["elbo_bits_per_dim"] is None:
        print("bits/dim mean nothing here: bernoulli gives grey values a cross-entropy and no probability")
    if result["features"]:
        about = result["features"]
        print(
            f"features: {about['dim']} of {describe_network(about)}; the distance is between the "
            f"{result['num_images']} images and what is decoded of them, and comparable only in the same features"
        )
    print(f"written to {path}")
    if (folder / "README.md").is_file() and (folder / "train_config.yaml").is_file():
        print(f"and into {add_figures(folder, figures_of(config, result))}")


def figures_of(config: EvaluateVAEConfig, result: dict) -> list[Figure]:
    """The measures as a model card shows them, with the command as it was given."""
    names = {
        "k": result["num_samples"],
        "lpips": result.get("lpips_network"),
        "dataset": Path(result["dataset_name"]).name,
        "features": name_network(result["features"] or {}, Path(result["dataset_name"]).name),
        "latents": result["num_latents"],
    }
    command = to_command(config, "training/evaluate_vae.py", launcher="python", first="model")
    metrics = metrics_of(result)
    return [
        Figure(
            metrics[name].format(**names),
            float(result[name]),
            result["num_likelihood_images" if name.endswith(("_nats", "_per_dim")) else "num_images"],
            None,
            None,
            command,
            METRIC_NAMES.get(name) or name.replace("_", " ").replace(" nats", " in nats"),  # the rate of a level
        )
        for name in metrics
        if result.get(name) is not None
    ]


parse = partial(parse_config, EvaluateVAEConfig, first="model")
run = partial(run_script, EvaluateVAEConfig, main, first="model")
