"""A run that begins with the network of a pipeline: its labels beside those of the data, and its size.

The pipeline's labels keep their ids, and labels of the data that it does not know come after them, so that what it could
make it still can be asked for. All else of the network is as it was, so that the run begins with what the pipeline does.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin, UNet2DModel
from torch import Tensor

from diffusers_ext.data.image_table import ImageData
from diffusers_ext.data.label_sets import first_names
from diffusers_ext.data.latent_cache import SampleSpace, fingerprint, load_vae
from diffusers_ext.data.sequences import in_scale_of
from diffusers_ext.data.stream import StreamData
from diffusers_ext.data.validation import renumbered
from diffusers_ext.models.dit import DiTModel
from diffusers_ext.models.unet import UNetModel
from diffusers_ext.recipes.pretrained import Pretrained, load_denoiser, read_pretrained


if TYPE_CHECKING:
    from diffusers_ext.recipes.denoising import DenoisingConfig

LABELS = "class_embedding.weight"  # ends the name of an embedding of labels, here and in diffusers


def joined_labels(source: Pretrained, id2label: dict[int, str]) -> dict[int, str]:
    """The names of a pipeline's labels and of those of the data, by the ids that they have in the run.

    They are matched by name; or by id if the pipeline's labels have no names, or those of the data are but their numbers
    and none of them is the name of a label of the pipeline.
    """
    count = source.num_classes or 0
    names = {label: (source.id2label or {}).get(label, str(label)) for label in range(count)}
    numbered = all(str(label) == name for label, name in id2label.items())
    if source.id2label is None or (numbered and not set(names.values()) & set(id2label.values())):
        own = id2label if source.id2label is None else names
        return {label: own.get(label, str(label)) for label in range(max(count, len(id2label)))}
    new = [name for name in id2label.values() if name not in names.values()]
    return names | {count + i: name for i, name in enumerate(new)}


def with_labels_of(config: "DenoisingConfig", data: ImageData | StreamData) -> ImageData | StreamData:
    """The data with labels by the ids that they have in the network of `pretrained_pipeline`, sequences in its scale, and a
    note on it.

    Raises:
        ValueError: if the network cannot take their labels, or needs labels that they do not have.
    """
    if config.pretrained_pipeline is None:
        return data
    source = read_pretrained(config.pretrained_pipeline)
    given, name = config.sequence_scale, source.name
    refusal = f"sequence_scale must be left out with --pretrained_pipeline {name}, which has a scale, got {given}"
    data = in_scale_of(source.config, data, given, refusal)
    notes = [source.describe()]
    if data.id2label is None or config.takes_texts:
        if not config.takes_texts and source.num_classes is not None and not source.has_null_label:
            raise ValueError(
                f"{data.name} must have labels for --pretrained_pipeline {source.name}, whose {source.denoiser_class} has no "
                "label that stands for none"
            )
        return dataclasses.replace(data, notes=(*notes, *data.notes))
    if not source.takes_labels:
        raise ValueError(
            f"the data must have no labels for --pretrained_pipeline {source.name}, a {source.denoiser_class}, which takes none: "
            "give --unconditional"
        )
    if data.has_label_sets and source.denoiser_class == UNet2DModel.__name__:
        raise ValueError(
            f"{data.name} must have one label an image for --pretrained_pipeline {source.name}, a UNet2DModel, got sets of "
            "labels; see --label_column"
        )
    joined = joined_labels(source, data.id2label)
    new = [joined[label] for label in range(source.num_classes or 0, len(joined))]
    notes.append(
        f"{source.num_classes or 0} labels are the pipeline's, {len(new)} are new"
        + (f": {first_names(new)}" if new else "")
    )
    if new and config.lora_rank is not None:
        raise ValueError(
            f"labels must be those of --pretrained_pipeline {source.name} with lora_rank, which trains no embeddings, got "
            f"the new {first_names(new)}: leave lora_rank out, or give --unconditional"
        )
    if joined != data.id2label:
        if isinstance(data, StreamData):
            raise ValueError(
                f"the labels of a stream must be those of --pretrained_pipeline {source.name}, all of them in its order, got "
                f"{first_names(data.id2label.values())}: give --label_names, or leave streaming out"
            )
        data = renumbered(data, joined, _numbers(data.id2label, joined))
    return dataclasses.replace(data, notes=(*notes, *data.notes))


def _numbers(id2label: dict[int, str], joined: dict[int, str]) -> list[int]:
    """The id in the run of each label of the data."""
    ids = {name: label for label, name in joined.items()}
    if all(name in ids for name in id2label.values()):
        return [ids[id2label[label]] for label in sorted(id2label)]
    return sorted(id2label)  # by id


def names_of_labels(config: "DenoisingConfig", data: ImageData | StreamData) -> dict[int, str] | None:
    """The names that a run saves with its pipeline: the data's, or those of the pipeline it begins with."""
    if data.id2label is None and config.pretrained_pipeline is not None:
        return read_pretrained(config.pretrained_pipeline).id2label
    return data.id2label


def pretrained_vae(config: "DenoisingConfig") -> ModelMixin | None:
    """The autoencoder that `vae` names, which is that of `pretrained_pipeline` if that has one.

    Raises:
        ValueError: if both are given and are not the same.
    """
    if config.vae is None:
        return None
    vae = load_vae(config.vae)
    name = config.pretrained_pipeline
    if name not in (None, config.vae) and fingerprint(load_vae(name)) != fingerprint(vae):
        raise ValueError(
            f"vae must be that of --pretrained_pipeline {name}, whose network knows no other latents, got {config.vae}: leave "
            "--vae out"
        )
    return vae


def load_network(
    config: "DenoisingConfig",
    space: SampleSpace,
    num_classes: int | None,
    *,
    learned_unconditional: bool,
    cross_attention_dim: int | None = None,
    pool_context: bool | None = None,
    condition_channels: int = 0,
    condition_level: bool = False,
    learned_without_image: bool = False,
) -> ModelMixin:
    """The network of `pretrained_pipeline` for these samples and labels.

    Args:
        space: Of the samples.
        num_classes: Of the run, the pipeline's labels included; `None` for data without labels.
        learned_unconditional: Whether any of the run's examples will be without label or text.
        cross_attention_dim, pool_context: Of the run's texts.
        condition_channels, condition_level, learned_without_image: Of its condition images, as networks have these options.

    Raises:
        ValueError: if samples, labels or texts are not what the network takes.
    """
    source = read_pretrained(config.pretrained_pipeline)
    network = load_denoiser(source)
    _check_samples(network, space, source)
    if cross_attention_dim not in (None, network.config.get("cross_attention_dim")):
        raise ValueError(
            f"pretrained_text_encoder must have hidden states of the width that --pretrained_pipeline {source.name} attends to, "
            f"{network.config.cross_attention_dim}, got {cross_attention_dim}"
        )
    if condition_channels != network.config.get("condition_channels", 0):
        raise ValueError(
            "the condition images must have as many channels for the network of --pretrained_pipeline "
            f"{source.name} as it was trained with, {network.config.get('condition_channels', 0)}, got {condition_channels}"
        )
    changes = _of_size(network, space.shape[1:], source) | {"dropout": config.dropout}
    if isinstance(network, UNet2DModel):
        if num_classes is not None and learned_unconditional:
            raise ValueError(
                f"label_dropout must be 0 with --pretrained_pipeline {source.name}, a UNet2DModel, which has no label that stands "
                "for none: give --label_dropout 0, or --unconditional"
            )
        changes["num_class_embeds"] = num_classes
    elif source.takes_labels:
        if condition_channels:
            changes["learned_without_image"] = learned_without_image or network.config.learned_without_image
        if config.lora_rank is not None and learned_unconditional and not source.has_null_label:
            raise ValueError(
                f"label_dropout and caption_dropout must be 0 with lora_rank and --pretrained_pipeline {source.name}, which was not "
                "trained without its condition: an adapter does not learn to embed none"
            )
        count = network.config.num_classes if num_classes is None else num_classes
        changes |= {
            "num_classes": count,
            "learned_unconditional": learned_unconditional or source.has_null_label,
        }
    return _rebuilt(network, changes)


def _check_samples(network: ModelMixin, space: SampleSpace, source: Pretrained) -> None:
    channels, dims = space.shape[0], network.config.get("dims", 2)
    if channels != network.config.in_channels:
        raise ValueError(
            f"the samples must have the {network.config.in_channels} channels that --pretrained_pipeline {source.name} takes, got "
            f"{channels}" + ("; see --image_mode" if space.vae is None else "")
        )
    if dims != len(space.shape) - 1:
        raise ValueError(
            f"the samples must have the {dims} dimensions that --pretrained_pipeline {source.name} takes, got "
            f"{len(space.shape) - 1}"
        )


def _of_size(network: ModelMixin, size: tuple[int, ...], source: Pretrained) -> dict[str, Any]:
    """The options of the network for samples of another size than it was trained on."""
    if tuple(size) == source.size:
        return {}
    if isinstance(network, DiTModel):
        sides = ["x".join(map(str, sides)) for sides in (source.size, size, source.resolution)]
        raise ValueError(
            f"the samples must have the size that --pretrained_pipeline {source.name} was trained on, {sides[0]}, since a "
            f"transformer knows the positions of no other grid, got {sides[1]}: give --resolution {sides[2].replace('x', ' ')}"
        )
    changes = {"sample_size": tuple(size)}
    if isinstance(network, UNetModel):
        # It has attention at maps by their side, and keeps it at the same maps, which now have other sides.
        levels = [level for level in range(len(network.config.block_out_channels)) if _attends(network, level)]
        changes["attention_resolutions"] = tuple(max(size) >> level for level in levels)
    return changes


def _attends(network: UNetModel, level: int) -> bool:
    return network.encoder[f"level{level}_block0"].attention is not None


def _rebuilt(network: ModelMixin, changes: dict[str, Any]) -> ModelMixin:
    """The same network with other options, and embeddings of labels for as many as these say."""
    rebuilt = type(network).from_config(dict(network.config) | changes)
    old, has_null = network.state_dict(), not isinstance(network, UNet2DModel)
    learned = has_null and network.config.get("learned_unconditional", True)
    weights = {
        name: _embeddings(old.get(name), value, has_null, learned) if name.endswith(LABELS) else old[name]
        for name, value in rebuilt.state_dict().items()
    }
    rebuilt.load_state_dict(weights)
    return rebuilt


def _embeddings(old: Tensor | None, like: Tensor, has_null: bool, learned_null: bool) -> Tensor:
    """Embeddings of labels: those that there were, and for each new one what stands for no label.

    Args:
        old: Shape `(labels, dim)`, or `(labels + 1, dim)` with that of the null label as the last; `None` for none, whose
            network begins as one that does not look at the label.
        like: Of the shape that is wanted.
        learned_null: Whether that of the null label was trained; if not, the mean of the others takes its part.
    """
    if old is None:
        return torch.zeros_like(like)
    labels, count = (old[:-1], len(like) - 1) if has_null else (old, len(like))
    neutral = old[-1:] if learned_null else labels.mean(0, keepdim=True)
    new = neutral.expand(count - len(labels), -1)
    return torch.cat([labels, new, neutral] if has_null else [labels, new])
