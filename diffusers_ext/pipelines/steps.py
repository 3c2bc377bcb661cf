"""The steps of a call, once its arguments are tensors: the guided prediction, the scheduler's step, what is kept of an image.

A pipeline makes them in its loop (`diffusers_ext.pipelines.sampling`), and so do the blocks of a modular pipeline
(`diffusers_ext.pipelines.modular_blocks`).
"""

import inspect
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor

from diffusers_ext.draws import draw_normal
from diffusers_ext.guidance.guiding import choose_guider, guided_steps
from diffusers_ext.pipelines.call_defaults import says_guidance
from diffusers_ext.pipelines.components import check_clipped_noise
from diffusers_ext.pipelines.inpainting import KnownPixels, mask_of_latents
from diffusers_ext.pipelines.outputs import TrajectoryPoint
from diffusers_ext.pipelines.truncation import check_latents
from diffusers_ext.schedulers.levels import add_noise_at, start_scale


class Steps:
    """What each step of a call does, in the order of the methods from `predict` on.

    Args:
        pipe: With the methods of `SamplingMixin`, and the components.
        condition, call: A `Condition` and the `CallOptions` of the call, with nothing left open.
        scheduler, timesteps: The one that samples, set to the timesteps to visit.
        batch_size: Number of images.
        generator: Source of the noise. With a list, that of image i comes from generator i alone.

    Raises:
        ValueError: if the call asks for what the scheduler, the guider or the components cannot do.
    """

    def __init__(
        self,
        pipe,
        condition,
        call,
        scheduler: SchedulerMixin,
        timesteps: Tensor,
        batch_size: int,
        generator: Generator | list[Generator] | None,
    ):
        self.pipe, self.condition, self.call, self.batch_size = pipe, condition, call, batch_size
        self.scheduler, self.timesteps, self.generator = scheduler, timesteps, generator
        self.guide = guided_steps(call.guidance_interval, scheduler, timesteps)
        self.trajectory: list[TrajectoryPoint] = []
        self._wanted = call.wanted_steps(len(timesteps))
        self._channels = _channels_for_step(scheduler, pipe._sample_shape[0])
        self._known: KnownPixels | None = None
        self.guide_by(call.guidance_scale)
        _check_refinements(pipe, condition, call)

    def guide_by(self, guidance_scale: float | None) -> None:
        """From the next step on, guides by this scale."""
        pipe, call = self.pipe, self.call
        guider = choose_guider(
            pipe.guider if call.guider is None else call.guider,
            guidance_scale,
            call.guidance_rescale,
            call.classifier_scale,
            call.internal_guidance_scale,
            weighted=self.condition.weighted,
        )
        self.condition.check(pipe, guider, self.timesteps, self.guide)
        self._denoise = pipe._denoiser(
            self.scheduler, guider, self.condition, self.batch_size, self.timesteps.device, call.low_memory
        )
        is_guided = guider is not None and guider._enabled and any(self.guide)
        clips = check_clipped_noise(pipe.config.get("clip_guided_noise") or False)
        reuse_clipped = clips == "always" or (is_guided and clips)
        self._options = _step_options(self.scheduler, self.generator, call, reuse_clipped)

    def keep(self, x0: Tensor | None, mask: Tensor | None) -> None:
        """From the next step on, keeps what is known of clean samples.

        Args:
            x0: Shape `(batch or 1, channels, *spatial)`.
            mask: 1 where the images are to be made, 0 where they are known, in pixels; `None` to keep nothing.
        """
        if mask is not None:
            shape = self.pipe._sample_shape
            spatial_mask = mask if mask.shape[2:] == shape[1:] else mask_of_latents(mask, shape[1:])
            self._known = KnownPixels(x0.expand(self.batch_size, *shape), spatial_mask, self.scheduler, self.generator)

    def predict(self, x: Tensor, i: int) -> Tensor:
        """The network's output at x_t of step `i`, guided."""
        return self._denoise(x, self.timesteps[i], i, len(self.timesteps), self.guide[i])

    def advance(self, x: Tensor, output: Tensor, i: int, times_left: int = 0) -> Tensor:
        """x_s from x_t by the scheduler; where the step is repeated, the last time belongs to the trajectory."""
        t = self.timesteps[i]
        step = self.scheduler.step(output[:, : self._channels], t, x, **self._options)
        if i in self._wanted and not times_left:
            self.trajectory.append(TrajectoryPoint.of_step(self.scheduler, t, x, output, step))
        return step.prev_sample

    def put_known(self, x: Tensor, i: int, times_left: int = 0) -> Tensor:
        """x_s with the known pixels as noisy as it is; back at x_t, if the step is repeated `times_left` times."""
        if self._known is None:
            return x
        x = self._known.put_into(x, self.timesteps[i + 1] if i + 1 < len(self.timesteps) else None)
        return self._known.renoise(x, self.timesteps[i]) if times_left else x


def _check_refinements(pipe, condition, call) -> None:
    """Refuses to guide in some of the steps, or to rescale, where nothing says by what to guide."""
    if says_guidance(vars(call)) or pipe.guider is not None or condition.weighted:
        return
    refined = {"guidance_interval": call.guidance_interval, "guidance_rescale": call.guidance_rescale or None}
    given = [name for name, value in refined.items() if value is not None]
    if given:
        raise ValueError(
            f"{' and '.join(given)} would do nothing, since nothing guides this call: give a guidance_scale, or leave it out"
        )


def noisy_start(
    scheduler: SchedulerMixin,
    shape: tuple[int, ...],
    generator: Generator | list[Generator] | None,
    latents: Tensor | None,
    x0: Tensor | None,
    timesteps: Tensor,
) -> Tensor:
    """x_T from noise, or from clean samples the level of the first timestep; float32, whatever the network's precision,
    since sampling is a sum of many small steps.

    Args:
        latents: The noise, of unit variance, if it is given.
        x0: Clean samples to start from, one or as many as `shape` says, on the scale of the denoiser; `None` for noise.
    """
    device = timesteps.device
    if latents is None:
        noise = draw_normal(shape, generator=generator, device=device, dtype=torch.float32)
    else:
        check_latents(latents, shape)
        noise = latents.to(device, torch.float32)
    if x0 is None:
        return noise * start_scale(scheduler)
    x0 = x0.expand(shape)
    return add_noise_at(scheduler, x0, noise, timesteps[:1]) if len(timesteps) else x0


def _channels_for_step(scheduler: SchedulerMixin, channels: int) -> int | None:
    """Channels of a network's output that the scheduler's step takes: those of the sample, or all, with a learned variance.

    Raises:
        ValueError: if the scheduler would misread a learned variance.
    """
    # A config keeps the keys of the scheduler that it came from, whether or not the class knows them.
    known = inspect.signature(type(scheduler).__init__).parameters
    if "variance_type" not in known or not str(scheduler.config.variance_type).startswith("learned"):
        return channels
    if "algorithm_type" not in known:
        return None
    # Solvers of diffusers use no variance, and keep 3 channels of what they get, whatever the data.
    if channels > 3:
        name = type(scheduler).__name__
        raise ValueError(
            f"{name} takes no learned variance for {channels} channels, got variance_type="
            f"{scheduler.config.variance_type!r}; make it by {name}.from_config(config, variance_type=None)"
        )
    return channels


def _step_options(
    scheduler: SchedulerMixin,
    generator: Generator | list[Generator] | None,
    call,
    reuse_clipped: bool,
) -> dict[str, Any]:
    """Options of the scheduler's step, of those that it has.

    Args:
        call: With `eta` and `use_clipped_model_output`.
        reuse_clipped: Whether DDIM uses the clipped x_0 where the call does not say it.

    Raises:
        ValueError: if the call asks for one that it has not.
    """
    accepted = inspect.signature(scheduler.step).parameters
    asked = call.use_clipped_model_output
    for name, value, neutral in (("eta", call.eta, 0), ("use_clipped_model_output", asked, None)):
        if value and name not in accepted:
            kind = type(scheduler).__name__
            raise ValueError(f"{name} must be {neutral} for {kind}, which has none, got {value}")
    reuse = reuse_clipped if asked is None else asked
    options = {"generator": generator, "eta": call.eta, "use_clipped_model_output": reuse}
    return {name: value for name, value in options.items() if name in accepted}
