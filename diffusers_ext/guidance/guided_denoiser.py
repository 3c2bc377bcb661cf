"""How several predictions of a network become one: diffusers' guiders, run by hand.

A guider of diffusers (`diffusers.guiders`) says which predictions it needs, prepares the network for each of them, and
combines them. Here is the loop between, for pipelines that are not modular. Guiders of ours, which look at more than
predictions, are in `diffusers_ext.guidance.guiders`; which guider acts, and in which steps, in
`diffusers_ext.guidance.guiding`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from diffusers.guiders import (
    AutoGuidance,
    BaseGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from diffusers_ext.diffusion.noising import NoiseLevel
from diffusers_ext.guidance.labels import num_classes_of
from diffusers_ext.guidance.regions import Regions
from diffusers_ext.models.caching import forget, prediction_of, predicts_apart
from diffusers_ext.models.parallel import spreads_tokens
from diffusers_ext.schedulers.levels import model_input, noise_level


# Inputs that a network without condition images does not get.
OF_CONDITION_IMAGES = ("condition_image", "condition_given", "condition_level")

# Guiders that change the network for a prediction of its own, beside the conditional and the unconditional one.
PERTURBING_APART = (SkipLayerGuidance, PerturbedAttentionGuidance, SmoothedEnergyGuidance)


class StepContext(NamedTuple):
    """A step as guiders of this package see it, besides the predictions."""

    x_t: Tensor
    timestep: Tensor
    scheduler: SchedulerMixin
    class_labels: Tensor | None
    classifier: nn.Module | None
    weak_denoiser: nn.Module | None

    @property
    def level(self) -> NoiseLevel:
        """Of x_t.

        Raises:
            ValueError: if the scheduler has no Gaussian path.
        """
        return noise_level(self.scheduler, self.timestep, self.x_t)


# The scales of guidance, and what their values mean.
SCALES = {
    "guidance_scale": (
        "0 is the unconditional prediction and 1 the conditional one, without guidance. What leads away from a label is a "
        "negative weight, class_labels={label: -1.0}, and from a text a negative_prompt"
    ),
    "internal_guidance_scale": (
        "1 is the network's output, and above 1 leads away from what its middle layer predicts"
    ),
    "classifier_scale": "0 is no guidance by a classifier",
}


def check_guidance_scale(scale: float, name: str = "guidance_scale") -> None:
    """Refuses a scale with which guidance would lead away from the condition, or nowhere.

    Args:
        name: Of the scale, one of `SCALES`.

    Raises:
        ValueError: if it is not finite or is negative.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"{name} must be finite and at least 0, got {scale}: {SCALES[name]}")


def check_guidance_rescale(guidance_rescale: float) -> None:
    """Refuses a share of the standard deviation to get back that is not in [0, 1]."""
    if not 0 <= guidance_rescale <= 1:
        raise ValueError(f"guidance_rescale must be in [0, 1], got {guidance_rescale}")


class GuidedDenoiser:
    """A network as a sampler sees it: from x_t to one prediction, of however many the guider asks for.

    Args:
        denoiser: Called `denoiser(x_t, timesteps, **conditions, return_dict=False)`.
        scheduler: That samples.
        guider: Or `None` for the conditional prediction alone.
        conditions: Pairs (conditional, unconditional) of tensors by name, each of shape `(batch, ...)`.
            `class_labels` may be those of the classifier alone: a network without labels does not get them.
        channels: Channels of the prediction. Further ones, of a learned variance, are not guided: they stay those of
            the conditional prediction.
        classifier, weak_denoiser: For guiders that use them.
        low_memory: Call the network once for each prediction, instead of once for all.
        regions: What holds in parts of the sample: each conditional prediction, of whatever network, has it blended in.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: SchedulerMixin,
        guider: BaseGuidance | None,
        conditions: dict[str, tuple[Tensor, Tensor]],
        channels: int,
        *,
        classifier: nn.Module | None = None,
        weak_denoiser: nn.Module | None = None,
        low_memory: bool = False,
        regions: Regions | None = None,
    ):
        self.denoiser, self.scheduler, self.guider = denoiser, scheduler, guider
        self.conditions, self.channels, self.low_memory = conditions, channels, low_memory
        self.regions = regions
        # What guiders choose from: with regions also whether a prediction is a conditional one, which has them.
        self._data = conditions if regions is None else conditions | {"regional": (True, False)}
        self.classifier, self.weak_denoiser = classifier, weak_denoiser
        self.changes_model = guider is not None and type(guider).prepare_models is not BaseGuidance.prepare_models
        if self.changes_model:
            _list_indices(guider)
        for network in (denoiser, weak_denoiser):
            forget(network)

    def __call__(self, x: Tensor, timestep: Tensor, step: int = 0, num_steps: int = 1, guide: bool = True) -> Tensor:
        """The network's output, guided.

        Args:
            x: As the scheduler has it, shape `(batch, channels, ...)`.
            timestep: One for all samples.
            step, num_steps: Index of the step, and the number of steps of the sampler.
            guide: Whether the guider acts in this step; if not, it costs the one call that no guider costs.

        Returns:
            float32 or wider, shape of one output of the network.
        """
        x = model_input(self.scheduler, x, timestep)
        if self.guider is None:
            inputs = {name: pair[0] for name, pair in self.conditions.items()}
            return self._predictions(self.denoiser, x, timestep, [(inputs, self.regions is not None)], "pred_cond")[0]
        guider = self.guider
        with self._acting(x, timestep, guide):
            guider.set_state(step=step, num_inference_steps=num_steps, timestep=timestep)
            batches = prepare_inputs(guider, self._data)
            for batch, output in zip(batches, self._outputs(batches, x, timestep), strict=True):
                batch.noise_pred, batch.rest = output[:, : self.channels], output[:, self.channels :]
                if type(guider).__name__ == "MagnitudeAwareGuidance":  # that of diffusers 0.42 fails with images
                    batch.noise_pred = batch.noise_pred.flatten(2)
            guided = guider(batches).pred.view_as(x)
        rest = batches[0].rest
        return torch.cat([guided, rest], dim=1) if rest.shape[1] else guided

    @contextmanager
    def _acting(self, x: Tensor, timestep: Tensor, guide: bool) -> Iterator[None]:
        """The guider as it is to act in this step; it holds no tensors of the step beyond it."""
        guider, enabled = self.guider, self.guider._enabled
        guider._enabled = enabled and guide
        sees = hasattr(guider, "see")
        if sees:
            labels, _ = self.conditions.get("class_labels", (None, None))
            guider.see(StepContext(x, timestep, self.scheduler, labels, self.classifier, self.weak_denoiser))
        try:
            yield
        finally:
            guider._enabled = enabled
            if sees:
                guider.see(None)

    def _outputs(self, batches: list, x: Tensor, timestep: Tensor) -> list[Tensor]:
        """The outputs for each of the batches, of as few calls as there can be."""
        outputs = []
        for (network, apart), group in groupby(batches, self._call_of):
            group = list(group)
            asked = [
                ({name: getattr(batch, name) for name in self.conditions}, getattr(batch, "regional", False))
                for batch in group
            ]
            with self._prepared(network, apart):
                name = getattr(group[0], BaseGuidance._identifier_key)
                outputs += self._predictions(network, x, timestep, asked, name)
        return outputs

    def _predictions(
        self, network: nn.Module, x: Tensor, timestep: Tensor, asked: list[tuple[dict[str, Tensor], bool]], name: str
    ) -> list[Tensor]:
        """The predictions for these inputs, by one call, each with the regions blended in or not."""
        if not any(regional for _, regional in asked):
            return self._predict_each(network, x, timestep, [inputs for inputs, _ in asked], name)
        regions = self.regions
        wanted = [inputs for inputs, _ in asked] + [*regions.inputs, regions.null]
        # The same tensors are the same inputs: without labels, the base of the regions is the null prediction.
        keys = [tuple(id(value) for value in inputs.values()) for inputs in wanted]
        different = dict(zip(keys, wanted, strict=True))
        predictions = self._predict_each(network, x, timestep, list(different.values()), name)
        by_key = dict(zip(different, predictions, strict=True))
        *outputs, null = (by_key[key] for key in keys)
        bases, of_regions = outputs[: len(asked)], outputs[len(asked) :]
        return [
            regions.blend(base, of_regions, null, self.channels) if regional else base
            for base, (_, regional) in zip(bases, asked, strict=True)
        ]

    def _predict_each(
        self, network: nn.Module, x: Tensor, timestep: Tensor, inputs: list[dict[str, Tensor]], name: str
    ) -> list[Tensor]:
        """The prediction for each of the inputs, by one call or, to save memory, by one for each.

        Args:
            name: Of the first prediction, by which a cache keeps it apart from others; those of regions get a number.
        """
        if self.low_memory:
            names = [name, *(f"{name}_{i}" for i in range(1, len(inputs)))]
            return [self._predict(network, x, timestep, each, name=of) for each, of in zip(inputs, names, strict=True)]
        together = {key: torch.cat([each[key] for each in inputs]) for key in self.conditions}
        return list(self._predict(network, x, timestep, together, len(inputs), name).chunk(len(inputs)))

    def _call_of(self, batch) -> tuple[nn.Module, str | None]:
        """The network of a prediction, and the name of how it is changed for it; neighbours that share both are one call."""
        name = getattr(batch, BaseGuidance._identifier_key)
        plain = isinstance(self.guider, PERTURBING_APART) and name in ("pred_cond", "pred_uncond")
        network = getattr(batch, "network", None) or self.denoiser
        apart = self.low_memory or (self.changes_model and not plain) or predicts_apart(network)
        return network, name if apart else None

    def _predict(
        self,
        network: nn.Module,
        x: Tensor,
        timestep: Tensor,
        conditions: dict[str, Tensor],
        copies: int = 1,
        name: str = "pred_cond",
    ) -> Tensor:
        if "class_labels" in conditions and num_classes_of(network) is None:
            conditions = {name: value for name, value in conditions.items() if name != "class_labels"}
        if "condition_image" in conditions and not network.config.get("condition_channels"):
            conditions = {name: value for name, value in conditions.items() if name not in OF_CONDITION_IMAGES}
        conditions = {  # numbers of a sample, such as a level, are embedded in float32
            name: value.to(network.dtype) if value.is_floating_point() and value.ndim > 1 else value
            for name, value in conditions.items()
        }
        x = x.repeat(copies, *[1] * (x.ndim - 1)).to(network.dtype)
        # The only guider of which each prediction is one of two outputs; a weaker network has but one.
        internal_scale = getattr(self.guider, "internal_scale", 1.0) if network is self.denoiser else 1.0
        with prediction_of(network, name.removeprefix("pred_"), len(x)):
            output = network(x, timestep.expand(len(x)), **conditions, return_dict=internal_scale != 1)
        wide = torch.promote_types(output[0].dtype, torch.float32)
        if internal_scale == 1:
            return output[0].to(wide)
        return self._led_away(output.sample.to(wide), output.internal_sample.to(wide), internal_scale)

    def _led_away(self, sample: Tensor, internal: Tensor, scale: float) -> Tensor:
        """The network's output, led away from that of its middle layer; but not that of a learned variance."""
        mean, rest = sample[:, : self.channels], sample[:, self.channels :]
        internal = internal[:, : self.channels]
        return torch.cat([internal + scale * (mean - internal), rest], dim=1)

    @contextmanager
    def _prepared(self, network: nn.Module, name: str | None) -> Iterator[None]:
        """The network as the guider wants it for the prediction of this name; `None` for those that leave it alone."""
        guider = self.guider
        if name is None or not self.changes_model:
            yield
            return
        hookable = with_named_blocks(network)
        before = _num_hooks(hookable)
        # Guiders know the perturbed prediction by the number of those before it. Without an unconditional one it is one
        # less, and diffusers 0.42 then perturbs nothing; so the number is what it would be with all of them.
        index = guider._input_predictions.index(name)
        guider._count_prepared = index
        if isinstance(guider, SmoothedEnergyGuidance) and spreads_tokens(network):
            raise ValueError(
                "SmoothedEnergyGuidance blurs over the tokens of an image, so that they must not be spread over processes: "
                "take another guider, or a network without enable_parallelism"
            )
        try:
            guider.prepare_models(hookable)
            if guider._count_prepared == index:  # SmoothedEnergyGuidance of diffusers 0.42 does not count
                guider._count_prepared += 1
                guider.prepare_models(hookable)
            if _is_perturbed(guider, name) and _num_hooks(hookable) == before:
                raise ValueError(
                    f"{type(guider).__name__} found nothing to change in {type(network).__name__}: the layers that it "
                    "names have no such part (a U-Net's have attention and no feed-forward network)"
                )
            yield
        finally:
            guider.cleanup_models(hookable)


def prepare_inputs(guider: BaseGuidance, conditions: dict[str, tuple[Tensor, Tensor]]) -> list:
    """The batches of the predictions that a guider asks for in the step that it is set to.

    Raises:
        ValueError: if it asks for predictions that are neither conditional nor unconditional.
    """
    try:
        batches = guider.prepare_inputs(conditions)
    except IndexError:
        batches = None
    known = ("pred_cond_stg", "pred_cond_modality")  # LTX2Guidance's, which its own network alone can make
    if batches is None or any(getattr(batch, guider._identifier_key) in known for batch in batches):
        raise ValueError(
            f"{type(guider).__name__} asks for predictions that this network cannot make; leave its stg_scale and "
            "modality_scale as they are"
        )
    return batches


def with_named_blocks(model: nn.Module) -> nn.Module:
    """`model` as diffusers' hooks look for its layers: a list of blocks under a name that they know.

    A model that says which of its layers may be skipped (`skippable_blocks`) gets a module around it that has them as
    `transformer_blocks`, beside what the model itself has. Registered in the model they would be saved twice.
    """
    blocks = getattr(model, "skippable_blocks", None)
    if blocks is None:
        return model
    view = nn.Module()
    view.transformer_blocks = nn.ModuleList(blocks)
    view._modules.update(model._modules)
    return view


def _is_perturbed(guider: BaseGuidance, name: str) -> bool:
    return name not in ("pred_cond", "pred_uncond") or (isinstance(guider, AutoGuidance) and name == "pred_uncond")


def _num_hooks(model: nn.Module) -> int:
    return sum(len(module._diffusers_hook.hooks) for module in model.modules() if hasattr(module, "_diffusers_hook"))


def _list_indices(guider: BaseGuidance) -> None:
    """Makes a layer's number a list of one, as diffusers' hooks want it; its guiders pass the number on as it is."""
    for value in vars(guider).values():
        for config in value if isinstance(value, list) else ():
            is_config = isinstance(config, LayerSkipConfig | SmoothedEnergyGuidanceConfig)
            if is_config and not isinstance(config.indices, Sequence):
                config.indices = [config.indices]
