"""The labels of a pipeline and of a call: by id and by name, as the network gets them, and what they cannot do."""

import difflib
import math
from collections.abc import Collection, Mapping, Sequence, Set
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers.guiders import AutoGuidance, BaseGuidance
from torch import Tensor

from diffusers_ext.guidance.guiders import ClassifierGuidance, ComposedGuidance
from diffusers_ext.guidance.guiding import asks_for_unconditional
from diffusers_ext.guidance.labels import num_classes_of


Label = int | str
Labels: TypeAlias = (
    Label | Sequence[Label | Collection[Label] | Mapping[Label, float]] | Mapping[Label, float] | Tensor
)


class LabelCondition:
    """The labels of a call, or that it has none.

    Args:
        pipe: A pipeline with labels, perhaps a classifier's.
        class_labels: As the pipeline's call takes them.
        of_regions: The label, or the set of labels, of each region of the image.

    Raises:
        ValueError: for a label that the model does not have.
    """

    default_guidance_scale = None

    def __init__(self, pipe: "LabelledMixin", class_labels: Labels | None, of_regions: Sequence[Any] = ()):
        self.labels = None if class_labels is None else pipe.label_tensor(class_labels)
        self.of_regions = [pipe.label_tensor([label]) for label in of_regions]
        # Such labels are for `ComposedGuidance` alone.
        self.weighted = self.labels is not None and self.labels.is_floating_point()
        self._check_regions(pipe)
        self.per_image = {"class_labels": self.labels}

    def _check_regions(self, pipe: "LabelledMixin") -> None:
        if not self.of_regions:
            return
        if self.weighted or any(label.is_floating_point() for label in self.of_regions):
            raise ValueError(
                "regions have weights of their own: give each a label, and weights of labels as regions of a full mask"
            )
        if pipe.denoiser_num_classes is None:
            raise ValueError("regions need a denoiser with labels, and this one was trained without")
        if pipe.null_label is None:
            raise ValueError(
                "regions need a null label, from which the direction of each label is taken, and the model was trained with a "
                "label on each image (label_dropout was 0)"
            )
        everything = [*self.of_regions, *([] if self.labels is None else [self.labels])]
        if any(label.dtype == torch.bool for label in everything):  # the network is called with all of them at once
            self.of_regions = [_as_sets(label, pipe.num_classes) for label in self.of_regions]
            empty = torch.zeros(1, pipe.num_classes, dtype=torch.bool)
            self.labels = empty if self.labels is None else _as_sets(self.labels, pipe.num_classes)

    def can_guide(self, pipe: "LabelledMixin") -> bool:
        """Whether there are labels, and a null label to lead away from."""
        return self.labels is not None and pipe.null_label is not None

    def for_each_image(self, values: Tensor) -> Tensor:
        """What is given once for each label, as it is, since each image has a label of its own."""
        return values

    def inputs(self, pipe: "LabelledMixin", batch_size: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Pairs of labels and null labels, each of shape `(batch,)`, or multi-hot or weights `(batch, num_classes)`.

        Raises:
            ValueError: if there is no label, and the model has no null label.
        """
        labels = self.labels
        null = torch.full((batch_size,), pipe.null_label or 0, device=device)
        if labels is not None:
            labels = labels.to(device).expand(batch_size, *labels.shape[1:])
            if not labels.is_floating_point() and pipe.null_label is None:
                null = labels  # what the unconditional prediction leaves out is another condition
            elif labels.dtype == torch.bool:
                null = torch.zeros_like(labels)
            return {"class_labels": (labels, null)}
        if pipe.denoiser_num_classes is None:
            return {}
        if pipe.null_label is None:
            raise ValueError(f"class_labels must be given: the model has {pipe.num_classes} labels and no null label")
        return {"class_labels": (null, null)}

    def region_inputs(self, pipe: "LabelledMixin", batch_size: int, device: torch.device) -> list[dict[str, Tensor]]:
        """The labels of each region, as `inputs` has those of the images."""
        return [{"class_labels": label.to(device).expand(batch_size, *label.shape[1:])} for label in self.of_regions]

    def check(
        self,
        pipe: "LabelledMixin",
        guider: BaseGuidance | None,
        timesteps: Tensor,
        guide: Sequence[bool],
        *,
        led_elsewhere: bool = False,
    ) -> None:
        """Refuses labels that would do nothing, and a guider that the components or the labels do not suffice for.

        Args:
            guide: In which of the steps it acts.
            led_elsewhere: Whether there is another condition to guide to, such as an image.

        Raises:
            ValueError: with what is missing.
        """
        self._check_labels(pipe, guider, guide)
        if guider is None:
            return
        if hasattr(guider, "check_pipeline"):
            guider.check_pipeline(pipe, self.labels)
        if isinstance(guider, ComposedGuidance):
            return  # its weights say whether it needs the null label, and it has looked
        has_labels, has_null = pipe.denoiser_num_classes is not None, pipe.null_label is not None
        if led_elsewhere or has_null and self.labels is not None:
            return
        if not has_labels and isinstance(guider, AutoGuidance):
            return  # it weakens the network itself
        if not has_labels and isinstance(guider, ClassifierGuidance) and guider.guidance_scale == 0:
            return  # all predictions are unconditional
        if not asks_for_unconditional(guider, timesteps, guide):
            return
        if not has_null:
            reason = "has no null label (label_dropout was 0)" if has_labels else "was trained without labels"
            raise ValueError(
                f"guidance needs a model with labels and a null label; this one {reason}. What needs neither is a "
                "guidance_scale of 1, and to guide by a weaker network or a classifier"
            )
        raise ValueError("guidance needs class_labels to guide to, got None")

    def _check_labels(self, pipe: "LabelledMixin", guider: BaseGuidance | None, guide: Sequence[bool]) -> None:
        labels = self.labels
        if labels is None:
            return
        if self.weighted and not isinstance(guider, ComposedGuidance):
            raise ValueError(
                f"class_labels with weights are a guidance of their own, which goes with no {type(guider).__name__}; for "
                "this call give guider=ComposedGuidance()"
            )
        if self.weighted and not all(guide):
            raise ValueError(
                "guidance_interval must not be given with weights of labels: without them there is no label"
            )
        if labels.dtype == torch.bool and "num_classes" not in pipe.denoiser.config:
            raise ValueError(
                f"class_labels must be one label for each image for {type(pipe.denoiser).__name__}, got sets"
            )
        if pipe.denoiser_num_classes is None and not isinstance(guider, ClassifierGuidance):
            raise ValueError(
                "class_labels would do nothing: the denoiser takes none, and the pipeline's classifier is not asked; give "
                "classifier_scale, or leave class_labels out"
            )


def _as_sets(labels: Tensor, num_classes: int) -> Tensor:
    if labels.dtype == torch.bool:
        return labels
    return torch.nn.functional.one_hot(labels, num_classes + 1)[:, :num_classes].bool()  # none for the null label


def check_label_names(id2label: Mapping[Any, str] | None, num_classes: int | None) -> dict[str, str] | None:
    """Names of labels as they are saved: by the number of each as a text, as JSON has it.

    Args:
        id2label: From ids of labels to their names.
        num_classes: Of the pipeline; `None` for one without labels.

    Raises:
        ValueError: if there is a name for what is no label.
    """
    if id2label is None:
        return None
    names = {str(label): name for label, name in id2label.items()}
    if num_classes is None:
        return names
    known = {str(label) for label in range(num_classes)}
    if unknown := [label for label in names if label not in known]:
        some = ", ".join(map(repr, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(f"id2label must name labels from 0 to {len(known) - 1}, got names of {some}")
    return names


class LabelledMixin:
    """Labels by id and by name, for a pipeline with a `denoiser`, perhaps a `classifier`, and `id2label` in its config."""

    @property
    def denoiser_num_classes(self) -> int | None:
        """Number of labels that the denoiser knows, the null label not counted; `None` if it takes none."""
        return num_classes_of(self.denoiser)

    @property
    def num_classes(self) -> int | None:
        """The same, or the classifier's number of labels for a denoiser without."""
        classifier = getattr(self, "classifier", None)
        if self.denoiser_num_classes is None and classifier is not None:
            return num_classes_of(classifier)
        return self.denoiser_num_classes

    @property
    def null_label(self) -> int | None:
        """The label that stands for "no label", or `None` if the denoiser has none, or was not trained with it."""
        config = self.denoiser.config
        if config.get("num_class_embeds") is not None or not config.get("learned_unconditional", True):
            return None
        return num_classes_of(self.denoiser)

    @property
    def labels(self) -> dict[str, int]:
        """Ids of the labels by name; empty if the labels have no names."""
        return {name: int(label) for label, name in (self.config.id2label or {}).items()}

    def get_label_ids(self, class_labels: Labels) -> list[int]:
        """Ids of one or several labels, each given by id or by name.

        Raises:
            ValueError: for a label that the model does not have.
        """
        if isinstance(class_labels, Tensor):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence | np.ndarray):
            class_labels = [class_labels]
        if self.num_classes is None:
            raise ValueError("class_labels were given, but the model was trained without labels")
        return [self._label_id(label) for label in class_labels]

    def label_tensor(self, class_labels: Labels) -> Tensor:
        """Labels as a network or a guider takes them, of which the dtype says what they are.

        Args:
            class_labels: One for all images, or a sequence with one for each. Each is a label; or a list or set of
                labels that the image has all at once; or a dict from labels to the weights of their directions. An
                array or tensor `(images, num_classes)` of zeros and ones means sets too.

        Returns:
            int64, shape `(images,)`, labels; bool, shape `(images, num_classes)`, sets; or float32 of the same shape,
            weights.

        Raises:
            ValueError: for a label that the model does not have, or if the images have different kinds.
        """
        if isinstance(class_labels, Mapping | Set):
            class_labels = [class_labels]
        if isinstance(class_labels, Tensor | np.ndarray) and class_labels.ndim == 2:
            return self._multi_hot(torch.as_tensor(class_labels))
        is_sequence = isinstance(class_labels, list | tuple)
        if not (is_sequence and any(isinstance(each, Mapping | list | tuple | Set) for each in class_labels)):
            return torch.tensor(self.get_label_ids(class_labels), dtype=torch.int64)
        weighted = isinstance(class_labels[0], Mapping)
        if any(isinstance(each, Mapping) != weighted for each in class_labels):
            raise ValueError("class_labels must have weights for all images or for none")
        if self.num_classes is None:
            raise ValueError("class_labels were given, but the model was trained without labels")
        rows = torch.zeros(len(class_labels), self.num_classes)
        for row, labels in zip(rows, class_labels, strict=True):
            if not isinstance(labels, Mapping):
                members = labels if isinstance(labels, list | tuple | Set) else [labels]
                labels = dict.fromkeys(members, 1.0)
            for label, weight in labels.items():
                number = self._label_id(label)
                if not (isinstance(weight, Real) and math.isfinite(weight)):
                    raise ValueError(f"the weight of a label must be finite, got {weight!r} for {label!r}")
                if number != self.null_label:
                    row[number] += weight
        return rows if weighted else self._sets(rows.bool())

    def _sets(self, rows: Tensor) -> Tensor:
        if self.null_label is None and not rows.any(1).all():
            raise ValueError("class_labels must have at least one label for each image: the model has no null label")
        return rows

    def _multi_hot(self, class_labels: Tensor) -> Tensor:
        zeros_and_ones = ((class_labels == 0) | (class_labels == 1)).all()
        if class_labels.shape[1] != self.num_classes or not zeros_and_ones:
            raise ValueError(
                f"class_labels must be ids, or zeros and ones of shape (images, {self.num_classes}), got shape "
                f"{tuple(class_labels.shape)}" + ("" if zeros_and_ones else " of other numbers")
            )
        return self._sets(class_labels.bool())

    def _label_id(self, label: int | str) -> int:
        if isinstance(label, Tensor | np.ndarray) and label.ndim == 0:
            label = label.item()
        if isinstance(label, str):
            if label not in self.labels:
                raise ValueError(f"class_labels has no label named {label!r}; {self._names_like(label)}")
            same = [number for number, name in self.config.id2label.items() if name == label]
            if len(same) > 1:
                raise ValueError(
                    f"{label!r} is the name of the labels {', '.join(same)}: give the number of one of them"
                )
            return self.labels[label]
        if isinstance(label, bool) or not isinstance(label, int | np.integer):
            raise ValueError(f"class_labels must be ids or names, got {label!r}")
        last = self.num_classes - 1
        if not (0 <= label <= last or label == self.null_label):
            null = "" if self.null_label is None else f", or {self.null_label} for no label"
            named = (
                f"; the label named {str(label)!r} is asked for by name, as a text"
                if str(label) in self.labels
                else ""
            )
            raise ValueError(f"class_labels must be in [0, {last}]{null}, got {label}{named}")
        return int(label)

    def _names_like(self, label: str) -> str:
        """Which names there are, near ones if there are some."""
        names = list(self.labels)
        if not names:
            return "this model's labels have no names"
        near = difflib.get_close_matches(label, names, n=5, cutoff=0.4)
        if near:
            return f"near ones are {', '.join(map(repr, near))}"
        some = ", ".join(map(repr, names[:20])) + (f", ... ({len(names)} of them)" if len(names) > 20 else "")
        numbers = "numbers, as texts or as ids: " if all(name.isdecimal() for name in names) else ""
        return f"its labels are named {numbers}{some}"
