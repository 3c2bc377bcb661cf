"""A data set that is at hand in Python, kept on disk as one that has a name.

So it is read, resumed, evaluated and shared by processes as every other. The folder is named by the contents.
"""

import hashlib
import io
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from PIL import Image

from diffusers_ext.machine import own_cache


# The keys of an example that is a dict, the first that it has; and what its column is called.
KEYS = {
    "image": ("image", "img", "images", "pixel_values", "x"),
    "label": ("label", "labels", "class", "target", "y"),
    "text": ("text", "caption"),
}
FILE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # of pictures that PNG holds as they are


class MapStyle(Protocol):
    """A data set of torch: a length, and an example for each index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


AtHand = datasets.Dataset | datasets.DatasetDict | MapStyle | Mapping[str, "datasets.Dataset | MapStyle"]


def keep_dataset(dataset: AtHand) -> Path:
    """The folder of a data set on disk, which `dataset_name` can be. It is written unless it is there.

    Args:
        dataset: A `datasets.Dataset`, with columns as those of any other; or any map-style data set of torch, whose examples
            are an image, a pair (image, label), or a dict with an `image`, a `label` and a `text`. Images are of PIL, arrays
            `(height, width, channels)` or `(height, width)`, or tensors `(channels, height, width)`: integers of 8 bits, or
            floats in [0, 1], which are rounded to 8 bits. Or a mapping from names of splits to such data sets.

    Raises:
        TypeError: if it is none of these.
        ValueError: if it is empty, or an image is none that a file holds.
    """
    splits = dataset if isinstance(dataset, Mapping) else {"train": dataset}
    if not splits:
        raise ValueError("dataset must have a split, got an empty mapping")
    rows = datasets.DatasetDict({name: _as_rows(part) for name, part in splits.items()})
    root = own_cache() / "datasets"
    root.mkdir(parents=True, exist_ok=True)
    writing = Path(tempfile.mkdtemp(prefix="writing-", dir=root))
    try:
        rows.save_to_disk(writing)  # which takes the contents of files that the rows only name
        number = sum(map(len, rows.values()))
        folder = root / f"images-{number}-{_digest(writing)[:12]}"
        if not folder.is_dir():
            try:
                writing.rename(folder)
            except OSError:
                if not folder.is_dir():  # which another process has written in the meantime
                    raise
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return folder


def _digest(folder: Path) -> str:
    """Of the rows alone: the descriptions beside them differ from one writing to the next."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*.arrow")):
        content.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.hexdigest()


def _as_rows(dataset: "datasets.Dataset | MapStyle") -> datasets.Dataset:
    if isinstance(dataset, datasets.IterableDataset | torch.utils.data.IterableDataset):
        raise TypeError(
            "dataset must have a length and examples by index: for a stream, give its dataset_name with streaming"
        )
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"dataset must be a datasets.Dataset or a map-style data set of torch, got a {type(dataset).__name__}"
        )
    if len(dataset) == 0:
        raise ValueError("dataset must have examples, and has none")
    if isinstance(dataset, datasets.Dataset):
        return dataset.with_format(None)
    examples = list(_examples(dataset))
    columns = {name: [example[name] for example in examples] for name in examples[0]}
    features = {"image": datasets.Image()} if "image" in columns else {}
    names = getattr(dataset, "classes", None)
    labels = columns.get("label")
    if names and labels and all(isinstance(label, int) and label < len(names) for label in labels):
        features["label"] = datasets.ClassLabel(names=list(map(str, names)))
    rows = datasets.Dataset.from_dict(columns)
    for name, feature in features.items():
        rows = rows.cast_column(name, feature)
    return rows


def _examples(dataset: MapStyle) -> Iterator[dict[str, Any]]:
    """Columns of each example.

    Raises:
        ValueError: if examples differ in their columns.
    """
    first = None
    for index in range(len(dataset)):
        example = _columns_of(dataset[index], index)
        first = first or example.keys()
        if example.keys() != first:
            raise ValueError(f"example {index} must have {', '.join(first)} as the first, got {', '.join(example)}")
        yield example


def _columns_of(example: Any, index: int) -> dict[str, Any]:
    if isinstance(example, Mapping):
        found = {name: next((key for key in keys if key in example), None) for name, keys in KEYS.items()}
        values = {name: example[key] for name, key in found.items() if key is not None}
        if "image" not in values:
            raise ValueError(
                f"example {index} must have an image under {', '.join(KEYS['image'])}; it has {', '.join(example)}"
            )
    elif isinstance(example, tuple | list) and 1 <= len(example) <= 2:
        values = dict(zip(("image", "label"), example, strict=False))
    elif isinstance(example, tuple | list):
        raise ValueError(
            f"example {index} must be an image, a pair (image, label) or a dict, got {len(example)} values"
        )
    else:
        values = {"image": example}
    columns = {"image": {"bytes": _encoded(values.pop("image"), index), "path": None}}
    for name, value in values.items():
        if isinstance(value, str) and name == "label":
            columns["label"] = value
        else:
            columns[name] = value.tolist() if isinstance(value, torch.Tensor | np.ndarray | np.generic) else value
    return columns


def _encoded(image: Any, index: int) -> bytes:
    """A picture as the bytes of a PNG.

    Raises:
        TypeError: if it is none.
        ValueError: if its values or its channels are none of a picture.
    """
    if isinstance(image, torch.Tensor):
        array = image.detach().cpu().numpy()
        image = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if isinstance(image, np.ndarray):
        image = _to_picture(image, index)
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"example {index} must have a picture of PIL, an array or a tensor, got a {type(image).__name__}"
        )
    if image.mode not in FILE_MODES:
        image = image.convert("RGB")
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _to_picture(array: np.ndarray, index: int) -> Image.Image:
    """Of shape `(height, width)` or `(height, width, channels)`."""
    shape = "x".join(map(str, array.shape))
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ValueError(
            f"example {index} must have an image of 1, 3 or 4 channels, an array with them last or a tensor with them first, got "
            f"one of {shape}"
        )
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"example {index} must have floats in [0, 1], got values from {low:g} to {high:g}: leave a normalisation out, or "
                "give 8 bits"
            )
        array = (array * 255).round().astype(np.uint8)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        raise ValueError(f"example {index} must have 8 bits or floats in [0, 1], got {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))
