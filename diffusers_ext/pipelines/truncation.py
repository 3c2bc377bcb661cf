"""A chain that starts below its noisiest level, from a prior of what is there (arXiv 2202.09671)."""

import inspect
from typing import TYPE_CHECKING

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor, nn

from diffusers_ext.command_names import name_commands
from diffusers_ext.diffusion.tables import is_readable
from diffusers_ext.diffusion.timesteps import make_timesteps
from diffusers_ext.draws import draw_normal
from diffusers_ext.models.gaussian_prior import GaussianPriorModel
from diffusers_ext.schedulers.levels import add_noise_at, is_linear
from diffusers_ext.sizes import as_size


if TYPE_CHECKING:
    from diffusers_ext.pipelines.sampling import Condition


def truncated_timesteps(scheduler: SchedulerMixin, num_inference_steps: int, start_timestep: int) -> list[int]:
    """Evenly spaced timesteps from `start_timestep` down, as "trailing" are from the last.

    Raises:
        ValueError: if the path has no such timestep, there are fewer of them than steps, or the scheduler goes through a list of
            its own alone.
    """
    if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(
            f"scheduler must take timesteps where calls start at start_timestep {start_timestep}, got {type(scheduler).__name__}, "
            "which always starts at the noisiest: take ExtDDIMScheduler or DPMSolverMultistepScheduler"
        )
    first = int(is_linear(scheduler))  # of whose timesteps 0 is the data
    length = scheduler.config.num_train_timesteps
    if isinstance(start_timestep, bool) or not isinstance(start_timestep, int) or not first <= start_timestep < length:
        raise ValueError(f"start_timestep must be an integer in [{first}, {length - 1}], got {start_timestep!r}")
    available = start_timestep + 1 - first
    if num_inference_steps > available:
        raise ValueError(
            f"num_inference_steps must be at most the {available} timesteps up to start_timestep {start_timestep}, got "
            f"{num_inference_steps}"
        )
    return (make_timesteps("trailing", num_inference_steps, available) + first).tolist()


def truncated_start(
    pipe,
    condition: "Condition",
    shape: tuple[int, ...],
    generator: Generator | list[Generator] | None,
    latents: Tensor | None,
    timestep: Tensor,
    scheduler: SchedulerMixin,
) -> Tensor:
    """x_t at the timestep that the chain starts from, float32: as it is given, or a draw of the pipeline's prior with noise.

    Args:
        pipe: With its `prior` and `statistics`.
        timestep: Shape `(1,)`.
        scheduler: With its timesteps set.

    Raises:
        ValueError: if there is neither a prior nor x_t, or x_t has another shape.
    """
    device = timestep.device
    if latents is not None:
        check_latents(latents, shape)
        return latents.to(device, torch.float32)
    prior = getattr(pipe, "prior", None)
    if prior is None:
        fitted = name_commands("a prior of this pipeline, which training/fit_prior.py fits, or ")
        raise ValueError(f"start_timestep needs {fitted if hasattr(pipe, 'prior') else ''}latents: x_t there")
    labels = getattr(condition, "labels", None)
    x0 = draw_clean(prior, shape[0], labels, pipe.statistics, generator, device)
    noise = draw_normal(shape, generator=generator, device=device, dtype=torch.float32)
    return add_noise_at(scheduler, x0, noise, timestep)


def check_latents(latents: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses latents of another shape than the call's samples, and those on the CPU that are not finite."""
    if latents.shape != shape:
        raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
    if is_readable(latents) and not latents.isfinite().all():  # an accelerator would be waited for
        raise ValueError("latents must be finite, got some that are not")


def draw_clean(
    prior: nn.Module,
    num_samples: int,
    labels: Tensor | None,
    statistics: nn.Module | None,
    generator: Generator | list[Generator] | None,
    device: torch.device,
) -> Tensor:
    """Clean samples of a prior as the denoiser knows them, float32, to which noise is then added.

    Args:
        prior: `GaussianPriorModel`, or an autoencoder of this package, whose decoded draws are images in [-1, 1].
        labels, statistics: Of the call and of the pipeline.
        generator: With a list, draw i depends on generator i alone.
    """
    if isinstance(prior, GaussianPriorModel):
        return prior.sample(num_samples, labels, generator, device)
    latents = prior.sample_prior(num_samples, generator)
    latents = latents if isinstance(latents, Tensor) else latents[-1]
    images = prior.decode(latents).sample.float().to(device)
    return images if statistics is None else statistics.normalise(images, labels)


def check_prior(prior: nn.Module | None, denoiser: nn.Module, in_latents: bool, num_classes: int | None) -> None:
    """Refuses a prior of other samples than a denoiser's.

    Raises:
        ValueError: with what differs.
    """
    if prior is None:
        return
    dims = denoiser.config.get("dims", 2)
    expected = (denoiser.config.in_channels, *as_size(denoiser.config.sample_size, dims))
    if isinstance(prior, GaussianPriorModel):
        got = tuple(prior.mean.shape[1:])
        labels = prior.config.num_classes
        if labels is not None and labels != num_classes:
            raise ValueError(
                f"prior must be of the denoiser's labels, of which it has {num_classes or 'none'}, got one of {labels}"
            )
    elif not hasattr(prior, "sample_prior"):
        raise ValueError(
            f"prior must be a GaussianPriorModel or an autoencoder of this package, got {type(prior).__name__}"
        )
    elif in_latents:
        raise ValueError("prior must be a GaussianPriorModel for a denoiser of latents: an autoencoder draws images")
    else:
        got = (prior.config.in_channels, *as_size(prior.config.sample_size, prior.config.get("dims", 2)))
    if got != expected:
        theirs, ours = ("x".join(map(str, shape)) for shape in (got, expected))
        raise ValueError(f"prior must be of the denoiser's samples, {ours} (channels first), got {theirs}")
