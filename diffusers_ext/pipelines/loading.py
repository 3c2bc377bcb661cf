"""How diffusers saves and loads a pipeline of this package, or makes one from another."""

import inspect
from collections.abc import Callable, Sequence

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging

from diffusers_ext.hub.remote_code import ForeignParts, add_code
from diffusers_ext.pipelines.stock import components_for, id2label_of, stock_name


logger = logging.get_logger(__name__)


def replaceable(names: Sequence[str]) -> Callable[[Callable], Callable]:
    """For an `__init__` whose components of these names have a default, and can still be replaced while loading.

    `diffusers.DiffusionPipeline.from_pretrained` heeds an argument that names a component only if the signature has no
    default for it; it loads the saved component over any other. So the signature that it is shown has none.
    """

    def decorate(init: Callable) -> Callable:
        signature = inspect.signature(init)
        parameters = [
            parameter.replace(default=inspect.Parameter.empty) if name in names else parameter
            for name, parameter in signature.parameters.items()
        ]
        init.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return init

    return decorate


class FromPipeMixin:
    """`from_pipe` and `from_pretrained` for pipelines with replaceable components, of pipelines of diffusers too."""

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """The same components in a pipeline of this class; those that it may do without need not be there.

        Args:
            pipeline: Of this class or another, such as `DDPMPipeline`, `DDIMPipeline`, `LDMPipeline` or `DiTPipeline` of
                diffusers, whose `unet` or `transformer` becomes the `denoiser`.
            kwargs: Further components or others in place of its own, and options of the pipeline.

        Raises:
            ValueError: if a component is missing, or does not fit the others.
        """
        # Named one by one, since diffusers takes over by itself only what is of the very class of the annotation.
        there = dict.fromkeys(cls._optional_components) | components_for(cls, pipeline)
        _, options = cls._get_signature_keys(cls)
        names = id2label_of(pipeline) if "id2label" in options else None
        return super().from_pipe(pipeline, **there | ({} if names is None else {"id2label": names}) | kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Loads a pipeline of this class, or one of diffusers as `from_pipe` takes it.

        Args:
            pretrained_model_name_or_path: A folder, or a name on the Hub.
            kwargs: As for `diffusers.DiffusionPipeline.from_pretrained`; components in place of the saved ones and options of
                the pipeline by their names here.

        Raises:
            ValueError: if a component is missing, or does not fit the others.
        """
        index = _saved_index(cls, pretrained_model_name_or_path, kwargs)
        saved = [name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")]
        components, options = cls._get_signature_keys(cls)
        if "denoiser" in saved or stock_name(saved, "denoiser") is None or kwargs.get("custom_pipeline") is not None:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        own = {name: kwargs.pop(name) for name in (*components, *options) if name in kwargs}
        # What is replaced need not be loaded.
        replaced = {stock_name(saved, name): part for name, part in own.items() if stock_name(saved, name) is not None}
        stock = DiffusionPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs | replaced)
        if index.get("id2label") and "id2label" in options:
            own = {"id2label": index["id2label"]} | own
        dtype = {name: kwargs[name] for name in ("torch_dtype", "dtype") if name in kwargs}
        return cls.from_pipe(stock, **dtype, **own)


def _saved_index(cls: type[DiffusionPipeline], name, kwargs: dict) -> dict:
    """What `model_index.json` says; empty if there is none, of which loading then says more."""
    keys = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")
    try:
        return cls.load_config(name, **{key: kwargs[key] for key in keys if key in kwargs})
    except (OSError, ValueError):
        return {}


class SavedWithCodeMixin:
    """Saves a pipeline together with the code that loads it without this package, and as a modular pipeline too."""

    blocks_class_name: str  # of those that are this pipeline

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves the components, the config, and the code of the classes (see `diffusers_ext.hub.remote_code`).

        A pipeline with components of other libraries than this one, diffusers and transformers is saved without code.

        Args:
            save_directory: The folder.
            args, kwargs: As for `diffusers.DiffusionPipeline.save_pretrained`.
        """
        super().save_pretrained(save_directory, *args, **kwargs)
        self._add_code(save_directory)

    def _upload_folder(self, working_dir, repo_id, *args, **kwargs):
        # Within `save_pretrained`, if that is to push, and after it in `push_to_hub`.
        self._add_code(working_dir, repo_id)
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)

    @staticmethod
    def _add_code(folder, repo_id=None):
        try:
            add_code(folder, repo_id)
        except ForeignParts as parts:
            logger.warning(str(parts))

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """The arguments of `__init__` among those of a config, which also names the code that is saved with it."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)
