"""Pictures of a run: a grid of samples, the denoising of one of them, the curve of the loss."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.curves import are_sequences, curve_grid
from diffusers_ext.lettering import font_of, wrapped


if TYPE_CHECKING:
    from matplotlib.figure import Figure


_MARGIN, _TEXT_SIZE, _LINE = 2, 14, 17
_MIN_SIDE = 64  # pixels, below which a picture is hard to look at
_SMOOTHED_FROM = 20  # points of a curve
_LOG_FROM = 4  # times that the largest value is the smallest
_NAME_WIDTH, _HEAD_WIDTH = 240, 72  # pixels, beyond which text is broken into lines


def enlarged(picture: Image.Image, min_side: int = _MIN_SIDE) -> Image.Image:
    """A small picture, each pixel as a square of them, so that its shorter side has at least `min_side` pixels."""
    zoom = max(1, -(-min_side // min(picture.size)))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def labelled_grid(
    rows: Sequence[Tensor],
    names: Sequence[str] | None = None,
    heads: Sequence[str] | None = None,
    title: str | None = None,
) -> Image.Image:
    """A PIL image of rows of pictures, each row with its name on the left and each column with its head above.

    Small pictures are enlarged by a whole number, pixel by pixel. Sequences are drawn as curves (`curve_grid`).

    Args:
        rows: Tensors of shape `(columns, channels, height, width)`, float in [0, 1]. Of other than 1, 3 or 4 channels the
            first is shown. Or of shape `(columns, channels, length)`, sequences in any unit.
        names: One for each row.
        heads: One for each column.
        title: Above all of it.
    """
    if are_sequences(rows):
        return curve_grid(rows, names, heads, title)
    pictures = [[enlarged(_to_pil(picture)) for picture in row] for row in rows]
    width, height = pictures[0][0].size
    columns = max(map(len, pictures))
    names = [_Text(name, _NAME_WIDTH, max(1, height // _LINE)) for name in names or []]
    heads = [_Text(head, max(width, _HEAD_WIDTH), 3) for head in heads or []]
    left = max((name.width for name in names), default=-3 * _MARGIN) + 3 * _MARGIN
    step = (max([width, *(head.width for head in heads)]) + _MARGIN, height + _MARGIN)
    title = None if title is None else _Text(title, left + columns * step[0] - _MARGIN, 4)
    head_top = 0 if title is None else title.height + 3 * _MARGIN
    top = head_top + max((head.height + 3 * _MARGIN for head in heads), default=0)

    mode = "RGBA" if any(picture.mode == "RGBA" for row in pictures for picture in row) else "RGB"
    grid = Image.new(mode, (left + columns * step[0] + _MARGIN, top + len(rows) * step[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    if title is not None:
        title.write(draw, (2 * _MARGIN, _MARGIN), "la")
    for column, head in enumerate(heads):
        head.write(draw, (left + column * step[0] + step[0] // 2, head_top + _MARGIN), "ma")
    for row, line in enumerate(pictures):
        y = top + row * step[1] + _MARGIN
        if names:
            names[row].write(draw, (left - 2 * _MARGIN, y + height // 2), "rm")
        for column, picture in enumerate(line):
            grid.paste(picture, (left + column * step[0] + _MARGIN + (step[0] - _MARGIN - width) // 2, y))
    return grid


class _Text:
    """A text in a font that has its letters, in lines of at most a width.

    Attributes:
        width, height: In pixels.
    """

    def __init__(self, text: str, max_width: int, max_lines: int):
        text, self._font = font_of(text, _TEXT_SIZE)
        self._text = wrapped(text, self._font, max_width, max_lines)
        lines = self._text.split("\n")
        self.width, self.height = math.ceil(max(map(self._font.getlength, lines))), len(lines) * _LINE

    def write(self, draw: ImageDraw.ImageDraw, at: tuple[int, int], anchor: str) -> None:
        align = {"l": "left", "m": "center", "r": "right"}[anchor[0]]
        draw.multiline_text(at, self._text, fill="black", font=self._font, anchor=anchor, align=align)


def on_white(picture: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, what is transparent in it shown on white."""
    if picture.mode == "RGB":
        return picture
    picture = picture.convert("RGBA")
    shown = Image.new("RGB", picture.size, "white")
    shown.paste(picture, mask=picture.getchannel("A"))
    return shown


def save_picture(picture: "Image.Image | Figure", path: Path) -> None:
    """Writes an image of PIL or a figure of matplotlib; a file that is there is complete."""
    with atomic_write(path) as partial:
        picture.save(partial) if isinstance(picture, Image.Image) else picture.savefig(partial, dpi=120)


ANIMATION_FORMATS = ("gif", "mp4")


def check_animation_format(format: str) -> None:
    """Refuses a format that cannot be written here, before anything long begins.

    Raises:
        ValueError: if it is none of `ANIMATION_FORMATS`, or mp4 without what writes it.
    """
    if format not in ANIMATION_FORMATS:
        raise ValueError(f"an animation must be {' or '.join(ANIMATION_FORMATS)}, got {format}")
    missing = [name for name in ("imageio", "imageio_ffmpeg") if format == "mp4" and not find_spec(name)]
    if missing:
        raise ValueError("mp4 needs imageio with ffmpeg (pip install 'imageio[ffmpeg]'): install it, or take gif")


def save_animation(
    frames: Sequence[Image.Image], path: Path, frames_per_second: float = 10, hold: float = 1.0
) -> None:
    """Writes pictures of one size as a GIF, which repeats itself, or an MP4; a file that is there is complete.

    Args:
        path: Its suffix is the format.
        hold: Seconds more that the last frame stays.
    """
    check_animation_format(path.suffix.removeprefix("."))
    num_held = round(hold * frames_per_second)
    with atomic_write(path) as partial:
        if path.suffix == ".gif":
            durations = [round(1000 / frames_per_second)] * len(frames)
            durations[-1] += round(1000 * hold)
            first, *others = (frame.convert("RGB") for frame in frames)
            first.save(partial, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
        else:
            import imageio.v3 as imageio

            shown = [*frames, *[frames[-1]] * num_held]
            pixels = np.stack([np.asarray(ImageOps.pad(frame.convert("RGB"), _even(frame.size))) for frame in shown])
            options = {"plugin": "FFMPEG", "extension": ".mp4", "fps": frames_per_second, "macro_block_size": 2}
            partial.write_bytes(imageio.imwrite("<bytes>", pixels, **options))


def _even(size: tuple[int, int]) -> tuple[int, int]:
    """The next size that halves, as the colours of a film are kept."""
    width, height = size
    return width + width % 2, height + height % 2


def _to_pil(picture: Tensor) -> Image.Image:
    array = picture.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array if array.shape[2] in (3, 4) else np.ascontiguousarray(array[..., 0]))


def _margins(figure: "Figure", left: float = 1.0) -> dict[str, float]:
    """Room for labels of axes that stand above one another: matplotlib's own search for it takes half of the drawing's time.

    Args:
        left: In inches, for the labels of the vertical axes.
    """
    width, height = figure.get_size_inches()
    return {
        "left": left / width,
        "right": 1 - 0.15 / width,
        "bottom": 0.55 / height,
        "top": 1 - 0.15 / height,
        "hspace": 0.12,
    }


def draw_loss(records: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss over optimizer steps, as logged and smoothed, and on held-out images; the learning rate below it.

    A short run is shown as the points that it is, without smoothing; without records no file is written.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    if not records:
        return

    steps = np.array([record["step"] for record in records])
    losses = np.array([record["loss"] for record in records])
    short = len(records) < _SMOOTHED_FROM
    figure = Figure(figsize=(7, 4.5))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1), gridspec_kw=_margins(figure))
    dots = {"marker": "."} if short else {"alpha": 0.35}
    above.plot(steps, losses, color="C0", label="mean between two lines of the log", **dots)
    if not short:
        above.plot(steps, smoothed(losses), color="C0", label="smoothed")
    held_out = [(record["step"], record["val_loss"]) for record in records if "val_loss" in record]
    if held_out:
        above.plot(*zip(*held_out, strict=True), color="C2", marker="o", markersize=4, label="on held-out images")
    scale_to(above, np.array([*losses, *(loss for _, loss in held_out)]))
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.plot(steps, [record["learning_rate"] for record in records], color="C1", marker="." if short else None)
    below.set_ylim(0, 1.1 * max(record["learning_rate"] for record in records) or 1)
    below.set_ylabel("learning rate")
    below.set_xlabel("optimizer step")
    below.set_xlim(left=0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    save_picture(figure, path)


def scale_to(axes, values: np.ndarray) -> None:
    """A logarithmic axis for values that span some, with labels that can be read."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if not ((values > 0).all() and values.max() > _LOG_FROM * values.min()):  # false for NaN too
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_loss_by_snr(rows: Sequence[dict[str, float]], path: Path) -> None:
    """The loss over the noise level, the noise on the left; without weights too, if that differs.

    Args:
        rows: With `log_snr`, `loss` and `error`, see `LossRecord.curve`; and `vlb_bits_per_dim` if there is any.
    """
    from matplotlib.figure import Figure

    log_snr = [row["log_snr"] for row in rows]
    bound = "vlb_bits_per_dim" in rows[0]
    figure = Figure(figsize=(7, 6 if bound else 4))
    rows_of_axes = 2 if bound else 1
    above, *below = figure.subplots(
        rows_of_axes, 1, sharex=True, squeeze=False, gridspec_kw=_margins(figure)
    ).flatten()
    loss, error = ([row[name] for row in rows] for name in ("loss", "error"))
    above.plot(log_snr, loss, color="C0", marker=".", label="loss")
    if loss != error:
        above.plot(log_snr, error, color="C1", marker=".", label="squared error of the output, without weights")
    above.legend(frameon=False)
    above.set_ylabel("mean loss")
    for axes in below:
        axes.plot(log_snr, [row["vlb_bits_per_dim"] for row in rows], color="C2", marker=".")
        axes.set_ylabel("timesteps times the\nbound's term, bits/dim")
    for axes in (above, *below):
        scale_to(axes, np.concatenate([line.get_ydata() for line in axes.lines]))
    (below[-1] if below else above).set_xlabel("log SNR of the timesteps (natural log)")
    save_picture(figure, path)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a centred window of a twentieth of the curve, shorter at its ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
