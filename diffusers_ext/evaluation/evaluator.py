"""All measures of a set of images against a data set, as `training/evaluate.py` prints them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_ext.command_names import name_commands
from diffusers_ext.evaluation.labelled_images import LabelledImages, drawn_order
from diffusers_ext.evaluation.pretrained_features import PretrainedFeatures
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.metrics.classes import classifier_score
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.metrics.frechet import FeatureStatistics, extrapolated_frechet_distance, frechet_distance
from diffusers_ext.metrics.kernel import kernel_distance
from diffusers_ext.metrics.module_features import ModuleFeatures
from diffusers_ext.metrics.neighbours import PrecisionRecall, density_coverage, nearest_distances, precision_recall
from diffusers_ext.metrics.shares import share_difference


# Below this probability of a chi-squared test, labels are taken to be in other proportions than the training images'.
SAME_PROPORTIONS = 1e-3


@dataclass
class Evaluator:
    """Measures sets of images against the real images `train`.

    Images with labels that are in other proportions than those of the real ones, such as equally many of each class of a
    data set of unequal classes, are compared with real ones weighted to the same proportions: the difference would
    otherwise hide all others in the Fréchet distance.

    Args:
        train: The images that a generator was trained on.
        features: A classifier of such images, a network of `load_pretrained_features`, or any module in a `ModuleFeatures`; None
            for no measure in features.
        num_reference: Real images that precision and recall compare with, drawn by `seed`; at most all of them. The
            paper compares sets of equal size.
        num_neighbours: The k of precision and recall.
        in_pixels: Measure precision, recall and distances to the nearest training image in pixels too; of sequences, in
            their values.
        svc: A fitted classifier with scikit-learn's `predict`, of flattened pixels in [0, 1] (see `fit_svc`), or None.
        extrapolate: Estimate the Fréchet distance of infinitely many images too, from more than twice as many as features.
        seed: Of the draw of the reference.
        train_features: Of the real images, as `reference_features` keeps them; measured if None.
    """

    train: LabelledImages
    features: FeatureClassifierModel | PretrainedFeatures | ModuleFeatures | None = None
    num_reference: int = 1000
    num_neighbours: int = 5
    in_pixels: bool = True
    svc: object | None = None
    extrapolate: bool = False
    seed: int = 0
    train_features: Tensor | None = None

    def __post_init__(self):
        for name in ("num_reference", "num_neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.train) <= self.num_neighbours:
            raise ValueError(
                f"num_neighbours must be smaller than the number of training images, {len(self.train)}, since precision "
                f"and recall look at that number of other images around each, got {self.num_neighbours}"
            )
        shape = tuple(self.train.images.shape[1:])
        if self.features is not None and not self.features.fits(shape):
            raise ValueError(
                name_commands(
                    f"the features are not of images of (channels, height, width) {shape}, as those of the data set are: train a "
                    "feature classifier on them with training/train_features.py"
                )
            )
        self._reference = drawn_order(len(self.train), self.seed)[: self.num_reference]
        if self.features is not None:
            given = self.train_features
            self._features = self.features.measure(self.train.images)[0] if given is None else given
            self._statistics = FeatureStatistics(self.features.feature_dim).update(self._features)

    def measure(self, images: Tensor, labels: Tensor | None = None) -> dict[str, float | int]:
        """Every measure of these images.

        Args:
            images: uint8, or of sequences float32 in own units; of the shape of the real ones.
            labels: The label asked for each image, if any was.

        Returns:
            `num_images`; in features: `frechet_distance` from all real images, `extrapolated_frechet_distance` where asked for,
            `feature_precision`, `feature_recall`, `density`, `coverage`, `kernel_distance` and its standard error
            `kernel_distance_error` from the reference, `classifier_score` of the network's classes, if it has some,
            `label_accuracy` (share of the images to which the feature classifier gives the label asked for, compared by
            name), if it knows the labels of the real images; then also `label_share_distance`, the total variation between the
            shares of the labels that it gives to these images and to the real ones, of these proportions, and
            `label_shares_differ`, whether it is more than chance makes of one distribution;
            `reference_weighted`, True where the real images were weighted to the labels' proportions, see the class;
            in pixels: `pixel_precision`, `pixel_recall`, `nearest_train_distance` (median Euclidean distance to the
            nearest training image, pixels in [0, 1]), `svc_label_accuracy`. Those that do not apply are left out. Of
            sequences the first two are `value_precision` and `value_recall`, of values that are in [0, 1] by `value_scale`.

        Raises:
            ValueError: if the images have another shape than the real ones, or are too few for `num_neighbours`.
        """
        shape, real_shape = tuple(images.shape[1:]), tuple(self.train.images.shape[1:])
        if shape != real_shape:
            raise ValueError(
                f"the images are {shape} (channels, height, width) but those of the data set are {real_shape}:"
                " give the resolution and the preparation that the pipeline was trained with"
            )
        check_number(len(images), self.num_neighbours)
        weights = self.weights_for(labels)
        result: dict[str, float | int] = {"num_images": len(images)}
        if weights is not None:
            result["reference_weighted"] = True
        if self.features is not None:
            result |= self._measure_in_features(images, labels, weights)
        if self.in_pixels:
            result |= self._measure_in_pixels(images, weights)
        if self.svc is not None and labels is not None:
            predicted = torch.as_tensor(self.svc.predict(self.train.flat(images).numpy()))
            result["svc_label_accuracy"] = _share_equal(predicted, labels)
        return result

    def _measure_in_features(self, images: Tensor, labels: Tensor | None, weights: Tensor | None) -> dict[str, float]:
        features, classes = self.features.measure(images)
        real = self._statistics if weights is None else FeatureStatistics.of_weighted(self._features, weights)
        distance = frechet_distance(real, FeatureStatistics(self.features.feature_dim).update(features))
        result = {"frechet_distance": distance}
        if self.extrapolate and len(features) > 2 * self.features.feature_dim:
            result["extrapolated_frechet_distance"] = extrapolated_frechet_distance(real, features, seed=self.seed)
        result["feature_precision"], result["feature_recall"] = self._precision_recall(
            self._features, features, weights
        )
        reference = self._features[self._reference]
        of_reference = None if weights is None else weights[self._reference]
        result["density"], result["coverage"] = density_coverage(
            reference, features, self.num_neighbours, of_reference
        )
        if min(len(features), len(reference) if weights is None else int((of_reference > 0).sum())) >= 4:
            result["kernel_distance"], result["kernel_distance_error"] = kernel_distance(
                reference, features, real_weights=of_reference
            )
        logits = self.features.logits(features)
        if logits is not None:
            result["classifier_score"] = classifier_score(logits)
        if knows_labels(self.features, self.train):
            result |= self._compare_shares(classes, weights)
            if labels is not None:
                ids = self.features.ids_among(self.train.label_names)
                result["label_accuracy"] = _share_equal(ids[classes], labels)
        return result

    def _compare_shares(self, classes: Tensor, weights: Tensor | None) -> dict[str, float | bool]:
        """How the classes that these images show are shared out, beside those that the real images show to the same network."""
        logits = self.features.logits(self._features)
        real = torch.zeros(logits.shape[1], dtype=torch.float64)
        each = (
            torch.ones(len(logits)) if weights is None else weights / weights.square().sum()
        )  # sum: what they are worth
        real.index_add_(0, logits.argmax(1), each.double())
        difference = share_difference(torch.bincount(classes, minlength=len(real)), real)
        return {
            "label_share_distance": difference.distance,
            "label_shares_differ": difference.p_value < SAME_PROPORTIONS,
        }

    def _measure_in_pixels(self, images: Tensor, weights: Tensor | None) -> dict[str, float]:
        pixels, real = self.train.flat(images), self.train.flat(self.train.images)
        what = "pixel" if self.train.value_scale is None else "value"
        precision, recall = self._precision_recall(real, pixels, weights)
        distance = nearest_distances(pixels, real).median().item()
        return {f"{what}_precision": precision, f"{what}_recall": recall, "nearest_train_distance": distance}

    def _precision_recall(self, real: Tensor, points: Tensor, weights: Tensor | None) -> PrecisionRecall:
        reference = self._reference
        return precision_recall(
            real[reference], points, self.num_neighbours, None if weights is None else weights[reference]
        )

    def weights_for(self, labels: Tensor | None) -> Tensor | None:
        """Weights by which the real images have the proportions of these labels, shape `(real images,)`, sum 1.

        Returns:
            None where they have them already, to within chance; where there are no labels; and where a label has no real
            image that could be weighted.
        """
        if labels is None or not self.train.label_names or len(labels) == 0:
            return None
        num_labels = len(self.train.label_names)
        theirs, ours = (torch.bincount(each, minlength=num_labels).double() for each in (labels, self.train.labels))
        there = ours > 0
        if theirs[~there].any() or there.sum() < 2:
            return None
        expected = ours[there] * (len(labels) / len(self.train))
        statistic = ((theirs[there] - expected).square() / expected).sum()
        # The upper tail of the chi-squared distribution.
        if torch.special.gammaincc((there.sum() - 1) / 2, statistic / 2) >= SAME_PROPORTIONS:
            return None
        weights = torch.where(there, theirs / ours.clamp(min=1), 0.0)[self.train.labels]
        # Of too few real images there is no covariance, and no recall of none.
        if (weights > 0).sum() < 2 or not weights[self._reference].any():
            return None
        return weights / weights.sum()

    def measure_held_out(self, held_out: LabelledImages, number: int) -> dict[str, float | int]:
        """The same of at most `number` real images that no model has seen, drawn by the seed: the best there is."""
        order = drawn_order(len(held_out), self.seed)[:number]
        return self.measure(held_out.images[order], held_out.labels[order] if held_out.label_names else None)


def check_number(num_images: int, num_neighbours: int, name: str = "num_images") -> None:
    """Refuses sets of images that are too small to be measured.

    Args:
        name: Of the number, for the user.

    Raises:
        ValueError: saying how many are needed.
    """
    if num_images <= num_neighbours:
        raise ValueError(
            f"{name} must be at least {num_neighbours + 1}, got {num_images}: precision and recall look at the "
            f"{num_neighbours} nearest other images around each (num_neighbours)"
        )


def can_measure_held_out(real: RealImages, num_neighbours: int) -> bool:
    """Whether there are enough images that a generator was not trained on."""
    return real.held_out is not None and len(real.held_out) > num_neighbours


def knows_labels(features: FeatureClassifierModel | PretrainedFeatures, train: LabelledImages) -> bool:
    """Whether a feature classifier has a class for each label that these images have, by name."""
    if not train.label_names:
        return False
    return set(train.labels.unique().tolist()) <= set(features.ids_among(train.label_names).tolist())


def describe_left_out(
    real: RealImages, features: FeatureClassifierModel | PretrainedFeatures | None, num_neighbours: int
) -> list[str]:
    """Which measures are left out for want of images or labels, in lines."""
    lines = []
    if real.held_out is None:
        lines.append(
            f"{real.name} has no split of images that were not trained on, so no real ones are measured beside the "
            "generated ones: name one by --held_out_split"
        )
    elif not can_measure_held_out(real, num_neighbours):
        lines.append(
            f"the held-out split of {real.name} is not measured beside the generated images: precision and recall take more "
            f"images than num_neighbours, {num_neighbours}, got {len(real.held_out)}"
        )
    if isinstance(features, FeatureClassifierModel) and real.has_labels and not knows_labels(features, real.train):
        lines.append(
            f"the feature classifier does not know the labels of {real.name} by their names, so label_accuracy is left out"
        )
    return lines


def fit_svc(train: LabelledImages):
    """scikit-learn's support vector classifier with an RBF kernel, on pixels in [0, 1].

    C = 10 for the default of 1: it reads held-out digits better.
    """
    from sklearn.svm import SVC

    return SVC(kernel="rbf", C=10).fit(train.flat(train.images).numpy(), train.labels.numpy())


def format_table(columns: dict[str, dict[str, float | int]], spread: dict[str, dict[str, float]] | None = None) -> str:
    """Measures as lines and sets of images as columns, for people.

    Args:
        spread: Standard deviations of the measures of some columns.
    """
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    cells = {
        title: [_format(column.get(name), (spread or {}).get(title, {}).get(name)) for name in names]
        for title, column in columns.items()
    }
    width, widths = (
        max(map(len, names)),
        {title: max(18, *(len(cell) + 2 for cell in cells[title])) for title in columns},
    )
    lines = [" " * width + "".join(f"{title:>{widths[title]}}" for title in columns)]
    for row, name in enumerate(names):
        lines.append(f"{name:<{width}}" + "".join(f"{cells[title][row]:>{widths[title]}}" for title in columns))
    return "\n".join(lines)


def _format(value: float | int | None, spread: float | None = None) -> str:
    if value is None or isinstance(value, float) and math.isnan(value):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" + ("" if spread is None else f" ± {spread:.2g}")


def _share_equal(a: Tensor, b: Tensor) -> float:
    return (a == b).double().mean().item()
