"""From images back to the noise that makes them, and images between two images (DDIM: arXiv 2010.02502, Section 5.3)."""

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_ext.pipelines.call_condition import CallCondition
from diffusers_ext.pipelines.image_inputs import ImageInput, encode_pixels
from diffusers_ext.pipelines.label_condition import LabelCondition, Labels
from diffusers_ext.pipelines.outputs import decode_images
from diffusers_ext.pipelines.sampling import count_images
from diffusers_ext.pipelines.statistics import labels_of_data
from diffusers_ext.schedulers.levels import is_linear, path_name
from diffusers_ext.schedulers.scheduling_ddim import ExtDDIMScheduler
from diffusers_ext.schedulers.scheduling_ddim_inverse import ExtDDIMInverseScheduler
from diffusers_ext.schedulers.scheduling_flow import FlowScheduler


class InversionMixin:
    """`invert` and `interpolate`, for a pipeline that makes images."""

    @torch.no_grad()
    def invert(
        self,
        image: ImageInput,
        class_labels: Labels | None = None,
        *,
        condition_image: ImageInput | None = None,
        num_inference_steps: int = 50,
        num_refinements: int = 0,
    ) -> Tensor:
        """The noise from which deterministic sampling with as many steps makes `image`, up to the error of the steps.

        Give it to the pipeline as `latents`, with the same labels and `num_inference_steps`, a DDIM scheduler or, on the
        linear path, `FlowScheduler`, and with a `guidance_scale` of 1 where the pipeline guides by default.

        Args:
            image: One or several, as for the call.
            class_labels, condition_image: As for the call.
            num_inference_steps: Number of steps, each of one call of the network.
            num_refinements: How often each step is repeated with its own result; each costs one more call of the
                network a step and makes the way back more exact.

        Returns:
            float32, shape `(batch, in_channels, *sample_size)`.

        Raises:
            ValueError: if an argument does not fit the model, or the scheduler has no noising path of ours.
        """
        if num_refinements < 0:
            raise ValueError(f"num_refinements must not be negative, got {num_refinements}")
        _, inverse = deterministic(self.scheduler)
        device = self._execution_device
        inverse.set_timesteps(num_inference_steps, device=device)
        condition = LabelCondition(self, class_labels)
        whole = CallCondition(self, condition, condition_image=condition_image)
        if condition.weighted:
            raise ValueError("class_labels must be labels to invert, not weights of them")
        if condition.labels is not None and self.denoiser_num_classes is None:
            raise ValueError("class_labels would do nothing: the denoiser takes none; leave them out")
        pixels, labels = self._to_pixels(image, device), labels_of_data(self.statistics, condition)
        x0 = encode_pixels(pixels, self.vae, self._sample_shape, self.statistics, labels)
        batch_size = count_images(1, **whole.per_image, image=x0)
        predict = self._denoiser(inverse, None, whole, batch_size, device)
        with self._precision():
            latents = inverse.invert(
                lambda x, t: predict(x, t)[:, : x.shape[1]], x0.expand(batch_size, *x0.shape[1:]), num_refinements
            )
        self.maybe_free_model_hooks()
        return latents

    @torch.no_grad()
    def interpolate(
        self,
        image_a: ImageInput,
        image_b: ImageInput,
        num_images: int = 8,
        class_labels: Labels | None = None,
        *,
        condition_image: ImageInput | None = None,
        num_inference_steps: int = 50,
        num_refinements: int = 0,
        output_type: str | None = None,
    ):
        """Images on the way from one image to another, both included: inverted, mixed as noise, and made again.

        The noise goes along the great circle between the two, on which it keeps its length.

        Args:
            image_a, image_b: The two ends, as for the call.
            num_images: Number of images, the ends included; at least 2.
            class_labels, condition_image: One for all of them, or none.
            num_inference_steps, num_refinements: As for `invert`.
            output_type: As for the call.

        Returns:
            The images, as the call's.

        Raises:
            ValueError: if an argument does not fit the model.
        """
        if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 2:
            raise ValueError(f"num_images must be an integer of at least 2, the two ends, got {num_images!r}")
        output_type = output_type or self._default_output
        self._check_output_type(output_type)
        condition = LabelCondition(self, class_labels)
        if condition.labels is not None and len(condition.labels) != 1:
            raise ValueError("class_labels must be one label for all images of an interpolation")
        whole = CallCondition(self, condition, condition_image=condition_image)
        if whole.image is not None and len(whole.image) != 1:
            raise ValueError("condition_image must be one for all images of an interpolation")
        options = {"num_inference_steps": num_inference_steps, "num_refinements": num_refinements}
        ends = [
            self.invert(image, class_labels, condition_image=condition_image, **options)
            for image in (image_a, image_b)
        ]
        if any(len(end) != 1 for end in ends):
            raise ValueError(f"image_a and image_b must be one image each, got {len(ends[0])} and {len(ends[1])}")
        device = ends[0].device
        x = slerp(*ends, torch.linspace(0, 1, num_images, device=device))
        sampler, _ = deterministic(self.scheduler)
        sampler.set_timesteps(num_inference_steps, device=device)
        predict = self._denoiser(sampler, None, whole, num_images, device)
        with self._precision():
            for t in sampler.timesteps:
                x = sampler.step(predict(x, t)[:, : x.shape[1]], t, x).prev_sample
        labels = labels_of_data(self.statistics, condition)
        images = decode_images(
            *(x, self.vae, output_type),
            statistics=self.statistics,
            labels=labels,
            value_scale=self._value_scale,
        )
        self.maybe_free_model_hooks()
        return images


def deterministic(scheduler: SchedulerMixin) -> tuple[SchedulerMixin, SchedulerMixin]:
    """A sampler without noise of the path of a scheduler, and one with the method `invert` that undoes it.

    Raises:
        ValueError: if the scheduler is not of this package.
    """
    if not hasattr(scheduler, "level") or path_name(scheduler) not in ("vp", "linear"):
        raise ValueError(
            "inversion needs a scheduler of this package, of a path at unit scale or the linear one, such as ExtDDIMScheduler "
            f"or FlowScheduler, got {type(scheduler).__name__}"
        )
    if is_linear(scheduler):
        sampler = FlowScheduler.from_config(scheduler.config, stochastic_sampling=False, multistep_order=1)
        return sampler, sampler
    sampler = ExtDDIMScheduler.from_config(scheduler.config, multistep_order=1)
    return sampler, ExtDDIMInverseScheduler.from_config(scheduler.config)


def slerp(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Points on the great circle from `a` (weight 0) to `b` (weight 1), with the lengths interpolated too.

    Args:
        a, b: Shape `(1, ...)`.
        weights: Shape `(points,)`.

    Returns:
        Shape `(points, ...)`. Where the two directions are parallel, points on the straight line.
    """
    w = weights.to(a).view(-1, *[1] * (a.ndim - 1))
    norm_a, norm_b = a.norm(), b.norm()
    angle = torch.arccos(((a / norm_a) * (b / norm_b)).sum().clamp(-1, 1))
    if not torch.sin(angle) > 1e-4:
        return (1 - w) * a + w * b
    direction = (torch.sin((1 - w) * angle) * a / norm_a + torch.sin(w * angle) * b / norm_b) / torch.sin(angle)
    return direction * ((1 - w) * norm_a + w * norm_b)
