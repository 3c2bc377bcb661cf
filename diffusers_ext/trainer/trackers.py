"""Which trackers of accelerate a run reports to, and how each of them takes pictures."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from diffusers_ext.figures import on_white


ALL = "all"


def tracker_names(report_to: str | None) -> list[str]:
    """The trackers that an option names, with commas between them; "all" stays what it is.

    Raises:
        ValueError: if one of them is none that accelerate knows, or if "all" is one of several.
    """
    if report_to is None:
        return []
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]  # those that a user has registered with accelerate among them
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",")))
    if ALL in names and len(names) > 1:
        raise ValueError(f"report_to all stands for all trackers, so it stands alone, got {report_to!r}")
    if unknown := [name for name in names if name not in (ALL, *known)]:
        raise ValueError(f"report_to must be of {', '.join(known)}, or all, got {', '.join(map(repr, unknown))}")
    return names


def installed_trackers(report_to: str | None) -> list[str]:
    """The trackers that an option names, all of them installed.

    Raises:
        ValueError: as `tracker_names`; and if one of them is not installed, or if "all" finds none.
    """
    names, there = tracker_names(report_to), [str(name) for name in get_available_trackers()]
    if names == [ALL]:
        if not there:
            raise ValueError("report_to all finds no tracker: install one of them, such as tensorboard")
        return there
    builtin = {name for name in names if LOGGER_TYPE_TO_CLASS[name].__module__ == "accelerate.tracking"}
    if missing := [name for name in names if name in builtin and name not in there]:
        raise ValueError(
            f"report_to {report_to} needs what is not installed: pip install {' '.join(missing)}, or leave it out; "
            f"installed are: {', '.join(there) or 'none'}"
        )
    return names


def log_picture(accelerator: Accelerator, name: str, picture: Image.Image | None, step: int, caption: str) -> None:
    """Gives a picture with its caption to the trackers that take pictures. None, as in processes that have none, is no picture.

    Those are tensorboard, which gets the caption as a text beside it, wandb, trackio, aim, swanlab and clearml, of which the
    last two take no caption. All of them get it on white, since tensorboard takes no transparency.
    """
    if picture is None:
        return
    picture = on_white(picture)
    for tracker in accelerator.trackers:
        match tracker.name:
            case "tensorboard":
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, dataformats="NHWC")
                tracker.log({f"{name}/caption": caption}, step=step)
            case "wandb":
                import wandb

                tracker.log({name: wandb.Image(picture, caption=caption)}, step=step)
            case "trackio":
                import trackio

                tracker.log({name: trackio.Image(picture, caption=caption)}, step=step)
            case "aim":
                tracker.log_images({name: (picture, caption)}, step=step)
            case "swanlab":
                tracker.log_images({name: [picture]}, step=step)
            case "clearml":
                tracker.log_images({name: np.asarray(picture)}, step=step)


def log_saved_pictures(accelerator: Accelerator, folder: Path, pictures: Mapping[str, str], step: int) -> None:
    """Gives the trackers the pictures of a folder that are there.

    Args:
        pictures: Names of files, with what they show.
    """
    for name, shows in pictures.items():
        if accelerator.trackers and (folder / name).is_file():
            with Image.open(folder / name) as picture:
                log_picture(accelerator, Path(name).stem, picture, step, shows)
