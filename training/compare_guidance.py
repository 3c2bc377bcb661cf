"""Compare ways to guide a pipeline: do the images show their labels, and how far are they from real ones?

    python training/compare_guidance.py runs/fashion --classifier runs/fashion-classifier
    accelerate launch training/compare_guidance.py runs/fashion --weak_pipeline runs/fashion-small --num_images 5000

PIPELINE is the folder of a run of training/train_ddpm.py, or another pipeline of this package. For each method and
guidance scale it makes the same number of images, image i of each from the same noise, and measures them as
training/evaluate.py does. `guidance.png`, `guidance.md` and `guidance.json` go into the folder. What is in the last is
not made again, so that a command that was stopped goes on when it is given again. `guidance_samples.png` shows the first
image of each label by each method, at its scale of least distance.
"""

import dataclasses
import json
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import openmp  # noqa: F401  before torch is loaded
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from PIL import Image

from diffusers_ext import GuidedDiffusionPipeline, NoisyClassifierModel
from diffusers_ext.atomic_files import written_whole
from diffusers_ext.draws import check_seed
from diffusers_ext.evaluation.evaluator import Evaluator, check_number
from diffusers_ext.evaluation.generate import (
    LARGEST_SEED_OF_SETS,
    default_of,
    generate_images,
    image_size_of,
    label_names_of,
)
from diffusers_ext.evaluation.guidance_comparison import (
    METHODS,
    UNGUIDED,
    UNGUIDED_TITLE,
    GuidanceOptions,
    add_networks,
    best_of,
    call_settings,
    counted_calls,
    describe_best,
    describe_settings,
    draw_comparison,
    markdown_table,
    why_missing,
)
from diffusers_ext.evaluation.real_images import (
    DataOptions,
    RealImages,
    features_for,
    hash_weights,
    load_real_images,
    take_options_of_run,
)
from diffusers_ext.evaluation.subject import generate_for, labels_for, load_pipeline
from diffusers_ext.figures import labelled_grid, save_picture
from diffusers_ext.guidance.guiding import choose_guider, guided_steps
from diffusers_ext.machine import is_fast_at_bf16, set_threads
from diffusers_ext.options import option, parse_config, refuse_below, run_script, to_command
from diffusers_ext.pipelines.label_condition import LabelCondition


NUM_NEIGHBOURS = 5  # of precision and recall
MAX_COLUMNS = 16  # labels in the picture


@dataclass(frozen=True)
class CompareConfig(GuidanceOptions, DataOptions):
    """Compare ways to guide a pipeline, over guidance scales: label accuracy, Fréchet distance, calls of the networks."""

    pipeline: str | None = option(None, "PIPELINE may also stand first, without --pipeline", "what is compared")
    methods: tuple[str, ...] = option(tuple(METHODS), "which of them, in the order of the figure")
    guidance_scales: tuple[float, ...] = option((1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), "at least 1, which is none")
    weak_pipeline: str | None = option(
        None, "pipeline with a smaller or less trained denoiser, for autoguidance; without one, layers are dropped"
    )
    classifier: str | None = option(None, "folder of training/train_classifier.py, for classifier guidance")
    num_images: int = option(1000, "images of each method and scale, of each label its share in the training images")
    num_inference_steps: int | None = option(None, "steps of the sampler; by default the run's or the pipeline's")
    scheduler: str | None = option(None, "class of a scheduler of diffusers or diffusers_ext to sample with instead")
    eval_batch_size: int = option(64, "images to generate at a time; the images do not depend on it")
    mixed_precision: Literal["no", "bf16"] | None = option(
        None, "precision of the networks; by default bf16 where the hardware is fast at it"
    )
    seed: int = option(0, "image i is made from the seed 1 000 000 * seed + i, by every method")
    num_threads: int | None = option(None, "CPU threads of a process; by default the cores are shared out")
    features: str | None = option(
        None,
        "folder of a classifier of training/train_features.py; by default one is trained on the data set, once, and kept",
    )
    output_dir: str | None = option(None, "by default PIPELINE, or here for a name on the Hub", "result")
    overwrite: bool = option(False, "leave what guidance.json holds, and start over")

    def __post_init__(self):
        if self.pipeline is None:
            raise ValueError("say what to guide: compare_guidance.py PIPELINE, a folder or a name on the Hub")
        super().__post_init__()
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods must be different ones of {', '.join(METHODS)}, got {' '.join(self.methods)}")
        if "cfg_interval" in self.methods and "cfg" not in self.methods:
            raise ValueError("cfg_interval is compared with cfg, which methods must have too")
        if min(self.guidance_scales) < 1 or len(set(self.guidance_scales)) < len(self.guidance_scales):
            given = " ".join(f"{scale:g}" for scale in self.guidance_scales)
            raise ValueError(f"guidance_scales must be different numbers of at least 1, got {given}")
        check_number(self.num_images, NUM_NEIGHBOURS)
        refuse_below(self, 1, "eval_batch_size", "num_inference_steps", "num_threads")
        check_seed(self.seed, LARGEST_SEED_OF_SETS)
        self.check_guidance()

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return Path(self.output_dir or (self.pipeline if Path(self.pipeline).is_dir() else "."))


def main(config: CompareConfig) -> dict | None:
    """Generates, measures, prints and writes. Returns what it wrote, on the main process, and None on the others."""
    state = PartialState()
    set_threads(config.num_threads, state.num_processes)
    command = to_command(config, "training/compare_guidance.py")
    pipe = load_for_comparison(config, state)
    config = take_options_of_run(config, config.pipeline, ["num_inference_steps"])
    if config.num_inference_steps is None:
        config = dataclasses.replace(config, num_inference_steps=default_of(pipe, "num_inference_steps"))
    if config.resolution is None:
        config = dataclasses.replace(config, resolution=image_size_of(pipe))
    methods = available_methods(config, pipe, state)
    with state.main_process_first():
        real = load_real_images(config, label_names=label_names_of(pipe))
    features, about_features = features_for(real, config.features, state)
    if features is None or not real.has_labels:
        raise ValueError(
            f"{real.name} must have labels, which the images are asked for: name them with --label_column"
        )
    bf16 = is_fast_at_bf16(state.device.type) if config.mixed_precision is None else config.mixed_precision == "bf16"

    made_with = describe_set(config, pipe, real, about_features, bf16)
    results = Results(config, made_with, command)
    # From the main process, so that all of them leave out the same sets.
    (results.rows,) = broadcast_object_list([results.load() if state.is_main_process else None])
    evaluator = None
    if state.is_main_process:
        evaluator = Evaluator(
            real.train, features, config.num_images, NUM_NEIGHBOURS, in_pixels=False, seed=config.seed
        )
        if real.held_out is not None and len(real.held_out) > NUM_NEIGHBOURS:
            results.held_out = evaluator.measure_held_out(real.held_out, config.num_images)
    plan = planned(config, methods, pipe)
    results.show(plan)
    for number, (method, scale, settings) in enumerate(plan, start=1):
        how = describe_settings(settings) | hashes_of(method, pipe)
        known = results.find(method, scale, how)
        title = f"{METHODS.get(method, UNGUIDED_TITLE)} at {scale:g} ({number} of {len(plan)})"
        if known:
            state.print(f"{title}: in {results.path}", flush=True)
            continue
        state.print(title, flush=True)
        row = measure(config, pipe, real, evaluator, settings, bf16)
        row = {"method": method, "guidance_scale": scale, "how": how} | row
        results.add(row)
        if state.is_main_process:
            results.save(methods)
    if not state.is_main_process:
        return None
    results.save(methods)
    print("\n".join([results.table(methods), "", *describe_best(results.shown, methods)]))
    save_picture(
        draw_best(config, pipe, real, results.shown, methods, bf16), results.path.with_name("guidance_samples.png")
    )
    print(f"written to {results.path}, guidance.md, guidance.png and guidance_samples.png")
    return results.contents()


def load_for_comparison(config: CompareConfig, state: PartialState) -> GuidedDiffusionPipeline:
    """The pipeline, with the networks that the options name."""
    pipe = load_pipeline(config.pipeline, config.scheduler)
    weak = None if config.weak_pipeline is None else load_pipeline(config.weak_pipeline)
    for name, loaded in (("pipeline", pipe), ("weak_pipeline", weak)):
        if loaded is not None and not isinstance(loaded, GuidedDiffusionPipeline):
            raise ValueError(f"{name} must be a GuidedDiffusionPipeline, got {type(loaded).__name__}")
    classifier = None
    if config.classifier is not None:
        if not (Path(config.classifier) / "config.json").is_file():
            raise ValueError(f"--classifier {config.classifier} is no folder of training/train_classifier.py")
        classifier = NoisyClassifierModel.from_pretrained(config.classifier).eval()
    if pipe.guider is not None:
        state.print(
            f"the pipeline's own guider, {type(pipe.guider).__name__}, is left out of the comparison", flush=True
        )
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
            condition.check(guider, pipe.scheduler.timesteps, guide)
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
    """What all sets of images share."""
    scheduler = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    return json.loads(
        json.dumps(
            {
                "dataset_name": config.dataset_name,
                "denoiser_sha256": hash_weights(pipe.denoiser),
                "vae_sha256": None if pipe.vae is None else hash_weights(pipe.vae),
                "features_sha256": about_features["sha256"],
                "scheduler_class": type(pipe.scheduler).__name__,
                "scheduler": scheduler,
                "clip_guided_noise": bool(pipe.config.get("clip_guided_noise")),
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


def measure(
    config: CompareConfig,
    pipe: GuidedDiffusionPipeline,
    real: RealImages,
    evaluator: Evaluator | None,
    settings: dict[str, Any],
    bf16: bool,
) -> dict:
    """The measures of a set of images, with the calls of each network an image. All processes share the images."""
    start = time.perf_counter()
    with counted_calls(pipe) as counts:
        images, labels, _ = generate_for(
            real,
            pipe,
            config.num_images,
            num_inference_steps=config.num_inference_steps,
            settings=settings,
            batch_size=config.eval_batch_size,
            bf16=bf16,
            seed=config.seed,
        )
    everywhere = gather_object([counts])
    calls = {name: sum(each[name] for each in everywhere) / config.num_images for name in counts}
    if evaluator is None:
        return {}
    seconds = round(time.perf_counter() - start, 1)
    return {"calls": calls, "seconds": seconds} | evaluator.measure(images, labels)


def draw_best(
    config: CompareConfig,
    pipe: GuidedDiffusionPipeline,
    real: RealImages,
    rows: list[dict],
    methods: list[str],
    bf16: bool,
) -> Image.Image:
    """Images that were measured, the first of each label: without guidance, and by each method at its best scale."""
    labels, asked = labels_for(real, pipe.num_classes, config.num_images)
    labels = labels[: min(asked["num_asked"], MAX_COLUMNS)]  # the first of each label come first
    names = pipe.config.id2label or {}
    lines, titles = [], []
    for method in (UNGUIDED, *methods):
        best = best_of([row for row in rows if row["method"] == method])
        if best is None:
            continue
        scale = best["guidance_scale"]
        settings = {} if method == UNGUIDED else call_settings(method, scale, config, pipe)
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=bf16):
            images = generate_images(
                pipe,
                range(len(labels)),
                labels=labels,
                num_inference_steps=config.num_inference_steps,
                settings=settings,
                batch_size=config.eval_batch_size,
                seed=config.seed,
                show_progress=False,
            )
        lines.append(images / 255)
        titles.append(UNGUIDED_TITLE if method == UNGUIDED else f"{METHODS[method]}, {scale:g}")
    return labelled_grid(lines, titles, [names.get(str(label), str(label)) for label in labels])


class Results:
    """What has been measured, in `guidance.json`, with a table and a figure of it.

    Args:
        made_with: What all sets share.
        command: That made them.
    """

    def __init__(self, config: CompareConfig, made_with: dict, command: str):
        self.config, self.made_with, self.command = config, made_with, command
        self.path = config.folder / "guidance.json"
        self.rows, self.held_out, self._asked = [], None, set()

    def load(self) -> list[dict]:
        """What an earlier command has measured.

        Raises:
            ValueError: if it was with other images or another model.
        """
        if self.config.overwrite or not self.path.is_file():
            return []
        saved = json.loads(self.path.read_text())
        before = saved["made_with"]
        changed = [name for name, value in self.made_with.items() if before.get(name) != value]
        if changed:
            raise ValueError(
                f"{self.path} is of another {changed[0]}, {before.get(changed[0])}, got {self.made_with[changed[0]]}: give "
                "--overwrite to start over, or another --output_dir"
            )
        return saved["results"]

    def find(self, method: str, scale: float, how: dict) -> dict | None:
        wanted = (method, scale, json.loads(json.dumps(how)))
        return next((row for row in self.rows if (row["method"], row["guidance_scale"], row["how"]) == wanted), None)

    def add(self, row: dict) -> None:
        """A row in place of the one with the same method and scale."""
        place = (row["method"], row["guidance_scale"])
        self.rows = [other for other in self.rows if (other["method"], other["guidance_scale"]) != place]
        self.rows.append(json.loads(json.dumps(row)))

    def show(self, plan: list[tuple[str, float, dict]]) -> None:
        """Puts into table and figure what this command asks for, of all that is kept."""
        self._asked = {(method, scale) for method, scale, _ in plan}

    @property
    def shown(self) -> list[dict]:
        return [row for row in self.rows if (row["method"], row["guidance_scale"]) in self._asked]

    def contents(self) -> dict:
        return {
            "command": self.command,
            "made_with": self.made_with,
            "held_out": self.held_out,
            "results": self.rows,
        }

    def table(self, methods: list[str]) -> str:
        return markdown_table(self.shown, methods, self.held_out)

    def save(self, methods: list[str]) -> None:
        """Writes the three files, each of them whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        made = self.made_with
        text = "\n".join(
            [
                f"{made['num_images']} images of each by {made['scheduler_class']} in {made['num_inference_steps']} steps, "
                f"image i of each from the same noise, labels {made['label_proportions']}. Right labels, Fréchet distance, "
                f"precision and recall by the features of a classifier of real images of {Path(made['dataset_name']).name}.",
                "",
                self.table(methods),
                "",
                *(f"- {line}" for line in describe_best(self.shown, methods)),
                "",
                f"Made by `{self.command}`.",
            ]
        )
        contents = {self.path: json.dumps(self.contents(), indent=2), self.path.with_suffix(".md"): text}
        for path, content in contents.items():
            with written_whole(path) as partial:
                partial.write_text(content + "\n")
        draw_comparison(self.shown, methods, self.path.with_suffix(".png"), self.held_out)


parse = partial(parse_config, CompareConfig, first="pipeline")


if __name__ == "__main__":
    run_script(CompareConfig, main, first="pipeline")
