"""Compare ways to guide a pipeline: do the images show their labels, and how far are they from real ones?

The command `diffusers-ext compare-guidance`; `training/compare_guidance.py` says how it is used.
"""

import dataclasses
import json
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image
from torch import Tensor

from diffusers_ext import GuidedDiffusionPipeline, NoisyClassifierModel
from diffusers_ext.atomic_files import finish_replacing
from diffusers_ext.command_names import name_commands
from diffusers_ext.data.identity import hash_weights
from diffusers_ext.data.sequences import refuse_sequences
from diffusers_ext.draws import check_seed
from diffusers_ext.evaluation.evaluator import (
    Evaluator,
    can_measure_held_out,
    check_number,
    describe_left_out,
    knows_labels,
)
from diffusers_ext.evaluation.feature_folders import features_for
from diffusers_ext.evaluation.generate import LARGEST_SEED_OF_SETS, generate_images
from diffusers_ext.evaluation.guidance_comparison import (
    METHODS,
    UNGUIDED,
    UNGUIDED_TITLE,
    GuidanceOptions,
    add_networks,
    call_settings,
    describe_settings,
    why_missing,
)
from diffusers_ext.evaluation.guidance_results import Results, best_of, describe_best
from diffusers_ext.evaluation.network_calls import counted_calls
from diffusers_ext.evaluation.options import DataOptions, take_options_of_run
from diffusers_ext.evaluation.pipeline_facts import default_of, image_size_of, label_names_of
from diffusers_ext.evaluation.real_images import RealImages, load_real_images
from diffusers_ext.evaluation.reference_cache import reference_features
from diffusers_ext.evaluation.subject import generate_for, labels_for, load_pipeline
from diffusers_ext.figures import labelled_grid, save_picture
from diffusers_ext.guidance.guiding import choose_guider, guided_steps
from diffusers_ext.machine import process_state, runs_in_bf16, set_threads
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.options import option, parse_config, run_script, to_command
from diffusers_ext.pipelines.label_condition import LabelCondition


NUM_NEIGHBOURS = 5  # of precision and recall
MAX_COLUMNS = 16  # labels in the picture


@dataclass(frozen=True)
class CompareConfig(GuidanceOptions, DataOptions):
    """Compare ways to guide a pipeline, over guidance scales: label accuracy, Fréchet distance, calls of the networks."""

    pipeline: str | None = option(None, "PIPELINE may also stand first, without --pipeline", "what is compared")
    guidance_scales: tuple[float, ...] = option((1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), "at least 1, which is none")
    weak_pipeline: str | None = option(
        None,
        "pipeline with a smaller or less trained denoiser, for autoguidance; without one, layers are dropped",
        needs={"methods": ("autoguidance",)},
    )
    classifier: str | None = option(
        None, "folder of training/train_classifier.py, for classifier guidance", needs={"methods": ("classifier",)}
    )
    num_images: int = option(1000, "images of each method and scale, of each label its share in the training images")
    num_inference_steps: int | None = option(
        None, "steps of the sampler; by default the run's or the pipeline's", at_least=1
    )
    scheduler: str | None = option(None, "class of a scheduler of diffusers or diffusers_ext to sample with instead")
    eval_batch_size: int = option(64, "images to generate at a time; the images do not depend on it", at_least=1)
    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "precision of the networks; by default bf16 where the hardware is fast at it"
    )
    seed: int = option(0, "image i is made from the seed 1 000 000 * seed + i, by every method")
    num_threads: int | None = option(None, "CPU threads of a process; by default the cores are shared out", at_least=1)
    features: str | None = option(
        None,
        "folder of a classifier of training/train_features.py; by default one is trained on the data set, once, and kept",
    )
    output_dir: str | None = option(None, "by default PIPELINE, or here for a name on the Hub", "result")
    overwrite: bool = option(False, "leave what guidance.json holds, and start over")

    ESSENTIAL: ClassVar[tuple[str, ...]] = (
        *(
            "dataset_name",
            "resolution",
            "pipeline",
            "methods",
            "guidance_scales",
            "weak_pipeline",
            "classifier",
            "num_images",
        ),
        *("num_inference_steps", "scheduler", "eval_batch_size", "mixed_precision", "seed", "features", "output_dir"),
    )

    def __post_init__(self):
        if self.pipeline is None:
            raise ValueError(
                name_commands(
                    "say what to guide: training/compare_guidance.py PIPELINE, a folder or a name on the Hub"
                )
            )
        super().__post_init__()
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be different ones of {', '.join(METHODS)}, got {' '.join(self.methods)}")
        if "cfg_interval" in self.methods and "cfg" not in self.methods:
            raise ValueError("cfg_interval is compared with cfg, which methods must have too")
        if min(self.guidance_scales) < 1 or len(set(self.guidance_scales)) < len(self.guidance_scales):
            given = " ".join(f"{scale:g}" for scale in self.guidance_scales)
            raise ValueError(f"guidance_scales must be different numbers of at least 1, got {given}")
        if self.auto_guidance_layers is not None and self.weak_pipeline is not None:
            raise ValueError(
                "auto_guidance_layers are dropped where there is no weaker network: leave them or weak_pipeline out"
            )
        check_number(self.num_images, NUM_NEIGHBOURS)
        check_seed(self.seed, LARGEST_SEED_OF_SETS)
        self.check_guidance()

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.output_dir or (self.pipeline if Path(self.pipeline).is_dir() else "."))


def main(config: CompareConfig) -> dict | None:
    """Generates, measures, prints and writes. Returns what it wrote, on the main process, and None on the others."""
    state = process_state()
    set_threads(config.num_threads, state.num_processes)
    command = to_command(config, "training/compare_guidance.py", launcher="python")
    pipe = load_for_comparison(config, state)
    config = complete(config, pipe)
    methods = available_methods(config, pipe, state)
    real, features, about_features = load_data(config, pipe, state)
    bf16 = runs_in_bf16(config.mixed_precision, state.device.type)
    made_with = describe_set(config, pipe, real, about_features, bf16)
    results, evaluator = Results(config.folder, made_with, command), None
    # From the main process, so that all of them leave out the same sets.
    known = [results.load() if state.is_main_process and not config.overwrite else []]
    (results.rows,) = broadcast_object_list(known)
    if state.is_main_process:
        evaluator = Evaluator(
            real.train,
            features,
            config.num_images,
            NUM_NEIGHBOURS,
            in_pixels=False,
            seed=config.seed,
            train_features=reference_features(features, real.train, about_features["sha256"]),
        )
        if can_measure_held_out(real, NUM_NEIGHBOURS):
            results.held_out = evaluator.measure_held_out(real.held_out, config.num_images)

    subject = Subject(config, pipe, real, bf16)
    plan = planned(config, methods, pipe)
    results.show(plan)
    for number, (method, scale, settings) in enumerate(plan, start=1):
        title = f"{METHODS.get(method, UNGUIDED_TITLE)} at {scale:g} ({number} of {len(plan)})"
        how = describe_settings(settings) | hashes_of(method, pipe)
        if results.find(method=method, guidance_scale=scale, how=how):
            state.print(f"{title}: in {results.path}", flush=True)
            continue
        state.print(title, flush=True)
        measures = subject.measure(settings, evaluator)
        results.add({"method": method, "guidance_scale": scale, "how": how} | measures)
        if state.is_main_process:
            results.save(methods)
    if not state.is_main_process:
        return None
    results.save(methods)
    print("\n".join([results.table(methods), "", *describe_best(results.shown, methods)]))
    save_picture(subject.draw_best(results.shown, methods), results.path.with_name("guidance_samples.png"))
    print(f"written to {results.path}, guidance.md, guidance.png and guidance_samples.png")
    return results.contents()


def complete(config: CompareConfig, pipe: GuidedDiffusionPipeline) -> CompareConfig:
    """The options, with what was left open as the training run or the pipeline has it."""
    config = take_options_of_run(config, config.pipeline, ["num_inference_steps"])
    if config.num_inference_steps is None:
        config = dataclasses.replace(config, num_inference_steps=default_of(pipe, "num_inference_steps"))
    if config.resolution is None:
        config = dataclasses.replace(config, resolution=image_size_of(pipe))
    return config


def load_data(
    config: CompareConfig, pipe: GuidedDiffusionPipeline, state: PartialState
) -> tuple[RealImages, FeatureClassifierModel, dict]:
    """The data set, and the classifier that its images are measured with; it is printed what cannot be measured.

    Raises:
        ValueError: if the images have no labels, or the classifier does not know them.
    """
    with state.main_process_first():
        real = load_real_images(config.for_data(), config.held_out_split, label_names=label_names_of(pipe))
        refuse_sequences(real, "training/compare_guidance.py")
    if not real.can_be_classified:
        raise ValueError(
            f"{real.name} must have labels, two or more, which the images are asked for: name them with --label_column"
        )
    features, about = features_for(real, config.features, state)
    if features is None:
        raise ValueError(
            "features must be a classifier of the labels, got none: leave --features out to have one trained"
        )
    if not knows_labels(features, real.train):
        raise ValueError(
            f"features must be a classifier of the labels of {real.name}, which that in {about['folder']} does not know by "
            "their names: leave --features out to have one trained"
        )
    for line in describe_left_out(real, features, NUM_NEIGHBOURS):
        state.print(line, flush=True)
    return real, features, about


def load_for_comparison(config: CompareConfig, state: PartialState) -> GuidedDiffusionPipeline:
    """The pipeline, with the networks that the options name."""
    pipe = load_pipeline(config.pipeline, config.scheduler)
    weak = None if config.weak_pipeline is None else load_pipeline(config.weak_pipeline)
    for name, loaded in (("pipeline", pipe), ("weak_pipeline", weak)):
        if loaded is not None and not isinstance(loaded, GuidedDiffusionPipeline):
            raise ValueError(f"{name} must be a GuidedDiffusionPipeline, got {type(loaded).__name__}")
    classifier = None
    if config.classifier is not None:
        finish_replacing(config.classifier)
        if not (Path(config.classifier) / "config.json").is_file():
            raise ValueError(
                name_commands(f"--classifier {config.classifier} is no folder of training/train_classifier.py")
            )
        classifier = NoisyClassifierModel.from_pretrained(config.classifier).eval()
    if pipe.guider is not None:
        state.print(
            f"the pipeline's own guider, {type(pipe.guider).__name__}, is left out of the comparison", flush=True
        )
    if pipe.config.call_defaults:
        state.print("the guidance that the pipeline has by default is left out of the comparison", flush=True)
    pipe.to(state.device)
    add_networks(pipe, weak, classifier)
    if pipe.num_classes is None:
        raise ValueError(
            "the pipeline's denoiser takes no labels and there is no --classifier: nothing guides to labels"
        )
    return pipe


def available_methods(config: CompareConfig, pipe: GuidedDiffusionPipeline, state: PartialState) -> list[str]:
    """The methods that the pipeline has what they need for; of the others it is said what they lack.

    Raises:
        ValueError: if there are none, or if one cannot work although all that it needs is there.
    """
    methods = []
    for method in config.methods:
        reason = why_missing(method, pipe)
        if reason is None:
            methods.append(method)
        else:
            state.print(f"{METHODS[method]} is left out: {reason}", flush=True)
    if not methods:
        raise ValueError("none of the methods can guide this pipeline")
    condition = LabelCondition(pipe, [0])
    pipe.scheduler.set_timesteps(config.num_inference_steps)
    for method in methods:
        settings = call_settings(method, max(config.guidance_scales) + 1, config, pipe)
        guider = choose_guider(
            settings.get("guider"), settings.get("guidance_scale"), settings.get("guidance_rescale", 0.0)
        )
        # Now, and not hours later when it is its turn.
        guide = guided_steps(settings.get("guidance_interval"), pipe.scheduler, pipe.scheduler.timesteps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once more when it is
            condition.check(pipe, guider, pipe.scheduler.timesteps, guide)
    return methods


def planned(
    config: CompareConfig, methods: list[str], pipe: GuidedDiffusionPipeline
) -> list[tuple[str, float, dict[str, Any]]]:
    """Method, scale and settings of each set of images; what is the same to all methods is made once."""
    plan = []
    for method in methods:
        for scale in sorted(config.guidance_scales):
            settings = call_settings(method, scale, config, pipe)
            if settings:
                plan.append((method, scale, settings))
            elif not any(other == UNGUIDED for other, _, _ in plan):
                plan.append((UNGUIDED, scale, settings))
    return plan


def describe_set(
    config: CompareConfig, pipe: GuidedDiffusionPipeline, real: RealImages, about_features: dict, bf16: bool
) -> dict:
    """The settings that all sets of images share."""
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    statistics = {} if pipe.statistics is None else {"statistics_sha256": hash_weights(pipe.statistics)}
    return json.loads(
        json.dumps(
            {
                "dataset_name": config.dataset_name,
                "denoiser_sha256": hash_weights(pipe.denoiser),
                "vae_sha256": None if pipe.vae is None else hash_weights(pipe.vae),
                **statistics,
                "features_sha256": about_features["sha256"],
                "scheduler_class": type(pipe.scheduler).__name__,
                "scheduler": scheduler,
                "clip_guided_noise": pipe.config.get("clip_guided_noise", False),
                "num_images": config.num_images,
                "label_proportions": labels_for(real, pipe.num_classes, config.num_images)[1]["proportions"],
                "num_inference_steps": config.num_inference_steps,
                "mixed_precision": "bf16" if bf16 else "no",
                "seed": config.seed,
            },
            default=str,
        )
    )


def hashes_of(method: str, pipe: GuidedDiffusionPipeline) -> dict[str, str]:
    """Of the network that the method alone uses."""
    network = {"autoguidance": pipe.weak_denoiser, "classifier": pipe.classifier}.get(method)
    return {} if network is None else {"network_sha256": hash_weights(network)}


@dataclass(frozen=True)
class Subject:
    """The pipeline that is compared with itself, guided in several ways, and the images it is measured against."""

    config: CompareConfig
    pipe: GuidedDiffusionPipeline
    real: RealImages
    bf16: bool

    def measure(self, settings: dict[str, Any], evaluator: Evaluator | None) -> dict:
        """The measures of a set of images, with the calls of each network an image. All processes share the images.

        Args:
            settings: Of the pipeline's call.
            evaluator: On the main process; without one, nothing is returned.
        """
        start, config = time.perf_counter(), self.config
        with counted_calls(self.pipe) as counts:
            images, labels, _ = generate_for(
                self.real,
                self.pipe,
                config.num_images,
                num_inference_steps=config.num_inference_steps,
                settings=settings,
                batch_size=config.eval_batch_size,
                bf16=self.bf16,
                seed=config.seed,
            )
        everywhere = gather_object([counts])
        calls = {name: sum(each[name] for each in everywhere) / config.num_images for name in counts}
        if evaluator is None:
            return {}
        seconds = round(time.perf_counter() - start, 1)
        return {"calls": calls, "seconds": seconds} | evaluator.measure(images, labels)

    def draw_best(self, rows: list[dict], methods: list[str]) -> Image.Image:
        """Images that were measured, the first of each label: without guidance, and by each method at its best scale."""
        labels, asked = labels_for(self.real, self.pipe.num_classes, self.config.num_images)
        labels = labels[: min(asked["num_asked"], MAX_COLUMNS)]  # the first of each label come first
        names = self.pipe.config.id2label or {}
        lines, titles = [], []
        for method in (UNGUIDED, *methods):
            best = best_of([row for row in rows if row["method"] == method])
            if best is None:
                continue
            scale = best["guidance_scale"]
            settings = {} if method == UNGUIDED else call_settings(method, scale, self.config, self.pipe)
            lines.append(self._first_images(labels, settings) / 255)
            titles.append(UNGUIDED_TITLE if method == UNGUIDED else f"{METHODS[method]}, {scale:g}")
        return labelled_grid(lines, titles, [names.get(str(label), str(label)) for label in labels])

    def _first_images(self, labels: list[int], settings: dict[str, Any]) -> Tensor:
        config = self.config
        with torch.autocast(self.pipe.device.type, torch.bfloat16, enabled=self.bf16):
            return generate_images(
                self.pipe,
                range(len(labels)),
                labels=labels,
                num_inference_steps=config.num_inference_steps,
                settings=settings,
                batch_size=config.eval_batch_size,
                seed=config.seed,
                show_progress=False,
            )


parse = partial(parse_config, CompareConfig, first="pipeline")
run = partial(run_script, CompareConfig, main, first="pipeline")
