"""Quality against the work that images take: one pipeline by several samplers, numbers of steps and guidance scales.

Each cell of the sweep is a set of images, image i of each from the same noise, measured against the same real ones in
the same features. Samplers are compared by the calls of the network that an image takes, since a step of Heun's method
takes two, and guidance takes two predictions.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from diffusers_ext.data.identity import hash_weights
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.measured_rows import as_json
from diffusers_ext.evaluation.network_calls import counted_calls
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.evaluation.spread import measure_over_seeds
from diffusers_ext.evaluation.subject import default_scale, generate_for, make_sampler
from diffusers_ext.evaluation.sweep_results import SweepResults, name_of
from diffusers_ext.options import option
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.pipelines.stock import STOCK_DENOISERS, stock_name
from diffusers_ext.schedulers.samplers import set_timesteps


# What a sweep has several values of, and its options by which they are given.
SWEPT = {
    "num_inference_steps": "sweep_steps",
    "scheduler": "sweep_schedulers",
    "guidance_scale": "sweep_guidance_scales",
}


@dataclass(frozen=True)
class SweepOptions:
    """Which cells a sweep has."""

    sweep: bool = option(
        False,
        "measure each of several schedulers, numbers of steps and guidance scales: a table, results.json and a figure",
        "sweep",
    )
    sweep_steps: tuple[int, ...] = option((5, 10, 20, 50), "numbers of steps", needs="sweep")
    sweep_schedulers: tuple[str, ...] | None = option(
        None, "classes of schedulers of diffusers or diffusers_ext; by default the pipeline's own", needs="sweep"
    )
    sweep_guidance_scales: tuple[float, ...] | None = option(
        None, "guidance scales; by default that of the run or the pipeline", needs="sweep"
    )
    overwrite: bool = option(False, "measure again what results.json has", needs="sweep")

    def check_sweep(self) -> None:
        """Refuses values that are no cells.

        Raises:
            ValueError: with the option.
        """
        for name in SWEPT.values():
            values = getattr(self, name)
            if values is not None and len(set(values)) < len(values):
                raise ValueError(f"{name} must be different ones, got {' '.join(map(str, values))}")
        if min(self.sweep_steps) < 1:
            raise ValueError(f"sweep_steps must be at least 1, got {min(self.sweep_steps)}")


@dataclass(frozen=True)
class Cell:
    """One set of images.

    Attributes:
        scheduler: Name of its class.
        guidance_scale: None for the pipeline's default.
    """

    scheduler: str
    guidance_scale: float | None
    num_inference_steps: int

    def __str__(self) -> str:
        return f"{name_of(self.scheduler, self.guidance_scale)}, {self.num_inference_steps} steps"

    @property
    def key(self) -> dict[str, Any]:
        return vars(self).copy()


def as_sampled(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline that any scheduler of its path samples: those of diffusers without texts as ours, others as they are.

    `DDPMPipeline` does not scale what it starts from as some schedulers ask, and `DDIMPipeline` replaces any by its own.
    """
    if isinstance(pipeline, GuidedDiffusionPipeline):
        return pipeline
    name = stock_name(pipeline.components, "denoiser")
    if name is None or type(pipeline.components[name]).__name__ not in STOCK_DENOISERS:
        return pipeline
    ours = GuidedDiffusionPipeline.from_pipe(pipeline)
    return ours.to(pipeline.device)


class Sweep:
    """A pipeline that is measured in cells.

    Args:
        pipeline: Of this package or of diffusers. Its scheduler is another after each cell.
        real: What it is measured against.
        options: Which cells there are.
        settings: Of `generate_for`, without steps, scale and seed.
        seeds: Of the sets of each cell.

    Raises:
        ValueError: if a scheduler is not for this pipeline, or cannot make one of the numbers of steps.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        real: RealImages,
        options: SweepOptions,
        settings: dict[str, Any],
        seeds: range,
    ):
        sampled = as_sampled(pipeline)
        # The default is that of the pipeline as it was, where ours would have another.
        default = None if sampled is pipeline else default_scale(pipeline)
        self.pipeline, self.real, self.settings, self.seeds = sampled, real, settings, seeds
        self.own, own = pipeline.scheduler, type(pipeline.scheduler).__name__
        self.schedulers: dict[str, SchedulerMixin] = {
            name: pipeline.scheduler if name == own else make_sampler(pipeline, name)
            for name in options.sweep_schedulers or (own,)
        }
        scales = options.sweep_guidance_scales or (default,)
        self.cells = [
            Cell(name, scale, steps) for name in self.schedulers for scale in scales for steps in options.sweep_steps
        ]
        for name, scheduler in self.schedulers.items():
            for steps in options.sweep_steps:  # now, and not hours later when it is its turn
                set_timesteps(copy.deepcopy(self._set(name, scheduler)), steps, None, 1.0, pipeline.device)

    def _set(self, name: str, scheduler: SchedulerMixin) -> SchedulerMixin:
        self.pipeline.register_modules(scheduler=scheduler)
        if type(self.pipeline.scheduler).__name__ != name:
            raise ValueError(
                f"a {type(self.pipeline).__name__} keeps its own {type(self.pipeline.scheduler).__name__}, and cannot be sampled "
                f"by {name}"
            )
        return self.pipeline.scheduler

    def describe(self, about_features: dict | None, reference: dict) -> dict:
        """What all cells share, as JSON has it: they are of one model, one reference, and the same noise."""
        networks = {name: part for name, part in self.pipeline.components.items() if isinstance(part, nn.Module)}
        return as_json(
            {
                "pipeline_class": type(self.pipeline).__name__,
                "networks_sha256": {name: hash_weights(network) for name, network in networks.items()},
                "scheduler": {key: value for key, value in self.own.config.items() if not key.startswith("_")},
                "call_defaults": getattr(self.pipeline, "config", {}).get("call_defaults"),
                **{name: value for name, value in self.settings.items() if name == "settings" and value},
                "features": about_features,
                "reference": reference,
                "num_images": self.settings["num_images"],
                "seeds": list(self.seeds),
                "mixed_precision": "bf16" if self.settings["bf16"] else "no",
            }
        )

    def run(self, evaluator: Evaluator | None, results: SweepResults, say: Callable[[str], None]) -> None:
        """Measures the cells that are not in the results, and saves these after each.

        Args:
            evaluator: On the main process, which alone keeps and saves the results.
            results: With the rows that are there already, on every process.
            say: Prints a line.
        """
        for number, cell in enumerate(self.cells, start=1):
            title = f"{cell} ({number} of {len(self.cells)})"
            if results.find(**cell.key):
                say(f"{title}: in {results.path}")
                continue
            say(title)
            results.add(cell.key | self.measure(cell, evaluator))
            if evaluator is not None:
                results.save()

    def generate(self, cell: Cell, seed: int) -> tuple[Tensor, Tensor | None]:
        """The images of a cell, and the labels that they were asked for or None."""
        self._set(cell.scheduler, self.schedulers[cell.scheduler])
        images, labels, _ = generate_for(
            self.real,
            self.pipeline,
            num_inference_steps=cell.num_inference_steps,
            guidance_scale=cell.guidance_scale,
            seed=seed,
            **self.settings,
        )
        return images, labels

    def measure(self, cell: Cell, evaluator: Evaluator | None) -> dict:
        """The measures of a cell, with the calls of the networks an image. All processes share the images.

        Args:
            evaluator: On the main process; without one, nothing is returned.
        """
        start = time.perf_counter()
        with counted_calls(self.pipeline) as counts:
            try:
                measures, spread = measure_over_seeds(partial(self.generate, cell), evaluator, self.seeds)
            except ValueError as error:
                raise ValueError(f"{cell}: {error}") from error
        everywhere = gather_object([counts]) if PartialState().num_processes > 1 else [counts]
        if evaluator is None:
            return {}
        total = sum(sum(each.values()) for each in everywhere)
        calls = total / (self.settings["num_images"] * len(self.seeds))
        return {"calls": calls, "seconds": round(time.perf_counter() - start, 1)} | measures | {"spread": spread}
