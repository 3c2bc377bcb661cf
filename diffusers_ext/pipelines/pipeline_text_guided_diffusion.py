"""Images from texts, in pixels or in latents, with any scheduler and guider of diffusers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers_ext.conditions import ImageCondition
from diffusers_ext.guidance.guiding import Interval
from diffusers_ext.pipelines.adapters import AdapterMixin
from diffusers_ext.pipelines.call_condition import CallCondition, image_condition_of
from diffusers_ext.pipelines.call_defaults import check_call_defaults
from diffusers_ext.pipelines.components import check_clipped_noise, check_text_components
from diffusers_ext.pipelines.image_inputs import ImageInput
from diffusers_ext.pipelines.loading import FromPipeMixin, SavedWithCodeMixin, replaceable
from diffusers_ext.pipelines.outputs import GuidedDiffusionPipelineOutput
from diffusers_ext.pipelines.regions import read_regions
from diffusers_ext.pipelines.sampling import CallOptions, SamplingMixin
from diffusers_ext.pipelines.text_condition import TextCondition, TextEncodingMixin, texts_or_embeds


class TextGuidedDiffusionPipeline(
    TextEncodingMixin, SamplingMixin, AdapterMixin, FromPipeMixin, SavedWithCodeMixin, DiffusionPipeline
):
    """Generates images from texts.

    Args:
        denoiser: `UNetModel` or `DiTModel` with a `cross_attention_dim`, or a model of diffusers that is called
            `model(x_t, timestep, encoder_hidden_states=)`.
        scheduler: Any scheduler of this package or of diffusers that goes from noise to data on the path of betas that the
            denoiser was trained on; others are refused.
        tokenizer: Of transformers, for `text_encoder`. Without the two, the call takes `prompt_embeds`.
        text_encoder: Of transformers: CLIP's text model, T5's encoder, or any model whose output has a
            `last_hidden_state` of the denoiser's `cross_attention_dim`.
        vae: `VAEModel` or an autoencoder of diffusers, for models trained on latents; `None` for models of pixels.
        guider: How conditional and unconditional predictions are combined, if not by `guidance_scale`.
        weak_denoiser: A weaker network of the same data and texts, for `WeakModelGuidance`.
        statistics: As for `GuidedDiffusionPipeline`, with one mean.
        max_text_length: Tokens at which a text is cut, saved with the pipeline; `None` for all that the encoder takes.
        mask_padding: Whether encoder and denoiser look away from the padding of a text, saved with the pipeline; `None`
            for no with CLIP and yes with any other encoder.
        clip_guided_noise, noise_path, call_defaults, image_condition: As for `GuidedDiffusionPipeline`.

    Raises:
        ValueError: if the components do not fit one another.

    Example:

        >>> import diffusers_ext
        >>> pipe = diffusers_ext.DiffusionPipeline.from_pretrained("runs/twemoji64")
        >>> heart, apple = pipe(["red heart", "green apple"], num_inference_steps=50, guidance_scale=4.0).images
    """

    blocks_class_name = "TextGuidedDiffusionBlocks"
    model_cpu_offload_seq = "text_encoder->denoiser->vae"
    # The first is used in turns with the denoiser, in each step; the other is small.
    _exclude_from_cpu_offload = ["weak_denoiser", "statistics"]
    _optional_components = ["tokenizer", "text_encoder", "vae", "guider", "weak_denoiser", "statistics"]

    @replaceable(_optional_components)
    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        tokenizer: PreTrainedTokenizerBase | None = None,
        text_encoder: PreTrainedModel | None = None,
        vae: ModelMixin | None = None,
        guider: BaseGuidance | None = None,
        weak_denoiser: ModelMixin | None = None,
        statistics: ModelMixin | None = None,
        max_text_length: int | None = None,
        mask_padding: bool | None = None,
        clip_guided_noise: bool | str = False,
        noise_path: str | None = None,
        call_defaults: dict | None = None,
        image_condition: dict | None = None,
    ):
        super().__init__()
        self.register_to_config(noise_path=noise_path)
        check_text_components(
            denoiser, tokenizer, text_encoder, vae, weak_denoiser, max_text_length, statistics=statistics
        )
        self.register_modules(
            denoiser=denoiser,
            scheduler=scheduler,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            guider=guider,
            weak_denoiser=weak_denoiser,
            statistics=statistics,
        )
        self.register_to_config(
            max_text_length=max_text_length,
            mask_padding=mask_padding,
            clip_guided_noise=check_clipped_noise(clip_guided_noise),
            call_defaults=check_call_defaults(call_defaults),
        )
        image_condition_of(denoiser, image_condition, vae)  # which checks it
        if isinstance(image_condition, ImageCondition):
            image_condition = image_condition.to_config()
        self.register_to_config(image_condition=image_condition)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        image: ImageInput | None = None,
        strength: float | None = None,
        mask_image: ImageInput | None = None,
        num_resample_steps: int = 1,
        condition_image: ImageInput | None = None,
        condition_noise_level: float | None = None,
        regions: Sequence[tuple[ImageInput, str, float]] | None = None,
        guider: BaseGuidance | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval | None = None,
        internal_guidance_scale: float = 1.0,
        timesteps: list[int] | None = None,
        start_timestep: int | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        low_memory: bool = False,
        output_type: str | None = None,
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        trajectory_steps: Sequence[int] | None = None,
    ) -> GuidedDiffusionPipelineOutput | tuple:
        """Generates images from texts.

        What is not listed is as for the call of `GuidedDiffusionPipeline`.

        Args:
            prompt: One text, or several. A text that is too long is cut at its end, with a warning.
            negative_prompt: What to lead away from, in place of the empty text: one for all prompts, or one for each.
                Needs guidance.
            num_inference_steps: Number of steps, each of one call of the network (two with guidance); by default that of
                `call_defaults`, or 50.
            guidance_scale: Weight of classifier-free guidance, at least 0; 1 is none. `None` for the guider of the pipeline, or
                without one what `call_defaults` say, or 4; or 1 where there is nothing to lead away from: no negative text, and a
                denoiser that was trained without empty texts, or no encoder. Not to be given together with a guider.
            num_images_per_prompt: Images of each prompt; they come one after the other, prompt by prompt. Images and masks may be
                given once for each prompt too.
            prompt_embeds: In place of `prompt`, hidden states `(prompts, tokens, cross_attention_dim)`.
            prompt_attention_mask: 1 or true at the tokens to attend to, shape `(prompts, tokens)`; by default all.
            negative_prompt_embeds, negative_prompt_attention_mask: The same in place of `negative_prompt`, for one
                prompt or for each.
            generator: Source of the noise. With a list, one generator for each image, image i depends on generator i
                alone.
            regions: Parts of the image with a text of their own, as `(mask, text, weight)`.
            latents: Start noise of unit variance, one for each image, shape `(images, in_channels, *sample_size)`.
            start_timestep: Start there, from `latents` that are x_t there as the scheduler has it.

        Raises:
            ValueError: if an argument does not fit the model, the scheduler or another argument.
        """
        call = CallOptions.of(locals())
        prompts = texts_or_embeds("prompt", prompt, prompt_embeds, prompt_attention_mask)
        negative = texts_or_embeds(
            "negative_prompt", negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
        )
        with self._precision():
            regions = read_regions(regions)
            named = [region.condition for region in regions]
            texts = TextCondition(self, prompts, negative, num_images_per_prompt, named)
            condition = CallCondition(self, texts, regions, condition_image, condition_noise_level)
            if isinstance(generator, list | tuple):
                texts.check_count("generator", len(generator))
            return self._sample(condition, call)
