"""Networks of features on disk: trained for a data set, kept, and loaded to measure its images in their features."""

import hashlib
import json
import os
import time
from pathlib import Path

from accelerate import PartialState
from torch import Tensor, nn

from diffusers_ext.atomic_files import finish_replacing, replace_files
from diffusers_ext.command_names import name_commands
from diffusers_ext.data.identity import hash_weights
from diffusers_ext.evaluation.feature_training import accuracy, fit_feature_classifier
from diffusers_ext.evaluation.labelled_images import LabelledImages, drawn_order
from diffusers_ext.evaluation.pretrained_features import (
    PretrainedFeatures,
    is_pretrained,
    load_pretrained_features,
)
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.evaluation.self_supervised import fit_features_without_labels, share_found
from diffusers_ext.machine import own_cache
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.metrics.module_features import ModuleFeatures
from diffusers_ext.models.vae import VAEModel
from diffusers_ext.sizes import as_size
from diffusers_ext.untrusted import read_json
from diffusers_ext.value_scale import ValueScale


# Steps of `quick_features`, of which a few are timed first: at least and at most, by whether it is a classifier.
TIMED_STEPS = 4
QUICK_STEPS = {True: (200, 400), False: (100, 200)}
FEWEST_QUICK_IMAGES = 16  # of which variances and covariances are something to learn

# What a folder of a trained feature classifier says of its training.
FEATURES_FILE = "features.json"


def split_for_training(real: RealImages, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """The images to train a classifier on, and others to test it on: the held-out split, or else a tenth."""
    if real.held_out is not None:
        return real.train, real.held_out
    order = drawn_order(len(real.train), seed)
    num_held_out = max(1, len(order) // 10)
    return real.train.take(order[num_held_out:]), real.train.take(order[:num_held_out])


def train_and_save_features(real: RealImages, folder: Path, **settings) -> dict:
    """Trains a network of features, saves it, and measures it on images that it was not trained on.

    It is a classifier of the labels; where there are none, or all are the same, it is trained without.

    Args:
        real: The data set.
        folder: Where the model and `features.json` go.
        settings: Of `FeatureTraining`.

    Returns:
        What `features.json` holds: `dataset_name`, `num_train_images`, `num_held_out_images`, and `held_out_accuracy` of a
        classifier, or `held_out_share_found` of a network without classes, see `share_found`.
    """
    train, held_out = split_for_training(real, settings.get("seed", 0))
    if real.can_be_classified:
        model = fit_feature_classifier(train, **settings)
        measured = {"held_out_accuracy": accuracy(model, held_out)}
    else:
        model = fit_features_without_labels(train, **settings)
        measured = {"held_out_share_found": share_found(model, held_out)}
    about = {
        "dataset_name": real.name,
        "num_train_images": len(train),
        "num_held_out_images": len(held_out),
        **measured,
    }
    if settings.get("alone") or int(os.environ.get("RANK", 0)) == 0:

        def write(partial: Path):
            model.save_pretrained(partial)
            (partial / FEATURES_FILE).write_text(json.dumps(about, indent=2) + "\n")

        replace_files(Path(folder), FEATURES_FILE, write)
    return about


def quick_features(real: RealImages, seconds: float) -> tuple[FeatureClassifierModel, dict] | None:
    """A network of features that is trained in this time, and what is known of it; None if that is too short (docs/few_calls.md).

    A classifier where there are labels, else one without. The process that calls it trains it alone.

    Returns: the network, on the device of the process, with whether it is `by_label`, `num_steps` and `seconds`.
    """
    if len(real.train) < FEWEST_QUICK_IMAGES:
        return None
    by_label = real.can_be_classified
    fit = fit_feature_classifier if by_label else fit_features_without_labels
    fewest, most = QUICK_STEPS[by_label]
    start, settings = time.perf_counter(), {"show_progress": False, "alone": True}
    for _ in range(2):  # of which the second has no first calls of anything in it
        before = time.perf_counter()
        fit(real.train, num_steps=TIMED_STEPS, **settings)
    now = time.perf_counter()
    num_steps = int(min((seconds - (now - start)) / ((now - before) / TIMED_STEPS), most))
    if num_steps < fewest:
        return None
    model = fit(real.train, num_steps=num_steps, **settings)
    return model, {
        "by_label": by_label,
        "num_steps": num_steps,
        "seconds": round(time.perf_counter() - start, 1),
    }


def load_features(
    folder: str | Path, real: RealImages | None = None
) -> tuple[FeatureClassifierModel | ModuleFeatures, dict]:
    """A saved network of features, and the contents of its `features.json`; or the latents of a saved `VAEModel`.

    Args:
        real: The data that an autoencoder's latents are to be features of.

    Raises:
        ValueError: if the folder is not one that `training/train_features.py` or `training/train_vae.py` has made.
    """
    folder = Path(folder)
    finish_replacing(folder)
    if real is not None and (folder / "config.json").is_file() and not (folder / FEATURES_FILE).is_file():
        return latents_as_features(folder, real), {}
    if not (folder / FEATURES_FILE).is_file():
        raise ValueError(
            name_commands(f"{folder} is no folder of a feature classifier: make one with training/train_features.py")
        )
    return FeatureClassifierModel.from_pretrained(folder).eval(), read_json(folder / FEATURES_FILE)


def latents_as_features(folder: Path, real: RealImages) -> ModuleFeatures:
    """The posterior means of an autoencoder of data like these, flattened.

    Raises:
        ValueError: if the folder holds no `VAEModel` for them.
    """
    if read_json(folder / "config.json").get("_class_name") != VAEModel.__name__:
        raise ValueError(f"{folder} must hold a feature classifier or a VAEModel, whose latents are features")
    vae = VAEModel.from_pretrained(folder).eval()
    shape = (vae.config.in_channels, *as_size(vae.config.sample_size, vae.config.dims))
    return ModuleFeatures(_Means(vae), shape, ValueScale.of_config(vae.config.value_scale) or real.value_scale)


class _Means(nn.Module):
    def __init__(self, vae: VAEModel):
        super().__init__()
        self.vae = vae

    def forward(self, samples: Tensor) -> Tensor:
        return self.vae.encode(samples).latent_dist.mode().flatten(1)


def cached_features_folder(real: RealImages) -> Path:
    """Where the default features of a data set are kept: named by the pixels, the labels and their names."""
    # Raise the number when the training of either changes its defaults.
    content = hashlib.sha256(b"fit 2" if real.can_be_classified else b"fit without labels 1")
    train, held_out = split_for_training(real, seed=0)
    for part in (train, held_out):
        content.update(repr(tuple(part.images.shape)).encode())
        content.update(part.images.contiguous().numpy())  # as they lie in memory, of which a copy may be large
        content.update(part.labels.contiguous().numpy())
    content.update(repr(real.train.label_names).encode())
    if real.value_scale is not None:
        content.update(repr(real.value_scale).encode())
    shape = "x".join(map(str, real.image_shape))
    slug = Path(os.path.abspath(real.name)).name
    return own_cache() / "features" / f"{slug}-{shape}-{content.hexdigest()[:12]}"


def measuring_features(
    real: RealImages, features: str | Path | None, state: PartialState
) -> tuple[FeatureClassifierModel | ModuleFeatures | PretrainedFeatures, dict] | tuple[None, None]:
    """What to measure images of a data set in: a network of a name, or one of the data as of `features_for`.

    Args:
        features: A name of `load_pretrained_features`, or what `features_for` takes.

    Raises:
        ValueError: see both; and for a network that does not take such images.
    """
    if features is None or Path(features).is_dir() or not is_pretrained(str(features)):
        return features_for(real, features, state, advice="; --features none does without")
    with state.main_process_first():
        network = load_pretrained_features(str(features))
    if not network.fits(real.image_shape):
        raise ValueError(
            f"features {features} are of images of 1 or 3 channels, and {real.name} has {real.image_shape[0]}"
        )
    known = {"name": str(features), "dim": network.feature_dim, "sha256": hash_weights(network)}
    return network.to(state.device), known


def features_for(
    real: RealImages, folder: str | Path | None, state: PartialState, advice: str = ""
) -> tuple[FeatureClassifierModel | ModuleFeatures, dict] | tuple[None, None]:
    """The network to measure images of a data set in, on the device of `state`, and what is known of it.

    Args:
        folder: Of `training/train_features.py`, or of an autoencoder; None for the features that are kept for this data set.
            They are trained if there are none yet: by the labels, or without where there are no two. "none" for no features.
        advice: Ends the line that says that they are trained.

    Returns:
        None twice for "none".

    Raises:
        ValueError: if the network takes images of another shape.
    """
    if folder == "none":
        return None, None
    given, folder = folder, Path(folder) if folder else cached_features_folder(real)
    if given is None and not (folder / FEATURES_FILE).is_file():
        what = (
            "a feature classifier on" if real.can_be_classified else f"features without labels on {_how_many(real)} of"
        )
        state.print(f"training {what} {real.name}, once, kept in {folder}{advice}", flush=True)
        train_and_save_features(real, folder)
        state.wait_for_everyone()
    model, about = load_features(folder, real)
    if model.image_shape != real.image_shape:
        raise ValueError(
            name_commands(
                f"the features of {folder} are of images of (channels, height, width), or sequences of (channels, length), "
                f"{model.image_shape}, but those of {real.name} are {real.image_shape}: train a network on them with "
                "training/train_features.py"
            )
        )
    known = {"folder": str(folder), "dim": model.feature_dim, "sha256": hash_weights(model)}
    return model.to(state.device), known | about


def _how_many(real: RealImages) -> str:
    return "the images of only one label" if real.has_labels else "the images"
