"""Images from a pipeline, each from a seed of its own: the same whatever the batch size and the number of processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Generator, Tensor
from tqdm.auto import tqdm

from diffusers_ext.draws import LARGEST_SEED
from diffusers_ext.evaluation.pipeline_facts import parameters_of


# Seeds s and s + 1 share no image of a set of up to this many.
SEED_STRIDE = 1_000_000
LARGEST_SEED_OF_SETS = LARGEST_SEED // SEED_STRIDE - 1


def condition_of(
    number: int,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    conditions: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """Keywords of a pipeline's call that ask for `number` images: of these labels, of these texts, or of neither; and of these
    condition images.

    Raises:
        ValueError: if labels and texts are given.
    """
    if labels is not None and prompts is not None:
        raise ValueError("labels and prompts must not both be given")
    images = {} if conditions is None else {"condition_image": list(conditions)}
    if labels is None and prompts is None:
        return images or {"batch_size": number}
    return ({"class_labels": list(labels)} if prompts is None else {"prompt": list(prompts)}) | images


def sample_images(
    pipeline,
    seeds: Sequence[int],
    *,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    conditions: Sequence[Tensor] | None = None,
    batch_size: int,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Iterator[Tensor]:
    """Batches of images, of which image i is made by a generator of seed `seeds[i]` and depends on nothing else.

    Args:
        pipeline: Called with `batch_size`, `class_labels` or `prompt`, and `condition_image`.
        labels, prompts: Of one of the two, one for each seed.
        conditions: Condition images in [0, 1], one for each seed, as the pipeline takes them.
        batch_size: Images at a time.
        device: Of the generators. Those of the CPU draw the same on every machine.
        settings: Further keywords of the pipeline's call.

    Yields:
        float32 in [0, 1], shape `(batch, channels, height, width)`, on the CPU; sequences in own units, `(batch, channels,
        length)`.
    """
    each = _given(labels=labels, prompts=prompts, conditions=conditions)
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, start + batch_size)
        generators = [Generator(device).manual_seed(seed) for seed in seeds[rows]]
        condition = condition_of(len(generators), **{name: values[rows] for name, values in each.items()})
        images = pipeline(**condition, generator=generators, output_type="np", **settings).images
        yield torch.as_tensor(images).float().movedim(-1, 1)


def shared_by_processes(number: int, make: Callable[[range], Tensor]) -> Tensor:
    """Images 0 to `number` - 1 in order, on every process, each of which makes its share.

    Args:
        make: Gives the images of these indices, first axis, on the CPU.
    """
    state = PartialState()
    indices = range(state.process_index, number, state.num_processes)
    mine = make(indices) if len(indices) else None
    if state.num_processes == 1:
        return mine
    parts = gather_object([mine])
    images = parts[0].new_empty(number, *parts[0].shape[1:])
    for process, part in enumerate(parts[:number]):
        images[process :: state.num_processes] = part
    return images


def generate_images(
    pipeline,
    indices: Sequence[int],
    *,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    conditions: Sequence[Tensor] | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 50,
    seed: int = 0,
    show_progress: bool = True,
) -> Tensor:
    """Images `indices` of a set of which image i is made by the generator of seed `seed * 1_000_000 + i`.

    Args:
        pipeline: A pipeline of this package, or one of diffusers that is called with `batch_size`, `class_labels` or
            `prompt`.
        indices: Which images of the set.
        labels: The label of each image of the set, of which `labels[i]` for i in `indices` are asked for.
        prompts: The text of each image of the set, instead of the labels.
        conditions: The condition image of each image of the set, beside labels or texts.
        num_inference_steps: The pipeline's default if None.
        guidance_scale: The pipeline's default if None.
        settings: Further keywords of the pipeline's call.
        batch_size: Images at a time.
        seed: Of the set.

    Returns:
        uint8, shape `(len(indices), channels, height, width)`, on the CPU; sequences float32 in own units, shape
        `(len(indices), channels, length)`.

    Raises:
        ValueError: if the pipeline takes no `guidance_scale` or no labels or prompts and one is given, or if it makes NaN.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    given = _given(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale) | dict(settings or {})
    _check_arguments(pipeline, {*given, "generator", "output_type", *condition_of(0, labels, prompts, conditions)})
    given_each = _given(labels=labels, prompts=prompts, conditions=conditions)
    each = {name: [values[i] for i in indices] for name, values in given_each.items()}
    seeds = [seed * SEED_STRIDE + index for index in indices]

    pipeline.set_progress_bar_config(disable=True)
    batches, done = [], 0
    with tqdm(total=len(indices), desc="generating", unit="image", disable=not show_progress) as progress:
        for images in sample_images(pipeline, seeds, batch_size=batch_size, **each, **given):
            batch = indices[done : done + len(images)]
            if not torch.isfinite(images).all():
                raise ValueError(
                    f"{type(pipeline).__name__} made NaN or infinity for images {batch[0]} to {batch[-1]}"
                )
            is_sequence = images.ndim == 3
            batches.append(images if is_sequence else images.mul(255).round().clamp(0, 255).to(torch.uint8))
            done += len(images)
            progress.update(len(images))
    return torch.cat(batches)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _check_arguments(pipeline, needed: set[str]) -> None:
    known = parameters_of(pipeline)
    if missing := sorted(needed - known.keys()):
        raise ValueError(
            f"{type(pipeline).__name__} takes no {', '.join(missing)}: leave what says it out; it takes {', '.join(known)}"
        )
