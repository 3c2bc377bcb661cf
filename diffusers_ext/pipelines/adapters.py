"""Adapters of a pipeline's denoiser, such as LoRA (Hu et al. 2021, arXiv 2106.09685), loaded and saved as diffusers does."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin
from torch import Tensor

from diffusers_ext.guidance.guiding import without_notice
from diffusers_ext.pipelines.stock import STOCK_NAMES


# Says of each prefix that there is nothing with it.
LOADER_OF_ADAPTERS = "diffusers.loaders.peft"


class AdapterMixin(LoraBaseMixin):
    """`load_lora_weights` and what goes with it, for a pipeline with a `denoiser`; needs `peft`.

    The methods of `diffusers.loaders.lora_base.LoraBaseMixin` choose, weigh, fuse and unload what is loaded.
    """

    _lora_loadable_modules = ["denoiser"]

    def load_lora_weights(
        self, name: str | os.PathLike | Mapping[str, Tensor], adapter_name: str | None = None, **kwargs
    ):
        """Puts an adapter into the denoiser.

        Args:
            name: A folder or a name on the Hub, with `pytorch_lora_weights.safetensors`; or its tensors by name.
            adapter_name: By which it is chosen later; by default a number.
            kwargs: As for `diffusers.loaders.peft.PeftAdapterMixin.load_lora_adapter`, such as `weight_name` and `revision`.

        Raises:
            ValueError: if there is no layer of a denoiser in it.
        """
        kwargs = {"use_safetensors": True, "_pipeline": self} | kwargs
        before = self._adapters_of_denoiser()
        for prefix in STOCK_NAMES["denoiser"]:  # by which the names of layers begin in the file
            with without_notice(LOADER_OF_ADAPTERS):
                self.denoiser.load_lora_adapter(name, prefix=prefix, adapter_name=adapter_name, **kwargs)
            if self._adapters_of_denoiser() != before:
                return
        if kwargs.get("hotswap"):  # into an adapter that there was
            return
        raise ValueError(
            f"an adapter must have layers whose names begin with one of {', '.join(STOCK_NAMES['denoiser'])}, and this one has none: it is of "
            "something else, such as a text encoder alone"
        )

    def _adapters_of_denoiser(self) -> set[str]:
        return set(getattr(self.denoiser, "peft_config", None) or {})

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        denoiser_lora_layers: Mapping[str, Tensor],
        denoiser_lora_adapter_metadata: Mapping[str, Any] | None = None,
        weight_name: str | None = None,
        **kwargs,
    ):
        """Saves an adapter.

        Args:
            save_directory: The folder.
            denoiser_lora_layers: Its tensors, as `peft.get_peft_model_state_dict(pipe.denoiser)` has them.
            denoiser_lora_adapter_metadata: Its config, `pipe.denoiser.peft_config[NAME].to_dict()`, of which rank and alpha
                are read again.
            weight_name: Of the file, by default `pytorch_lora_weights.safetensors`.
            kwargs: `is_main_process`, `save_function` and `safe_serialization` as in diffusers.
        """
        about = denoiser_lora_adapter_metadata
        if about:  # the names of modules are a set, whose order differs between processes, as the file then would
            about = {key: sorted(value) if isinstance(value, set) else value for key, value in about.items()}
        cls._save_lora_weights(
            save_directory,
            lora_layers={"denoiser": dict(denoiser_lora_layers)},
            lora_metadata={"denoiser": about},
            weight_name=weight_name,
            **kwargs,
        )

    def fuse_lora(self, components: Sequence[str] = ("denoiser",), **kwargs):
        """Adds the adapters to the weights, so that sampling costs what it does without them; `unfuse_lora` takes them out."""
        super().fuse_lora(components=list(components), **kwargs)

    def unfuse_lora(self, components: Sequence[str] = ("denoiser",), **kwargs):
        """Takes the adapters out of the weights again."""
        super().unfuse_lora(components=list(components), **kwargs)
