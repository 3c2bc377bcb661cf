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
from accelerate.utils import broadcast_object_list
from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.command_names import name_commands
from diffusers_ext.data.captions import find_caption_column
from diffusers_ext.draws import check_seed
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
from diffusers_ext.evaluation.likelihood_curves import draw_likelihood
from diffusers_ext.evaluation.likelihood_options import LikelihoodOptions
from diffusers_ext.evaluation.options import AskedOptions, take_options_of_run
from diffusers_ext.evaluation.perceptual_distance import LPIPS_NETWORKS, PerceptualDistance, load_distance
from diffusers_ext.evaluation.pipeline_facts import image_size_of, label_names_of, samples_in_bf16, takes_prompts
from diffusers_ext.evaluation.real_images import RealImages, describe_reference, load_real_images
from diffusers_ext.evaluation.reference_cache import reference_features
from diffusers_ext.evaluation.report import (
    CONDITIONED_PICTURE,
    LIKELIHOOD_PICTURE,
    describe,
    figures_of,
    reference_in_words,
)
from diffusers_ext.evaluation.spread import measure_over_seeds
from diffusers_ext.evaluation.subject import generate_for, load_pipeline
from diffusers_ext.evaluation.sweep import SWEPT, Sweep, SweepOptions
from diffusers_ext.evaluation.sweep_results import SweepResults
from diffusers_ext.figures import save_picture
from diffusers_ext.guidance.guided_denoiser import check_guidance_scale
from diffusers_ext.hub.cards import add_figures
from diffusers_ext.machine import process_state, set_threads
from diffusers_ext.options import option, parse_config, run_script, to_command


# Measures in pixels are slow and of little use for images of more values than these, and must then be asked for.
PIXEL_METRICS_UP_TO = 64 * 64 * 3
SVC_UP_TO = 16 * 16

# What a run's train_config.yaml says of its sample grids, and the evaluation samples with too.
OPTIONS_OF_SAMPLING = ["num_inference_steps", "guidance_scale"]

# Options that do nothing for a folder of images.
OPTIONS_OF_PIPELINES = [
    *(
        *OPTIONS_OF_SAMPLING,
        "internal_guidance_scale",
        "num_images",
        "scheduler",
        "eval_batch_size",
        "mixed_precision",
        "num_seeds",
        "sweep",
    ),
]


@dataclass(frozen=True)
class EvaluateConfig(LikelihoodOptions, SweepOptions, AskedOptions):
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
    scheduler: str | None = option(None, "class of a scheduler of diffusers or diffusers_ext to sample with instead")
    eval_batch_size: int = option(64, "images to generate at a time; the images do not depend on it", at_least=1)
    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "precision of the networks; by default bf16 where the hardware is fast at it"
    )
    seed: int = option(0, "image i is made from the seed 1 000 000 * seed + i")
    num_seeds: int = option(
        1,
        "sets of images, of this seed and the next ones; the measures are their means, with their spread",
        at_least=1,
    )
    num_threads: int | None = option(None, "CPU threads of a process; by default the cores are shared out", at_least=1)

    features: str | None = option(
        None,
        "folder of a network of training/train_features.py, or of an autoencoder of training/train_vae.py, whose latents are features "
        "too; or inception (whose Fréchet distance is FID), dinov2 or clip, the last two also with a folder or name of the "
        "network after a colon; or none; by default a network is trained on the data set, once, and kept: a classifier, or "
        "without labels if there are none",
        "how",
    )
    num_neighbours: int = option(5, "k of precision and recall", at_least=1)
    extrapolate: bool = option(
        False,
        "estimate the Fréchet distance of infinitely many images too, by a line through those of subsets; takes more than "
        "twice as many images as there are features",
    )
    pixel_metrics: bool | None = option(None, "measure in pixels too; by default for images of up to 64x64x3 values")
    lpips: Literal[tuple(LPIPS_NETWORKS)] | None = option(
        None, "measure LPIPS too, by this network, of a pipeline that is asked for images by condition images"
    )
    svc: bool | None = option(
        None,
        "train scikit-learn's SVC on the real pixels and count the labels asked for; by default for images of up to "
        "16x16 values",
    )
    output_file: str | None = option(
        None,
        "by default evaluation.json in PIPELINE, or here for a name on the Hub; of a sweep sweep/results.json there",
        "result",
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
        *(
            "eval_batch_size",
            "mixed_precision",
            "seed",
            "features",
            "bits_per_dim",
            "num_flow_steps",
            "sweep",
            "output_file",
        ),
    )

    def __post_init__(self):
        if self.pipeline is None:
            raise ValueError(
                name_commands("say what to evaluate: training/evaluate.py PIPELINE, a folder or a name on the Hub")
            )
        super().__post_init__()
        check_seed(self.seed, LARGEST_SEED_OF_SETS)
        check_seed(self.seed + self.num_seeds - 1, LARGEST_SEED_OF_SETS)
        for scale in (self.guidance_scale, *(self.sweep_guidance_scales or ())):
            check_guidance_scale(1.0 if scale is None else scale)
        check_guidance_scale(self.internal_guidance_scale, "internal_guidance_scale")
        self.check_sweep()
        self.check_likelihood()
        if self.sweep and self.bits_per_dim:
            raise ValueError("bits_per_dim does not depend on the sampler: measure it without --sweep")

    @property
    def seeds(self) -> range:
        """Of the sets of images."""
        return range(self.seed, self.seed + self.num_seeds)


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
    lpips = load_distance(config.lpips, real.image_shape, state)
    for line in (*real.notes, *describe_left_out(real, features, config.num_neighbours)):
        state.print(line, flush=True)
    if pipeline is None:
        images, labels, sampling = *read_images(config, real), None
    num_images = len(images) if pipeline is None else config.num_images
    evaluator = make_evaluator(config, real, features, num_images, about_features) if state.is_main_process else None
    bf16 = samples_in_bf16(pipeline, config.mixed_precision, state.device.type)
    reference = describe_reference(real, config.for_data().dataset_split, num_images, config.num_neighbours)
    setting = Setting(config, state, real, reference, about_features, bf16)
    if config.sweep:
        return sweep(setting, pipeline, evaluator)
    likelihood = {}
    if config.bits_per_dim:
        how = {"batch_size": config.eval_batch_size, "bf16": bf16, "seed": config.seed}
        likelihood = {"likelihood": config.measure_likelihood(pipeline, real, **how)}
        if config.likelihood_curves and state.is_main_process:
            draw_likelihood(likelihood["likelihood"]["curves"], path_of_result(config).with_name(LIKELIHOOD_PICTURE))
    if pipeline is None:
        generated, spread = evaluator.measure(images, labels) if state.is_main_process else {}, {}
    else:
        generated, spread, images, sampling = generate_and_measure(setting, pipeline, evaluator)
    if not state.is_main_process:
        return None
    result = {
        "pipeline": config.pipeline,
        "dataset_name": config.dataset_name,
        "image_shape": list(real.image_shape),
        "num_train_images": len(real.train),
        "num_neighbours": config.num_neighbours,
        "reference": setting.reference,
        "seeds": [] if pipeline is None else list(config.seeds),
        "sampling": sampling,
        "features": about_features,
        "generated": generated,
        **({"spread": spread} if spread else {}),
        **measure_held_out(evaluator, real, num_images),
        **likelihood,
        **measure_conditioned(config, real, pipeline, images, lpips),
        "seconds": round(time.perf_counter() - start, 1),
    }
    report(config, result)
    return result


@dataclass(frozen=True)
class Setting:
    """What the images of a pipeline are measured with.

    Attributes:
        reference: Of the real images, for the results.
        about_features: What is known of the features; None without.
        bf16: Whether the networks run under bf16 autocast.
    """

    config: EvaluateConfig
    state: PartialState
    real: RealImages
    reference: dict
    about_features: dict | None
    bf16: bool

    @property
    def of_generation(self) -> dict:
        """Arguments of `generate_for`, but for those that a sweep has several values of."""
        config = self.config
        given = {"num_images": config.num_images, "batch_size": config.eval_batch_size, "bf16": self.bf16}
        return given | {"settings": settings_of(config)}


def settings_of(config: EvaluateConfig) -> dict[str, float]:
    """Arguments of the pipeline's call that not every pipeline has, where they say something."""
    scale = config.internal_guidance_scale
    return {} if scale == 1 else {"internal_guidance_scale": scale}


def generate_and_measure(
    setting: Setting, pipeline: DiffusionPipeline, evaluator: Evaluator | None
) -> tuple[dict, dict, Tensor, dict]:
    """The measures and their spread over the seeds, the images of the first seed, and how they were sampled."""
    config, first = setting.config, []

    def make(seed: int) -> tuple[Tensor, Tensor | None]:
        images, labels, sampling = generate_for(
            setting.real,
            pipeline,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            seed=seed,
            **setting.of_generation,
        )
        if not first:
            first.extend([images, sampling])
        return images, labels

    measures, spread = measure_over_seeds(make, evaluator, config.seeds)
    return measures, spread, *first


def sweep(setting: Setting, pipeline: DiffusionPipeline, evaluator: Evaluator | None) -> dict | None:
    """Measures the cells of the sweep that are not measured yet; returns what it wrote, on the main process."""
    config, state, real = setting.config, setting.state, setting.real
    swept = Sweep(pipeline, real, config, setting.of_generation, config.seeds)
    made_with = swept.describe(setting.about_features, setting.reference)
    command = to_command(config, "training/evaluate.py", launcher="python", first="pipeline")
    results = SweepResults(path_of_result(config), made_with, command)
    # From the main process, so that all of them leave out the same cells.
    known = [results.load() if state.is_main_process and not config.overwrite else []]
    (results.rows,) = broadcast_object_list(known)
    if evaluator is not None:
        results.held_out = measure_held_out(evaluator, real, config.num_images).get("held_out")
    swept.run(evaluator, results, partial(state.print, flush=True))
    if evaluator is None:
        return None
    results.save()
    print("\n".join([results.table(), results.describe(), f"written to {results.path}, with a table and a figure"]))
    return results.contents()


def complete(config: EvaluateConfig, pipeline: DiffusionPipeline | None) -> EvaluateConfig:
    """The options, with what was left open as the training run or the pipeline has it."""
    own = set(getattr(pipeline, "config", {}).get("call_defaults") or ())  # which take the place of the run's
    if getattr(pipeline, "guider", None) is not None:
        own.add("guidance_scale")  # the run's is not of its guider
    of_sampling = [name for name in OPTIONS_OF_SAMPLING if name not in own]
    config = take_options_of_run(config, config.pipeline, of_sampling, of_data=config.OF_ASKING)
    if config.resolution is None and pipeline is not None:
        config = dataclasses.replace(config, resolution=image_size_of(pipeline))
    if config.sweep:
        scales = config.sweep_guidance_scales or (None if config.guidance_scale is None else (config.guidance_scale,))
        one = dict.fromkeys(OPTIONS_OF_SAMPLING)  # which the run has
        config = dataclasses.replace(config, **one, sweep_guidance_scales=scales)
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
        config.check_likelihood_of(pipeline)
    by_text = pipeline is not None and takes_prompts(pipeline)
    what = f"{config.pipeline} is a folder of images" if pipeline is None else f"got a {type(pipeline).__name__}"
    if pipeline is None:
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        for name in OPTIONS_OF_PIPELINES:
            if getattr(config, name) != defaults[name]:
                raise ValueError(f"{name} is of a pipeline, and {what}: leave it out")
    guider = getattr(pipeline, "guider", None)
    if guider is not None and (config.guidance_scale is not None or config.sweep_guidance_scales is not None):
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
    if config.lpips is not None and condition is None:
        raise ValueError(
            f"lpips is of pairs of images, as of a pipeline that takes condition images, and {what}: leave it out"
        )
    if config.condition_column is not None and (condition is None or condition.kind != "given"):
        raise ValueError(
            f"condition_column is of pipelines that were trained on such a column, and {what}: leave it out"
        )
    for name, several in SWEPT.items():
        if config.sweep and getattr(config, name) is not None:
            raise ValueError(f"{name} is of one set of images: give --{several} for a sweep")
    if pipeline is None and config.bits_per_dim:
        raise ValueError(f"--bits_per_dim is of a model, and {what}")
    if condition is not None and config.bits_per_dim:
        raise ValueError(
            f"--bits_per_dim is of models without condition images, and this one has {condition.describe()}"
        )
    if by_text and config.bits_per_dim:
        raise ValueError(f"--bits_per_dim is of images, or of images given their labels, and not given texts: {what}")


def make_evaluator(
    config: EvaluateConfig, real: RealImages, features, num_images: int, about_features: dict | None
) -> Evaluator:
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
            "--extrapolate is of a Fréchet distance, which --features none leaves out: give others, or none by default"
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
        train_features=None
        if features is None
        else reference_features(features, real.train, about_features["sha256"]),
    )


def measure_held_out(evaluator: Evaluator, real: RealImages, number: int) -> dict:
    """The measures of real images that no model has seen: the best there is; nothing without such."""
    if not can_measure_held_out(real, evaluator.num_neighbours):
        return {}
    return {"held_out": evaluator.measure_held_out(real.held_out, number)}


def measure_conditioned(
    config: EvaluateConfig, real: RealImages, pipeline, images: Tensor, lpips: PerceptualDistance | None
) -> dict:
    """How close the images are to those whose condition images were asked for, in a picture too; nothing without such."""
    condition = getattr(pipeline, "image_condition", None)
    if condition is None:
        return {}
    conditioned = ConditionedImages.of(condition, real, len(images), config.seed)
    save_picture(conditioned.draw(images), path_of_result(config).with_name(CONDITIONED_PICTURE))
    known = {} if lpips is None else {"lpips_network": lpips.name}
    return {"conditioned": conditioned.measure(images, lpips) | known}


def path_of_result(config: EvaluateConfig) -> Path:
    """The file of the measures, in a folder that is there."""
    folder = Path(config.pipeline) if Path(config.pipeline).is_dir() else Path()
    name = "sweep/results.json" if config.sweep else "evaluation.json"
    path = Path(config.output_file) if config.output_file else folder / name
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
    print(format_table(columns, {"generated": result.get("spread", {})}))
    print("\n".join([reference_in_words(result["reference"]), *describe(result), f"written to {path}"]))
    if result["sampling"] and (folder / "README.md").is_file() and (folder / "train_config.yaml").is_file():
        command = to_command(config, "training/evaluate.py", launcher="python", first="pipeline")
        print(f"and into {add_figures(folder, figures_of(result, command))}")


parse = partial(parse_config, EvaluateConfig, first="pipeline")
run = partial(run_script, EvaluateConfig, main, first="pipeline")
