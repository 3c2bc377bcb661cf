"""Images from a pipeline, for measuring: of each label as many as the data has, the same whatever the batch size."""

import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_ext.draws import LARGEST_SEED
from diffusers_ext.guidance.labels import NUM_CLASSES_KEYS
from diffusers_ext.sizes import as_size, downsampling_factor


# Seeds s and s + 1 share no image of a set of up to this many.
SEED_STRIDE = 1_000_000
LARGEST_SEED_OF_SETS = LARGEST_SEED // SEED_STRIDE - 1

# Classes of which the largest has at most this many times the images of the smallest are taken as equal, as those of a
# random split of a balanced data set: shares of one in ten are then off by at most half a percent.
NEARLY_EQUAL = 1.1

EQUALLY_OFTEN, AS_IN_TRAINING = "equally often", "as often as in the training images"


def num_classes_of(pipeline) -> int | None:
    """The number of labels that a pipeline can be asked for, or None if it takes none."""
    if "class_labels" not in _parameters(pipeline):
        return None
    for component in pipeline.components.values():
        for key in NUM_CLASSES_KEYS:
            num_classes = getattr(getattr(component, "config", None), key, None)
            if isinstance(component, torch.nn.Module) and num_classes:
                return num_classes
    return None


def label_names_of(pipeline) -> list[str] | None:
    """Names of a pipeline's labels 0, 1, 2, ...; None if it has none."""
    names = getattr(pipeline, "config", {}).get("id2label")
    return [names[key] for key in sorted(names, key=int)] if names else None


def takes_prompts(pipeline) -> bool:
    """Whether a pipeline makes images from texts."""
    return "prompt" in _parameters(pipeline) and "class_labels" not in _parameters(pipeline)


def image_size_of(pipeline) -> tuple[int, int]:
    """The (height, width) of the images that a pipeline makes, from the configs of its networks.

    Raises:
        ValueError: if they do not say it.
    """
    for name in ("denoiser", "unet", "transformer"):
        size = getattr(getattr(getattr(pipeline, name, None), "config", None), "sample_size", None)
        if size is not None:
            height, width = as_size(size)
            vae = getattr(pipeline, "vae", None)
            scale = 1 if vae is None else downsampling_factor(vae.config.block_out_channels)
            return height * scale, width * scale
    raise ValueError(f"the size of the images of {type(pipeline).__name__} is not in its configs: give --resolution")


def balanced_labels(num_images: int, labels: int | Sequence[int]) -> list[int]:
    """Labels in turn, so that their counts differ by at most 1.

    Args:
        labels: Those to take; a number stands for 0, 1, ... below it.
    """
    labels = range(labels) if isinstance(labels, int) else labels
    return [labels[index % len(labels)] for index in range(num_images)]


def proportional_labels(num_images: int, counts: Sequence[int]) -> list[int]:
    """Labels as often as a data set has them, so that a generator is not measured as one of another mix.

    A label gets its share of the images, rounded up for those of the largest remainders and down for the others
    (Hamilton's method). A label of no image gets none, and one may be too rare for any of so few images. Where the
    numbers are equal or nearly so (see `NEARLY_EQUAL`), labels come in turn, as from `balanced_labels`.

    Args:
        num_images: Labels to return.
        counts: Images that the data set has of the labels 0, 1, 2, ...

    Returns:
        One label for each image. The first of each label come first, and the others follow evenly.

    Raises:
        ValueError: if a count is negative or all are 0.
    """
    shares = _shares(counts)
    quotas = {label: num_images * share for label, share in shares.items()}
    numbers = {label: math.floor(quota) for label, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda label: (numbers[label] - quotas[label], label))
    for label in by_remainder[: num_images - sum(numbers.values())]:
        numbers[label] += 1
    places = [(k / shares[label], label) for label, number in numbers.items() for k in range(number)]
    return [label for _, label in sorted(places)]


def describe_labels(labels: Sequence[int], counts: Sequence[int]) -> dict[str, str | int]:
    """In which proportions labels are asked for, as JSON and model cards have it.

    Returns:
        `proportions`, which is `EQUALLY_OFTEN` or `AS_IN_TRAINING`; `num_labels` that the data set has images of;
        `num_asked`, those asked for at all; `fewest` and `most` images of one of those.
    """
    asked = Counter(labels).values()
    return {
        "proportions": EQUALLY_OFTEN if _are_nearly_equal(counts) else AS_IN_TRAINING,
        "num_labels": sum(count > 0 for count in counts),
        "num_asked": len(asked),
        "fewest": min(asked),
        "most": max(asked),
    }


def _are_nearly_equal(counts: Sequence[int]) -> bool:
    there = [count for count in counts if count]
    return max(there) <= NEARLY_EQUAL * min(there)


def _shares(counts: Sequence[int]) -> dict[int, Fraction]:
    """The exact share of each label that has images; equal ones where the counts are nearly equal."""
    if min(counts, default=0) < 0 or not any(counts):
        raise ValueError(f"counts must not be negative, and one of them positive, got {list(counts)}")
    there = {label: int(count) for label, count in enumerate(counts) if count}
    if _are_nearly_equal(counts):
        there = dict.fromkeys(there, 1)
    total = sum(there.values())
    return {label: Fraction(count, total) for label, count in there.items()}


def generate_images(
    pipeline,
    indices: Sequence[int],
    *,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 50,
    seed: int = 0,
    show_progress: bool = True,
) -> Tensor:
    """Images `indices` of a set of which image i is made by the generator of seed `seed * 1_000_000 + i`.

    Image i depends on nothing else, so the set may be split among batches and processes.

    Args:
        pipeline: A pipeline of this package, or one of diffusers that is called with `batch_size`, `class_labels` or
            `prompt`.
        indices: Which images of the set.
        labels: The label of each image of the set, of which `labels[i]` for i in `indices` are asked for.
        prompts: The text of each image of the set, in place of the labels.
        num_inference_steps: The pipeline's default if None.
        guidance_scale: The pipeline's default if None.
        settings: Further keywords of the pipeline's call.
        batch_size: Images at a time.
        seed: Of the set.

    Returns:
        uint8, shape `(len(indices), channels, height, width)`, on the CPU.

    Raises:
        ValueError: if the pipeline takes no `guidance_scale` or no labels or prompts and one is given, or if it makes NaN.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if labels is not None and prompts is not None:
        raise ValueError("labels and prompts must not both be given")
    word, each = ("class_labels", labels) if prompts is None else ("prompt", prompts)
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    given = {name: value for name, value in given.items() if value is not None} | dict(settings or {})
    needed = {*given, "generator", "output_type", "batch_size" if each is None else word}
    if missing := sorted(needed - _parameters(pipeline).keys()):
        raise ValueError(
            f"{type(pipeline).__name__} takes no {', '.join(missing)}, so it cannot be evaluated with it;"
            f" it takes {', '.join(_parameters(pipeline))}"
        )

    pipeline.set_progress_bar_config(disable=True)
    progress = tqdm(total=len(indices), desc="generating", unit="image", disable=not show_progress)
    batches = []
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        # On the CPU, so that the images are the same on every device.
        generators = [torch.Generator().manual_seed(seed * SEED_STRIDE + index) for index in batch]
        what = {"batch_size": len(batch)} if each is None else {word: [each[index] for index in batch]}
        images = pipeline(**what, **given, generator=generators, output_type="np").images  # (B, H, W, C) in [0, 1]
        images = torch.as_tensor(images).float().movedim(-1, 1)
        if not torch.isfinite(images).all():
            raise ValueError(f"{type(pipeline).__name__} made NaN or infinity for images {batch[0]} to {batch[-1]}")
        batches.append(images.mul(255).round().clamp(0, 255).to(torch.uint8))
        progress.update(len(batch))
    progress.close()
    return torch.cat(batches)


def convert_channels(images: Tensor, channels: int) -> Tensor:
    """Colour to grey by its luma (ITU-R BT.601, as in Pillow's mode L), grey to colour by copies; else unchanged.

    Args:
        images: uint8, shape `(number, 1 or 3 or channels, height, width)`.
        channels: Channels of the result.
    """
    given = images.shape[1]
    if given == channels:
        return images
    if (given, channels) == (3, 1):
        luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        return (images.float() * luma).sum(1, keepdim=True).round().to(torch.uint8)
    if (given, channels) == (1, 3):
        return images.expand(-1, 3, -1, -1)
    raise ValueError(f"images of {given} channels cannot be compared with a data set of {channels} channels")


def default_of(pipeline, name: str):
    """The default of an argument of the pipeline's call, or None."""
    parameter = _parameters(pipeline).get(name)
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def _parameters(pipeline) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(type(pipeline).__call__).parameters.items() if name != "self"}
