"""The options of the data for scripts that measure: those of training, taken from a training run where none is given."""

import dataclasses
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from diffusers_ext.data.config import DataConfig
from diffusers_ext.data.latent_cache import read_info
from diffusers_ext.evaluation.real_images import HELD_OUT_SPLITS, is_test_split
from diffusers_ext.options import check_options, option
from diffusers_ext.untrusted import read_yaml_mapping


# Options on which the images do not depend, so that those of a run need not suit the machine that measures.
OF_MACHINE = ("preprocessing_num_workers",)


def left_open(cls: type, leave_out: Collection[str] = ()) -> type:
    """A frozen dataclass with the options of another, in which None says that one was not given.

    Args:
        leave_out: Names of options that it does not have.
    """
    hints, fields = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        help = field.metadata["help"] + ("" if field.default is None else f"; {field.default} if left open")
        opened = dataclasses.field(default=None, metadata={**field.metadata, "help": help})
        fields.append((field.name, hints[field.name] | None, opened))
    fields = [field for field in fields if field[0] not in leave_out]
    return dataclasses.make_dataclass(f"Open{cls.__name__}", fields, frozen=True)


@dataclass(frozen=True)
class DataOptions(left_open(DataConfig, leave_out=("unconditional", "random_flip"))):
    """The options of `DataConfig` that say how images are prepared, each of them None if left open, and the held-out split."""

    dataset_name: str | None = option(None, "digits, a data set on the Hub, or a local folder", "data")
    dataset_split: str | None = option(None, "split that the model was trained on; train if left open")
    resize_mode: Literal["auto", "crop", "pad", "stretch"] | None = option(
        None, "how images get there, as in training; auto if left open"
    )
    held_out_split: str | None = option(
        None, f"split of images not trained on; by default the first there is of {', '.join(HELD_OUT_SPLITS)}"
    )

    def __post_init__(self):
        check_options(self)
        self.for_data()  # which checks those of the data

    def for_data(self) -> DataConfig:
        """The options as training has them, with its defaults for those left open."""
        names = [field.name for field in dataclasses.fields(DataConfig)]
        return DataConfig(**{name: value for name in names if (value := getattr(self, name, None)) is not None})


@dataclass(frozen=True)
class AskedOptions(DataOptions):
    """Those of `DataOptions`, and what a pipeline's images are asked for by."""

    caption_column: str | None = option(
        None, "column of the captions that texts are taken from; by default found as in training"
    )
    condition_column: str | None = option(
        None, "column of the condition images of a pipeline that was trained on one; by default the run's"
    )

    # Of the options here, those that `DataOptions` does not have.
    OF_ASKING: ClassVar[tuple[str, ...]] = ("caption_column", "condition_column")


def take_options_of_run(
    options: DataOptions,
    folder: str | Path,
    others: Sequence[str] = (),
    of_data: Sequence[str] = (),
    *,
    hold_out_validation: bool = False,
) -> DataOptions:
    """The options with what was left open taken from the train_config.yaml of a training run, if there is one.

    Args:
        folder: Of the run.
        others: Names of options beside those of the data. They are taken for another data set too.
        of_data: Names of options of the data that are not among `DataOptions`.
        hold_out_validation: Take the run's validation split, if it had one that is no test split, for the held-out split.

    Raises:
        ValueError: if neither names a data set.
    """
    saved, names = _options_of(Path(folder)), list(others)
    if options.dataset_name in (None, saved.get("dataset_name")):  # of another data set, the options are others
        of_images = [field.name for field in dataclasses.fields(DataOptions) if field.name not in OF_MACHINE]
        names += [*of_data, *of_images]
        if hold_out_validation and not is_test_split(saved.get("validation_split") or ""):
            saved = saved | {"held_out_split": saved.get("validation_split")}
    left = [name for name in names if getattr(options, name) is None and saved.get(name) is not None]
    taken = {name: tuple(saved[name]) if isinstance(saved[name], list) else saved[name] for name in left}
    options = dataclasses.replace(options, **taken)
    if options.dataset_name is None:
        raise ValueError(f"{folder} has no train_config.yaml that names its data set: give --dataset_name")
    return options


def _options_of(folder: Path) -> dict[str, Any]:
    """The options of a training run; of a run on latents, those of the images that the latents were made from."""
    path = folder / "train_config.yaml"
    saved = read_yaml_mapping(path) if path.is_file() else {}
    info = read_info(saved.get("dataset_name") or "").get(saved.get("dataset_split"))
    if info is None:
        return saved
    of_images = dataclasses.asdict(info)
    # Captions are kept as labels. A training of texts has the option, and so has each distillation, where it is given for texts.
    is_student = "student_steps" in saved
    if saved.get("caption_column") is not None or "caption_column" in saved and not is_student:
        of_images |= {"caption_column": info.label_column, "label_column": None}
    return saved | of_images
