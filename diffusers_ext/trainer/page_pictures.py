"""The samples of a run as its page holds them: within the page, and of a long run a share of them."""

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffusers_ext.figures import on_white


MAX_FRAMES, MAX_BYTES = 64, 6_000_000  # of all samples on the page, as they are encoded
MAX_PNG_BYTES, MAX_SIDE, JPEG_QUALITY = (
    200_000,
    1280,
    85,
)  # a larger PNG goes into the page as a JPEG of at most this side

_STEP = re.compile(r"step-(\d+)(?:\.png)?")


@dataclass(frozen=True)
class Frame:
    """What was drawn at a step.

    Attributes:
        pictures: Their names, and their content as addresses that begin with `data:`.
    """

    step: int
    pictures: tuple[tuple[str, str], ...]

    @property
    def num_bytes(self) -> int:
        return sum(len(address) for _, address in self.pictures)


class SampleFrames:
    """The frames of the folder `samples` of a run: `step-STEP.png`, and the pictures in folders `step-STEP`.

    Where they would be too many or too large for a page, every second, fourth, ... of them is left out, and the last one stays.
    What has been read once is kept.
    """

    def __init__(self, folder: Path):
        self._folder, self._stride = folder, 1
        self._read: dict[int, Frame] = {}

    def until(self, step: int) -> list[Frame]:
        """Those of steps up to `step`, in order."""
        there = sorted(each for each in self._steps() if each[0] <= step)
        while True:
            chosen = [each for number, each in enumerate(there) if number % self._stride == 0 or each is there[-1]]
            frames = [self._frame(*each) for each in chosen]
            if len(frames) <= MAX_FRAMES and sum(frame.num_bytes for frame in frames) <= MAX_BYTES or len(frames) < 3:
                break
            self._stride *= 2
        self._read = {frame.step: frame for frame in frames}
        return [frame for frame in frames if frame.pictures]

    def _steps(self) -> Iterator[tuple[int, Path]]:
        for path in self._folder.glob("step-*"):
            if match := _STEP.fullmatch(path.name):
                yield int(match[1]), path

    def _frame(self, step: int, path: Path) -> Frame:
        if step not in self._read:
            paths = sorted(path.glob("[!.]*.png")) if path.is_dir() else [path]
            names = [each.stem if path.is_dir() else "samples" for each in paths]
            encoded = zip(names, map(picture_address, paths), strict=True)
            self._read[step] = Frame(step, tuple((name, address) for name, address in encoded if address))
        return self._read[step]


def picture_address(path: Path) -> str:
    """A picture as an address that has its content: the PNG itself, or a JPEG of one that is large. Empty if it cannot be read."""
    try:
        content = path.read_bytes()
        if len(content) <= MAX_PNG_BYTES:
            return f"data:image/png;base64,{base64.b64encode(content).decode()}"
        with Image.open(io.BytesIO(content)) as picture:
            picture.thumbnail((MAX_SIDE, MAX_SIDE))
            packed = io.BytesIO()
            on_white(picture).save(packed, "JPEG", quality=JPEG_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"
    except (OSError, ValueError):
        return ""
