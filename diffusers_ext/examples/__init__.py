"""Small trained pipelines that ship with the package, each in a folder here, made by `training/make_example.py`."""

from pathlib import Path

from diffusers_ext.pipelines.pipeline_guided_diffusion import GuidedDiffusionPipeline


_FOLDER = Path(__file__).parent


def example_names() -> list[str]:
    """The names that `example` takes."""
    return sorted(index.parent.name for index in _FOLDER.glob("*/model_index.json"))


def example(name: str) -> GuidedDiffusionPipeline:
    """A small trained pipeline that ships with the package. It is read from the installed files, without a network.

        import diffusers_ext

        pipe = diffusers_ext.example("digits")
        images = pipe(class_labels=[3, 3, 7]).images

    "digits" makes handwritten digits of 8x8 grey pixels by their labels, 0 to 9. Its weights are stored in 16 bits and
    computed with in float32. Its card, beside the weights, says how it was trained and how well it does.

    Args:
        name: One of `diffusers_ext.examples.example_names()`.

    Raises:
        ValueError: if there is no example of this name.
    """
    names = example_names()
    if name not in names:
        raise ValueError(f"there is no example {name!r}: take one of {', '.join(names)}")
    return GuidedDiffusionPipeline.from_pretrained(_FOLDER / name, local_files_only=True)
