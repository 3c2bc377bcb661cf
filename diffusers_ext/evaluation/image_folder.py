"""A folder of images, to be measured as a pipeline's images are."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from diffusers_ext.atomic_files import finish_replacing
from diffusers_ext.data.decoding import allowed_faults, describe_fault
from diffusers_ext.data.images import fit
from diffusers_ext.evaluation.real_images import CHANNEL_MODES, RealImages
from diffusers_ext.pixels import open_picture, to_array


# What `training/sample.py` saves: images, what is known of each of them, and how all were made.
SAMPLED, METADATA, SAMPLING_RECORD = "images", "metadata.jsonl", "sampling.json"

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def is_image_folder(name: str) -> bool:
    """Whether a local folder holds images rather than a pipeline.

    Raises:
        ValueError: if it holds neither.
    """
    folder = Path(name)
    finish_replacing(folder)  # which has no index until then, and the pictures of its pipeline
    if not folder.is_dir() or (folder / "model_index.json").is_file():
        return False
    if _image_files(_images_of(folder)):
        return True
    raise ValueError(f"{folder} holds neither a pipeline (model_index.json) nor images ({', '.join(IMAGE_SUFFIXES)})")


def read_image_folder(
    name: str, real: RealImages, pad_value: int = 0, max_bad_share: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The images of a folder and its subfolders, prepared like the real ones.

    Args:
        name: Folder. Labels are those of its `metadata.jsonl`, such as `training/sample.py` writes, or else the names of the
            subfolders that the images are in.
        real: The data set.
        pad_value: Of a border, where images are smaller than the real ones, in the range of those.
        max_bad_share: Share of the files, rounded up to a whole one, that may fail to decode and are left out.

    Returns:
        The images, uint8, in the order of their paths; and their labels, or None.

    Raises:
        ValueError: if more files cannot be decoded, or none can.
    """
    if real.value_scale is not None:
        raise ValueError(f"{name} holds images, and {real.name} sequences: give a pipeline")
    channels, height, width = real.image_shape
    if channels > len(CHANNEL_MODES):
        raise ValueError(f"files hold images of up to 4 channels, but those of {real.name} have {channels}")
    folder = _images_of(Path(name))
    paths = _image_files(folder)
    border = round(pad_value * 255 / real.white)
    images, faults = np.empty((len(paths), height, width, channels), np.uint8), {}
    for row, path in zip(images, paths, strict=True):
        try:
            picture = to_array(open_picture(path), CHANNEL_MODES[channels - 1], border, real.whites)
            row[...] = fit(picture, (height, width), real.resize_mode, border)
        except Exception as error:  # a decoder raises what it likes on a damaged file
            faults[path] = f"{path} cannot be decoded: {describe_fault(error)}"
    if faults and (len(faults) > allowed_faults(len(paths), max_bad_share) or len(faults) == len(paths)):
        more = f", nor {len(faults) - 1} more of {len(paths)}" if len(faults) > 1 else ""
        raise ValueError(f"{next(iter(faults.values()))}{more}; at most a share of {max_bad_share:g} may fail")
    for fault in faults.values() if PartialState().is_main_process else ():
        print(f"left out: {fault}", file=sys.stderr)
    images = torch.from_numpy(images[[path not in faults for path in paths]]).permute(0, 3, 1, 2).contiguous()
    paths = [path for path in paths if path not in faults]

    ids = {label_name: label for label, label_name in enumerate(real.train.label_names)}
    told = _labels_told(folder)
    labels = [ids.get(told.get(place, place.parts[0])) for place in (path.relative_to(folder) for path in paths)]
    if None not in labels:
        return images, torch.tensor(labels)
    if ids and PartialState().is_main_process:
        without = paths[labels.index(None)].relative_to(folder)
        print(
            f"the labels of the images are not all known, such as that of {without}, so that none is measured: name them in "
            f"{METADATA}, or by subfolders",
            file=sys.stderr,
        )
    return images, None


def _labels_told(folder: Path) -> dict[Path, str]:
    """Names of labels by the place of an image in the folder, of those that `metadata.jsonl` tells.

    Raises:
        ValueError: if it cannot be read.
    """
    told = {}
    with suppress(FileNotFoundError):
        for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                if "label" in row:
                    told[Path(row["file_name"])] = str(row["label"])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"line {number} of {folder / METADATA} must be a JSON object with a file_name, got {line[:80]!r}"
                ) from error
    return told


def _images_of(folder: Path) -> Path:
    """The folder itself, or where `training/sample.py` has put the images, beside which there are grids of them."""
    return folder / SAMPLED if (folder / SAMPLING_RECORD).is_file() else folder


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
