"""The measures in words: lines for the screen, and figures for a model card.

What is described is the result of `training/evaluate.py`, the contents of `evaluation.json`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers_ext.guidance.guiding import Interval
from diffusers_ext.hub.cards import Figure


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
    "label_share_distance": "total variation between the shares of the labels that this classifier gives to them and to the data",
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
    "label_share_distance": "distance of label shares",
    "pixel_precision": "precision in pixels",
    "pixel_recall": "recall in pixels",
    "value_precision": "precision in values",
    "value_recall": "recall in values",
    "svc_label_accuracy": "label accuracy by an SVC",
}

# These numbers have names of their own in the features of the InceptionV3 that they were defined by, and in no others.
NAMES_OF_INCEPTION = {"frechet_distance": "FID", "kernel_distance": "KID", "classifier_score": "Inception score"}

# And those of images that were asked for by condition images.
CLOSENESS = {
    "rmse": ("RMSE, of 256 values,", "RMSE"),
    "psnr": ("PSNR", "PSNR in dB"),
    "ssim": ("SSIM", "SSIM"),
    "ms_ssim": ("MS-SSIM", "MS-SSIM"),
    "lpips": ("LPIPS", "LPIPS"),
}
# Of results that have several sets of images.
MEASURED_ONCE = {"conditioned": "closeness to the condition images", "likelihood": "bits/dim"}
CONDITIONED_PICTURE = "conditions.png"
LIKELIHOOD_PICTURE = "likelihood.png"


def names_of(about_features: dict | None) -> dict[str, str]:
    """What the field calls the measures, in these features."""
    inception = (about_features or {}).get("name") == "inception"
    return METRIC_NAMES | (NAMES_OF_INCEPTION if inception else {})


def describe(result: dict) -> list[str]:
    """All of it in lines, after the table of the measures."""
    lines = describe_proportions(result)
    if len(seeds := result["seeds"]) > 1:
        lines.append(
            f"each measure is the mean over {len(seeds)} sets of images, of seeds {seeds[0]} to {seeds[-1]}, ± their standard "
            "deviation"
        )
        once = [name for key, name in MEASURED_ONCE.items() if key in result]
        if once:
            lines.append(f"{' and '.join(once)}: of seed {seeds[0]} alone")
    if "likelihood" in result:
        lines.append(describe_likelihood(result["likelihood"]))
    if "curves" in result.get("likelihood", {}):
        lines.append(f"rate-distortion curve and terms of the bound in {LIKELIHOOD_PICTURE}")
    if "conditioned" in result:
        lines.append(describe_conditioned(result["conditioned"]))
    if result["features"]:
        lines.append(describe_features(result["features"], result["reference"]))
    return lines


def reference_in_words(reference: dict) -> str:
    """The real images, as `describe_reference` has them, in a line of the screen."""
    name, size = Path(reference["dataset_name"]).name, "x".join(map(str, reference["image_shape"][1:]))
    return f"reference: {reference['num_images']} images of {name}, split {reference['dataset_split']}, {size}"


def describe_network(about: dict) -> str:
    """Which network the features are of, by what is known of it."""
    if "name" in about:
        return f"the network {about['name']}"
    if "held_out_accuracy" in about:
        return f"the classifier in {about['folder']}, which reads {about['held_out_accuracy']:.2%} of held-out images"
    if "held_out_share_found" in about:
        return (
            f"the network in {about['folder']}, trained without labels, which finds {about['held_out_share_found']:.2%} of held-out "
            "images by another view of them"
        )
    return f"the autoencoder in {about['folder']}"


def name_network(about: dict, dataset: str) -> str:
    """The same for a card, which has no folders."""
    if "name" in about:
        return f"the network {about['name']}"
    if "held_out_accuracy" in about:
        return f"a classifier of {dataset}"
    return (
        f"a network trained on {dataset} without labels"
        if "held_out_share_found" in about
        else "an autoencoder, its latents"
    )


def describe_features(about: dict, reference: dict) -> str:
    """Which features, and which images they are compared with."""
    return (
        f"features: {about['dim']} of {describe_network(about)}; the Fréchet distance is from all {reference['num_images']} training "
        "images and is comparable only with distances in the same features"
    )


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
        if result.get(name, {}).get("label_shares_differ"):
            lines.append(
                f"the {title} images do not show the labels in the proportions of the training images: by the classifier of the "
                f"features {result[name]['label_share_distance']:.1%} of them would have to show another label"
            )
    return lines


def describe_likelihood(bound: dict) -> str:
    """The bound in a line."""
    flow = ""
    if "flow_bits_per_dim" in bound:
        flow = (
            f"; by the probability flow {_with_error(bound, 'flow_bits_per_dim', 'flow_standard_error')} in "
            f"{bound['flow_calls']:.4g} calls, dequantisation {bound['dequantization']}"
        )
    return (
        f"bits/dim: at most {_with_error(bound, 'bits_per_dim', 'standard_error')} on {bound['num_images']} held-out images in 8 "
        f"bits, rate {_with_error(bound, 'rate', 'rate_standard_error')} and distortion "
        f"{_with_error(bound, 'distortion', 'distortion_standard_error')} ({bound['num_steps']} timesteps, of which "
        f"{bound['num_terms']} for each image; variance {bound['variance']}){flow}; +- is the standard error over images and noise"
    )


def _with_error(bound: dict, name: str, error: str) -> str:
    return f"{bound[name]:.3f}" + ("" if bound[error] is None else f" +- {bound[error]:.3f}")


def describe_conditioned(measures: dict) -> str:
    """These figures in a line."""
    kind = "held-out images" if measures["held_out"] else "training images"
    bicubic = f"; bicubic {_closeness(measures, 'bicubic_')}" if "bicubic_psnr" in measures else ""
    return (
        f"by {measures['condition']} of {kind}: {_closeness(measures)}{bicubic}; side by side in {CONDITIONED_PICTURE}"
    )


def _closeness(measures: dict, beginning: str = "") -> str:
    named = {name: measures[beginning + key] for key, (_, name) in CLOSENESS.items() if beginning + key in measures}
    return ", ".join(f"{name} {value:.4g}" for name, value in named.items())


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    (unit, bounds), *_ = (interval if isinstance(interval, Mapping) else {"steps": interval}).items()
    low, high = bounds
    return f" in {unit} {low:.3g} to {high:.3g}"


def figures_of(result: dict, command: str) -> list[Figure]:
    """The measures of the generated images as a model card shows them, with the command that made them."""
    sampling, measures = result["sampling"], result["generated"]
    sampler = sampling["scheduler_class"]
    if sampling["guidance_scale"] not in (None, 1.0):
        sampler += f", guidance {sampling['guidance_scale']:g}{_interval(sampling['guidance_interval'])}"
    if sampling["internal_guidance_scale"] != 1.0:
        sampler += f", internal guidance {sampling['internal_guidance_scale']:g}"
    if sampling["guider"]:
        sampler += f", {sampling['guider']}"
    if sampling["labels"]:
        sampler += f", labels {sampling['labels']['proportions']}"
    dataset, about = Path(result["dataset_name"]).name, result["features"] or {}
    known = {
        "dataset": dataset,
        "k": result["num_neighbours"],
        "whose": "asked for",
        "values": "values" if len(result["image_shape"]) == 2 else "pixels",
        "features": name_network(about, dataset),
    }
    names, spread, seeds = names_of(about), result.get("spread", {}), result["seeds"]
    asked = ""
    if captions := sampling["captions"]:
        known["whose"] = "of the picture whose caption was asked for"
        asked = f", images from captions of the split {captions['split']}"
    figures = [
        Figure(
            METRICS[name].format(**known) + asked + _over_seeds(spread.get(name), seeds),
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


def _over_seeds(spread: float | None, seeds: Sequence[int]) -> str:
    """How a figure that is a mean over sets of images says so."""
    return "" if spread is None else f", mean of {len(seeds)} seeds with standard deviation {spread:.2g}"


def figures_of_conditioned(measures: dict, sampler: str, sampling: dict, dataset: str, command: str) -> list[Figure]:
    """How close images are to those whose condition images were asked for."""
    figures, kind = [], "held-out" if measures["held_out"] else "training"
    for key, (title, name) in CLOSENESS.items():
        if key not in measures:
            continue
        by = f" by {measures['lpips_network']}" if key == "lpips" else ""
        beside = f"; bicubic has {measures[f'bicubic_{key}']:.3g}" if f"bicubic_{key}" in measures else ""
        what = f"{title}{by} to {kind} images of {dataset} by {measures['condition']}{beside}"
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
