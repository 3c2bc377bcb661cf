"""How diffusers loads a pipeline of this package, or makes one from another."""

import inspect
from collections.abc import Callable, Sequence


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
        init.__signature__ = signature.replace(parameters=parameters)
        return init

    return decorate


class FromPipeMixin:
    """`from_pipe` for pipelines with replaceable components."""

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """The same components in a pipeline of this class; those that it may do without need not be there.

        Args:
            pipeline: Of this class or another.
            kwargs: Further components or others in place of its own, and options of the pipeline.

        Raises:
            ValueError: if a component is missing, or does not fit the others.
        """
        # Named one by one, since diffusers takes over by itself only what is of the very class of the annotation.
        names, _ = cls._get_signature_keys(cls)
        there = {**dict.fromkeys(cls._optional_components), **pipeline.components}
        return super().from_pipe(pipeline, **{name: there[name] for name in names if name in there} | kwargs)
