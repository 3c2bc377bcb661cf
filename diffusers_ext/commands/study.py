"""Answer a question about trained models by a figure and a table.

The command `diffusers-ext study`; `training/study.py` says how it is used.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_ext import GuidedDiffusionPipeline
from diffusers_ext.calibration.examples import Examples
from diffusers_ext.calibration.subject import Subject
from diffusers_ext.command_names import name_commands
from diffusers_ext.diffusion.noising import predict_x0
from diffusers_ext.draws import check_seed
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.feature_folders import features_for
from diffusers_ext.evaluation.generate import LARGEST_SEED_OF_SETS, sample_images
from diffusers_ext.evaluation.label_shares import proportional_labels
from diffusers_ext.evaluation.options import DataOptions, take_options_of_run
from diffusers_ext.evaluation.pipeline_facts import image_size_of, label_names_of
from diffusers_ext.evaluation.real_images import RealImages, load_real_images
from diffusers_ext.evaluation.reference_cache import reference_features
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.figures import labelled_grid
from diffusers_ext.machine import process_state, set_threads
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.options import option, parse_config, run_script
from diffusers_ext.pipelines.call_condition import CallCondition
from diffusers_ext.pipelines.outputs import decode_samples
from diffusers_ext.schedulers.levels import is_linear
from diffusers_ext.studies import data_draws, embeddings, noise_end, scaling
from diffusers_ext.studies.report import Report


STUDIES = ("noise_end", "scaling", "data_draws", "embedding")
IN_FEATURES = ("noise_end", "data_draws")  # which measure samples
OF_SAMPLES = {"study": (*IN_FEATURES, "embedding")}  # which make some
BATCH = 100


@dataclass(frozen=True)
class StudyConfig(DataOptions):
    """Answer a question about trained models by a figure and a table."""

    study: Literal[STUDIES] | None = option(None, "the question; it may also stand first, without --study", "study")
    pipelines: tuple[str, ...] | None = option(
        None, "folders of runs of training/train_ddpm.py; for noise_end several, of the same data and path"
    )
    num_images: int = option(
        500, "samples of each Fréchet distance, and points of an embedding", at_least=5, needs=OF_SAMPLES
    )
    num_data: int = option(2000, "images of the data, drawn by the seed, that are looked at", at_least=2)
    num_inference_steps: int = option(20, "steps of the samplers", at_least=1, needs=OF_SAMPLES)
    lengths: tuple[int, ...] = option(
        (50, 100, 200, 400, 700, 1000), "lengths of the chain of noise_end", needs={"study": ("noise_end",)}
    )
    factors: tuple[float, ...] = option(
        (0.5, 0.8, 0.95, 1.05, 1.25, 2.0), "factors c of scaling", needs={"study": ("scaling",)}
    )
    num_levels: int = option(12, "noise levels of scaling", at_least=2, needs={"study": ("scaling",)})
    features: str | None = option(
        None,
        "folder of a network of training/train_features.py, or none; by default one is trained, once, and kept",
        needs={"study": IN_FEATURES},
    )
    seed: int = option(0, "of the noise and of the draw of images")
    num_threads: int | None = option(None, "CPU threads; by default all cores", at_least=1)
    output_dir: str = option("studies", "folder for the page, the figure and the numbers", "result")

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *(
            "dataset_name",
            "resolution",
            "study",
            "pipelines",
            "num_images",
            "num_data",
            "num_inference_steps",
            "lengths",
        ),
        *("factors", "seed", "output_dir"),
    )

    def __post_init__(self):
        if self.study is None or not self.pipelines:
            names = "|".join(STUDIES)
            raise ValueError(
                name_commands(f"say what to study and of what: training/study.py {names} --pipelines PIPELINE ...")
            )
        super().__post_init__()
        check_seed(self.seed, LARGEST_SEED_OF_SETS)
        if self.study not in ("noise_end", "scaling") and len(self.pipelines) != 1:
            raise ValueError(f"pipelines must be one for {self.study}, got {len(self.pipelines)}")
        if len({os.path.abspath(folder) for folder in self.pipelines}) < len(self.pipelines):
            raise ValueError(f"pipelines must be different ones, got {' '.join(self.pipelines)}")
        if min(self.lengths) < 2:
            raise ValueError(f"lengths must be at least 2, got {min(self.lengths)}")


@dataclass(frozen=True)
class Material:
    """What a study looks at.

    Attributes:
        pipes: By their names, see `names_of`.
        features: To measure samples in, where the study does.
    """

    config: StudyConfig
    pipes: dict[str, GuidedDiffusionPipeline]
    real: RealImages
    features: FeatureClassifierModel | None

    @property
    def pipe(self) -> GuidedDiffusionPipeline:
        return next(iter(self.pipes.values()))

    def clean(self, pipe: GuidedDiffusionPipeline, most: int | None = None) -> tuple[Tensor, CallCondition]:
        """x_0 of the data as the pipeline's network knows them, at most so many, and the condition that they are of."""
        number = min(self.config.num_data, most or self.config.num_data)
        return Subject(pipe, pipe, 1).clean_samples(Examples(self.real.train).at_most(number, self.config.seed))

    def labels(self, pipe: GuidedDiffusionPipeline) -> list[int] | None:
        """Of the samples, in the proportions of the data's."""
        classes = pipe.denoiser_num_classes
        if classes is None:
            return None
        counts = torch.bincount(self.real.train.labels, minlength=classes).tolist() if self.real.has_labels else None
        return proportional_labels(self.config.num_images, counts or [1] * classes)

    def frechet_distance(self, images: Tensor, labels: list[int] | None) -> float | None:
        """Of uint8 images from the data; None without features."""
        if self.features is None:
            return None
        train = self.real.train
        kept = reference_features(self.features, train)
        settings = {"in_pixels": False, "seed": self.config.seed, "train_features": kept}
        evaluator = Evaluator(train, self.features, len(images), 3, **settings)
        measures = evaluator.measure(images, None if labels is None else torch.tensor(labels))
        return measures["frechet_distance"]


@torch.no_grad()
def main(config: StudyConfig) -> Path:
    """Makes the report, and returns its page."""
    state = process_state()
    set_threads(config.num_threads, state.num_processes)
    pipes = {}
    for name, folder in zip(names_of(config.pipelines), config.pipelines, strict=True):
        pipe = load_pipeline(folder)
        check_subject(folder, pipe)
        pipe.set_progress_bar_config(disable=True)
        pipe.denoiser.eval()
        pipes[name] = pipe.to(state.device)
    data = take_options_of_run(config, config.pipelines[0])
    if data.resolution is None:
        data = dataclasses.replace(data, resolution=image_size_of(pipe))
    real = load_real_images(data.for_data(), data.held_out_split, label_names=label_names_of(pipe))
    features = None
    if config.study in IN_FEATURES:
        with torch.enable_grad():  # which trains a network of them, if there is none
            features, _ = features_for(real, config.features, state)
    report = MAKERS[config.study](Material(config, pipes, real, features))
    page = report.write(Path(config.output_dir), config.study)
    print(f"{report.table()}\n\n{page}")
    return page


def check_subject(folder: str, pipe: DiffusionPipeline) -> None:
    """Refuses what no study is of: its questions are about a chain of steps with betas.

    Raises:
        ValueError: with the pipeline, its path or its scheduler.
    """
    if not isinstance(pipe, GuidedDiffusionPipeline):
        raise ValueError(f"{folder} must be a GuidedDiffusionPipeline, got a {type(pipe).__name__}")
    if not hasattr(pipe.scheduler, "schedule"):
        name = type(pipe.scheduler).__name__
        if is_linear(pipe.scheduler):
            raise ValueError(
                f"{folder} must be of a path of betas, got the linear path of its {name}: train one with --path vp"
            )
        raise ValueError(
            f"{folder} must have a scheduler of this package, got {name}: save it with ExtDDIMScheduler.from_config of its config"
        )


def names_of(folders: Sequence[str]) -> list[str]:
    """What rows and curves call the pipelines: by their folders, and by the paths as given where two folders have one name."""
    last = [Path(os.path.abspath(folder)).name for folder in folders]
    return [folder if last.count(name) > 1 else name for name, folder in zip(last, folders, strict=True)]


def study_noise_end(material: Material) -> Report:
    """L_T, the distance from a Gaussian, and that of samples, by the length of the chain."""
    config, rows, lines = material.config, [], []
    curves: dict[str, dict] = {"L_T in bits/dim": {}, "distance of p(x_T) from N(0, 1)": {}, "Fréchet distance": {}}
    longest, looked_at = min(len(pipe.scheduler.schedule) for pipe in material.pipes.values()), 0
    lengths = sorted({min(length, longest) for length in config.lengths})

    def add(name: str, x0: Tensor, schedule, distance: Callable[[int], float | None]) -> None:
        projections = noise_end.principal_projections(x0)
        columns = []
        for length in lengths:
            values = (
                noise_end.prior_bits(x0, schedule, length - 1),
                noise_end.distance_from_gaussian(projections, schedule, length - 1),
                distance(length),
            )
            columns.append(values)
            rows.append({"data": name, "T": length} | dict(zip(curves, values, strict=True)))
        for measure, column in zip(curves, zip(*columns, strict=True), strict=True):
            curves[measure][name] = [math.nan if value is None else value for value in column]
        first = noise_end.gaussian_from(projections, schedule)
        lines.append(f"{name}: x_t is Gaussian {'nowhere' if first is None else f'from T = {first + 1} on'}.")

    for name, pipe in material.pipes.items():
        x0, _ = material.clean(pipe)
        looked_at = len(x0)  # the same of all: they may be fewer than num_data
        add(name, x0.cpu(), pipe.scheduler.schedule, partial(_distance_at_length, material, pipe))
    single = material.clean(material.pipe)[0][:1].cpu()
    schedule = material.pipe.scheduler.schedule
    add(f"one image, {next(iter(material.pipes))}", single, schedule, lambda length: None)
    add("one image, its mean subtracted", torch.zeros_like(single), schedule, lambda length: None)
    about = (
        f"L_T over {looked_at} images; the distance is the largest between the distribution functions of x_T and N(0, 1) along "
        f"{noise_end.NUM_COMPONENTS} principal components, and below {noise_end.SMALL_DISTANCE} called none; the Fréchet distance is "
        f"that of {config.num_images} samples in up to {config.num_inference_steps} steps from N(0, 1) at timestep T - 1."
    )
    return Report(
        "How long a chain does it take until nothing is left of the data?",
        [about, *lines],
        rows,
        noise_end.draw_curves(curves, lengths),
    )


def _distance_at_length(material: Material, pipe: GuidedDiffusionPipeline, length: int) -> float | None:
    """The Fréchet distance of samples that start from N(0, 1) at timestep `length - 1`."""
    if material.features is None:
        return None
    config, labels, images = material.config, material.labels(pipe), []
    noise = torch.randn(config.num_images, *pipe._sample_shape, generator=torch.Generator().manual_seed(config.seed))
    for start in range(0, config.num_images, BATCH):
        chosen = slice(start, start + BATCH)
        made = pipe(
            None if labels is None else labels[chosen],
            latents=noise[chosen],
            start_timestep=length - 1,
            num_inference_steps=min(config.num_inference_steps, length),
            guidance_scale=1.0,
            output_type="pt",
        ).images
        images.append(_to_bytes(made))
    return material.frechet_distance(torch.cat(images), labels)


def study_scaling(material: Material) -> Report:
    """Relative errors of eps(c x, t) = c eps(x, t)."""
    config, rows, measured = material.config, [], []
    for name, pipe in material.pipes.items():
        schedule = pipe.scheduler.schedule
        timesteps = torch.linspace(0, len(schedule) - 1, config.num_levels).round().long().tolist()
        x0, condition = material.clean(pipe, BATCH)
        errors = scaling.relative_errors(
            *(Subject(pipe, pipe, 1).network(condition, len(x0)), x0, schedule, pipe.scheduler.config.prediction_type),
            *(timesteps, config.factors),
            torch.Generator().manual_seed(config.seed),
        )
        measured.append((name, timesteps, errors, len(x0)))
        for timestep, of_factors in zip(timesteps, errors.tolist(), strict=True):
            columns = {f"c = {c:g}": error for c, error in zip(config.factors, of_factors, strict=True)}
            rows.append({"model": name, "timestep": timestep} | columns)
    name, timesteps, errors, looked_at = measured[0]
    lines = [
        "The error is |eps(c x, t) - c eps(x, t)| / |c eps(x, t)|, in root mean squares over "
        f"{looked_at} images; the figure is of {name}.",
        f"A network that is homogeneous in x has none. The largest of {name} is {errors.max().item():.3g}, at timestep "
        f"{timesteps[int(errors.max(1).values.argmax())]}, and the smallest {errors.min().item():.3g}, at timestep "
        f"{timesteps[int(errors.min(1).values.argmin())]}.",
    ]
    return Report("Is eps(c x, t) = c eps(x, t)?", lines, rows, scaling.draw_errors(errors, timesteps, config.factors))


def study_data_draws(material: Material) -> Report:
    """Samplers whose x_0 is the network's, or the mean or a draw of the data."""
    config, pipe = material.config, material.pipe
    images, condition = material.clean(pipe)
    chosen, schedule, subject = material.labels(pipe), pipe.scheduler.schedule, Subject(pipe, pipe, 1)
    labels = None if chosen is None else torch.tensor(chosen, device=images.device)
    clip, prediction_type = subject.clip, pipe.scheduler.config.prediction_type
    asked = subject.condition({} if chosen is None else {"labels": chosen})
    network, generator = subject.network(asked, config.num_images), torch.Generator(images.device)
    by_label = None if condition.labels is None else condition.labels.to(images.device)
    if by_label is not None and chosen is not None and (missing := sorted({*chosen} - {*by_label.tolist()})):
        raise ValueError(
            f"num_data must be so large that each label has an image among those drawn, got {config.num_data}, of which none is of "
            f"{_in_words(pipe, missing)}: give more by --num_data"
        )
    posterior = data_draws.DataPosterior(images, by_label, None if by_label is None else labels)

    def of_network(x: Tensor, level, timestep: int) -> Tensor:
        at = torch.full((len(x),), timestep, device=x.device)
        x0 = predict_x0(network(x, at), x, level, prediction_type)
        return x0 if clip is None else clip(x0)

    kinds = {
        "the network's": of_network,
        "E[x_0 | x_t] of the data": lambda x, level, _: posterior.mean(x, level),
        "a draw of p(x_0 | x_t) of the data": lambda x, level, _: posterior.draw(x, level, generator),
        "any draw of the data": lambda x, level, _: posterior.any(x, generator),
    }
    rows, made = [], {}
    for num_steps in sorted({3, config.num_inference_steps}):
        timesteps = pipe.scheduler.list_timesteps(num_steps).tolist()
        for kind, x0_of in kinds.items():
            generator.manual_seed(config.seed)
            noise = torch.randn(config.num_images, *images.shape[1:], generator=generator, device=images.device)
            samples = data_draws.ancestral(x0_of, noise, schedule, timesteps, generator)
            distances = data_draws.nearest(samples, images)
            pictures = torch.cat(
                [
                    decode_samples(part, pipe.vae, pipe.statistics, None if labels is None else labels[i : i + BATCH])
                    for i, part in zip(range(0, len(samples), BATCH), samples.split(BATCH), strict=True)
                ]
            )
            bytes_ = _to_bytes(pictures / 2 + 0.5)
            rows.append(
                {
                    "x_0": kind,
                    "steps": num_steps,
                    "Fréchet distance": material.frechet_distance(bytes_, chosen),
                    "distance from the nearest image": distances.mean().item(),
                    "images of the data": f"{(distances < 1e-3).double().mean().item():.0%}",
                }
            )
            made[kind] = bytes_[:16]
    lines = [
        f"{config.num_images} samples of the ancestral chain, each step of which is a draw of q(x_s | x_t, x_0), with x_0 as the table "
        f"says; the data are {len(images)} images, of the label of the sample if it has one. The distance is the root mean square "
        "difference on the scale of the network.",
        "With a draw of p(x_0 | x_t) each step is exact, however few there are, and the samples are images of the data. The "
        "best network is E[x_0 | x_t] of the data: it too ends in them, given many steps. A trained network, which does not "
        "reach it, makes others.",
    ]
    figure = labelled_grid([images / 255 for images in made.values()], list(made))
    return Report("What if the predicted x_0 were a draw of the data?", lines, rows, figure)


def study_embedding(material: Material) -> Report:
    """Images, samples and latents in the plane, by label."""
    config, pipe = material.config, material.pipe
    chosen = material.labels(pipe)
    if chosen is None or not material.real.has_labels:
        raise ValueError("embedding colours points by label, and this pipeline or its data have none")
    if len(material.real.train.label_names) != pipe.denoiser_num_classes:
        raise ValueError(
            f"embedding needs the {pipe.denoiser_num_classes} labels of the pipeline, got data of "
            f"{len(material.real.train.label_names)}: see --label_column"
        )
    x0, condition = material.clean(pipe, config.num_images)
    labels = condition.labels.to(x0.device)
    images = decode_samples(x0, pipe.vae, pipe.statistics, labels)
    seeds = range(config.num_images)
    settings = {"num_inference_steps": config.num_inference_steps, "guidance_scale": 1.0}
    samples = torch.cat([*sample_images(pipe, seeds, labels=chosen, batch_size=BATCH, **settings)])
    points = {"real images": images, "samples": 2 * samples - 1}
    if pipe.vae is not None:
        kind, points_of_kind = "latents", x0
    else:
        kind, parts = "latents (noise by inversion)", zip(images.split(BATCH), labels.split(BATCH), strict=True)
        steps = {"num_inference_steps": config.num_inference_steps}
        inverted = [pipe.invert(part.clamp(-1, 1) / 2 + 0.5, mine.tolist(), **steps) for part, mine in parts]
        points_of_kind = torch.cat(inverted)
    points[kind] = points_of_kind
    of_kinds = {"real images": labels.cpu(), "samples": torch.tensor(chosen), kind: labels.cpu()}
    missing, rows, planes = embeddings.missing_methods(), [], {}
    for method in embeddings.METHODS:
        if method not in missing:
            planes[method] = {name: embeddings.embed(each, method, config.seed) for name, each in points.items()}
    for name, each in points.items():
        row = {"points": name, "number": len(each)}
        row["neighbours of the same label"] = embeddings.label_agreement(each.cpu(), of_kinds[name])
        for method, plane in planes.items():
            row[f"by {method}"] = embeddings.label_agreement(plane[name], of_kinds[name])
        rows.append(row)
    lines = [
        f"The share of the {embeddings.NUM_NEIGHBOURS} nearest neighbours that have a point's label, among the points as they are and "
        "in the plane."
    ]
    if missing:
        lines.append("Without UMAP, whose library is not installed: it is in the extra `study`.")
    names = label_names_of(pipe) or [str(label) for label in range(pipe.denoiser_num_classes)]
    return Report(
        "Where do images, samples and latents lie?", lines, rows, embeddings.draw_planes(planes, of_kinds, names)
    )


def _in_words(pipe: GuidedDiffusionPipeline, labels: Sequence[int]) -> str:
    """The labels by their names, where they have some."""
    names = label_names_of(pipe)
    return ", ".join(names[label] if names else str(label) for label in labels)


def _to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as uint8, on the CPU."""
    return images.float().mul(255).round().clamp(0, 255).to(torch.uint8).cpu()


MAKERS = {
    "noise_end": study_noise_end,
    "scaling": study_scaling,
    "data_draws": study_data_draws,
    "embedding": study_embedding,
}

parse = partial(parse_config, StudyConfig, first="study")
run = partial(run_script, StudyConfig, main, first="study")
