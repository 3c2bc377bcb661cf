"""All that the images of a call are to show: labels or texts, a condition image, and what holds in regions alone."""

from collections.abc import Sequence

import torch
from diffusers.guiders import BaseGuidance
from torch import Tensor, nn

from diffusers_ext.conditions import GIVEN, ImageCondition, add_condition_noise
from diffusers_ext.draws import draw_normal
from diffusers_ext.guidance.regions import Regions
from diffusers_ext.pipelines.image_inputs import ImageInput, images_to_tensor
from diffusers_ext.pipelines.label_condition import LabelCondition
from diffusers_ext.pipelines.regions import Region, masks_for
from diffusers_ext.pipelines.text_condition import TextCondition
from diffusers_ext.sizes import as_size


class CallCondition:
    """The condition of a call.

    Args:
        pipe: A pipeline with `image_condition`, `_dims` and `_sample_shape`.
        named: Labels or texts, with those of the regions.
        regions: The regions, in the order of those of `named`.
        condition_image, condition_noise_level: As the pipeline's call takes them.

    Raises:
        ValueError: if they do not fit the network.
    """

    def __init__(
        self,
        pipe,
        named: LabelCondition | TextCondition,
        regions: Sequence[Region] = (),
        condition_image: ImageInput | None = None,
        condition_noise_level: float | None = None,
    ):
        self.pipe, self.named, self.regions = pipe, named, regions
        self.weighted = named.weighted
        self.default_guidance_scale = named.default_guidance_scale if named.can_guide(pipe) else None
        self.image = _read_image(pipe, condition_image)
        if self.image is not None:
            self.image = named.for_each_image(self.image)
        self.noise_level = _check_noise_level(pipe.image_condition, self.image, condition_noise_level)
        self.masks = [named.for_each_image(mask) for mask in masks_for(pipe, regions)]
        self.per_image = named.per_image | {"condition_image": self.image}
        self.per_image |= {f"the mask of regions[{index}]": mask for index, mask in enumerate(self.masks)}
        self._noised: Tensor | None = None

    @property
    def labels(self) -> Tensor | None:
        """The labels of the images, as `LabelCondition` has them; `None` without, and of texts."""
        return getattr(self.named, "labels", None)

    @property
    def can_drop_image(self) -> bool:
        """Whether there is a condition image, and the network knows what to do without."""
        return self.image is not None and self.pipe.denoiser.config.get("learned_without_image", True)

    def can_guide(self, pipe) -> bool:
        """Whether there is a condition, and one without it to lead away from."""
        return self.named.can_guide(pipe) or self.can_drop_image or bool(self.regions)

    def for_each_image(self, values: Tensor) -> Tensor:
        """Images or masks of which there may be one for each prompt, as often as each prompt has images."""
        return self.named.for_each_image(values)

    def draw_noise(self, batch_size: int, generator, device: torch.device) -> None:
        """Puts noise of the asked level into the condition image, before the start noise is drawn; none at level 0."""
        if not self.noise_level:
            return
        image = self.image.to(device).expand(batch_size, *self.image.shape[1:])
        eps = draw_normal(image.shape, generator, device=device, dtype=image.dtype)
        self._noised = add_condition_noise(image, eps, torch.full((batch_size,), self.noise_level, device=device))

    def check(self, pipe, guider: BaseGuidance | None, timesteps: Tensor, guide: Sequence[bool]) -> None:
        """Refuses a guider that it, or the components, do not suffice for in the steps in which it acts."""
        led_elsewhere = self.can_drop_image or bool(self.regions)
        self.named.check(pipe, guider, timesteps, guide, led_elsewhere=led_elsewhere)

    def inputs(self, pipe, batch_size: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Pairs of conditional and unconditional inputs of the network, by name, each of shape `(batch, ...)`.

        The unconditional ones have neither label or text nor image, as far as the network has learned to do without.
        """
        return self.named.inputs(pipe, batch_size, device) | self._image_inputs(batch_size, device)

    def _image_inputs(self, batch_size: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        if self.image is None:
            return {}
        condition, shape = self.pipe.image_condition, self.pipe._sample_shape
        image = self.image.to(device) if self._noised is None else self._noised
        image = condition.for_network(image, shape[1:]).expand(batch_size, -1, *shape[1:])
        given = torch.ones(batch_size, dtype=torch.bool, device=device)
        pairs = {
            "condition_image": (image, image),
            "condition_given": (given, torch.zeros_like(given) if self.can_drop_image else given),
        }
        if condition.noise:
            level = torch.full((batch_size,), self.noise_level or 0.0, device=device)
            pairs["condition_level"] = (level, level)
        return pairs

    def regional(
        self, pairs: dict[str, tuple[Tensor, Tensor]], batch_size: int, device: torch.device
    ) -> Regions | None:
        """What holds in regions, beside the inputs `pairs` of `inputs`; `None` without."""
        if not self.regions:
            return None
        # The condition image holds everywhere, so that it is in the null prediction of the regions too.
        image = {name: pair[0] for name, pair in pairs.items() if name.startswith("condition_")}
        null = {name: image.get(name, pair[1]) for name, pair in pairs.items()}
        inputs = [{**null, **each} for each in self.named.region_inputs(self.pipe, batch_size, device)]
        masks = [mask.to(device) for mask in self.masks]
        return Regions(inputs, null, masks, [region.weight for region in self.regions])


def image_condition_of(denoiser: nn.Module, config: dict | None, vae: nn.Module | None) -> ImageCondition | None:
    """How the condition images of a pipeline are made: as its config says, or given as they are; `None` without.

    Raises:
        ValueError: if that is not what the denoiser was built for.
    """
    channels = denoiser.config.get("condition_channels", 0)
    if not channels:
        if config is not None:
            raise ValueError("image_condition is of a denoiser with condition_channels, and this one has none")
        return None
    size = as_size(denoiser.config.sample_size, denoiser.config.get("dims", 2))
    if config is None:
        image_channels = denoiser.config.in_channels if vae is None else vae.config.in_channels
        return ImageCondition(GIVEN, channels, image_channels, size)
    condition = ImageCondition.of_config(config)
    if condition.network_channels(size) != channels:
        raise ValueError(
            f"image_condition must give the denoiser's {channels} condition_channels, got {condition.describe()}, which are "
            f"{condition.network_channels(size)} at its sample_size"
        )
    if bool(condition.noise) != bool(denoiser.config.get("condition_level")):
        raise ValueError(
            "image_condition must have noise exactly if the denoiser takes its level (condition_level), got noise "
            f"{condition.noise:g} and condition_level={denoiser.config.get('condition_level')}"
        )
    return condition


class ConditionImagesMixin:
    """Condition images of a pipeline with a `denoiser`, a `vae` and an `image_condition` in its config."""

    @property
    def image_condition(self) -> ImageCondition | None:
        """What `condition_image` of a call is, with its channels and size; `None` for a network without."""
        return image_condition_of(self.denoiser, self.config.get("image_condition"), self.vae)

    def condition_from_image(self, image: ImageInput) -> Tensor:
        """The condition that training makes of an image, to be given as `condition_image`.

        Args:
            image: One or several of the size of the pipeline's images, as `image` of the call.

        Returns:
            In [0, 1], shape `(batch, channels, height, width)`.

        Raises:
            ValueError: for a pipeline without condition images or whose condition is no function of the image, and for images
                of another size.
        """
        condition = self.image_condition
        if condition is None:
            raise ValueError(
                "condition_from_image is of pipelines with condition images, and this one was trained without"
            )
        images = images_to_tensor(image, condition.image_channels, self._dims)
        return (condition.of_images(images) / 2 + 0.5).clamp(0, 1)


def _read_image(pipe, condition_image: ImageInput | None) -> Tensor | None:
    """The condition image in [-1, 1], as its kind has it."""
    condition = pipe.image_condition
    if condition is None:
        if condition_image is not None:
            raise ValueError("condition_image was given, but the model was trained without: leave it out")
        return None
    if condition_image is None:
        if not pipe.denoiser.config.get("learned_without_image", True):
            raise ValueError(
                f"condition_image must be given, {condition.describe()}: the model was trained with one on each image "
                "(condition_dropout was 0)"
            )
        return None
    tensor = images_to_tensor(condition_image, condition.channels, pipe._dims, "condition_image")
    if tuple(tensor.shape[2:]) != condition.size:
        size, got = ("x".join(map(str, each)) for each in (condition.size, tensor.shape[2:]))
        how = "" if condition.kind == GIVEN else "; pipe.condition_from_image(image) makes it from an image"
        raise ValueError(f"condition_image must be {condition.describe()}, and so of {size}, got {got}{how}")
    return tensor


def _check_noise_level(condition: ImageCondition | None, image: Tensor | None, level: float | None) -> float:
    if level is None:
        return 0.0
    if image is None:
        raise ValueError(f"condition_noise_level is of a condition_image, which is not given, got {level}")
    if not condition.noise:
        raise ValueError(
            f"condition_noise_level must be left out: the model was trained without noise in its condition, got {level}"
        )
    if not 0 <= level <= condition.noise:
        raise ValueError(
            f"condition_noise_level must be in [0, {condition.noise:g}], which the model was trained on, got {level}"
        )
    return float(level)
