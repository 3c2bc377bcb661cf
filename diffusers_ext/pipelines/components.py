"""Components of a pipeline that must fit one another."""

from collections.abc import Sequence

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusers_ext.command_names import name_commands
from diffusers_ext.guidance.labels import num_classes_of
from diffusers_ext.guidance.texts import context_width, longest_text, width_of
from diffusers_ext.latents import check_one_level, image_channels
from diffusers_ext.models.statistics import DataStatisticsModel, check_statistics
from diffusers_ext.models.vae import VAEModel
from diffusers_ext.pipelines.stock import check_stock_denoiser
from diffusers_ext.value_scale import ValueScale


def check_components(
    denoiser: nn.Module,
    vae: nn.Module | None = None,
    classifier: nn.Module | None = None,
    weak_denoiser: nn.Module | None = None,
    statistics: DataStatisticsModel | None = None,
    with_texts: bool = False,
) -> None:
    """Refuses components that do not fit the denoiser, and a denoiser that is not called as the pipeline calls it.

    Raises:
        ValueError: with what differs.
    """
    components = {"denoiser": denoiser, "vae": vae, "classifier": classifier, "weak_denoiser": weak_denoiser}
    for name, network in components.items():
        _refuse_wrapped(name, network)
    check_stock_denoiser(denoiser, with_texts)
    in_channels, num_classes = denoiser.config.in_channels, num_classes_of(denoiser)
    if vae is not None:
        _check_vae(vae, denoiser)
    check_statistics(statistics, in_channels, _size(denoiser.config.sample_size, _dims(denoiser)), num_classes)
    if weak_denoiser is not None:
        check_stock_denoiser(weak_denoiser, with_texts, "weak_denoiser")
        for key in ("in_channels", "sample_size"):
            theirs, ours = weak_denoiser.config[key], denoiser.config[key]
            if _size(theirs, 2) != _size(ours, 2):
                raise ValueError(f"weak_denoiser must have the denoiser's {key}, {ours}, got {theirs}")
        if num_classes_of(weak_denoiser) not in (None, num_classes):
            raise ValueError(
                f"weak_denoiser must have no labels or the denoiser's {num_classes}, got {num_classes_of(weak_denoiser)}"
            )
        theirs, ours = (network.config.get("condition_channels", 0) for network in (weak_denoiser, denoiser))
        if theirs not in (0, ours):
            raise ValueError(f"weak_denoiser must have no condition_channels or the denoiser's {ours}, got {theirs}")
    if classifier is not None:
        if "out_channels" in classifier.config:
            raise ValueError(
                f"classifier must have logits of labels, as NoisyClassifierModel, got a {type(classifier).__name__}, which "
                "is a denoiser"
            )
        if classifier.config.in_channels != in_channels:
            raise ValueError(
                f"classifier must take the denoiser's {in_channels} channels, got {classifier.config.in_channels}"
            )
        _check_data_of(classifier, statistics)
        theirs, ours = (_size(network.config.sample_size, _dims(denoiser)) for network in (classifier, denoiser))
        if theirs != ours:
            raise ValueError(f"classifier must take the denoiser's size, {_text(ours)}, got {_text(theirs)}")
        if num_classes is not None and num_classes_of(classifier) != num_classes:
            raise ValueError(
                f"classifier must have the denoiser's {num_classes} labels, got {num_classes_of(classifier)}"
            )


def check_value_scale(value_scale: dict | None, denoiser: nn.Module, vae: nn.Module | None) -> None:
    """Refuses a scale of values that is none, or of other data.

    Raises:
        ValueError: saying so.
    """
    if value_scale is None:
        return
    scale = ValueScale.of_config(value_scale)
    if denoiser.config.get("dims", 2) != 1:
        raise ValueError("value_scale is of sequences, and the denoiser makes images: leave it out")
    channels = denoiser.config.in_channels if vae is None else image_channels(vae.config)
    if scale.channels != channels:
        raise ValueError(
            f"value_scale must have a shift and a scale for each of {channels} channels, got {scale.channels}"
        )


def check_text_components(
    denoiser: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    text_encoder: PreTrainedModel | None,
    vae: nn.Module | None,
    weak_denoiser: nn.Module | None,
    max_text_length: int | None,
    statistics: DataStatisticsModel | None = None,
) -> None:
    """Refuses components of a pipeline of texts that do not fit one another.

    Raises:
        ValueError: with what differs.
    """
    check_components(denoiser, vae, weak_denoiser=weak_denoiser, with_texts=True, statistics=statistics)
    _refuse_wrapped("text_encoder", text_encoder)
    width = context_width(denoiser)
    if width is None:
        raise ValueError(
            f"denoiser must have cross-attention to look at texts, got a {type(denoiser).__name__} with "
            "cross_attention_dim=None"
        )
    if (tokenizer is None) != (text_encoder is None):
        raise ValueError("tokenizer and text_encoder must be given together or not at all, got one of them")
    if text_encoder is None:
        if max_text_length is not None:
            raise ValueError(f"max_text_length has no meaning without a text_encoder, got {max_text_length}")
    else:
        if width_of(text_encoder) != width:
            raise ValueError(
                f"text_encoder must have hidden states of the denoiser's cross_attention_dim, {width}, got "
                f"{width_of(text_encoder)}"
            )
        longest_text(tokenizer, text_encoder, max_text_length)
    if weak_denoiser is not None and context_width(weak_denoiser) != width:
        raise ValueError(
            f"weak_denoiser must have the denoiser's cross_attention_dim, {width}, got {context_width(weak_denoiser)}"
        )


def _check_data_of(classifier: nn.Module, statistics: DataStatisticsModel | None) -> None:
    """Refuses a classifier that was trained on samples of another scale than the denoiser's."""
    theirs = classifier.config.get("data_statistics")
    ours = None if statistics is None else statistics.fingerprint()
    if theirs != ours:
        knows = {None: "none"}
        raise ValueError(
            name_commands(
                "classifier must be trained on samples of the denoiser's statistics, got one trained on those of "
                f"{knows.get(theirs, 'other data')} for a pipeline with {knows.get(ours, 'statistics')}: train it by "
                "training/train_classifier.py --pipeline"
            )
        )


def _refuse_wrapped(name: str, network: nn.Module | None) -> None:
    """Refuses what spreads a network over devices; a compiled network is one like any other."""
    if isinstance(network, DataParallel | DistributedDataParallel):
        raise ValueError(
            f"{name} must be the network itself, got it in a {type(network).__name__}: give its .module, or "
            "accelerator.unwrap_model of it. To sample on several devices, start a process with a pipeline for each"
        )


def _check_vae(vae: nn.Module, denoiser: nn.Module) -> None:
    check_one_level(vae)
    channels, config = denoiser.config.in_channels, vae.config
    if config.get("architecture") == "mlp":
        raise ValueError("vae must have latents with room for a denoiser, got a fully connected one, whose are flat")
    if config.latent_channels != channels:
        raise ValueError(
            f"vae must have latents of the denoiser's {channels} channels, got latent_channels={config.latent_channels}"
        )
    vae = getattr(vae, "_orig_mod", vae)  # of a compiled one
    if not isinstance(vae, VAEModel):
        return  # those of diffusers have a sample_size that says nothing of what they are used for
    got, expected = vae.latent_shape[1:], _size(denoiser.config.sample_size, _dims(denoiser))
    if got != expected:
        raise ValueError(
            f"vae must have latents of the denoiser's size, {_text(expected)}, got {_text(got)} for its images of "
            f"{_text(_size(config.sample_size, config.dims))}; if it is to decode images of another size than it was "
            "trained on, say so by vae.register_to_config(sample_size=...)"
        )


def _dims(denoiser: nn.Module) -> int:
    return denoiser.config.get("dims", 2)


def _size(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value)


def _text(size: tuple[int, ...]) -> str:
    return "x".join(map(str, size))


def check_clipped_noise(value: bool | str) -> bool | str:
    """A pipeline's `clip_guided_noise`, as it is.

    Raises:
        ValueError: if it is none.
    """
    if value not in (False, True, "always"):
        raise ValueError(f'clip_guided_noise must be False, True or "always", got {value!r}')
    return value
