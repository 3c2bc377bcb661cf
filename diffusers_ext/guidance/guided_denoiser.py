"""How several predictions of a network become one: diffusers' guiders, run by hand.

A guider of diffusers (`diffusers.guiders`) says which predictions it needs, prepares the network for each of them, and
combines them. What stands here is the loop between, for pipelines that are not modular. Guiders of ours, which look at
more than predictions, stand in `diffusers_ext.guidance.guiders`.
"""

import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch
from diffusers.guiders import (
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
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
from diffusers_ext.schedulers.levels import noise_level


# What an interval can be given in, besides fractions of the steps.
INTERVAL_UNITS = ("steps", "sigma", "timestep")

Interval = tuple[float, float] | Mapping[str, tuple[float, float]]


# Guiders that change the network for a prediction of its own, beside the conditional and the unconditional one.
PERTURBING_APART = (SkipLayerGuidance, PerturbedAttentionGuidance, SmoothedEnergyGuidance)


class StepContext(NamedTuple):
    """What a guider of ours may look at in a step, besides predictions."""

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
            ValueError: if the scheduler has no variance-preserving path.
        """
        return noise_level(self.scheduler, self.timestep, self.x_t)


@contextmanager
def without_notice() -> Iterator[None]:
    """Makes guiders without diffusers' notice that they may change, which is for users who name one themselves."""
    notice = logging.getLogger("diffusers.guiders.guider_utils")
    before, notice.disabled = notice.disabled, True
    try:
        yield
    finally:
        notice.disabled = before


def check_guidance_scale(guidance_scale: float) -> None:
    """Refuses a weight of the condition with which guidance would lead away from it, or nowhere.

    Raises:
        ValueError: if it is not finite or is negative.
    """
    if not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(
            f"guidance_scale must be finite and at least 0, got {guidance_scale}: 0 is the unconditional prediction and 1 the "
            "conditional one, without guidance. What leads away from a label is a negative weight, class_labels={label: "
            "-1.0}, and from a text a negative_prompt"
        )


def classifier_free_guidance(guidance_scale: float, guidance_rescale: float = 0.0) -> ClassifierFreeGuidance | None:
    """The guider for a scale, where 1 is the conditional prediction alone (Ho & Salimans 2022, with w = scale - 1).

    At a scale of 1 there is nothing to guide: `None`, so that a step costs one call of the network.

    Args:
        guidance_rescale: In [0, 1], how far the result gets the standard deviation of the conditional prediction
            back (Lin et al. 2023, arXiv 2305.08891, Section 3.4).

    Raises:
        ValueError: if the scale is not finite or is negative.
    """
    check_guidance_scale(guidance_scale)
    if guidance_scale == 1.0:
        return None
    return ClassifierFreeGuidance(guidance_scale=float(guidance_scale), guidance_rescale=float(guidance_rescale))


class GuidedDenoiser:
    """A network as a sampler sees it: from x_t to one prediction, of however many the guider asks for.

    Args:
        denoiser: Called `denoiser(x_t, timesteps, **conditions, return_dict=False)`.
        scheduler: That samples.
        guider: Or `None` for the conditional prediction alone.
        conditions: Pairs (conditional, unconditional) of tensors by name, each of shape `(batch, ...)`.
        channels: Channels of the prediction. Further ones, of a learned variance, are not guided: they stay those of
            the conditional prediction.
        class_labels: What a classifier is to see, shape `(batch,)`.
        classifier, weak_denoiser: For guiders that use them.
        low_memory: Call the network once for each prediction, instead of once for all.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        scheduler: SchedulerMixin,
        guider: BaseGuidance | None,
        conditions: dict[str, tuple[Tensor, Tensor]],
        channels: int,
        *,
        class_labels: Tensor | None = None,
        classifier: nn.Module | None = None,
        weak_denoiser: nn.Module | None = None,
        low_memory: bool = False,
    ):
        self.denoiser, self.scheduler, self.guider = denoiser, scheduler, guider
        self.conditions, self.channels, self.low_memory = conditions, channels, low_memory
        self.class_labels, self.classifier, self.weak_denoiser = class_labels, classifier, weak_denoiser
        self.changes_model = guider is not None and type(guider).prepare_models is not BaseGuidance.prepare_models
        if self.changes_model:
            _list_indices(guider)

    def __call__(self, x: Tensor, timestep: Tensor, step: int = 0, num_steps: int = 1, guide: bool = True) -> Tensor:
        """The network's output, guided.

        Args:
            x: As the scheduler has it, shape `(batch, channels, ...)`.
            timestep: One for all samples.
            step, num_steps: Place among the steps of the sampler.
            guide: Whether the guider acts in this step; if not, it costs the one call that no guider costs.

        Returns:
            float32 or wider, shape of one output of the network.
        """
        x = self.scheduler.scale_model_input(x, timestep)
        if self.guider is None:
            return self._predict(self.denoiser, x, timestep, {name: pair[0] for name, pair in self.conditions.items()})
        guider = self.guider
        with self._acting(x, timestep, guide):
            guider.set_state(step=step, num_inference_steps=num_steps, timestep=timestep)
            batches = prepare_inputs(guider, self.conditions)
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
            guider.see(
                StepContext(x, timestep, self.scheduler, self.class_labels, self.classifier, self.weak_denoiser)
            )
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
            conditions = {name: torch.cat([getattr(batch, name) for batch in group]) for name in self.conditions}
            with self._prepared(network, apart):
                outputs += self._predict(network, x, timestep, conditions, len(group)).chunk(len(group))
        return outputs

    def _call_of(self, batch) -> tuple[nn.Module, str | None]:
        """What neighbours must share to be predicted in one call: the network, and how it is changed for them."""
        name = getattr(batch, BaseGuidance._identifier_key)
        plain = isinstance(self.guider, PERTURBING_APART) and name in ("pred_cond", "pred_uncond")
        apart = self.low_memory or (self.changes_model and not plain)
        return getattr(batch, "network", None) or self.denoiser, name if apart else None

    def _predict(
        self, network: nn.Module, x: Tensor, timestep: Tensor, conditions: dict[str, Tensor], copies: int = 1
    ) -> Tensor:
        if network is self.weak_denoiser and num_classes_of(network) is None:
            conditions = {name: value for name, value in conditions.items() if name != "class_labels"}
        conditions = {
            name: value.to(network.dtype) if value.is_floating_point() else value for name, value in conditions.items()
        }
        x = x.repeat(copies, *[1] * (x.ndim - 1)).to(network.dtype)
        output = network(x, timestep.expand(len(x)), **conditions, return_dict=False)[0]
        return output.to(torch.promote_types(output.dtype, torch.float32))

    @contextmanager
    def _prepared(self, network: nn.Module, name: str | None) -> Iterator[None]:
        """The network as the guider wants it for the prediction of this name; `None` for those that leave it alone."""
        guider = self.guider
        if name is None or not self.changes_model:
            yield
            return
        hookable = with_named_blocks(network)
        before = _num_hooks(hookable)
        # Guiders tell the perturbed prediction by the number of those before it. Without an unconditional one it is one
        # less, and diffusers 0.42 then perturbs nothing; so the number is what it would be with all of them.
        place = guider._input_predictions.index(name)
        guider._count_prepared = place
        try:
            guider.prepare_models(hookable)
            if guider._count_prepared == place:  # SmoothedEnergyGuidance of diffusers 0.42 does not count
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


def asks_for_unconditional(guider: BaseGuidance, timesteps: Tensor, guide: Sequence[bool]) -> bool:
    """Whether in any of the steps in which it acts a guider asks for a prediction without the condition."""
    for step, (timestep, acts) in enumerate(zip(timesteps, guide, strict=True)):
        if not acts:
            continue
        guider.set_state(step=step, num_inference_steps=len(timesteps), timestep=timestep)
        if any(getattr(batch, guider._identifier_key) == "pred_uncond" for batch in prepare_inputs(guider, {})):
            return True
    return False


def guided_steps(interval: Interval | None, scheduler: SchedulerMixin, timesteps: Tensor) -> list[bool]:
    """In which of the steps guidance acts (limited interval: Kynkaanniemi et al. 2024, arXiv 2404.07724).

    Args:
        interval: `(start, stop)` as fractions of the steps, start included, as diffusers' guiders have them. Or by
            name, with both ends included: `{"sigma": (low, high)}` for sigma / alpha, the paper's noise level, or
            `{"timestep": (low, high)}`.

    Raises:
        ValueError: if the interval is out of order or out of range, or of an unknown unit.
    """
    if interval is None:
        return [True] * len(timesteps)
    by_name = interval if isinstance(interval, Mapping) else {"steps": interval}
    if len(by_name) != 1 or next(iter(by_name)) not in INTERVAL_UNITS:
        raise ValueError(
            f"guidance_interval must be (start, stop) or of one of the units {', '.join(INTERVAL_UNITS)}, such as "
            f"{{'sigma': (0.2, 5.0)}}, got {interval!r}"
        )
    (unit, bounds), *_ = by_name.items()
    largest = 1.0 if unit == "steps" else float("inf")
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        low = high = float("nan")
    if not 0 <= low <= high <= largest:
        limit = " in [0, 1]" if unit == "steps" else " of at least 0"
        raise ValueError(
            f"guidance_interval must be two numbers{limit}, the smaller one first, got {bounds!r} ({unit})"
        )
    if unit == "steps":
        first, end = int(low * len(timesteps)), int(high * len(timesteps))
        guide = [first <= i < end for i in range(len(timesteps))]
    else:
        values = timesteps.tolist()
        if unit == "sigma":
            like = torch.zeros(1, dtype=torch.float64)
            levels = [noise_level(scheduler, t, like) for t in timesteps.cpu()]
            values = [(level.sigma / level.alpha).item() for level in levels]
        guide = [low <= value <= high for value in values]
    if guide and low < high and not any(guide):
        warnings.warn(
            f"guidance_interval holds none of the {len(guide)} steps, so that none is guided: got {bounds!r} ({unit})",
            stacklevel=4,
        )
    return guide


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
