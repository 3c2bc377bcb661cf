"""Pictures of a pipeline at work: from noise to images, and from one image to the next by the noise between them."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Generator, Tensor

from diffusers_ext.draws import between_draws, draw_normal
from diffusers_ext.evaluation.generate import condition_of
from diffusers_ext.evaluation.pipeline_facts import default_of
from diffusers_ext.figures import labelled_grid
from diffusers_ext.pipelines.outputs import decode_samples
from diffusers_ext.pipelines.sampling import SamplingMixin
from diffusers_ext.value_scale import ValueScale


def as_shown(pipe: DiffusionPipeline, samples: Tensor, labels: Tensor | None = None) -> Tensor:
    """Samples as the sampler has them to pictures in [0, 1]: decoded, and with the mean of the data put back.

    Sequences are in own units.

    Args:
        labels: One for each sample, or one of all, if the pipeline's statistics are of labels.
    """
    vae, statistics = (getattr(pipe, name, None) for name in ("vae", "statistics"))
    with torch.no_grad():
        samples = decode_samples(samples, vae, statistics, labels).float()
    scale = ValueScale.of_config(pipe.config.get("value_scale"))
    return (samples + 1) / 2 if scale is None else scale.to_values(samples)


def check_animated(pipe: DiffusionPipeline) -> None:
    """Refuses a pipeline whose noise and steps cannot be had.

    Raises:
        ValueError: if it is not of this package.
    """
    if not isinstance(pipe, SamplingMixin):
        raise ValueError(
            f"animations are of pipelines of this package, got a {type(pipe).__name__}: one of diffusers with a UNet2DModel or "
            "a DiT becomes one by GuidedDiffusionPipeline.from_pipe(pipe)"
        )


def denoising_frames(
    pipe: DiffusionPipeline,
    seeds: Sequence[int],
    *,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    heads: Sequence[str] | None = None,
    num_frames: int = 50,
    num_inference_steps: int | None = None,
    **settings: Any,
) -> list[Image.Image]:
    """x_t above the predicted x_0, a column for each image, at evenly spaced steps from the first to the last.

    Args:
        seeds: Of the images, as in `sample_images`.
        labels, prompts: Of the images, one for each.
        heads: Texts above them.
        num_frames: At most; a step has no more than one.
        settings: Further keywords of the pipeline's call.

    Raises:
        ValueError: if the pipeline is not of this package.
    """
    check_animated(pipe)
    steps = num_inference_steps or default_of(pipe, "num_inference_steps")
    last, count = steps - 1, min(num_frames, steps)
    trajectory = pipe(
        **condition_of(len(seeds), labels, prompts),
        generator=[Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
        num_inference_steps=steps,
        trajectory_steps=sorted({round(frame * last / max(count - 1, 1)) for frame in range(count)}),
        **settings,
    ).trajectory
    of_data = None if labels is None else torch.tensor(labels)
    frames = []
    for timestep, x_t, x0_hat in trajectory:
        rows = {"x_t": x_t, "predicted x_0": x0_hat}
        rows = {name: as_shown(pipe, row, of_data) for name, row in rows.items() if row is not None}
        frames.append(labelled_grid(list(rows.values()), list(rows), heads, title=f"t = {timestep:.4g}"))
    return frames


def interpolation_frames(
    pipe: DiffusionPipeline,
    seeds: Sequence[int],
    *,
    label: int | None = None,
    prompt: str | None = None,
    num_between: int = 11,
    batch_size: int = 50,
    **settings: Any,
) -> list[Image.Image]:
    """Images of the noise on the arcs from seed to seed, and from the last back to the first.

    With a deterministic sampler the image at a seed is that of `sample_images`. What other samplers draw in their steps is the
    same in all frames.

    Args:
        label, prompt: Of all frames.
        num_between: Frames between two seeds.
        settings: Further keywords of the pipeline's call.

    Raises:
        ValueError: if the pipeline is not of this package.
    """
    check_animated(pipe)
    device = pipe._execution_device
    ends = [draw_normal((1, *pipe._sample_shape), [Generator().manual_seed(seed)]) for seed in seeds]
    pairs = zip(ends, ends[1:] + ends[:1], strict=True)
    shares = [k / (num_between + 1) for k in range(num_between + 1)]
    noise = torch.cat([between_draws(first, second, share) for first, second in pairs for share in shares])
    frames = []
    for latents in noise.split(batch_size):
        each = [None if value is None else [value] * len(latents) for value in (label, prompt)]
        images = pipe(
            **condition_of(len(latents), *each),
            latents=latents.to(device),
            generator=[Generator().manual_seed(seeds[0]) for _ in latents],
            output_type="pt",
            **settings,
        ).images.cpu()
        frames += [labelled_grid([image[None]]) for image in images]
    return frames
