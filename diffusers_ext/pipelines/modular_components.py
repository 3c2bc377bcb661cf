"""What the blocks of a modular pipeline see: its components as those of a pipeline, and the inputs of a pipeline's call."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

from diffusers.modular_pipelines import ComponentSpec, ConfigSpec, InputParam

from diffusers_ext.pipelines.label_condition import LabelledMixin
from diffusers_ext.pipelines.sampling import CallOptions, SamplingMixin
from diffusers_ext.pipelines.text_condition import TextEncodingMixin


COMPONENTS = {
    "denoiser": "the network: UNetModel, DiTModel or one of diffusers",
    "scheduler": "any that samples the path that the denoiser was trained on",
    "vae": "of a denoiser of latents",
    "guider": "how conditional and unconditional predictions are combined, if not by guidance_scale",
    "classifier": "for ClassifierGuidance",
    "weak_denoiser": "for WeakModelGuidance",
    "statistics": "of a denoiser of normalised data",
    "prior": "of a chain that starts below its noisiest level",
    "tokenizer": "of the text encoder",
    "text_encoder": "of transformers",
}

# Of the pipelines' configs, by what they are without.
CONFIGS = {
    "id2label": None,
    "image_condition": None,
    "call_defaults": None,
    "clip_guided_noise": False,
    "noise_path": None,
    "value_scale": None,
    "max_text_length": None,
    "mask_padding": None,
}


def component_specs(*names: str) -> list[ComponentSpec]:
    """Specifications of some of `COMPONENTS`, whose classes the folder that they are loaded from names."""
    return [ComponentSpec(name, description=COMPONENTS[name]) for name in names]


def config_specs(*names: str) -> list[ConfigSpec]:
    """Specifications of some of `CONFIGS`."""
    return [ConfigSpec(name, CONFIGS[name]) for name in names]


class Components(LabelledMixin, TextEncodingMixin, SamplingMixin):
    """The components of a modular pipeline, with the methods that ours have; those that it lacks are `None`.

    Args:
        pipe: A modular pipeline.
        needed: Names of the components that have to be there.

    Raises:
        ValueError: if one of them is not.
    """

    def __init__(self, pipe, *needed: str):
        self._pipe = pipe
        # Without its VAE a model of latents would decode nothing, and show them as they are; and so without statistics.
        expected = {*needed, *(name for name in ("vae", "statistics") if _has_saved(pipe, name))}
        missing = [name for name in COMPONENTS if name in expected and getattr(pipe, name, None) is None]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} must be there before the blocks are called, got None: load what a folder has by "
                "pipe.load_components(), or give your own by pipe.update_components(name=component)"
            )

    def __getattr__(self, name: str) -> Any:
        if name in COMPONENTS:
            return getattr(self._pipe, name, None)
        if name in ("config", "_execution_device"):
            return getattr(self._pipe, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _has_saved(pipe, name: str) -> bool:
    """Whether the folder that a modular pipeline is of has this component."""
    spec = pipe._component_specs.get(name)
    return spec is not None and spec.pretrained_model_name_or_path is not None


class CallInputs:
    """Arguments of a pipeline's call as inputs of blocks: with its types, defaults and descriptions.

    Args:
        calls: Calls of pipelines; what the first describes as another's is described there.
    """

    def __init__(self, *calls: Callable):
        self.parameters: dict[str, inspect.Parameter] = {}
        self.descriptions: dict[str, str] = {}
        for call in reversed(calls):
            self.parameters |= inspect.signature(call).parameters
            self.descriptions |= dict(_described(call.__doc__ or ""))

    def params(self, *names: str) -> list[InputParam]:
        """The inputs of these names, none of which is required: what must be given, the call says itself."""
        return [
            InputParam(
                name,
                type_hint=self.parameters[name].annotation,
                default=self.parameters[name].default,
                description=self.descriptions.get(name, ""),
            )
            for name in names
        ]

    def options(self, **given) -> CallOptions:
        """The options of a call with these arguments and no others."""
        return CallOptions.of({name: parameter.default for name, parameter in self.parameters.items()} | given)


def _described(docstring: str) -> Iterator[tuple[str, str]]:
    """Names and descriptions of the arguments in a docstring's `Args:`."""
    section = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", inspect.cleandoc(docstring), flags=re.DOTALL | re.MULTILINE)
    for text in re.split(r"^ {4}(?=\w)", section[1], flags=re.MULTILINE)[1:] if section else ():
        names, _, description = text.partition(":")
        for name in names.split(","):
            yield name.strip(), " ".join(description.split())
