"""Measure the images of a pipeline, or a folder of images, against the real ones of a data set.

The command `diffusers-ext evaluate`; `training/evaluate.py` says how it is used.
"""

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.data.captions import find_caption_column
from diffusers_ext.draws import check_seed
from diffusers_ext.evaluation.bits_per_dim import FIXED_VARIANCES, measure_bits_per_dim
from diffusers_ext.evaluation.conditioned import ConditionedImages
from diffusers_ext.evaluation.evaluator import (
    Evaluator,
    can_measure_held_out,
    check_number,
    describe_left_out,
    fit_svc,
    format_table,
)
from diffusers_ext.evaluation.feature_folders import measuring_features
from diffusers_ext.evaluation.generate import LARGEST_SEED_OF_SETS
from diffusers_ext.evaluation.image_folder import is_image_folder, read_image_folder
from diffusers_ext.evaluation.options import DataOptions, take_options_of_run
from diffusers_ext.evaluation.pipeline_facts import image_size_of, label_names_of, takes_prompts
from diffusers_ext.evaluation.real_images import RealImages, load_real_images
from diffusers_ext.evaluation.subject import generate_for, load_pipeline
from diffusers_ext.figures import save_picture
from diffusers_ext.hub.cards import Figure, add_figures
from diffusers_ext.machine import is_fast_at_bf16, process_state, set_threads
from diffusers_ext.options import option, parse_config, run_script, to_command


# Measures in pixels are slow and of little use for images of more values than these, and must then be asked for.
PIXEL_METRICS_UP_TO = 64 * 64 * 3
SVC_UP_TO = 16 * 16

# How a model card names the measures.
METRICS = {
    "frechet_distance": "Fréchet distance in the features of {features}",
    "extrapolated_frechet_distance": "Fréchet distance in these features, extrapolated to infinitely many images",
    "feature_precision": "precision in these features, k={k}",
    "feature_recall": "recall in these features, k={k}",
    "density": "density in these features, k={k}",
    "coverage": "coverage in these features, k={k}",
    "kernel_distance": "kernel distance (MMD^2, polynomial of degree 3) in these features",
    "classifier_score": "score of this network's classes, as the Inception score is of Inception's",
    "label_accuracy": "share that this classifier gives the label {whose}",
    "pixel_precision": "precision in pixels, k={k}",
    "pixel_recall": "recall in pixels, k={k}",
    "value_precision": "precision in values of [0, 1], k={k}",
    "value_recall": "recall in values of [0, 1], k={k}",
    "svc_label_accuracy": "share that an SVC of the real {values} gives the label {whose}",
}

# And its metadata, which the Hub shows in its tables.
METRIC_NAMES = {
    "frechet_distance": "Fréchet distance",
    "extrapolated_frechet_distance": "extrapolated Fréchet distance",
    "feature_precision": "precision",
    "feature_recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "kernel_distance": "kernel distance",
    "classifier_score": "classifier score",
    "label_accuracy": "label accuracy",
    "pixel_precision": "precision in pixels",
    "pixel_recall": "recall in pixels",
    "value_precision": "precision in values",
    "value_recall": "recall in values",
    "svc_label_accuracy": "label accuracy by an SVC",
}

# These numbers have names of their own in the features of the InceptionV3 that they were defined by, and in no others.
NAMES_OF_INCEPTION = {"frechet_distance": "FID", "kernel_distance": "KID", "classifier_score": "Inception score"}

# And those of images that were asked for by condition images.
CLOSENESS = {"psnr": ("PSNR", "PSNR in dB"), "ssim": ("SSIM", "SSIM")}
CONDITIONED_PICTURE = "conditions.png"

# What a run's train_config.yaml says of its sample grids, and the evaluation samples with too.
OPTIONS_OF_SAMPLING = ["num_inference_steps", "guidance_scale"]

# Options that do nothing for a folder of images.
OPTIONS_OF_PIPELINES = [
    *OPTIONS_OF_SAMPLING,
    "internal_guidance_scale",
    "num_images",
    "scheduler",
    "eval_batch_size",
    "mixed_precision",
]


@dataclass(frozen=True)
class EvaluateConfig(DataOptions):
    """Measure generated images against real ones: Fréchet distance, precision and recall, and the labels they show."""

    pipeline: str | None = option(None, "PIPELINE may also stand first, without --pipeline", "what is measured")
    num_images: int = option(
        1000,
        "images to generate; each label gets its share of them in the training images, each caption comes in turn",
        at_least=1,
    )
    num_inference_steps: int | None = option(
        None, "steps of the sampler; by default the run's or the pipeline's", at_least=1
    )
    guidance_scale: float | None = option(None, "by default the run's or the pipeline's")
    internal_guidance_scale: float = option(1.0, "guidance away from the network's middle layer; 1 is none")
    caption_column: str | None = option(
        None, "column of the captions that texts are taken from; by default found as in training"
    )
    condition_column: str | None = option(
        None, "column of the condition images of a pipeline that was trained on one; by default the run's"
    )
    scheduler: str | None = option(None, "class of a scheduler of diffusers or diffusers_ext to sample with instead")
    eval_batch_size: int = option(64, "images to generate at a time; the images do not depend on it", at_least=1)
    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "precision of the networks; by default bf16 where the hardware is fast at it"
    )
    seed: int = option(0, "image i is made from the seed 1 000 000 * seed + i")
    num_threads: int | None = option(None, "CPU threads of a process; by default the cores are shared out", at_least=1)

    features: str | None = option(
        None,
        "folder of a classifier of training/train_features.py, or of an autoencoder of train_vae.py, whose latents are features "
        "too; or inception (whose Fréchet distance is FID), dinov2 or clip, the last two also with a folder or name of the "
        "network after a colon; by default a classifier is trained on the data set, once, and kept",
        "how",
    )
    num_neighbours: int = option(5, "k of precision and recall", at_least=1)
    extrapolate: bool = option(
        False,
        "estimate the Fréchet distance of infinitely many images too, by a line through those of subsets; takes more than "
        "twice as many images as there are features",
    )
    pixel_metrics: bool | None = option(None, "measure in pixels too; by default for images of up to 64x64x3 values")
    svc: bool | None = option(
        None,
        "train scikit-learn's SVC on the real pixels and count the labels asked for; by default for images of up to "
        "16x16 values",
    )
    bits_per_dim: bool = option(
        False,
        "measure what a lossless code by the model would take for held-out images in 8 bits: the variational bound",
        "likelihood",
    )
    num_likelihood_images: int | None = option(
        None,
        "held-out images to measure it on; 1000 if left open, at most all",
        at_least=1,
        needs="bits_per_dim",
    )
    num_likelihood_steps: int | None = option(
        None,
        "timesteps of the sampler whose bound it is; by default all that the model was trained on",
        at_least=1,
        needs="bits_per_dim",
    )
    num_likelihood_terms: int | None = option(
        None,
        "timesteps of these to look at for each image, drawn without bias; 100 if left open, more make the standard "
        "error smaller",
        at_least=1,
        needs="bits_per_dim",
    )
    likelihood_variance: Literal[FIXED_VARIANCES] | None = option(
        None,
        "variance of the sampler's steps; by default learned if the model learned it, else the scheduler's, else that of "
        "its path: fixed_large, fixed_small for a learned schedule, optimal for paths that do not preserve the variance; "
        "analytic is what training/calibrate.py measured; optimal is measured on a batch of training images",
        needs="bits_per_dim",
    )
    num_flow_steps: int | None = option(
        None,
        "measure the bound by the probability flow too, in this number of steps; each asks the model four times",
        at_least=1,
        needs="bits_per_dim",
    )

    output_file: str | None = option(
        None, "by default evaluation.json in PIPELINE, or here for a name on the Hub", "result"
    )

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *(
            "dataset_name",
            "resolution",
            "pipeline",
            "num_images",
            "num_inference_steps",
            "guidance_scale",
            "scheduler",
        ),
        *("eval_batch_size", "mixed_precision", "seed", "features", "bits_per_dim", "num_flow_steps", "output_file"),
    )

    def __post_init__(self):
        if self.pipeline is None:
            raise ValueError("say what to evaluate: evaluate.py PIPELINE, a folder or a name on the Hub")
        super().__post_init__()
        check_seed(self.seed, LARGEST_SEED_OF_SETS)


def main(config: EvaluateConfig) -> dict | None:
    """Generates, measures, prints and writes. Returns what it wrote, on the main process, and None on the others."""
    start = time.perf_counter()
    state = process_state()
    set_threads(config.num_threads, state.num_processes)
    pipeline = None
    if not is_image_folder(config.pipeline):
        pipeline = load_pipeline(config.pipeline, config.scheduler).to(state.device)
    check_options(config, pipeline)
    config = complete(config, pipeline)
    real = load_data(config, pipeline, state)
    # What can fail on account of the options or the data comes before the images are generated.
    features, about_features = measuring_features(real, config.features, state)
    for line in (*real.notes, *describe_left_out(real, features, config.num_neighbours)):
        state.print(line, flush=True)
    if pipeline is None:
        images, labels, sampling = *read_images(config, real), None
    num_images = len(images) if pipeline is None else config.num_images
    evaluator = make_evaluator(config, real, features, num_images) if state.is_main_process else None
    bf16 = is_fast_at_bf16(state.device.type) if config.mixed_precision is None else config.mixed_precision == "bf16"
    likelihood = get_bits_per_dim(config, real, pipeline, bf16) if config.bits_per_dim else None
    if pipeline is not None:
        images, labels, sampling = generate_for(
            real,
            pipeline,
            config.num_images,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            settings=settings_of(config),
            batch_size=config.eval_batch_size,
            bf16=bf16,
            seed=config.seed,
        )
    if not state.is_main_process:
        return None
    result = {
        "pipeline": config.pipeline,
        "dataset_name": config.dataset_name,
        "image_shape": list(real.image_shape),
        "num_train_images": len(real.train),
        "num_neighbours": config.num_neighbours,
        "sampling": sampling,
        "features": about_features,
        **measure(evaluator, real, images, labels),
        **({} if likelihood is None else {"likelihood": likelihood}),
        **measure_conditioned(config, real, pipeline, images),
        "seconds": round(time.perf_counter() - start, 1),
    }
    report(config, result)
    return result


def settings_of(config: EvaluateConfig) -> dict[str, float]:
    """Arguments of the pipeline's call that not every pipeline has, where they say something."""
    scale = config.internal_guidance_scale
    return {} if scale == 1 else {"internal_guidance_scale": scale}


def complete(config: EvaluateConfig, pipeline: DiffusionPipeline | None) -> EvaluateConfig:
    """The options, with what was left open as the training run or the pipeline has it."""
    own = set(getattr(pipeline, "config", {}).get("call_defaults") or ())  # which take the place of the run's
    if getattr(pipeline, "guider", None) is not None:
        own.add("guidance_scale")  # the run's is not of its guider
    of_sampling = [name for name in OPTIONS_OF_SAMPLING if name not in own]
    config = take_options_of_run(config, config.pipeline, of_sampling, of_data=["caption_column", "condition_column"])
    if config.resolution is None and pipeline is not None:
        config = dataclasses.replace(config, resolution=image_size_of(pipeline))
    return config


def load_data(config: EvaluateConfig, pipeline: DiffusionPipeline | None, state: PartialState) -> RealImages:
    """The data set, with captions for a pipeline that makes images from texts."""
    data, caption_column = config.for_data(), None
    with state.main_process_first():
        if pipeline is not None and takes_prompts(pipeline):
            caption_column = find_caption_column(data, config.caption_column)
        return load_real_images(
            data,
            config.held_out_split,
            caption_column=caption_column,
            condition_column=config.condition_column,
            label_names=None if pipeline is None else label_names_of(pipeline),
        )


def read_images(config: EvaluateConfig, real: RealImages) -> tuple[Tensor, Tensor | None]:
    """The images of the folder that is measured, and their labels if they have some."""
    data = config.for_data()
    images, labels = read_image_folder(config.pipeline, real, data.pad_value, data.max_bad_share)
    check_number(len(images), config.num_neighbours, f"the number of images in {config.pipeline}")
    return images, labels


def check_options(config: EvaluateConfig, pipeline: DiffusionPipeline | None) -> None:
    """Refuses options that do nothing for what is measured.

    Raises:
        ValueError: with the option and why.
    """
    if pipeline is not None:
        check_number(config.num_images, config.num_neighbours)
    by_text = pipeline is not None and takes_prompts(pipeline)
    what = f"{config.pipeline} is a folder of images" if pipeline is None else f"got a {type(pipeline).__name__}"
    if pipeline is None:
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for name in OPTIONS_OF_PIPELINES:
            if getattr(config, name) != defaults[name]:
                raise ValueError(f"{name} is of a pipeline, and {what}: leave it out")
    guider = getattr(pipeline, "guider", None)
    if config.guidance_scale is not None and guider is not None:
        raise ValueError(
            f"guidance_scale is not of a pipeline with a guider, got a {type(guider).__name__}: leave it out"
        )
    if config.caption_column is not None and not by_text:
        raise ValueError(f"caption_column is of pipelines that make images from texts, and {what}: leave it out")
    if by_text and pipeline.components.get("text_encoder", "none is asked for") is None:
        raise ValueError(
            f"a {type(pipeline).__name__} without a text_encoder cannot be asked for captions: give it one"
        )
    condition = getattr(pipeline, "image_condition", None)
    if config.condition_column is not None and (condition is None or condition.kind != "given"):
        raise ValueError(
            f"condition_column is of pipelines that were trained on such a column, and {what}: leave it out"
        )
    if condition is not None and config.bits_per_dim:
        raise ValueError(
            f"--bits_per_dim is of models without condition images, and this one has {condition.describe()}"
        )
    if by_text and config.bits_per_dim:
        raise ValueError(f"--bits_per_dim is of images, or of images given their labels, and not given texts: {what}")


def get_bits_per_dim(config: EvaluateConfig, real: RealImages, pipeline, bf16: bool) -> dict:
    """The variational bound of held-out images, see `measure_bits_per_dim`."""
    if pipeline is None:
        raise ValueError(f"--bits_per_dim is of a model, and {config.pipeline} is a folder of images")
    if real.value_scale is not None:
        raise ValueError(
            f"--bits_per_dim is of images in 8 bits, and {real.name} holds sequences of numbers, which have a density and no "
            "probability, so that no lossless code has a length"
        )
    if real.held_out is None:
        raise ValueError(
            f"--bits_per_dim is of images not trained on: name a split of {real.name} by --held_out_split"
        )
    return measure_bits_per_dim(
        pipeline,
        real.held_out,
        train=real.train,
        num_images=config.num_likelihood_images or 1000,
        num_steps=config.num_likelihood_steps,
        num_terms=config.num_likelihood_terms or 100,
        variance=config.likelihood_variance,
        num_flow_steps=config.num_flow_steps,
        batch_size=config.eval_batch_size,
        bf16=bf16,
        seed=config.seed,
    )


def make_evaluator(config: EvaluateConfig, real: RealImages, features, num_images: int) -> Evaluator:
    """The evaluator of this number of images.

    Raises:
        ValueError: if the data set is too small, or lacks what an option needs.
    """
    num_values = math.prod(real.image_shape)
    use_svc = num_values <= SVC_UP_TO if config.svc is None else config.svc
    if use_svc and not real.can_be_classified:
        if config.svc:
            has = "images of only one" if real.has_labels else "none"
            raise ValueError(f"--svc needs labels, two or more, and {real.name} has {has}")
        use_svc = False
    if config.extrapolate and features is None:
        raise ValueError(
            f"--extrapolate is of a Fréchet distance, and there are no features of {real.name} to measure in"
        )
    if config.extrapolate and num_images <= 2 * features.feature_dim:
        raise ValueError(
            f"--extrapolate takes more than {2 * features.feature_dim} images, twice the number of features, got {num_images}"
        )
    return Evaluator(
        real.train,
        features,
        num_reference=num_images,
        num_neighbours=config.num_neighbours,
        in_pixels=num_values <= PIXEL_METRICS_UP_TO if config.pixel_metrics is None else config.pixel_metrics,
        svc=fit_svc(real.train) if use_svc else None,
        extrapolate=config.extrapolate,
        seed=config.seed,
    )


def measure(evaluator: Evaluator, real: RealImages, images: Tensor, labels: Tensor | None) -> dict:
    """The measures of the generated images, and the same of real images that no model has seen: the best there is."""
    result = {"generated": evaluator.measure(images, labels)}
    if can_measure_held_out(real, evaluator.num_neighbours):
        result["held_out"] = evaluator.measure_held_out(real.held_out, len(images))
    return result


def measure_conditioned(config: EvaluateConfig, real: RealImages, pipeline, images: Tensor) -> dict:
    """How close the images are to those whose condition images were asked for, in a picture too; nothing without such."""
    condition = getattr(pipeline, "image_condition", None)
    if condition is None:
        return {}
    conditioned = ConditionedImages.of(condition, real, len(images), config.seed)
    save_picture(conditioned.draw(images), path_of_result(config).with_name(CONDITIONED_PICTURE))
    return {"conditioned": conditioned.measure(images)}


def describe_conditioned(measures: dict) -> str:
    """These figures in a line."""
    bicubic = ""
    if "bicubic_psnr" in measures:
        bicubic = f"; bicubic {measures['bicubic_psnr']:.2f} dB and {measures['bicubic_ssim']:.3f}"
    kind = "held-out images" if measures["held_out"] else "training images"
    return (
        f"by {measures['condition']} of {kind}: PSNR {measures['psnr']:.2f} dB, SSIM {measures['ssim']:.3f}{bicubic}; "
        f"side by side in {CONDITIONED_PICTURE}"
    )


def path_of_result(config: EvaluateConfig) -> Path:
    """The file of the measures, in a folder that is there."""
    folder = Path(config.pipeline) if Path(config.pipeline).is_dir() else Path()
    path = Path(config.output_file) if config.output_file else folder / "evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def report(config: EvaluateConfig, result: dict):
    """Prints the measures and writes them to a file in one go; the model card of a training run gets them too."""
    folder, path = Path(config.pipeline) if Path(config.pipeline).is_dir() else Path(), path_of_result(config)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")

    columns = {"generated": result["generated"]}
    if "held_out" in result:
        columns["held-out real"] = result["held_out"]
    print(format_table(columns))
    for line in describe_proportions(result):
        print(line)
    if "likelihood" in result:
        print(describe_likelihood(result["likelihood"]))
    if "conditioned" in result:
        print(describe_conditioned(result["conditioned"]))
    if result["features"]:
        about = result["features"]
        kind = "classifier" if "held_out_accuracy" in about else "autoencoder"
        network = f"the network {about['name']}" if "name" in about else f"the {kind} in {about['folder']}"
        reads = (
            f", which reads {about['held_out_accuracy']:.2%} of held-out images"
            if "held_out_accuracy" in about
            else ""
        )
        print(
            f"features: {about['dim']} of {network}{reads}; the Fréchet distance is from all {result['num_train_images']} "
            "training images and is comparable only with distances in the same features"
        )
    print(f"written to {path}")
    if result["sampling"] and (folder / "README.md").is_file() and (folder / "train_config.yaml").is_file():
        print(f"and into {add_figures(folder, figures_of(config, result))}")


def describe_proportions(result: dict) -> list[str]:
    """How often each label was asked for, and which images were compared with weighted ones, in lines."""
    lines, asked = [], (result["sampling"] or {}).get("labels")
    if asked:
        each = (
            f"{asked['fewest']} to {asked['most']} images"
            if asked["fewest"] < asked["most"]
            else "equally many images"
        )
        rare = asked["num_labels"] - asked["num_asked"]
        missing = f"; {rare} more are too rare for so few images" if rare else ""
        lines.append(
            f"labels were asked for {asked['proportions']}: {asked['num_asked']} labels, {each} of each{missing}"
        )
    for name, title in (("generated", "measured"), ("held_out", "held-out")):
        if result.get(name, {}).get("reference_weighted"):
            lines.append(
                f"the {title} images have labels in other proportions than the training images, which are weighted to the "
                "same for the Fréchet distance and recall"
            )
    return lines


def describe_likelihood(bound: dict) -> str:
    """The bound in a line."""
    error = "" if bound["standard_error"] is None else f" +- {bound['standard_error']:.3f}"
    flow = f"; by the probability flow {bound['flow_bits_per_dim']:.3f}" if "flow_bits_per_dim" in bound else ""
    return (
        f"bits/dim: at most {bound['bits_per_dim']:.3f}{error} on {bound['num_images']} held-out images in 8 bits, rate "
        f"{bound['rate']:.3f} and distortion {bound['distortion']:.3f} ({bound['num_steps']} timesteps, of which "
        f"{bound['num_terms']} for each image; variance {bound['variance']}){flow}"
    )


def figures_of(config: EvaluateConfig, result: dict) -> list[Figure]:
    """The measures of the generated images as a model card shows them."""
    sampling, measures = result["sampling"], result["generated"]
    sampler = sampling["scheduler_class"]
    if sampling["guidance_scale"] not in (None, 1.0):
        sampler += f", guidance {sampling['guidance_scale']:g}"
    if sampling["internal_guidance_scale"] != 1.0:
        sampler += f", internal guidance {sampling['internal_guidance_scale']:g}"
    if sampling["guider"]:
        sampler += f", {sampling['guider']}"
    if sampling["labels"]:
        sampler += f", labels {sampling['labels']['proportions']}"
    command = to_command(config, "training/evaluate.py", launcher="python", first="pipeline")
    dataset, about = Path(result["dataset_name"]).name, result["features"] or {}
    features = f"a classifier of {dataset}" if "held_out_accuracy" in about else "an autoencoder, its latents"
    known = {
        "dataset": dataset,
        "k": result["num_neighbours"],
        "whose": "asked for",
        "values": "values" if len(result["image_shape"]) == 2 else "pixels",
        "features": f"the network {about['name']}" if "name" in about else features,
    }
    names = METRIC_NAMES | (NAMES_OF_INCEPTION if about.get("name") == "inception" else {})
    asked = ""
    if captions := sampling["captions"]:
        known["whose"] = "of the picture whose caption was asked for"
        asked = f", images from captions of the split {captions['split']}"
    figures = [
        Figure(
            METRICS[name].format(**known) + asked,
            value,
            measures["num_images"],
            sampler,
            sampling["num_inference_steps"],
            command,
            names[name],
        )
        for name, value in measures.items()
        if name in METRICS
    ]
    if "conditioned" in result:
        figures += figures_of_conditioned(result["conditioned"], sampler, sampling, known["dataset"], command)
    if "likelihood" in result:
        figures.append(figure_of_likelihood(result["likelihood"], known["dataset"], command))
    return figures


def figures_of_conditioned(measures: dict, sampler: str, sampling: dict, dataset: str, command: str) -> list[Figure]:
    """How close images are to those whose condition images were asked for."""
    figures, kind = [], "held-out" if measures["held_out"] else "training"
    for key, (title, name) in CLOSENESS.items():
        beside = f"; bicubic has {measures[f'bicubic_{key}']:.3g}" if f"bicubic_{key}" in measures else ""
        what = f"{title} to {kind} images of {dataset} by {measures['condition']}{beside}"
        steps = sampling["num_inference_steps"]
        figures.append(Figure(what, measures[key], measures["num_images"], sampler, steps, command, name))
    return figures


def figure_of_likelihood(bound: dict, dataset: str, command: str) -> Figure:
    labels = ", given their labels" if bound["by_label"] else ""
    return Figure(
        f"bits/dim of held-out images of {dataset} in 8 bits{labels}, an upper bound",
        bound["bits_per_dim"],
        bound["num_images"],
        f"ancestral, variance {bound['variance']}",
        bound["num_steps"],
        command,
        "bits/dim",
    )


parse = partial(parse_config, EvaluateConfig, first="pipeline")
run = partial(run_script, EvaluateConfig, main, first="pipeline")
