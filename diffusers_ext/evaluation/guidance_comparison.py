"""Ways to guide one pipeline: what each of them needs, and what it is at a scale.

`training/compare_guidance.py` compares them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from diffusers.guiders import AdaptiveProjectedGuidance, AutoGuidance, BaseGuidance
from torch import nn

from diffusers_ext.command_names import name_commands
from diffusers_ext.guidance.guided_denoiser import check_guidance_rescale, with_named_blocks
from diffusers_ext.guidance.guiders import ClassifierGuidance, WeakModelGuidance
from diffusers_ext.guidance.guiding import INTERVAL_UNITS, without_notice
from diffusers_ext.options import option
from diffusers_ext.pipelines.components import check_components
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.schedulers.levels import PATH_TOLERANCE, describe_path, path_difference, prediction_type_of


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


@dataclass(frozen=True)
class GuidanceOptions:
    """The settings of the methods, beside their scale."""

    methods: tuple[str, ...] = option(tuple(METHODS), "which of them, in the order of the figure", "guidance")
    guidance_interval: tuple[float, ...] = option(
        (0.2, 0.8),
        "where CFG with interval guides, two numbers in interval_unit",
        needs={"methods": ("cfg_interval",)},
    )
    interval_unit: Literal[INTERVAL_UNITS] = option(
        "steps",
        "shares of the steps, or sigma / alpha, or timesteps of the training",
        needs={"methods": ("cfg_interval",)},
    )
    guidance_rescale: float = option(
        0.7, "of CFG with rescale, in [0, 1] (arXiv 2305.08891)", needs={"methods": ("cfg_rescale",)}
    )
    apg_eta: float = option(
        0.0,
        "weight of the part of APG's direction along the prediction (arXiv 2410.02416)",
        needs={"methods": ("apg",)},
    )
    apg_momentum: float = option(
        -0.5, "APG's momentum, negative against the steps before", needs={"methods": ("apg",)}
    )
    apg_norm_threshold: float = option(2.5, "largest norm of APG's direction; 0 for any", needs={"methods": ("apg",)})
    auto_guidance_layers: tuple[int, ...] | None = option(
        None,
        "layers that autoguidance drops where there is no weaker network; by default the middle one",
        needs={"methods": ("autoguidance",)},
    )

    def check_guidance(self) -> None:
        """Refuses values out of range; the interval's are checked by the pipeline.

        Raises:
            ValueError: if an option is out of range.
        """
        if len(self.guidance_interval) != 2:
            raise ValueError(f"guidance_interval must be two numbers, got {self.guidance_interval}")
        check_guidance_rescale(self.guidance_rescale)
        if self.apg_norm_threshold < 0:
            raise ValueError(f"apg_norm_threshold must not be negative, got {self.apg_norm_threshold}")


def add_networks(
    pipe: GuidedDiffusionPipeline, weak: GuidedDiffusionPipeline | None, classifier: nn.Module | None
) -> None:
    """Gives a pipeline the networks that some of the methods need; those that it has stay where none is given.

    Its own guider and defaults of a call, which would guide where a method does not, are taken away.

    Raises:
        ValueError: if they do not fit it, or the weaker pipeline has other noise levels or predicts another thing.
    """
    if weak is not None:
        theirs, ours = (prediction_type_of(each.scheduler) for each in (weak, pipe))
        if theirs != ours:
            raise ValueError(f"the weaker pipeline must predict what the pipeline does, {ours}, got {theirs}")
        difference = path_difference(describe_path(weak.scheduler), pipe.scheduler)
        if difference > PATH_TOLERANCE:
            raise ValueError(
                f"the weaker pipeline must have the noise levels of the pipeline, got alpha_bar up to {difference:.2g} apart"
            )
        if _data_of(weak) != _data_of(pipe):
            raise ValueError(
                "the weaker pipeline must have the statistics of the pipeline, by which its samples are normalised, got others: "
                "train both with the same data_mean and data_scale"
            )
    weak_denoiser = pipe.weak_denoiser if weak is None else weak.denoiser
    classifier = pipe.classifier if classifier is None else classifier
    check_components(pipe.denoiser, pipe.vae, classifier, weak_denoiser, pipe.statistics)
    pipe.register_modules(weak_denoiser=weak_denoiser, classifier=classifier, guider=None)
    pipe.register_to_config(call_defaults=None)
    for network in (weak_denoiser, classifier):
        if network is not None:
            network.to(pipe.device)


def _data_of(pipe: GuidedDiffusionPipeline) -> str | None:
    """A digest of the statistics of a pipeline; None without."""
    return None if pipe.statistics is None else pipe.statistics.fingerprint()


def why_missing(method: str, pipe: GuidedDiffusionPipeline) -> str | None:
    """Why a method cannot be used with this pipeline, in a clause; `None` if it can."""
    if method == "classifier":
        if pipe.classifier is not None:
            return None
        return name_commands("give --classifier, a folder of training/train_classifier.py")
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
    described = dict(settings)
    if isinstance(guider := settings.get("guider"), BaseGuidance):
        config = {
            name: value for name, value in guider.config.items() if not name.startswith("_") and value is not None
        }
        described["guider"] = {"class": type(guider).__name__} | config
    return described


def _num_blocks(network: nn.Module) -> int:
    return len(getattr(with_named_blocks(network), "transformer_blocks", ()))
