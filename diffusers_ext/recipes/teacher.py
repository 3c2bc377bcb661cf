"""The pipeline that a student learns from: its network as it is, and the x_0 that it predicts under guidance."""

import copy
from collections.abc import Callable, Mapping
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
from diffusers_ext.pipelines.pipeline_text_guided_diffusion import TextGuidedDiffusionPipeline
from diffusers_ext.schedulers.levels import model_schedule, prediction_type_of


# A student of one step starts where there is no signal left. There these two say nothing of x_0: it is a quotient by alpha.
WITHOUT_X0_AT_NOISE = ("epsilon", "score")


class Teacher:
    """A frozen denoiser on a table of betas or the linear path. It is no module, so that checkpoints of the student leave it out.

    Args:
        pipe: In pixels or latents, by label, by text or unconditional.
        guidance_scale: Weight of the prediction with the label or text against that without; 1 is the former alone.
        guidance_interval: The noise levels sigma / alpha in which that holds, (low, high), both included; None for all.
        autocast: Entered for each call of the network.

    Raises:
        ValueError: if its prediction type is none to distil, or it has nothing to guide away from.
    """

    def __init__(
        self,
        pipe: GuidedDiffusionPipeline | TextGuidedDiffusionPipeline,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.pipe, self.network, self.autocast = pipe, pipe.denoiser.eval().requires_grad_(False), autocast
        self.schedule, self.prediction_type = model_schedule(pipe.scheduler), prediction_type_of(pipe.scheduler)
        self.subject, self.guidance_scale, self._empty = Subject.of(pipe, 1), guidance_scale, None
        self.clip = self.subject.clip
        if self.prediction_type in WITHOUT_X0_AT_NOISE:
            raise ValueError(
                f"a pipeline to distil must predict v, x_0 or flow, got {self.prediction_type}: in few steps the first starts at "
                "next to no signal, by which a predicted noise is divided to have x_0. Train one with --prediction_type "
                "v_prediction"
            )
        check_guidance_scale(guidance_scale)
        if guidance_scale != 1 and not self.subject.can_guide:
            raise ValueError(
                "guidance_scale must be 1 for a pipeline without labels or texts, or that has not learned to do without them (its "
                f"label_dropout or caption_dropout was 0), got {guidance_scale:g}"
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
    def x0(self, x_t: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The predicted x_0, guided, and clipped as the pipeline's sampler does; float32 or wider, of the shape of `x_t`.

        Args:
            timesteps: int64, shape `(batch,)`.
            inputs: Labels or texts as `model_inputs` has them.
        """
        output = self.output(x_t, timesteps, inputs)
        x0 = predict_x0(output, x_t, self.schedule.level(timesteps, x_t), self.prediction_type)
        return x0 if self.clip is None else self.clip(x0)

    @torch.no_grad()
    def output(self, x_t: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The network's output under guidance, the second half of channels of a learned variance left out."""
        if self.guidance_scale == 1:
            return self._call(x_t, timesteps, inputs)
        without = self.unconditional(inputs)
        both = {name: torch.cat([value, without[name].to(value)]) for name, value in inputs.items()}
        output = self._call(*(torch.cat([each, each]) for each in (x_t, timesteps)), both)
        conditional, unconditional = output.chunk(2)
        return torch.lerp(unconditional, conditional, self._scales.gather(timesteps, x_t)[0])

    def unconditional(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stands for no label or for the empty text, by the names and of the shapes of these inputs."""
        if (labels := inputs.get("class_labels")) is not None:
            none = torch.zeros_like(labels)
            return {"class_labels": none if labels.dtype == torch.bool else none.fill_(self.pipe.null_label)}
        states = inputs["encoder_hidden_states"]
        if self._empty is None:  # encoded once
            self._empty = self.pipe.encode_prompt([""])
        empty = self._empty.to(states.device, states.dtype).padded(states.shape[1], "encoder_attention_mask" in inputs)
        named = zip(("encoder_hidden_states", "encoder_attention_mask"), empty.expand(len(states)), strict=True)
        return {name: value for name, value in named if value is not None}

    def _call(self, x_t: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        with self.autocast():
            return call_network(self.network, x_t, self.schedule.labels(timesteps), inputs)


def call_network(network: nn.Module, x_t: Tensor, timesteps: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The output of a denoiser of this package or of diffusers, float32 or wider, without a learned variance."""
    output = network(x_t, timesteps, **inputs, return_dict=False)[0][:, : x_t.shape[1]]
    return output.to(torch.promote_types(output.dtype, torch.float32))


def load_teacher(name: str) -> Subject:
    """A pipeline of this package or of diffusers, and, as `pipe`, one of this package to make a `Teacher` of.

    Raises:
        ValueError: if there is none, it makes images of condition images, or its path is not known here.
    """
    pipe = load_pipeline(name)
    subject = Subject.of(pipe, 1)
    if subject.pipe.image_condition is not None:
        raise ValueError(
            f"a pipeline to distil must make images by label, by text or of no condition, got {type(pipe).__name__} of condition "
            "images"
        )
    return subject
