"""The call of our pipelines as blocks of diffusers' modular pipelines, which can be taken apart, run alone and replaced.

    encode       labels or texts               condition
    add_conditions  condition_image, regions   condition
    encode_image image, mask_image             pixels, mask, image_latents
    set_timesteps                              sampler, timesteps, start
    prepare_latents                            latents: what the first step begins at
    denoise      for each step                 latents
        predict  the network, under the guider
        step     the scheduler
        keep     known pixels (inpainting)
    decode                                     images

The same seed makes the same image as the pipeline, whose steps these are (`diffusers_ext.pipelines.steps`).
"""

from typing import Any

import torch
from diffusers.modular_pipelines import (
    ComponentSpec,
    ConfigSpec,
    InputParam,
    LoopSequentialPipelineBlocks,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from diffusers_ext.draws import as_generators
from diffusers_ext.latents import image_channels
from diffusers_ext.pipelines.call_condition import CallCondition
from diffusers_ext.pipelines.call_defaults import with_defaults
from diffusers_ext.pipelines.components import check_components
from diffusers_ext.pipelines.image_inputs import encode_pixels
from diffusers_ext.pipelines.inpainting import check_resampling
from diffusers_ext.pipelines.label_condition import LabelCondition
from diffusers_ext.pipelines.modular_components import CallInputs, Components, component_specs, config_specs
from diffusers_ext.pipelines.outputs import check_output_type, decode_images, default_output_type
from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline
from diffusers_ext.pipelines.pipeline_text_guided_diffusion import TextGuidedDiffusionPipeline
from diffusers_ext.pipelines.regions import read_regions
from diffusers_ext.pipelines.sampling import count_images
from diffusers_ext.pipelines.statistics import labels_of_data
from diffusers_ext.pipelines.steps import Steps, noisy_start
from diffusers_ext.pipelines.text_condition import TextCondition, texts_or_embeds
from diffusers_ext.pipelines.truncation import truncated_start, truncated_timesteps
from diffusers_ext.schedulers.samplers import check_sampler, set_timesteps
from diffusers_ext.value_scale import ValueScale


ARGUMENTS = CallInputs(GuidedDiffusionPipeline.__call__, TextGuidedDiffusionPipeline.__call__)

# What blocks hand to one another.
VALUES = {
    "condition": (CallCondition | LabelCondition | TextCondition, "what the images are to show"),
    "pixels": (Tensor, "images to start from in [-1, 1], shape (batch, channels, *spatial)"),
    "mask": (Tensor, "1 where to make the image anew, 0 where to keep it, shape (batch, 1, *spatial)"),
    "image_latents": (Tensor, "the images as the denoiser knows them, shape (batch, in_channels, *sample_size)"),
    "start": (int, "the timestep that the chain starts from, if not at pure noise"),
    "sampler": (SchedulerMixin, "the scheduler, set to the timesteps"),
    "timesteps": (Tensor, "to visit, descending"),
    "latents": (Tensor, "float32, shape (batch, in_channels, *sample_size)"),
    "trajectory": (list, "x_t and the predicted clean sample of the asked steps"),
    "images": (Any, "of the asked type"),
}


class Block(ModularPipelineBlocks):
    """A block in a few lists of names; `run(parts, values)` of each does the work, on the values that these have."""

    about: str = ""
    components: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()  # of those, the ones that it cannot do without
    configs: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()  # of a pipeline's call
    takes: tuple[str, ...] = ()  # of VALUES, from blocks before it
    requires: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        return self.about

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return component_specs(*self.components)

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return config_specs(*self.configs)

    @property
    def inputs(self) -> list[InputParam]:
        return ARGUMENTS.params(*self.arguments) + _values(InputParam, self.takes, self.requires)

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return _values(OutputParam, self.gives)

    @torch.no_grad()
    def __call__(self, components, state):
        values = self.get_block_state(state)
        self.run(Components(components, *self.needed), values)
        self.set_block_state(state, values)
        return components, state


def _values(param: type, names: tuple[str, ...], required: tuple[str, ...] = ()) -> list:
    params = []
    for name in (*names, *required):
        kind, description = VALUES[name]
        more = {"required": True} if name in required else {}
        params.append(param(name, type_hint=kind, description=description, **more))
    return params


class EncodeLabels(Block):
    """Labels by id or by name to a condition."""

    about = "Labels by id or by name, to what the network gets."
    components, needed = ("denoiser", "classifier"), ("denoiser",)
    configs = ("id2label",)
    arguments = ("class_labels", "regions")
    gives = ("condition",)

    def run(self, parts, values):
        of_regions = [region.condition for region in read_regions(values.regions)]
        values.condition = LabelCondition(parts, values.class_labels, of_regions)


class EncodeTexts(Block):
    """Texts, or their embeddings, to a condition; afterwards no text encoder is needed."""

    about = "Texts to the hidden states that the network attends to, those of the empty text among them."
    components = ("tokenizer", "text_encoder")
    configs = ("max_text_length", "mask_padding")
    arguments = (
        "prompt",
        "negative_prompt",
        "num_images_per_prompt",
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
        "regions",
    )
    gives = ("condition",)

    def run(self, parts, values):
        texts = [
            texts_or_embeds(name, *(getattr(values, f"{name}{end}") for end in ("", "_embeds", "_attention_mask")))
            for name in ("prompt", "negative_prompt")
        ]
        of_regions = [region.condition for region in read_regions(values.regions)]
        if of_regions and parts.denoiser is None:
            raise ValueError("regions need the denoiser when texts are encoded, got None")
        values.condition = TextCondition(parts, *texts, values.num_images_per_prompt, of_regions)
        if texts[1] is None and parts.text_encoder is not None:
            values.condition.encode_empty(parts)


class AddConditions(Block):
    """A condition image, and the masks of regions, beside labels or texts."""

    about = "Adds a condition image, and the masks of the regions in which labels or texts hold."
    components, needed = ("denoiser", "vae"), ("denoiser",)
    configs = ("image_condition",)
    arguments = ("regions", "condition_image", "condition_noise_level")
    requires = ("condition",)
    gives = ("condition",)

    def run(self, parts, values):
        regions, image = read_regions(values.regions), values.condition_image
        values.condition = CallCondition(parts, values.condition, regions, image, values.condition_noise_level)


class EncodeImages(Block):
    """Images to start from, or to keep parts of; nothing without them."""

    about = "Images to start from and masks, to tensors; through the VAE for models of latents."
    components, needed = ("denoiser", "vae", "statistics"), ("denoiser",)
    configs = ("value_scale",)
    arguments = ("image", "mask_image")
    takes = ("condition",)
    gives = ("pixels", "mask", "image_latents")

    def run(self, parts, values):
        ARGUMENTS.options(image=values.image, mask_image=values.mask_image)  # which refuses a mask alone
        values.pixels = values.mask = values.image_latents = None
        if values.image is None:
            return
        check_components(parts.denoiser, parts.vae, statistics=parts.statistics)
        values.pixels = values.condition.for_each_image(parts._to_pixels(values.image, parts._execution_device))
        if values.mask_image is not None:
            values.mask = values.condition.for_each_image(parts._to_mask(values.mask_image, values.pixels))
        labels = labels_of_data(parts.statistics, values.condition)
        values.image_latents = encode_pixels(values.pixels, parts.vae, parts._sample_shape, parts.statistics, labels)


class SetTimesteps(Block):
    """The scheduler set to the steps of this call."""

    about = "Sets the scheduler to a number of steps or to timesteps, and says which of them to visit."
    components, needed = ("denoiser", "scheduler"), ("denoiser", "scheduler")
    configs = ("noise_path", "call_defaults")
    arguments = ("num_inference_steps", "timesteps", "strength", "start_timestep", "latents")
    takes = ("image_latents", "mask")
    gives = ("sampler", "timesteps", "start")

    def run(self, parts, values):
        check_sampler(parts.scheduler, "these blocks", parts.config.noise_path)
        own = {name: getattr(values, name) for name in self.arguments}
        call = _with_images(values, **own)
        given = own | {"image": values.image_latents}
        given |= with_defaults(given, parts.config.call_defaults, can_guide=False)
        steps, listed, values.start = given["num_inference_steps"], values.timesteps, given["start_timestep"]
        if values.start is not None:
            listed = truncated_timesteps(parts.scheduler, steps, values.start)
        values.sampler, values.timesteps = set_timesteps(
            parts.scheduler, steps, listed, call.noise_share, parts._execution_device
        )


class PrepareLatents(Block):
    """What the first step begins at."""

    about = "Noise, or images as noisy as the first timestep."
    components, needed = ("denoiser", "prior", "statistics"), ("denoiser",)
    arguments = ("batch_size", "generator", "latents", "strength")
    takes = ("mask", "image_latents", "start")
    requires = ("condition", "sampler", "timesteps")
    gives = ("latents",)

    def run(self, parts, values):
        call = _with_images(values, strength=values.strength, latents=values.latents)
        batch_size = count_images(
            values.batch_size,
            **values.condition.per_image,
            latents=values.latents,
            image=values.image_latents,
            mask_image=values.mask,
        )
        shape, generator = (batch_size, *parts._sample_shape), as_generators(values.generator, batch_size)
        if isinstance(values.condition, CallCondition):
            values.condition.draw_noise(batch_size, generator, parts._execution_device)
        if values.start is None:
            x0 = values.image_latents if call.noise_share < 1 else None
            values.latents = noisy_start(values.sampler, shape, generator, values.latents, x0, values.timesteps)
        else:
            values.latents = truncated_start(
                parts, values.condition, shape, generator, values.latents, values.timesteps[:1], values.sampler
            )


class Predict(Block):
    """The network's output in a step of the loop, guided."""

    about = "Predicts by the network, or the networks, that the guider asks."
    components, needed = ("denoiser", "guider", "classifier", "weak_denoiser"), ("denoiser",)
    configs = ("clip_guided_noise", "call_defaults")

    @torch.no_grad()
    def __call__(self, components, values, i, t):
        values.output = values.steps.predict(values.latents, i)
        return components, values


class Advance(Block):
    """A step of the scheduler."""

    about = "Makes a step of the scheduler with the prediction."

    @torch.no_grad()
    def __call__(self, components, values, i, t):
        values.latents = values.steps.advance(values.latents, values.output, i, values.times_left)
        return components, values


class KeepKnown(Block):
    """The known pixels of an image that is inpainted."""

    about = "Puts known pixels into the latents, as noisy as these are."

    @torch.no_grad()
    def __call__(self, components, values, i, t):
        values.latents = values.steps.put_known(values.latents, i, values.times_left)
        return components, values


class Denoise(LoopSequentialPipelineBlocks):
    """The loop over the timesteps. Its blocks are called `block(components, values, i=, t=)`, with `values.latents`."""

    block_classes = [Predict, Advance, KeepKnown]
    block_names = ["predict", "step", "keep"]
    arguments = (
        "generator",
        "guidance_scale",
        "guidance_rescale",
        "guidance_interval",
        "classifier_scale",
        "internal_guidance_scale",
        "eta",
        "use_clipped_model_output",
        "low_memory",
        "num_resample_steps",
        "trajectory_steps",
    )

    @property
    def description(self) -> str:
        return "From noise to clean samples: in each step a guided prediction, and a step of the scheduler."

    @property
    def loop_inputs(self) -> list[InputParam]:
        values = _values(InputParam, ("image_latents", "mask"), ("condition", "sampler", "timesteps", "latents"))
        return ARGUMENTS.params(*self.arguments) + values

    @property
    def loop_intermediate_outputs(self) -> list[OutputParam]:
        return _values(OutputParam, ("latents", "trajectory"))

    @torch.no_grad()
    def __call__(self, components, state):
        values = self.get_block_state(state)
        parts = Components(components, "denoiser")
        check_components(parts.denoiser, None, parts.classifier, parts.weak_denoiser)
        call = ARGUMENTS.options(**{name: getattr(values, name) for name in self.arguments})
        call = parts._completed(values.condition, call)
        timesteps, repeats, batch_size = values.timesteps, call.num_resample_steps, len(values.latents)
        check_resampling(repeats, values.mask is not None, values.sampler)
        generator = as_generators(values.generator, batch_size)
        values.steps = Steps(parts, values.condition, call, values.sampler, timesteps, batch_size, generator)
        values.steps.keep(values.image_latents, values.mask)
        with self.progress_bar(total=len(timesteps) * repeats) as bar:
            for i, t in enumerate(timesteps):
                for times_left in reversed(range(repeats)):
                    values.times_left = times_left
                    components, values = self.loop_step(components, values, i=i, t=t)
                    bar.update()
        values.trajectory = values.steps.trajectory
        self.set_block_state(state, values)
        return components, state


class DecodeImages(Block):
    """Latents to images of the asked type."""

    about = "Decodes latents, and makes images of the asked type of them."
    components, configs = ("vae", "statistics"), ("value_scale",)
    arguments = ("output_type",)
    takes = ("pixels", "mask", "condition")
    requires = ("latents",)
    gives = ("images",)

    def run(self, parts, values):
        ARGUMENTS.options(output_type=values.output_type)
        x, vae = values.latents, parts.vae
        output_type = values.output_type or default_output_type(x.ndim - 2)
        check_output_type(output_type, x.shape[1] if vae is None else image_channels(vae.config), x.ndim - 2)
        labels = None if values.condition is None else labels_of_data(parts.statistics, values.condition)
        values.images = decode_images(
            *(x, vae, output_type, values.pixels, values.mask, parts.statistics, labels),
            value_scale=ValueScale.of_config(parts.config.value_scale),
        )


def _with_images(values, **given):
    """The options of a call with the images that have become tensors."""
    return ARGUMENTS.options(image=values.image_latents, mask_image=values.mask, **given)


class GuidedDiffusionBlocks(SequentialPipelineBlocks):
    """`GuidedDiffusionPipeline` in blocks: images from noise or from images, unconditionally or by label.

    Example:

        >>> import diffusers_ext
        >>> from diffusers import ModularPipeline
        >>> pipe = ModularPipeline.from_pretrained("runs/digits")
        >>> pipe.load_components()
        >>> three = pipe(class_labels=3, num_inference_steps=50, guidance_scale=2.0, output="images")[0]
    """

    block_classes = [EncodeLabels, AddConditions, EncodeImages, SetTimesteps, PrepareLatents, Denoise, DecodeImages]
    block_names = ["encode", "add_conditions", "encode_image", "set_timesteps", "prepare_latents", "denoise", "decode"]

    @property
    def description(self) -> str:
        return "Generates images from noise or from images, unconditionally or by label."

    @property
    def outputs(self) -> list[OutputParam]:
        return _values(OutputParam, ("images", "trajectory"))


class TextGuidedDiffusionBlocks(GuidedDiffusionBlocks):
    """`TextGuidedDiffusionPipeline` in blocks: images from texts."""

    block_classes = [EncodeTexts, *GuidedDiffusionBlocks.block_classes[1:]]

    @property
    def description(self) -> str:
        return "Generates images from texts."
