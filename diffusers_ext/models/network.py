"""The base of the networks: recomputed activations, compilation by block, and the conditions that a network takes."""

import functools
import inspect

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from diffusers_ext.diffusion.tables import is_readable
from diffusers_ext.sizes import one_if_equal
from diffusers_ext.untrusted import check_config


# A block is compiled anew for training and for sampling, and for a few sizes of batch or sample.
COMPILATIONS_PER_BLOCK = 4


class Network(AttentionMixin, ModelMixin, PeftAdapterMixin, ConfigMixin):
    """A model of diffusers that can recompute its activations, be compiled block by block, and take adapters of peft.

    Its attention can be another (`set_attn_processor`).
    """

    _supports_gradient_checkpointing = True
    gradient_checkpointing = False

    def __init__(self):
        super().__init__()
        check_config(self.config, type(self).__init__, finite=True)  # a saved one may be anybody's
        if isinstance(size := self.config.get("sample_size"), list | tuple):
            self.register_to_config(sample_size=one_if_equal(size))

    def run(self, module: nn.Module, *args) -> Tensor:
        """Calls a module of the network; with gradient checkpointing, its activations are recomputed in backward."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(module, *args)
        return module(*args)

    @functools.wraps(
        ModelMixin.save_pretrained
    )  # whose signature pipelines look into for the options that they hand on
    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves the weights and the config, as `diffusers.ModelMixin.save_pretrained`.

        Raises:
            ValueError: if there is an adapter in the network, whose layers no network would load.
        """
        if getattr(self, "peft_config", None):
            raise ValueError(
                f"a {type(self).__name__} with adapters ({', '.join(self.peft_config)}) cannot be saved as it is: save the "
                "adapter by save_lora_adapter, or put it into the weights by fuse_lora() and unload_lora()"
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """The arguments of `__init__` among those of a config, which may also name the code that is saved with it."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def compile_repeated_blocks(self, *args, **kwargs) -> None:
        """Compiles each block by itself (regional compilation of diffusers), in less time than all of the network takes.

        Blocks of other widths, resolutions or layers need code of their own, and PyTorch gives up after 8 by default: it
        then runs the rest uncompiled, or raises with `fullgraph=True`. Here the limit grows with the number of blocks,
        in versions of PyTorch in which `torch.compile` has one.

        Args:
            args, kwargs: For `torch.compile`.
        """
        if "recompile_limit" in inspect.signature(torch.compile).parameters:
            blocks = [module for module in self.modules() if type(module).__name__ in self._repeated_blocks]
            kwargs.setdefault("recompile_limit", COMPILATIONS_PER_BLOCK * len(blocks))
        super().compile_repeated_blocks(*args, **kwargs)


def check_shape(sample: Tensor, channels: int, dims: int = 2, name: str = "sample") -> None:
    """Refuses a sample that is not of shape `(batch, channels, *spatial)` with `dims` spatial axes.

    Raises:
        ValueError: with the shape that it must have; `name` is that of the sample.
    """
    if sample.ndim != dims + 2 or sample.shape[1] != channels:
        spatial = "height, width" if dims == 2 else "length"
        raise ValueError(f"{name} must have shape (batch, {channels}, {spatial}), got {tuple(sample.shape)}")


def check_conditions(config, sample: Tensor, class_labels: Tensor | None, context: Tensor | None) -> None:
    """Refuses labels and contexts that a denoiser was not built for, and their absence where it needs them.

    Args:
        config: Of the denoiser, with `num_classes`, `learned_unconditional` and `cross_attention_dim`.
        sample, class_labels, context: As in the denoiser's `forward`.

    Raises:
        ValueError: if one is missing, given without need, of another shape, or out of range.
    """
    if (context is None) != (config.cross_attention_dim is None):
        raise ValueError(
            "encoder_hidden_states must be given exactly if the model has cross-attention, got "
            f"{'none' if context is None else tuple(context.shape)} for cross_attention_dim={config.cross_attention_dim}"
        )
    if context is not None and (context.ndim != 3 or context.shape[::2] != (len(sample), config.cross_attention_dim)):
        raise ValueError(
            f"encoder_hidden_states must have shape ({len(sample)}, tokens, {config.cross_attention_dim}), got "
            f"{tuple(context.shape)}"
        )
    if class_labels is not None:
        if config.num_classes is None:
            raise ValueError("class_labels were given to a model without labels: it was built with num_classes=None")
        _check_labels(class_labels, len(sample), config.num_classes, config.learned_unconditional)
    elif config.num_classes is not None and not config.learned_unconditional:
        raise ValueError(
            "class_labels must be given: the model has no null label, since it was trained with a label on each image"
        )


def _check_labels(class_labels: Tensor, batch_size: int, num_classes: int, has_null: bool) -> None:
    is_sets = class_labels.ndim == 2
    if class_labels.shape != ((batch_size, num_classes) if is_sets else (batch_size,)):
        raise ValueError(
            f"class_labels must be one for each of the {batch_size} samples, or sets of labels of shape "
            f"({batch_size}, {num_classes}), got {tuple(class_labels.shape)}"
        )
    # On other devices the embedding checks the range itself, and a check here would wait for the device.
    if not is_readable(class_labels):
        return
    if is_sets:
        outside = class_labels[(class_labels != 0) & (class_labels != 1)]
        if len(outside):
            raise ValueError(f"class_labels of sets must be zeros and ones, got {outside.tolist()}")
        return
    last = num_classes if has_null else num_classes - 1
    outside = class_labels[(class_labels < 0) | (class_labels > last)]
    if len(outside):
        reason = "" if has_null else ", since the model has no null label"
        raise ValueError(f"class_labels must be in [0, {last}]{reason}, got {outside.tolist()}")


def check_num_classes(num_classes: int | None) -> None:
    """Refuses a number of labels below 1; `None` stands for no labels."""
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, or None for no labels, got {num_classes}")
