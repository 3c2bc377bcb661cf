"""Ways to guide one pipeline, side by side: what each of them is at a scale, its network calls, a figure and a table.

`training/compare_guidance.py` is the command for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffusers.guiders import AdaptiveProjectedGuidance, AutoGuidance, BaseGuidance
from torch import nn

from diffusers_ext.figures import save_picture
from diffusers_ext.guidance.guided_denoiser import with_named_blocks
from diffusers_ext.guidance.guiders import ClassifierGuidance, WeakModelGuidance
from diffusers_ext.guidance.guiding import INTERVAL_UNITS, without_notice
from diffusers_ext.options import option
from diffusers_ext.pipelines.components import check_components
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.schedulers.levels import PATH_TOLERANCE, describe_path, path_difference


METHODS = {
    "cfg": "CFG",
    "cfg_interval": "CFG with interval",
    "cfg_rescale": "CFG with rescale",
    "apg": "APG",
    "autoguidance": "autoguidance",
    "classifier": "classifier guidance",
}
# What every method is at a scale of 1, for a denoiser with labels: its conditional prediction.
UNGUIDED, UNGUIDED_TITLE = "none", "no guidance"
NETWORKS = ("denoiser", "weak_denoiser", "classifier")


@dataclass(frozen=True)
class GuidanceOptions:
    """What the methods are set to, beside their scale."""

    guidance_interval: tuple[float, ...] = option(
        (0.2, 0.8), "where CFG with interval guides, two numbers in interval_unit", "guidance"
    )
    interval_unit: Literal[INTERVAL_UNITS] = option(
        "steps", "shares of the steps, or sigma / alpha, or timesteps of the training"
    )
    guidance_rescale: float = option(0.7, "of CFG with rescale, in [0, 1] (arXiv 2305.08891)")
    apg_eta: float = option(0.0, "weight of the part of APG's direction along the prediction (arXiv 2410.02416)")
    apg_momentum: float = option(-0.5, "APG's momentum, negative against the steps before")
    apg_norm_threshold: float = option(2.5, "largest norm of APG's direction; 0 for any")
    auto_guidance_layers: tuple[int, ...] | None = option(
        None, "layers that autoguidance drops where there is no weaker network; by default the middle one"
    )

    def check_guidance(self) -> None:
        """Refuses what no method could do anything with; a pipeline looks at the interval.

        Raises:
            ValueError: if an option is out of range.
        """
        if len(self.guidance_interval) != 2:
            raise ValueError(f"guidance_interval must be two numbers, got {self.guidance_interval}")
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale must be in [0, 1], got {self.guidance_rescale}")
        if self.apg_norm_threshold < 0:
            raise ValueError(f"apg_norm_threshold must not be negative, got {self.apg_norm_threshold}")


def add_networks(
    pipe: GuidedDiffusionPipeline, weak: GuidedDiffusionPipeline | None, classifier: nn.Module | None
) -> None:
    """Gives a pipeline the networks that some of the methods need; those that it has stay where none is given.

    Raises:
        ValueError: if they do not fit it, or the weaker pipeline has other noise levels or predicts another thing.
    """
    if weak is not None:
        theirs, ours = (each.scheduler.config.prediction_type for each in (weak, pipe))
        if theirs != ours:
            raise ValueError(f"the weaker pipeline must predict what the pipeline does, {ours}, got {theirs}")
        difference = path_difference(describe_path(weak.scheduler), pipe.scheduler)
        if difference > PATH_TOLERANCE:
            raise ValueError(
                f"the weaker pipeline must have the noise levels of the pipeline, got alpha_bar up to {difference:.2g} apart"
            )
    weak_denoiser = pipe.weak_denoiser if weak is None else weak.denoiser
    classifier = pipe.classifier if classifier is None else classifier
    check_components(pipe.denoiser, pipe.vae, classifier, weak_denoiser)
    pipe.register_modules(weak_denoiser=weak_denoiser, classifier=classifier, guider=None)
    for network in (weak_denoiser, classifier):
        if network is not None:
            network.to(pipe.device)


def why_missing(method: str, pipe: GuidedDiffusionPipeline) -> str | None:
    """What a method lacks with this pipeline, in a clause; `None` if nothing."""
    if method == "classifier":
        return None if pipe.classifier is not None else "give --classifier, a folder of training/train_classifier.py"
    if method == "autoguidance" and pipe.weak_denoiser is not None:
        return None
    if pipe.null_label is None:
        return "the denoiser has no null label, as one trained with label_dropout has"
    if method == "autoguidance" and not _num_blocks(pipe.denoiser):
        return "the denoiser has no layers to drop: give --weak_pipeline"
    return None


@without_notice()
def call_settings(
    method: str, scale: float, options: GuidanceOptions, pipe: GuidedDiffusionPipeline
) -> dict[str, Any]:
    """Keywords of the pipeline's call that a method at a scale is.

    A scale means the same to all: how far the prediction goes from the weaker one to the conditional one, and beyond it.
    At 1 each is the conditional prediction alone. Classifier guidance adds `scale - 1` times the classifier's gradient
    to that, and `scale` times to the prediction of a denoiser without labels.

    Args:
        method: One of `METHODS`.
    """
    has_labels = pipe.denoiser_num_classes is not None
    if scale == 1 and has_labels:
        return {}
    match method:
        case "cfg":
            return {"guidance_scale": scale}
        case "cfg_interval":
            bounds = tuple(options.guidance_interval)
            interval = bounds if options.interval_unit == "steps" else {options.interval_unit: bounds}
            return {"guidance_scale": scale, "guidance_interval": interval}
        case "cfg_rescale":
            return {"guidance_scale": scale, "guidance_rescale": options.guidance_rescale}
        case "apg":
            guider = AdaptiveProjectedGuidance(
                scale - 1,  # the paper's form: from the conditional prediction on
                adaptive_projected_guidance_momentum=options.apg_momentum,
                adaptive_projected_guidance_rescale=options.apg_norm_threshold,
                eta=options.apg_eta,
                use_original_formulation=True,
            )
        case "autoguidance" if pipe.weak_denoiser is not None:
            guider = WeakModelGuidance(scale)
        case "autoguidance":
            layers = options.auto_guidance_layers or (_num_blocks(pipe.denoiser) // 2,)
            guider = AutoGuidance(scale, auto_guidance_layers=list(layers), dropout=1.0)
        case "classifier":
            guider = ClassifierGuidance(scale - 1 if has_labels else scale)
        case _:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return {"guider": guider}


def describe_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same as JSON can hold it."""
    told = dict(settings)
    if isinstance(guider := settings.get("guider"), BaseGuidance):
        config = {
            name: value for name, value in guider.config.items() if not name.startswith("_") and value is not None
        }
        told["guider"] = {"class": type(guider).__name__} | config
    return told


@contextmanager
def counted_calls(pipe: GuidedDiffusionPipeline) -> Iterator[dict[str, int]]:
    """Counts the samples that each of a pipeline's networks is called with, from x_t to a prediction.

    Conditional and unconditional predictions of one batch count as two, since they cost two.
    """
    counts = dict.fromkeys(NETWORKS, 0)

    def counting(name: str):
        def count(module: nn.Module, arguments: tuple) -> None:
            counts[name] += len(arguments[0])

        return count

    networks = {name: getattr(pipe, name) for name in NETWORKS if getattr(pipe, name) is not None}
    handles = [network.register_forward_pre_hook(counting(name)) for name, network in networks.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def rows_of(rows: Sequence[dict], method: str) -> list[dict]:
    """The results of a method by rising scale, with the one without guidance, which is every method's at a scale of 1."""
    return sorted((row for row in rows if row["method"] in (method, UNGUIDED)), key=lambda row: row["guidance_scale"])


def best_of(rows: Sequence[dict]) -> dict | None:
    """The result of least Fréchet distance, if there is any."""
    return min(rows, key=lambda row: row["frechet_distance"], default=None)


def num_calls(row: dict) -> float:
    """Calls of all networks an image."""
    return sum(row["calls"].values())


def saved_share(rows: Sequence[dict]) -> float | None:
    """Share of the network calls of classifier-free guidance that its interval saves, of the scales that both have."""
    full, limited = (
        {row["guidance_scale"]: num_calls(row) for row in rows if row["method"] == method}
        for method in ("cfg", "cfg_interval")
    )
    both = full.keys() & limited.keys()
    return 1 - sum(limited[scale] for scale in both) / sum(full[scale] for scale in both) if both else None


def describe_best(rows: Sequence[dict], methods: Sequence[str]) -> list[str]:
    """For each method the scale of least Fréchet distance, in a line; and what the interval saves."""
    lines = []
    for method in methods:
        best = best_of(rows_of(rows, method))
        if best is not None:
            lines.append(
                f"{METHODS[method]}: least Fréchet distance {best['frechet_distance']:.4g} at scale "
                f"{best['guidance_scale']:g}, where {best['label_accuracy']:.1%} of the labels are right and an image takes "
                f"{_calls(best)} network calls."
            )
    share = saved_share(rows)
    if share is not None:
        full, limited = (
            min(row["frechet_distance"] for row in rows_of(rows, method)) for method in ("cfg", "cfg_interval")
        )
        verdict = "no worse than" if limited <= full else "worse than"
        lines.append(
            f"The interval saves {share:.1%} of the network calls of CFG; its least distance, {limited:.4g}, is {verdict} "
            f"that of full CFG, {full:.4g}."
        )
    return lines


def markdown_table(rows: Sequence[dict], methods: Sequence[str], held_out: dict | None = None) -> str:
    """The measures of every method and scale."""
    lines = [
        "| guidance | scale | labels right | Fréchet distance | precision | recall | network calls an image |",
        "|---|---|---|---|---|---|---|",
    ]
    ordered = [row for row in rows if row["method"] == UNGUIDED]
    for method in methods:
        ordered += [row for row in rows_of(rows, method) if row["method"] == method]
    for row in ordered:
        title = METHODS.get(row["method"], UNGUIDED_TITLE)
        lines.append(f"| {title} | {row['guidance_scale']:g} | {_measures(row)} | {_calls(row)} |")
    if held_out is not None:
        lines.append(f"| held-out real images | | {_measures(held_out)} | |")
    return "\n".join(lines)


def draw_comparison(rows: Sequence[dict], methods: Sequence[str], path: Path, held_out: dict | None = None) -> None:
    """Label accuracy and Fréchet distance over the scale, a line for each method."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    measures = ("label_accuracy", "frechet_distance")
    for number, method in enumerate(methods):
        mine = rows_of(rows, method)
        if not mine:
            continue
        label = f"{METHODS[method]} ({_calls(mine[-1])} calls)"
        for axes, measure in zip(panels, measures, strict=True):
            scales, values = zip(*((row["guidance_scale"], row[measure]) for row in mine), strict=True)
            axes.plot(scales, values, marker=".", color=f"C{number}", label=label)
    for axes, measure in zip(panels, measures, strict=True):
        if held_out is not None:
            axes.axhline(held_out[measure], color="grey", linestyle=":", label="held-out real images")
        axes.set_xlabel("guidance scale")
    panels[0].set_ylabel("share of the labels that a classifier of real images finds")
    panels[1].set_ylabel("Fréchet distance in its features")
    if all(row["frechet_distance"] > 0 for row in rows):
        panels[1].set_yscale("log")
    panels[1].legend(frameon=False, fontsize="small")
    save_picture(figure, path)


def _num_blocks(network: nn.Module) -> int:
    return len(getattr(with_named_blocks(network), "transformer_blocks", ()))


def _calls(row: dict) -> str:
    names = {"denoiser": "", "weak_denoiser": " weaker", "classifier": " classifier"}
    return " + ".join(f"{row['calls'][name]:.4g}{word}" for name, word in names.items() if row["calls"].get(name))


def _measures(row: dict) -> str:
    return (
        f"{row['label_accuracy']:.1%} | {row['frechet_distance']:.4g} | {row['feature_precision']:.3f} | "
        f"{row['feature_recall']:.3f}"
    )
