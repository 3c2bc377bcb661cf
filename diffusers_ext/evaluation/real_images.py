"""The real images that generated ones are measured against, prepared as the trainer prepares them."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
import yaml
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.data.captions import count_missing, refuse_missing
from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.identity import hash_weights
from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.label_columns import find_label_column
from diffusers_ext.data.latent_cache import read_info
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.data.sources import load_source, split_names
from diffusers_ext.evaluation.feature_training import LabelledImages, accuracy, drawn_order, fit_feature_classifier
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.options import check_options, option
from diffusers_ext.pixels import DEFAULT_WHITES, IMAGE_MODES, Whites, to_range


HELD_OUT_SPLITS = ("validation", "test", "valid", "val")

# PIL's mode of images of 1, 2, 3 and 4 channels.
CHANNEL_MODES = tuple(IMAGE_MODES)

# What a folder of a trained feature classifier tells about its training.
FEATURES_FILE = "features.json"

_HELP = {field.name: field.metadata["help"] for field in dataclasses.fields(DataConfig)}


@dataclass(frozen=True)
class DataOptions:
    """Those of `DataConfig` that say how images are prepared, and the held-out split. None leaves one open."""

    dataset_name: str | None = option(None, "digits, a data set on the Hub, or a local folder", "data")
    dataset_config_name: str | None = option(None, _HELP["dataset_config_name"])
    dataset_split: str | None = option(None, "split that the model was trained on; train if left open")
    held_out_split: str | None = option(
        None, f"split of images not trained on; by default the first there is of {', '.join(HELD_OUT_SPLITS)}"
    )
    image_column: str | None = option(None, _HELP["image_column"])
    label_column: str | None = option(None, "column of the labels; by default the class labels, if there are any")
    num_classes: int | None = option(None, _HELP["num_classes"])
    label_names: tuple[str, ...] | None = option(None, _HELP["label_names"])
    resolution: tuple[int, ...] | None = option(None, _HELP["resolution"])
    resize_mode: Literal["auto", "crop", "pad", "stretch"] | None = option(
        None, "how images get there, as in training; auto if left open"
    )
    pad_value: int | None = option(None, _HELP["pad_value"] + "; 0 if left open")
    image_mode: Literal["L", "LA", "RGB", "RGBA"] | None = option(None, _HELP["image_mode"])
    white_value: int | None = option(None, _HELP["white_value"])
    max_train_samples: int | None = option(
        None, "use only so many images of dataset_split, of each label its share, as the training did"
    )
    max_bad_share: float | None = option(None, _HELP["max_bad_share"] + "; 0.01 if left open")
    preprocessing_num_workers: int = option(1, _HELP["preprocessing_num_workers"])
    cache_dir: str | None = option(None, _HELP["cache_dir"])

    def __post_init__(self):
        check_options(self)
        to_data_config(self, self.dataset_split or "train")  # which checks them


@dataclass(frozen=True)
class RealImages:
    """A data set's images.

    Attributes:
        train: What the model was trained on. Where the data set has no labels, its `label_names` are empty.
        held_out: Images that it was not trained on, or None.
        name: What the user called the data set.
        resize_mode: How images get to their size, of the modes of `fit`.
        notes: What the user may want to know about the preparation.
        whites: Which values are white.
        white: What is white in the images' own range, which the value of a border is in.
        captions: Of the held-out images, or of the training images where those have none; None if not asked for.
    """

    train: LabelledImages
    held_out: LabelledImages | None
    name: str
    resize_mode: str
    notes: tuple[str, ...]
    captions: "Captions | None" = None
    whites: Whites = DEFAULT_WHITES
    white: int = 255

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(channels, height, width)`"""
        return tuple(self.train.images.shape[1:])

    @property
    def has_labels(self) -> bool:
        return len(self.train.label_names) > 0

    @property
    def can_be_classified(self) -> bool:
        """Whether there are images of at least two labels, which a classifier takes."""
        return self.has_labels and len(self.train.labels.unique()) > 1


@dataclass(frozen=True)
class Captions:
    """What the images of a split show, in words.

    Attributes:
        texts: One for each image.
        labels: Of the same images, int64, shape `(images,)`; None where there are no labels.
        column, split: Where the texts are from.
    """

    texts: tuple[str, ...]
    labels: torch.Tensor | None
    column: str
    split: str

    def draw(self, count: int, seed: int) -> tuple[list[str], torch.Tensor | None]:
        """So many texts and their labels: each text once in an order that the seed draws, then again in this order.

        It is the order in which `Evaluator.measure_held_out` takes the images.
        """
        order = drawn_order(len(self.texts), seed)
        rows = order.repeat(-(-count // len(order)))[:count]
        return [self.texts[row] for row in rows.tolist()], None if self.labels is None else self.labels[rows]


def load_real_images(
    options: DataOptions, caption_column: str | None = None, label_names: Sequence[str] | None = None
) -> RealImages:
    """Both splits of a data set, in memory.

    Args:
        caption_column: Read the captions of this column too. Free texts are then no labels, and neither are several labels
            an image.
        label_names: Of a model's labels 0, 1, 2, ..., by which the images' labels are numbered if all of them are among
            these.

    Raises:
        ValueError: see `prepare_images`; and if the held-out images have labels that the training images have not.
    """
    train_split, more = options.dataset_split or "train", {}
    if caption_column is not None:
        more["unconditional"] = not _has_labels_beside(options, train_split, caption_column)
        more["share_by"] = caption_column
    train = prepare_split(options, train_split, options.max_train_samples, **more)
    name = options.held_out_split or find_held_out_split(options)
    train_images = to_labelled_images(train)
    if label_names is not None and set(train_images.label_names) <= set(label_names):
        train_images = _numbered_by(label_names, train_images)
    real = RealImages(
        train_images,
        None,
        options.dataset_name,
        train.resize_mode,
        train.notes,
        whites=train.whites,
        white=train.white,
    )
    if name is not None:
        # Prepared like the training images, whatever its own pictures would suggest.
        prepared = dataclasses.replace(
            options,
            resolution=train.size,
            resize_mode=train.resize_mode,
            white_value=options.white_value or train.whites.integers,
        )
        held_out = prepare_split(prepared, name, **more)
        if held_out.channels != train.channels and train.channels <= len(CHANNEL_MODES):
            prepared = dataclasses.replace(prepared, image_mode=CHANNEL_MODES[train.channels - 1])
            held_out = prepare_split(prepared, name, **more)
        held_out_images = _with_labels_of(train_images, to_labelled_images(held_out), name)
        real = dataclasses.replace(real, held_out=held_out_images)
    if caption_column is None:
        return real

    captions = None
    if name is not None:
        captions = read_captions(options, name, caption_column, held_out, real.held_out)
    if captions is None:
        captions = read_captions(options, train_split, caption_column, train, train_images)
    if captions is None:
        raise ValueError(
            f"the split {train_split} of {options.dataset_name} has no text in the column {caption_column}"
        )
    note = f"images are asked for by the captions of the split {captions.split}, column {caption_column}"
    return dataclasses.replace(real, captions=captions, notes=(*real.notes, note))


def _has_labels_beside(options: DataOptions, split: str, caption_column: str) -> bool:
    if any(given is not None for given in (options.label_column, options.num_classes, options.label_names)):
        return True
    source = load_source(options.dataset_name, options.dataset_config_name, split, cache_dir=options.cache_dir)
    column = find_label_column(source)
    if column is None:
        return False
    feature = source.features[column]
    return isinstance(feature, datasets.ClassLabel) or isinstance(feature, datasets.Value) and column != caption_column


def read_captions(
    options: DataOptions, split: str, column: str, data: ImageData, images: LabelledImages
) -> Captions | None:
    """The captions of a split's images; None if it has none at all, and refused if it has some.

    Args:
        data: The images, which know their rows.
        images: The same, with the labels that they are measured by.
    """
    source = load_source(options.dataset_name, options.dataset_config_name, split, cache_dir=options.cache_dir)
    if column not in source.features or count_missing(source, column) == len(source):
        return None
    texts = source.select(data.rows)
    refuse_missing(texts, column, split)
    feature, values = texts.features[column], texts[column][:]
    if isinstance(feature, datasets.ClassLabel):
        values = [feature.names[value] for value in values]
    return Captions(tuple(map(str, values)), images.labels if images.label_names else None, column, split)


def _with_labels_of(train: LabelledImages, held_out: LabelledImages, split: str) -> LabelledImages:
    """The held-out images with the ids that the training images' labels have: one split may lack some of the names."""
    unknown = set(held_out.label_names) - set(train.label_names)
    if unknown or bool(train.label_names) != bool(held_out.label_names):
        raise ValueError(
            f"the split {split} must have the labels of the training images, {_names(train)}, got {_names(held_out)}:"
            " give another one by --held_out_split"
        )
    return _numbered_by(train.label_names, held_out)


def _numbered_by(label_names: Sequence[str], images: LabelledImages) -> LabelledImages:
    """The images with the ids that these names have."""
    if not images.label_names:
        return images
    ids = {name: label for label, name in enumerate(label_names)}
    numbers = torch.tensor([ids[name] for name in images.label_names])
    return LabelledImages(images.images, numbers[images.labels], list(label_names))


def prepare_split(
    options: DataOptions,
    split: str,
    max_samples: int | None = None,
    unconditional: bool = False,
    share_by: str | None = None,
) -> ImageData:
    """The images of one split, by the trainer's own preparation, which settles what is left open."""
    config = dataclasses.replace(to_data_config(options, split), max_train_samples=max_samples)
    if unconditional:
        config = dataclasses.replace(config, unconditional=True, num_classes=None, label_names=None)
    return prepare_images(config, share_by=share_by)


def to_data_config(options: DataOptions, split: str) -> DataConfig:
    """The options as the trainer has them."""
    names = [field.name for field in dataclasses.fields(DataConfig)]
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    return DataConfig(**given | {"dataset_split": split})


def find_held_out_split(options: DataOptions) -> str | None:
    """The split that holds images not trained on, or None."""
    used = [part.split("[")[0] for part in (options.dataset_split or "train").split("+")]
    names = split_names(options.dataset_name, options.dataset_config_name)
    return next((name for name in HELD_OUT_SPLITS if name in names and name not in used), None)


def to_labelled_images(data: ImageData) -> LabelledImages:
    """All images in memory, in 8 bits, channels first. Without labels, `label_names` are empty."""
    pixels = to_range(data.pixels[np.arange(len(data))], np.uint8)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    if data.labels is None:
        return LabelledImages(images, torch.full([len(images)], -1), [])
    names = [data.id2label[label] for label in range(len(data.id2label))]
    if data.has_label_sets:
        raise ValueError(
            f"{data.name} has several labels an image, and what is measured by label takes one: name a column of single "
            "labels with --label_column"
        )
    return LabelledImages(images, torch.from_numpy(data.labels), names)


def split_for_training(real: RealImages, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The images to train a classifier on, and others to test it on: the held-out split, or else a tenth."""
    if real.held_out is not None:
        return real.train, real.held_out
    order = drawn_order(len(real.train), seed)
    num_held_out = max(1, len(order) // 10)
    held_out, train = [
        LabelledImages(real.train.images[rows], real.train.labels[rows], real.train.label_names)
        for rows in (order[:num_held_out], order[num_held_out:])
    ]
    return train, held_out


def train_and_save_features(real: RealImages, folder: Path, **settings) -> dict:
    """Trains a feature classifier, saves it, and tells how well it reads images that it was not trained on.

    Args:
        real: The data set, with labels.
        folder: Where the model and `features.json` go.
        settings: Of `fit_feature_classifier`.

    Returns:
        What `features.json` holds: `dataset_name`, `num_train_images`, `num_held_out_images`, `held_out_accuracy`.
    """
    if not real.can_be_classified:
        raise ValueError(
            f"{real.name} has {_how_many_labels(real)}, and a feature classifier is trained on two or more: name a column of "
            "them with --label_column"
        )
    train, held_out = split_for_training(real, settings.get("seed", 0))
    model = fit_feature_classifier(train, **settings)
    about = {
        "dataset_name": real.name,
        "num_train_images": len(train),
        "num_held_out_images": len(held_out),
        "held_out_accuracy": accuracy(model, held_out),
    }
    if int(os.environ.get("RANK", 0)) == 0:
        # It goes first and comes last, so that a folder with this file is whole.
        Path(folder, FEATURES_FILE).unlink(missing_ok=True)
        model.save_pretrained(folder)
        with atomic_write(Path(folder, FEATURES_FILE)) as partial:
            partial.write_text(json.dumps(about, indent=2) + "\n")
    return about


def load_features(folder: str | Path) -> tuple[FeatureClassifierModel, dict]:
    """A saved feature classifier, and what its `features.json` tells.

    Raises:
        ValueError: if the folder is not one that `training/train_features.py` has made.
    """
    folder = Path(folder)
    if not (folder / FEATURES_FILE).is_file():
        raise ValueError(f"{folder} is no folder of a feature classifier: make one with training/train_features.py")
    return FeatureClassifierModel.from_pretrained(folder).eval(), json.loads((folder / FEATURES_FILE).read_text())


def cached_features_folder(real: RealImages) -> Path:
    """Where the default feature classifier of a data set is kept: named by the pixels and labels themselves."""
    content = hashlib.sha256(b"fit 2")  # raise the number when `fit_feature_classifier` changes its defaults
    train, held_out = split_for_training(real, seed=0)
    for part in (train, held_out):
        content.update(repr(tuple(part.images.shape)).encode())
        content.update(part.images.numpy().tobytes())
        content.update(part.labels.numpy().tobytes())
    shape = "x".join(map(str, real.image_shape))
    slug = Path(os.path.abspath(real.name)).name
    root = os.environ.get("DIFFUSERS_EXT_CACHE", os.path.join(HF_HOME, "diffusers_ext"))
    return Path(root, "features", f"{slug}-{shape}-{content.hexdigest()[:12]}")


def _how_many_labels(real: RealImages) -> str:
    return "images of only one label" if real.has_labels else "no labels"


def _names(data: LabelledImages) -> str:
    return ", ".join(data.label_names[:10]) or "none"


def features_for(
    real: RealImages, folder: str | Path | None, state: PartialState
) -> tuple[FeatureClassifierModel, dict] | tuple[None, None]:
    """The feature classifier to measure images of a data set in, and what is known of it.

    Args:
        folder: Of `training/train_features.py`; None for the one that is kept for this data set. It is trained if there
            is none yet.

    Returns:
        On the device of `state`; None twice for a data set without labels, where no folder is given.

    Raises:
        ValueError: if the classifier takes images of another shape.
    """

    def say(line: str):
        if state.is_main_process:
            print(line, flush=True)

    if folder is None and not real.can_be_classified:
        say(
            f"{real.name} has {_how_many_labels(real)} to train a feature classifier on, so only pixels are measured;"
            " --features takes a classifier trained on other images of this size"
        )
        return None, None
    given, folder = folder, Path(folder) if folder else cached_features_folder(real)
    if given is None and not (folder / FEATURES_FILE).is_file():
        say(f"training a feature classifier on {real.name}, kept in {folder}")
        train_and_save_features(real, folder)
        state.wait_for_everyone()
    model, about = load_features(folder)
    if model.image_shape != real.image_shape:
        raise ValueError(
            f"the feature classifier {folder} takes images of (channels, height, width) {model.image_shape}, but those"
            f" of {real.name} are {real.image_shape}: train one on them with training/train_features.py"
        )
    known = {"folder": str(folder), "dim": model.feature_dim, "sha256": hash_weights(model)}
    return model.to(state.device), known | about


def take_options_of_run(
    options: DataOptions, folder: str | Path, others: Sequence[str] = (), of_data: Sequence[str] = ()
) -> DataOptions:
    """The options with what was left open taken from the train_config.yaml of a training run, if there is one.

    Args:
        folder: Of the run.
        others: Names of options beside those of the data. They are taken for another data set too.
        of_data: Names of options of the data that are not among `DataOptions`.

    Raises:
        ValueError: if neither names a data set.
    """
    path = Path(folder, "train_config.yaml")
    saved = (yaml.safe_load(path.read_text()) or {}) if path.is_file() else {}
    if info := read_info(saved.get("dataset_name") or "").get(saved.get("dataset_split")):
        captioned = "caption_column" in saved
        saved |= dataclasses.asdict(info)  # of a run on latents: what is measured are the images that they are of
        if captioned:  # captions are kept as labels
            saved |= {"caption_column": info.label_column, "label_column": None}
    names = [*others, *of_data, *(field.name for field in dataclasses.fields(DataOptions))]
    if options.dataset_name not in (None, saved.get("dataset_name")):
        names = others  # another data set, prepared by options of its own
    left_open = [name for name in names if getattr(options, name) is None and saved.get(name) is not None]
    taken = {name: tuple(saved[name]) if isinstance(saved[name], list) else saved[name] for name in left_open}
    options = dataclasses.replace(options, **taken)
    if options.dataset_name is None:
        raise ValueError(f"{folder} has no train_config.yaml that names its data set: give --dataset_name")
    return options
