"""Features of networks that were trained on other images: InceptionV3, DINOv2 and CLIP.

They measure images of any size and without labels. Only a Fréchet distance in the features of this InceptionV3 is the one
that is known as FID; each network has a scale of its own.
"""

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_ext.pixels import to_images


# The network of each name, where none is said after a colon.
DEFAULT_SOURCES = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14"}
PRETRAINED_FEATURES = ("inception", *DEFAULT_SOURCES)

# Mean and standard deviation of red, green and blue in [0, 1] that the networks were trained with, as their image
# processors' configs have them.
NORMALISATION = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class PretrainedFeatures(nn.Module):
    """A network that images are measured in, with the methods of a `FeatureClassifierModel` that an evaluator asks for.

    Args:
        name: What the user calls it, as in `--features`.
        network: From RGB images, uint8, shape `(batch, 3, height, width)`, to features and logits, or None for logits.
        feature_dim: Number of features of an image.
    """

    def __init__(self, name: str, network: nn.Module, feature_dim: int):
        super().__init__()
        self.name, self.network, self.feature_dim = name, network, feature_dim

    def fits(self, image_shape: Sequence[int]) -> bool:
        """Whether it takes images of this shape `(channels, height, width)`: of any size, with colour or without."""
        return image_shape[0] in (1, 3)

    def ids_among(self, label_names: Sequence[str]) -> Tensor:
        """No class of the network is a label of the data."""
        return torch.zeros(0, dtype=torch.int64)

    @torch.no_grad()
    def measure(self, images: Tensor, batch_size: int = 64) -> tuple[Tensor, Tensor | None]:
        """Features of 8-bit images, float32, shape `(number, feature_dim)`, on the CPU; and None for labels.

        Args:
            images: uint8, shape `(number, channels, height, width)`, of 1 channel or of 3.
            batch_size: Images at a time.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"images must be uint8 in [0, 255], got {images.dtype}")
        if not self.fits(images.shape[1:]):
            raise ValueError(f"features {self.name} are of images of 1 or 3 channels, got {images.shape[1]}")
        device = next(self.network.parameters()).device
        batches = [self.network(batch.to(device).expand(-1, 3, -1, -1)).cpu() for batch in images.split(batch_size)]
        return torch.cat(batches), None

    def logits(self, features: Tensor) -> Tensor | None:
        """The logits of the network's classes, where it has some."""
        return self.network.logits(features)


class _Inception(nn.Module):
    """The InceptionV3 that FID is defined by, with its own resizing to 299 pixels."""

    def __init__(self, extractor: nn.Module):
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> Tensor:
        return self.extractor(images)[0].float()

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor:
        # Without the bias, as the Inception score is computed.
        weight = self.extractor.fc.weight
        return F.linear(features.to(weight), weight).cpu()


class _Transformer(nn.Module):
    """The first token of a vision transformer: of the last layer, normalised (DINOv2), or projected (CLIP)."""

    def __init__(self, model: nn.Module, embed: Callable[[nn.Module, Tensor], Tensor], family: str):
        super().__init__()
        self.model, self.embed = model, embed
        for kind, values in zip(("mean", "std"), NORMALISATION[family], strict=True):
            self.register_buffer(kind, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        pixels = (to_images(images) + 1) / 2
        side = self.model.config.image_size
        size = (side, side) if isinstance(side, int) else tuple(side)
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.embed(self.model, (pixels - self.mean) / self.std).float()

    def logits(self, features: Tensor) -> None:
        return None


def is_pretrained(features: str) -> bool:
    """Whether `--features` names one of these networks rather than a folder."""
    return features.partition(":")[0] in PRETRAINED_FEATURES


def load_pretrained_features(features: str) -> PretrainedFeatures:
    """The network of a name.

    Args:
        features: "inception"; or "dinov2" or "clip", after a colon with a folder or a name on the Hub of transformers' model
            in the place of that of `DEFAULT_SOURCES`.

    Raises:
        ValueError: for another name, and where the package or the weights are not there, with what to do.
    """
    family, _, source = features.partition(":")
    if family == "inception":
        if source:
            raise ValueError(f"features inception are of one network, which takes no source, got {features}")
        return PretrainedFeatures(features, _Inception(_load_inception()), 2048)
    if family not in DEFAULT_SOURCES:
        raise ValueError(f"features must be a folder or one of {', '.join(PRETRAINED_FEATURES)}, got {features}")
    source = source or DEFAULT_SOURCES[family]
    model = _load_transformer(family, source)
    if family == "dinov2":
        return PretrainedFeatures(features, _Transformer(model, _dinov2_token, family), model.config.hidden_size)
    return PretrainedFeatures(features, _Transformer(model, _clip_embedding, family), model.config.projection_dim)


def _dinov2_token(model: nn.Module, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).pooler_output


def _clip_embedding(model: nn.Module, pixels: Tensor) -> Tensor:
    return model(pixel_values=pixels).image_embeds


def _load_transformer(family: str, source: str) -> nn.Module:
    from transformers import CLIPVisionModelWithProjection, Dinov2Model

    cls = {"dinov2": Dinov2Model, "clip": CLIPVisionModelWithProjection}[family]
    try:
        return cls.from_pretrained(source).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the weights of features {family} are not to be had from {source}: {first_line(error)}. Save a {cls.__name__} "
            f"of transformers in a folder and give --features {family}:FOLDER"
        ) from error


def _load_inception() -> nn.Module:
    package = import_of_extra(
        "torch_fidelity.feature_extractor_inceptionv3", "features inception need the package torch-fidelity", "fid"
    )
    try:
        return package.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    except OSError as error:
        raise ValueError(
            f"the weights of features inception could not be downloaded: {first_line(error)}. Put the file that torch-fidelity "
            f"names, weights-inception-2015-12-05-6726825d.pth, into {torch.hub.get_dir()}/checkpoints"
        ) from error


def import_of_extra(module: str, needs: str, extra: str) -> ModuleType:
    """A module of a package that comes with torchvision.

    Args:
        needs: The beginning of the sentence if it is not there.
        extra: Of this package, that brings it.

    Raises:
        ValueError: if it cannot be imported, with what to do.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that was built for another torch
        raise ValueError(
            f"{needs}, with a torchvision of the installed torch: pip install 'diffusers_ext[{extra}]' ({first_line(error)})"
        ) from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
