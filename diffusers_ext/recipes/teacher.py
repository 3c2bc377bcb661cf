"""The pipeline that a student learns from: its network as it is, and the x_0 that it predicts under guidance."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from diffusers_ext.calibration.subject import Subject
from diffusers_ext.diffusion.distillation import noise_ratio
from diffusers_ext.diffusion.noising import predict_x0
from diffusers_ext.diffusion.tables import DeviceTable
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.guidance.guided_denoiser import check_guidance_scale
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.schedulers.levels import model_schedule, prediction_type_of


# A student of one step starts where there is no signal left. There these two say nothing of x_0: it is a quotient by alpha.
WITHOUT_X0_AT_NOISE = ("epsilon", "score")


class Teacher:
    """A frozen denoiser on a table of betas or the linear path. It is no module, so that checkpoints of the student leave it out.

    Args:
        pipe: In pixels or latents, by label or unconditional.
        guidance_scale: Weight of the prediction with the label against that without; 1 is the former alone.
        guidance_interval: The noise levels sigma / alpha in which that holds, (low, high), both included; None for all.
        autocast: Entered for each call of the network.

    Raises:
        ValueError: if its prediction type is none to distil, or it has nothing to guide away from.
    """

    def __init__(
        self,
        pipe: GuidedDiffusionPipeline,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.pipe, self.network, self.autocast = pipe, pipe.denoiser.eval().requires_grad_(False), autocast
        self.schedule, self.prediction_type = model_schedule(pipe.scheduler), prediction_type_of(pipe.scheduler)
        self.clip = Subject.of(pipe, 1).clip
        self.null_label, self.guidance_scale = pipe.null_label, guidance_scale
        if self.prediction_type in WITHOUT_X0_AT_NOISE:
            raise ValueError(
                f"a pipeline to distil must predict v, x_0 or flow, got {self.prediction_type}: in few steps the first starts at "
                "next to no signal, by which a predicted noise is divided to have x_0. Train one with --prediction_type "
                "v_prediction"
            )
        check_guidance_scale(guidance_scale)
        if guidance_scale != 1 and (pipe.denoiser_num_classes is None or self.null_label is None):
            raise ValueError(
                "guidance_scale must be 1 for a pipeline without labels, or without a null label (its label_dropout was 0), got "
                f"{guidance_scale:g}"
            )
        low, high = (0.0, float("inf")) if guidance_interval is None else guidance_interval
        noise = noise_ratio(self.schedule)
        scales = torch.where((noise >= low) & (noise <= high), guidance_scale, 1.0)
        if guidance_scale != 1 and (scales == 1).all():
            raise ValueError(f"guidance_interval must hold noise levels of the path, got {low:g} to {high:g}")
        self._scales = DeviceTable(scales[:, None])

    def copy_network(self) -> nn.Module:
        """A network that begins as the teacher's, to be trained."""
        network = copy.deepcopy(self.network).float().requires_grad_(True).train()
        if getattr(network, "config", {}).get("internal_guidance_layer") is not None:
            network.remove_internal_output()  # which nothing would train, and a student is not guided
        return network

    @torch.no_grad()
    def x0(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """The predicted x_0, guided, and clipped as the pipeline's sampler does; float32 or wider, of the shape of `x_t`.

        Args:
            timesteps: int64, shape `(batch,)`.
            labels: As a batch has them; None for a network without.
        """
        output = self.output(x_t, timesteps, labels)
        x0 = predict_x0(output, x_t, self.schedule.level(timesteps, x_t), self.prediction_type)
        return x0 if self.clip is None else self.clip(x0)

    @torch.no_grad()
    def output(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """The network's output under guidance, the second half of channels of a learned variance left out."""
        if self.guidance_scale == 1:
            return self._call(x_t, timesteps, labels)
        null = torch.zeros_like(labels) if labels.dtype == torch.bool else torch.full_like(labels, self.null_label)
        both = (torch.cat([each, each]) for each in (x_t, timesteps))
        conditional, unconditional = self._call(*both, torch.cat([labels, null])).chunk(2)
        return torch.lerp(unconditional, conditional, self._scales.gather(timesteps, x_t)[0])

    def _call(self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        with self.autocast():
            return call_network(self.network, x_t, self.schedule.labels(timesteps), labels)


def call_network(network: nn.Module, x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
    """The output of a denoiser of this package or of diffusers, float32 or wider, without a learned variance."""
    more = {} if labels is None else {"class_labels": labels}
    output = network(x_t, timesteps, **more, return_dict=False)[0][:, : x_t.shape[1]]
    return output.to(torch.promote_types(output.dtype, torch.float32))


def load_teacher(name: str) -> GuidedDiffusionPipeline:
    """A pipeline of this package or of diffusers, with a scheduler of this package, to make a `Teacher` of.

    Raises:
        ValueError: if there is none, it makes images of texts or condition images, or its path is not known here.
    """
    pipe = load_pipeline(name)
    subject = Subject.of(pipe, 1)
    if subject.needs_examples:
        what = "texts" if subject.of_texts else "condition images"
        raise ValueError(
            f"a pipeline to distil must make images by label or of no condition, got {type(pipe).__name__} of {what}"
        )
    return subject.pipe
