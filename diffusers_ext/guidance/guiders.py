"""Guiders of this package: by a classifier, by a weaker network, by a middle layer, by weights of labels.

They are saved with a pipeline like diffusers' own. They need more than conditional and unconditional predictions, which
`diffusers_ext.guidance.guided_denoiser.GuidedDenoiser` gives them: before each step it calls `see` with the noisy sample, its timestep
and the pipeline's other networks. A pipeline calls `check_pipeline` once, before it samples.
"""

import math
import warnings

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput, rescale_noise_cfg
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from diffusers_ext.diffusion.noising import add_to_score
from diffusers_ext.guidance.guided_denoiser import (
    StepContext,
    check_guidance_rescale,
    check_guidance_scale,
)
from diffusers_ext.schedulers.levels import (
    PATH_TOLERANCE,
    describe_path,
    path_difference,
    path_in_words,
    prediction_type_of,
)


class _ContextGuidance(BaseGuidance):
    """A guider that looks at the step's context, within its share of the steps."""

    def __init__(self, guidance_scale: float = 1.0, guidance_rescale: float = 0.0, *start_stop_enabled):
        super().__init__(*start_stop_enabled)
        check_guidance_scale(guidance_scale)
        check_guidance_rescale(guidance_rescale)
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self._context: StepContext | None = None

    def see(self, context: StepContext | None) -> None:
        """Gives the step that the predictions of the next `forward` belong to; `None` after it."""
        self._context = context

    def check_pipeline(self, pipe, labels: Tensor | None) -> None:
        """Refuses a pipeline without what the guider needs.

        Raises:
            ValueError: with what is missing.
        """
        raise NotImplementedError

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        """Names of the predictions to ask for in this step."""
        raise NotImplementedError

    def _is_on(self, start: float = 0.0, stop: float = 1.0) -> bool:
        """Whether it acts in this step, and the step is within these shares of them too."""
        if not self._enabled:
            return False
        if self._num_inference_steps is None:
            return True
        bounds = (max(start, self._start), min(stop, self._stop))
        first, end = (int(share * self._num_inference_steps) for share in bounds)
        return first <= self._step < end


class ClassifierGuidance(_ContextGuidance):
    """Guidance by the gradient of a classifier of noisy samples (Dhariwal & Nichol 2021, arXiv 2105.05233).

        score = score(x_t, guided) + classifier_scale * grad log p(label | x_t)

    where "guided" is classifier-free guidance at `guidance_scale`: 1, the conditional prediction; 0, the unconditional
    one, on which a `classifier_scale` of w means what classifier-free guidance at a scale of w means; or any other, for
    both kinds at once. For a denoiser without labels there is one prediction, and the label is the classifier's alone.

    The gradient enters through the score that the network's output means, so that every prediction type and every
    sampler of the classifier's path will do. Needs the pipeline's `classifier`.

    Args:
        classifier_scale: Weight of the gradient, at least 0; 0 costs no call of the classifier.
        guidance_scale: Of classifier-free guidance.
        guidance_rescale: In [0, 1], how far the result gets the standard deviation of the conditional prediction back.
        start, stop: Share of the steps after which guidance starts and stops, in [0, 1].
        enabled: Whether it acts at all.

    Raises:
        ValueError: if a scale is out of range.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        classifier_scale: float = 1.0,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale, guidance_rescale, start, stop, enabled)
        check_guidance_scale(classifier_scale, "classifier_scale")
        self.classifier_scale = classifier_scale

    def check_pipeline(self, pipe, labels: Tensor | None) -> None:
        if pipe.classifier is None:
            raise ValueError("ClassifierGuidance needs a classifier: give the pipeline one as classifier=")
        if labels is None or labels.ndim > 1 or pipe.null_label in labels.tolist():
            raise ValueError(
                "ClassifierGuidance needs class_labels to guide to, one for each image, none of them the null label"
            )
        _check_path(pipe.classifier, pipe.scheduler)

    def prepare_inputs(self, data: dict[str, tuple[Tensor, Tensor]]) -> list:
        return [self._prepare_batch(data, int(name == "pred_uncond"), name) for name in self._names()]

    def forward(self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_cond is None or pred_uncond is None:
            pred = pred_uncond if pred_cond is None else pred_cond
        else:
            pred = pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        if self._is_on() and self.classifier_scale:
            context = self._context
            gradient = self.classifier_scale * classifier_gradient(context)
            pred = add_to_score(pred, gradient.to(pred), context.level, prediction_type_of(context.scheduler))
        if self._is_on() and self.guidance_rescale > 0:
            pred = rescale_noise_cfg(pred, pred_uncond if pred_cond is None else pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _names(self) -> list[str]:
        if not self._is_on() or self.guidance_scale == 1:
            return ["pred_cond"]
        return ["pred_uncond"] if self.guidance_scale == 0 else ["pred_cond", "pred_uncond"]


class WeakModelGuidance(_ContextGuidance):
    """Autoguidance: away from what a weaker network predicts (Karras et al. 2024, arXiv 2406.02507).

        weak + guidance_scale * (strong - weak)

    Both see the same label. The weaker one is a smaller or less trained network of the same data, noise schedule and
    prediction type, the pipeline's `weak_denoiser`; where it takes no labels, it leads to the label too, as
    classifier-free guidance does. (diffusers' `AutoGuidance` weakens the network itself, by dropping layers.)

    Args:
        guidance_scale: 1 is the stronger network alone, which costs one call a step.
        guidance_rescale: In [0, 1], how far the result gets the standard deviation of the stronger prediction back.
        start, stop: Share of the steps after which guidance starts and stops, in [0, 1].
        enabled: Whether it acts at all.

    Raises:
        ValueError: if a scale is out of range.
    """

    _input_predictions = ["pred_cond", "pred_weak"]

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 2.0,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale, guidance_rescale, start, stop, enabled)

    def check_pipeline(self, pipe, labels: Tensor | None) -> None:
        if pipe.weak_denoiser is None:
            raise ValueError("WeakModelGuidance needs a weaker network: give the pipeline one as weak_denoiser=")

    def prepare_inputs(self, data: dict[str, tuple[Tensor, Tensor]]) -> list:
        batches = [self._prepare_batch(data, 0, name) for name in self._names()]
        if len(batches) == 2 and self._context is not None:
            batches[1].network = self._context.weak_denoiser
        return batches

    def forward(self, pred_cond: Tensor, pred_weak: Tensor | None = None) -> GuiderOutput:
        pred = pred_cond if pred_weak is None else pred_weak + self.guidance_scale * (pred_cond - pred_weak)
        if pred_weak is not None and self.guidance_rescale > 0:
            pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_weak)

    def _names(self) -> list[str]:
        return self._input_predictions if self._is_on() and self.guidance_scale != 1 else ["pred_cond"]


class InternalGuidance(_ContextGuidance):
    """Guidance away from what the network predicts in a middle layer (Zhou et al. 2025, arXiv 2512.24176).

        internal + internal_guidance_scale * (output - internal)

    for each prediction; the conditional and the unconditional one then make classifier-free guidance at `guidance_scale`. Both
    outputs come from one call of the network, so that the former costs no further one. Needs a network with a second output, a
    `DiTModel` with an `internal_guidance_layer` that was trained along.

    Args:
        internal_guidance_scale: Finite, at least 0; 1 is the network's output alone.
        guidance_scale: Of classifier-free guidance; 1 is none.
        guidance_rescale: In [0, 1], how far the result gets the standard deviation of the conditional prediction back, which
            classifier-free guidance has changed.
        start, stop: Share of the steps after which guidance starts and stops, in [0, 1].
        enabled: Whether it acts at all.
        internal_start, internal_stop: The same for what the middle layer does, within those. The paper finds it
            of use at high and middle noise levels above all.

    Raises:
        ValueError: if a scale is out of range.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        internal_guidance_scale: float = 1.4,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        internal_start: float = 0.0,
        internal_stop: float = 1.0,
    ):
        super().__init__(guidance_scale, guidance_rescale, start, stop, enabled)
        check_guidance_scale(internal_guidance_scale, "internal_guidance_scale")
        if not 0 <= internal_start <= internal_stop <= 1:
            raise ValueError(
                "internal_start and internal_stop must be in [0, 1], the smaller one first, got "
                f"{internal_start} and {internal_stop}"
            )
        self.internal_guidance_scale = internal_guidance_scale
        self.internal_start, self.internal_stop = internal_start, internal_stop

    def check_pipeline(self, pipe, labels: Tensor | None) -> None:
        if pipe.denoiser.config.get("internal_guidance_layer") is None:
            raise ValueError(
                "InternalGuidance needs a network with a second output in a middle layer, such as a DiTModel that was trained "
                "with --internal_guidance_layer; this one has none"
            )
        if getattr(pipe.denoiser, "caches_blocks", False):
            raise ValueError(
                "InternalGuidance needs each block in each step, and the cache that is enabled skips some: call "
                "denoiser.disable_cache(), or take a cache of attention"
            )

    @property
    def internal_scale(self) -> float:
        """The weight by which each prediction of this step is led away from that of the middle layer."""
        return self.internal_guidance_scale if self._is_on(self.internal_start, self.internal_stop) else 1.0

    def prepare_inputs(self, data: dict[str, tuple[Tensor, Tensor]]) -> list:
        return [self._prepare_batch(data, int(name == "pred_uncond"), name) for name in self._names()]

    def forward(self, pred_cond: Tensor | None = None, pred_uncond: Tensor | None = None) -> GuiderOutput:
        if pred_cond is None or pred_uncond is None:
            pred = pred_uncond if pred_cond is None else pred_cond
        else:
            pred = pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
            if self.guidance_rescale > 0:
                pred = rescale_noise_cfg(pred, pred_cond, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _names(self) -> list[str]:
        if not self._is_on() or self.guidance_scale == 1:
            return ["pred_cond"]
        return ["pred_uncond"] if self.guidance_scale == 0 else ["pred_cond", "pred_uncond"]


class ComposedGuidance(_ContextGuidance):
    """The weighted sum of the labels' directions (Liu et al. 2022, arXiv 2206.01714, Section 4).

        null + sum over labels of weight * (label's prediction - null)

    A pipeline uses it for `class_labels` that have weights. A step costs as many predictions as the image with the
    most labels has, and one; but where the weights of each image add up to 1, that of the null label, which has no part
    in the sum then, is left out.

    Args:
        guidance_rescale: In [0, 1], how far the result gets the standard deviation of the first label's prediction
            back.

    Raises:
        ValueError: if it is out of range.
    """

    _input_predictions = ["pred_uncond"]

    @register_to_config
    def __init__(self, guidance_rescale: float = 0.0):
        super().__init__(guidance_rescale=guidance_rescale)
        self._data, self._slots, self._needs_null = None, [], True

    def check_pipeline(self, pipe, labels: Tensor | None) -> None:
        if labels is None or not labels.is_floating_point():
            raise ValueError("ComposedGuidance needs class_labels with weights, such as [{3: 2.0, 5: 1.0}]")
        if not self._enabled:
            raise ValueError("ComposedGuidance must be enabled: without it, weights of labels mean nothing")
        if pipe.denoiser_num_classes is None:
            raise ValueError("weights of labels need a model with labels")
        if pipe.null_label is None and _needs_null(labels):
            raise ValueError(
                "weights of labels that do not add up to 1 need a model with a null label, which was trained without labels "
                "too (label_dropout above 0); this one has none"
            )

    def prepare_inputs(self, data: dict[str, tuple[Tensor, Tensor]]) -> list:
        if data is not self._data:  # as it is in each step of a call, and to count labels waits for the device
            self._data = data
            self._slots, self._needs_null = _slots_of_labels(*data["class_labels"])
        batches = []
        for slot, (labels, _) in enumerate(self._slots):
            batches.append(self._prepare_batch(data, 0, f"pred_label_{slot}"))
            batches[-1].class_labels = labels
        if self._needs_null:
            batches.append(self._prepare_batch(data, 1, "pred_uncond"))
        return batches

    def forward(self, pred_uncond: Tensor | None = None, **pred_labels: Tensor) -> GuiderOutput:
        first = pred_labels["pred_label_0"]
        base = first if pred_uncond is None else pred_uncond  # any base will do for weights that add up to 1
        pred = base
        for (_, weights), label in zip(self._slots, pred_labels.values(), strict=True):
            pred = pred + weights.view(-1, *[1] * (label.ndim - 1)) * (label - base)
        if self.guidance_rescale > 0:
            pred = rescale_noise_cfg(pred, first, self.guidance_rescale)
        return GuiderOutput(pred=pred, pred_cond=first, pred_uncond=pred_uncond)

    @property
    def num_conditions(self) -> int:
        return len(self._slots) + self._needs_null


def _slots_of_labels(weights: Tensor, null: Tensor) -> tuple[list[tuple[Tensor, Tensor]], bool]:
    """The k-th label of each image and its weight, both of shape `(batch,)`, for each k up to the most labels of an image;
    and whether the null label has a part in the weighted sum.

    Args:
        weights: Shape `(batch, num_classes)`.
        null: The null label, shape `(batch,)`. An image with fewer labels has it instead, at a weight of 0.
    """
    most = max(int((weights != 0).sum(1).max()), 1)
    order = (weights == 0).int().argsort(dim=1, stable=True)[:, :most]
    ordered = weights.gather(1, order)
    labels = torch.where(ordered != 0, order, null[:, None])
    return list(zip(labels.unbind(1), ordered.unbind(1), strict=True)), _needs_null(weights)


# Of weights that are to add up to 1: they are rounded to float32, each of them.
SUM_TOLERANCE = 1e-5


def _needs_null(weights: Tensor) -> bool:
    return bool(((weights.double().sum(1) - 1).abs() > SUM_TOLERANCE).any())


def classifier_gradient(context: StepContext) -> Tensor:
    """The gradient of log p(label | x_t) in x_t by the classifier, shape and dtype of x_t."""
    classifier = context.classifier
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, since tensors that were made in inference mode cannot be differentiated.
        x_t, timestep, labels = context.x_t.clone(), context.timestep.clone(), context.class_labels.clone()
        x_t.requires_grad_()
        logits = classifier(x_t.to(classifier.dtype), timestep.expand(len(x_t)), return_dict=False)[0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        of_labels = logits.log_softmax(-1, dtype=wide).gather(1, labels[:, None])
        return torch.autograd.grad(of_labels.sum(), x_t)[0]


def _check_path(classifier: nn.Module, scheduler: SchedulerMixin) -> None:
    """Refuses a classifier that knows other noise levels than those that it will see."""
    path = classifier.config.get("noise_schedule")
    if path is None:
        warnings.warn(
            "the classifier's config has no noise_schedule, so that it may have been trained on other noise "
            "levels than this scheduler's; set it by describe_path(scheduler)",
            stacklevel=10,
        )
        return
    difference = path_difference(path, scheduler)
    if difference > PATH_TOLERANCE:
        trained, sampled = map(path_in_words, (path, describe_path(scheduler)))
        apart = f", with alpha_bar up to {difference:.2g} apart" if math.isfinite(difference) else ""
        raise ValueError(
            f"the classifier must be trained on the scheduler's noise levels: it was trained on {trained}, and the "
            f"scheduler has {sampled}{apart}"
        )
