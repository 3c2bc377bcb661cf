"""The column of the images: found among the others, and left undecoded.

Columns may hold pictures without saying so, as pandas writes them: encoded bytes, or paths of files.
"""

import io
import itertools
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from diffusers_ext.data.folders import picture_suffixes
from diffusers_ext.data.label_columns import describe_feature


Rows = datasets.Dataset | datasets.IterableDataset
_PROBED = 20  # rows in which a column's first value is looked for


def find_image_column(source: Rows, name: str | None = None, condition_column: str | None = None) -> str:
    """The column that holds the images.

    Args:
        name: As it is named by the user.
        condition_column: That of the condition images, which are not these.

    Raises:
        ValueError: if there is none, if there are several and none is named, or if the named one holds no images.
    """
    found = {column: feature for column, feature in source.features.items() if _holds_images(feature)}
    columns = ", ".join(f"{column} ({describe_feature(feature)})" for column, feature in source.features.items())
    if name is not None and name not in found:
        reason = "holds no images" if name in source.features else "is not in the data set"
        raise ValueError(f"image_column {name!r} {reason}; its columns are: {columns}")
    if not found:
        raise ValueError(
            f"the data set has no column of images; its columns are: {columns}. Nor is one of sequences among them: lists or "
            "arrays of numbers, or audio"
        )
    found = {column: feature for column, feature in found.items() if column == name or column != condition_column}
    if not found:
        raise ValueError(
            f"condition_column {condition_column!r} is the only column of images; its columns are: {columns}"
        )
    # Arrays of floats can be anything, so that they are images only where nothing else is.
    likely = [column for column, feature in found.items() if not _is_float(feature)] or list(found)
    if name is None and len(likely) > 1:
        raise ValueError(f"several columns hold images ({', '.join(likely)}): name one with --image_column")
    return name or likely[0]


def undecoded(rows: Rows, column: str) -> Rows:
    """The rows with the bytes or the paths of the images instead of the images."""
    if isinstance(rows, datasets.IterableDataset):
        return rows.decode(False)  # also what fetches and decodes in threads, as folders on the Hub do
    if isinstance(rows.features[column], datasets.Image | datasets.Audio):
        return rows.cast_column(column, type(rows.features[column])(decode=False))
    return rows


def with_image_columns(source: Rows, folder: Path | None = None) -> Rows:
    """The rows with columns of encoded pictures, and of paths of pictures, as columns of images.

    That are columns of bytes, or of structs of `bytes` and `path`, whose first value PIL opens; and, in a local folder,
    columns of texts of which the first is the path of a picture that is there, absolute or below the folder; all of them must
    lie in the folder. Rows that have a column of images, or of arrays, stay as they are.

    Args:
        folder: In which the data set is; None for one on the Hub.
    """
    features = source.features
    if features is None:
        return source
    if any(isinstance(each, datasets.Image | datasets.Array2D | datasets.Array3D) for each in features.values()):
        return source
    candidates = [name for name, feature in features.items() if _is_encoded(feature) or _is_text(feature)]
    if not candidates:
        return source
    firsts = _first_values(source, candidates)
    root = folder if folder is None or folder.is_dir() else folder.parent
    for name, value in firsts.items():
        if _is_encoded(features[name]) and _opens(value):
            source = source.cast_column(name, datasets.Image())
        elif root is not None and _is_text(features[name]) and _is_picture(root, value):
            source = _from_paths(source, name, root)
    return source


def _holds_images(feature: Any) -> bool:
    arrays = datasets.Array2D | datasets.Array3D
    return isinstance(feature, datasets.Image) or (
        isinstance(feature, arrays) and np.dtype(feature.dtype).kind in "buif"
    )


def _is_float(feature: Any) -> bool:
    return not isinstance(feature, datasets.Image) and np.dtype(feature.dtype).kind == "f"


def _is_encoded(feature: Any) -> bool:
    if isinstance(feature, dict):
        return "bytes" in feature and set(feature) <= {"bytes", "path"} and _is_encoded(feature["bytes"])
    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _first_values(source: Rows, names: list[str]) -> dict[str, Any]:
    firsts: dict[str, Any] = {}
    for row in itertools.islice(source.select_columns(names), _PROBED):
        firsts = {name: value for name, value in row.items() if value is not None} | firsts
    return firsts


def _opens(value: Any) -> bool:
    encoded = value["bytes"] if isinstance(value, dict) else value
    if encoded is None:
        return False
    try:
        Image.open(io.BytesIO(encoded)).close()
    except Exception:  # a reader of some format raises what it likes on other data
        return False
    return True


def _is_picture(root: Path, value: str) -> bool:
    return Path(value).suffix.lower() in picture_suffixes() and len(value) < 1000 and (root / value).is_file()


def _from_paths(source: Rows, name: str, root: Path) -> Rows:
    def absolute(rows: dict[str, list]) -> dict[str, list]:
        return {name: [value and {"path": _path_within(root, value), "bytes": None} for value in rows[name]]}

    root = root.absolute()
    features = datasets.Features(source.features | {name: datasets.Image()})
    return source.map(absolute, batched=True, features=features)


def _path_within(root: Path, value: str) -> str:
    """The path of a picture that a table names, in the folder that the table is in.

    Raises:
        ValueError: if it leads out of the folder.
    """
    path = os.path.normpath(root / value)
    if os.path.commonpath([root, path]) != str(root):
        raise ValueError(
            f"a table of pictures must name files in {root}, got {value!r}: give a folder that holds both"
        )
    return path
