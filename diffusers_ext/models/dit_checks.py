"""What `DiTModel` refuses: options that do not fit one another, and inputs that do not fit the options."""

from torch import Tensor

from diffusers_ext.models.image_condition import check_condition_options
from diffusers_ext.models.network import check_conditions, check_num_classes, check_shape


PATCH_SIZES = range(1, 9)
HALVED_PATCH_SIZES = (1, 2, 4, 8)  # that strided convolutions reach

# The null label of diffusers' `DiTPipeline`, whatever the number of labels is.
NULL_LABEL_OF_DIFFUSERS = 1000


def check_size(size, patch_size: int) -> None:
    """Refuses samples that cannot be cut into patches."""
    if any(side < patch_size or side % patch_size for side in size):
        raise ValueError(
            f"each side of the sample must be a multiple of patch_size ({patch_size}), got {' x '.join(map(str, size))}"
        )


def check_options(config) -> None:
    """Refuses the options of a network that cannot be.

    Raises:
        ValueError: with the option.
    """
    counts = ("in_channels", "out_channels", "hidden_size", "num_layers", "num_attention_heads")
    if min(config[name] for name in counts) < 1:
        raise ValueError(
            f"{', '.join(counts[:-1])} and {counts[-1]} must be at least 1, got "
            f"{', '.join(str(config[name]) for name in counts)}"
        )
    if config.patch_size not in PATCH_SIZES:
        raise ValueError(f"patch_size must be in [{PATCH_SIZES[0]}, {PATCH_SIZES[-1]}], got {config.patch_size}")
    if config.hidden_size % config.num_attention_heads or config.hidden_size % 4:
        raise ValueError(
            f"hidden_size must be a multiple of num_attention_heads ({config.num_attention_heads}) and of 4, got "
            f"{config.hidden_size}"
        )
    if config.hidden_size * config.mlp_ratio < 1 or config.num_registers < 0:
        raise ValueError(
            "mlp_ratio must be positive and num_registers not negative, got "
            f"{config.mlp_ratio:g} and {config.num_registers}"
        )
    _check_parts(config)
    check_num_classes(config.num_classes)
    check_condition_options(config.condition_channels, config.condition_level)


def _check_parts(config) -> None:
    head_dim = config.hidden_size // config.num_attention_heads
    if config.position_embedding == "rope" and head_dim % 4:
        raise ValueError(
            "position_embedding rope needs attention heads of a multiple of 4 features, for pairs of them in two axes, got "
            f"hidden_size {config.hidden_size} in {config.num_attention_heads} heads, {head_dim} features each"
        )
    if config.patch_embedding == "conv" and config.patch_size not in HALVED_PATCH_SIZES:
        raise ValueError(
            f"patch_embedding conv halves the sides, so that patch_size must be one of "
            f"{', '.join(map(str, HALVED_PATCH_SIZES))}, got {config.patch_size}"
        )
    if config.value_residual and config.num_layers < 2:
        raise ValueError(
            "value_residual takes the first block's values into the later ones, so that num_layers must be at least 2, got "
            f"{config.num_layers}"
        )
    layer = config.internal_guidance_layer
    if layer is not None and not 1 <= layer < config.num_layers:
        raise ValueError(
            "internal_guidance_layer must be the number of blocks before the output of a middle layer, in [1, num_layers - 1], "
            f"got {layer} of {config.num_layers}"
        )
    if config.long_skips and config.num_layers < 3:
        raise ValueError(
            "long_skips join the first blocks to the last over at least one between them, so that num_layers must be at "
            f"least 3, got {config.num_layers}"
        )


def check_inputs(config, sample: Tensor, class_labels: Tensor | None, context: Tensor | None) -> Tensor | None:
    """The labels as the embedding knows them, of a call whose inputs fit.

    Raises:
        ValueError: if one does not.
    """
    check_shape(sample, config.in_channels)
    check_size(sample.shape[2:], config.patch_size)
    by_id = class_labels is not None and class_labels.ndim == 1
    if by_id and config.num_classes is not None and config.num_classes < NULL_LABEL_OF_DIFFUSERS:
        class_labels = class_labels.masked_fill(class_labels == NULL_LABEL_OF_DIFFUSERS, config.num_classes)
    check_conditions(config, sample, class_labels, context)
    return class_labels
