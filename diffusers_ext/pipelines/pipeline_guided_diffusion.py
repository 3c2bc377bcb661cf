"""Images from noise: unconditional or by label, in pixels or in latents, with any scheduler and guider of diffusers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Generator, Tensor

from diffusers_ext.conditions import ImageCondition
from diffusers_ext.guidance.guiding import Interval
from diffusers_ext.guidance.labels import num_classes_of
from diffusers_ext.pipelines.adapters import AdapterMixin
from diffusers_ext.pipelines.call_condition import CallCondition, image_condition_of
from diffusers_ext.pipelines.call_defaults import check_call_defaults
from diffusers_ext.pipelines.components import check_clipped_noise, check_components, check_value_scale
from diffusers_ext.pipelines.image_inputs import ImageInput
from diffusers_ext.pipelines.inversion import InversionMixin
from diffusers_ext.pipelines.label_condition import Label, LabelCondition, LabelledMixin, Labels, check_label_names
from diffusers_ext.pipelines.loading import FromPipeMixin, SavedWithCodeMixin, replaceable
from diffusers_ext.pipelines.outputs import GuidedDiffusionPipelineOutput
from diffusers_ext.pipelines.regions import read_regions
from diffusers_ext.pipelines.sampling import CallOptions, SamplingMixin
from diffusers_ext.pipelines.truncation import check_prior


class GuidedDiffusionPipeline(
    LabelledMixin, InversionMixin, SamplingMixin, AdapterMixin, FromPipeMixin, SavedWithCodeMixin, DiffusionPipeline
):
    """Generates images from noise or from images, unconditionally or by label.

    Args:
        denoiser: `UNetModel`, `DiTModel`, or a model of diffusers that is called `model(x_t, timestep, class_labels=)`.
        scheduler: Any scheduler of this package or of diffusers that goes from noise to data on the path that the denoiser
            was trained on, that of betas or the linear one; others are refused.
        vae: `VAEModel` or an autoencoder of diffusers, for models trained on latents; `None` for models of pixels.
        guider: How conditional and unconditional predictions are combined, if not by `guidance_scale`.
        classifier: `NoisyClassifierModel`, for `ClassifierGuidance`.
        weak_denoiser: A weaker network of the same data, for `WeakModelGuidance`.
        statistics: `DataStatisticsModel`, by whose mean and standard deviation the denoiser's samples were normalised; what
            the pipeline takes and gives are images all the same.
        prior: `GaussianPriorModel` of the denoiser's clean samples, or an autoencoder of this package whose draws are such
            images, for calls with a `start_timestep`.
        id2label: Names of the labels by their ids, saved with the pipeline.
        clip_guided_noise: Whether DDIM, under guidance, takes the noise in x_t to be what the clipped x_0 leaves, as
            Dhariwal & Nichol 2021's sampler does, rather than what the guided prediction says. That leaves the range of
            the data, and the noise that it says would stay in the image. "always" does so without guidance too, where what
            the network predicts leaves that range by less, but in each of many steps. `training/train_ddpm.py` saves its
            pipelines with that; the default is a scheduler's own.
        noise_path: What the denoiser was trained on, so that a scheduler of another path is refused: "vp" for betas, "linear"
            for rectified flow, "ve" or "subvp". By default what the scheduler is of; it is saved with the pipeline.
        call_defaults: What a call does where it does not say it, saved with the pipeline: `num_inference_steps`, 50 without;
            `start_timestep`, which counts where neither latents, nor an image, nor timesteps are given; `guidance_scale` and `guidance_interval`, which count where the call says nothing of guidance and the pipeline has
            no guider (`training/calibrate.py` chooses them).
        image_condition: How a condition image is made from an image, for a denoiser with `condition_channels`: a dict of the
            arguments of `diffusers_ext.conditions.ImageCondition`, saved with the pipeline. By default condition images are
            given at the size of the samples.
        value_scale: Of sequences, `{"shift": [...], "scale": [...]}` with a number for each channel: what the networks make in
            about [-1, 1] times the scale plus the shift is in the data's own units. Without it sequences are given in [0, 1],
            like images.

    Raises:
        ValueError: if the components do not fit one another.

    Example:

        >>> import diffusers_ext
        >>> pipe = diffusers_ext.DiffusionPipeline.from_pretrained("runs/digits")
        >>> three = pipe(class_labels=[3, 3, 7], num_inference_steps=50, guidance_scale=2.0).images[0]
        >>> other_threes = pipe(class_labels=3, batch_size=4, image=three, strength=0.6).images
    """

    blocks_class_name = "GuidedDiffusionBlocks"
    model_cpu_offload_seq = "denoiser->vae"
    # The first two are used in turns with the denoiser, in each step; the others are small.
    _exclude_from_cpu_offload = ["classifier", "weak_denoiser", "statistics", "prior"]
    _optional_components = ["vae", "guider", "classifier", "weak_denoiser", "statistics", "prior"]

    @replaceable(_optional_components)
    def __init__(
        self,
        denoiser: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        guider: BaseGuidance | None = None,
        classifier: ModelMixin | None = None,
        weak_denoiser: ModelMixin | None = None,
        statistics: ModelMixin | None = None,
        prior: ModelMixin | None = None,
        id2label: dict | None = None,
        clip_guided_noise: bool | str = False,
        noise_path: str | None = None,
        call_defaults: dict | None = None,
        image_condition: dict | None = None,
        value_scale: dict | None = None,
    ):
        super().__init__()
        self.register_to_config(noise_path=noise_path)
        check_components(denoiser, vae, classifier, weak_denoiser, statistics)
        check_prior(prior, denoiser, vae is not None, num_classes_of(denoiser))
        check_value_scale(value_scale, denoiser, vae)
        self.register_modules(
            denoiser=denoiser,
            scheduler=scheduler,
            vae=vae,
            guider=guider,
            classifier=classifier,
            weak_denoiser=weak_denoiser,
            statistics=statistics,
            prior=prior,
        )
        self.register_to_config(id2label=check_label_names(id2label, self.num_classes))
        clip_guided_noise = check_clipped_noise(clip_guided_noise)
        self.register_to_config(clip_guided_noise=clip_guided_noise, call_defaults=check_call_defaults(call_defaults))
        image_condition_of(denoiser, image_condition, vae)  # which checks it
        if isinstance(image_condition, ImageCondition):
            image_condition = image_condition.to_config()
        self.register_to_config(image_condition=image_condition)
        self.register_to_config(value_scale=value_scale)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels | None = None,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        image: ImageInput | None = None,
        strength: float | None = None,
        mask_image: ImageInput | None = None,
        num_resample_steps: int = 1,
        condition_image: ImageInput | None = None,
        condition_noise_level: float | None = None,
        regions: Sequence[tuple[ImageInput, Label | Sequence[Label], float]] | None = None,
        guider: BaseGuidance | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Interval | None = None,
        classifier_scale: float = 0.0,
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
        """Generates a batch of images.

        Args:
            class_labels: One label for all images, or one for each, as ids or as names; `None` for no label. In place of
                a label there may be a list of labels that an image has all at once, for models trained so; or a dict
                from labels to weights, whose directions are then added up (`ComposedGuidance`).
            batch_size: Number of images, where `class_labels`, `latents` and `image` do not say it.
            num_inference_steps: Number of steps, each of one call of the network (two with guidance); by default that of
                `call_defaults`, or 50.
            guidance_scale: Weight of classifier-free guidance, at least 0; 1 is none. `None` for the guider of the pipeline, or
                what `call_defaults` say, or 1. Not to be given together with a guider.
            generator: Source of the noise. With a list, one generator for each image, image i depends on generator i
                alone, whatever else is in the batch; one generator is drawn from for the batch as a whole.
            latents: Start noise of unit variance, shape `(batch, in_channels, *sample_size)`.
            image: Images to start from, or to keep what `mask_image` says of: PIL images, read as in training,
                with transparent pixels on black; arrays `(batch, height, width, channels)` or tensors
                `(batch, channels, height, width)`, floats in [0, 1] or integers (see `diffusers_ext.pixels.Whites`); one
                for all, or one for each. Sequences are arrays `(batch, length, channels)` or tensors
                `(batch, channels, length)`, in own units if there is a `value_scale`.
            strength: How far to go back to noise, in [0, 1]: 0 gives the image itself, 1 does not look at it. By
                default 0.8, or 1 with a `mask_image`. The steps taken are that share of `num_inference_steps`.
            mask_image: White (from 0.5 on) where to make the image anew, black where to keep it exactly.
            num_resample_steps: How often each step of inpainting is done, with noise added back between, so that the
                new parts fit the known ones better (RePaint, arXiv 2201.09865).
            condition_image: What the image is to be made of, for a model that was trained so: a low resolution of it, its grey
                values, its lines. As `pipe.image_condition` says, in channels and size; one for all, or one for each;
                `condition_from_image` makes it from an image. Guidance leads away from the prediction without it.
            condition_noise_level: Standard deviation of noise that is put into the condition image, and that the network is
                given, for a model that was trained so (cascades, arXiv 2106.15282); 0 by default.
            regions: Parts of the image with a label of their own, as `(mask, label, weight)`: to the prediction of the call,
                weight * mask * (prediction of the label - null prediction) is added at each pixel, in one call of the
                network; guiders then act as ever, on the sum. Masks are of the size of the images, with values in [0, 1].
            guider: Takes the place of the pipeline's guider in this call.
            guidance_rescale: In [0, 1], how far a guided prediction gets the standard deviation of the conditional one
                back (arXiv 2305.08891, Section 3.4). For `guidance_scale`; a guider has its own.
            guidance_interval: Where to guide: `(start, stop)` as fractions of the steps, or `{"sigma": (low, high)}` in
                sigma / alpha, or `{"timestep": (low, high)}`. Elsewhere the conditional prediction is used alone, which
                costs one call of the network (arXiv 2404.07724).
            classifier_scale: Weight of the pipeline's classifier (`ClassifierGuidance`), on top of `guidance_scale`.
            internal_guidance_scale: How far each prediction is led away from that of the network's middle layer
                (`InternalGuidance`), beneath `guidance_scale`, at no further call of the network; 1 is none.
            timesteps: Timesteps to visit, descending, in place of `num_inference_steps`.
            start_timestep: Start there and not at pure noise (a truncated chain, arXiv 2202.09671): from a draw of the `prior`
                with the noise of that timestep, or from `latents`, which are then x_t there as the scheduler has it. The
                steps are evenly spaced below it. By default what `call_defaults` say.
            eta: Share of the noise that DDIM puts back in each step, in [0, 1]; other schedulers take none.
            use_clipped_model_output: Whether DDIM takes the noise in x_t to be what the clipped x_0 leaves; by default as
                `clip_guided_noise` says. Other schedulers have no such choice.
            low_memory: Call the network once for each prediction of a guider, instead of once for all.
            output_type: "pil", the default; "np", `(batch, height, width, channels)` in [0, 1]; "pt",
                `(batch, channels, height, width)` in [0, 1]; or "latent", as the sampler left them. Of sequences "np", the
                default, `(batch, length, channels)`, and "pt", `(batch, channels, length)`, in own units by `value_scale`.
            return_dict: `False` returns a tuple of images and, if asked for, trajectory.
            callback_on_step_end: Called as `callback(pipeline, step, timestep, tensors)` after each step; may return
                tensors to go on with, and set `pipeline._guidance_scale` for the steps that follow. It is one of
                `pipeline.num_timesteps`.
            callback_on_step_end_tensor_inputs: Names of those tensors; "latents" is the only one.
            trajectory_steps: Indices of the steps whose `x_t` and predicted clean sample are returned.

        Raises:
            ValueError: if an argument does not fit the model, the scheduler or another argument.
        """
        call = CallOptions.of(locals())
        with self._precision():
            regions = read_regions(regions)
            labels = LabelCondition(self, class_labels, [region.condition for region in regions])
            return self._sample(CallCondition(self, labels, regions, condition_image, condition_noise_level), call)
