"""Pictures of a run: a grid of samples, the denoising of one of them, the curve of the loss."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffusers_ext.whole_files import written_whole


if TYPE_CHECKING:
    from matplotlib.figure import Figure


MIN_SMOOTHED = 10  # lines of the log
_MARGIN, _TEXT_SIZE, _MIN_SIDE = 2, 14, 48


def labelled_grid(rows: Sequence[Tensor], names: Sequence[str] | None = None, heads: Sequence[str] | None = None):
    """A PIL image of rows of pictures, each row with its name on the left and each column with its head above.

    Small pictures are enlarged by a whole number, pixel by pixel.

    Args:
        rows: Tensors of shape `(columns, channels, height, width)`, float in [0, 1]. Of other than 1, 3 or 4 channels the
            first is shown.
        names: One for each row.
        heads: One for each column.
    """
    pictures = [[_to_pil(picture) for picture in row] for row in rows]
    width, height = pictures[0][0].size
    zoom = max(1, -(-_MIN_SIDE // min(width, height)))
    width, height = width * zoom, height * zoom
    font = ImageFont.load_default(_TEXT_SIZE)
    left = 0 if names is None else int(max(font.getlength(name) for name in names)) + 3 * _MARGIN
    top = 0 if heads is None else _TEXT_SIZE + 3 * _MARGIN
    columns = max(map(len, pictures))
    if heads is not None:
        width_of_heads = int(max(font.getlength(head) for head in heads)) + _MARGIN
    step = (max(width, width_of_heads if heads is not None else 0) + _MARGIN, height + _MARGIN)
    mode = "RGBA" if pictures[0][0].mode == "RGBA" else "RGB"
    grid = Image.new(mode, (left + columns * step[0] + _MARGIN, top + len(rows) * step[1] + _MARGIN), "white")
    draw = ImageDraw.Draw(grid)
    for column, head in enumerate(heads or []):
        draw.text((left + column * step[0] + step[0] // 2, _MARGIN), head, fill="black", font=font, anchor="ma")
    for row, line in enumerate(pictures):
        y = top + row * step[1] + _MARGIN
        if names is not None:
            draw.text((left - 2 * _MARGIN, y + height // 2), names[row], fill="black", font=font, anchor="rm")
        for column, picture in enumerate(line):
            x = left + column * step[0] + _MARGIN + (step[0] - _MARGIN - width) // 2
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
    return grid


def save_picture(picture: "Image.Image | Figure", path: Path) -> None:
    """Writes an image of PIL or a figure of matplotlib, whole or not at all."""
    with written_whole(path) as partial:
        picture.save(partial) if isinstance(picture, Image.Image) else picture.savefig(partial, dpi=120)


def _to_pil(picture: Tensor) -> Image.Image:
    array = picture.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(array if array.shape[2] in (3, 4) else np.ascontiguousarray(array[..., 0]))


def draw_loss(records: Sequence[dict[str, Any]], path: Path) -> None:
    """The loss over optimizer steps, as logged and smoothed, and on held-out images; the learning rate below it.

    Few records are drawn as points; without any there is no curve, and no file is written.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import MaxNLocator

    if not records:
        return

    steps = np.array([record["step"] for record in records])
    losses = np.array([record["loss"] for record in records])
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    # A line through fewer points than these shows nothing by itself, and there is nothing to smooth.
    is_short = len(steps) < MIN_SMOOTHED
    points = {"marker": "."} if is_short else {}
    alpha = 1.0 if is_short else 0.35
    above.plot(steps, losses, color="C0", alpha=alpha, label="mean between two lines of the log", **points)
    if not is_short:
        above.plot(steps, _smoothed(losses), color="C0", label="smoothed")
    held_out = [(record["step"], record["val_loss"]) for record in records if "val_loss" in record]
    if held_out:
        above.plot(*zip(*held_out, strict=True), color="C2", marker=".", label="on held-out images")
    if not is_short and (losses > 0).all() and all(loss > 0 for _, loss in held_out):
        above.set_yscale("log")
    above.set_ylabel("loss")
    above.legend(frameon=False)
    below.plot(steps, [record["learning_rate"] for record in records], color="C1", **points)
    below.set_ylim(bottom=0)
    below.set_ylabel("learning rate")
    below.set_xlabel("optimizer step")
    if is_short:
        below.set_xlim(0, 1.05 * steps[-1])
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    save_picture(figure, path)


def draw_loss_by_snr(rows: Sequence[dict[str, float]], path: Path) -> None:
    """The loss over the noise level, the noise on the left; without weights too, if that differs.

    Args:
        rows: With `log_snr`, `loss` and `error`, see `DenoisingObjective.curve`; and `vlb_bits_per_dim` if there is any.
    """
    from matplotlib.figure import Figure

    log_snr = [row["log_snr"] for row in rows]
    bound = "vlb_bits_per_dim" in rows[0]
    figure = Figure(figsize=(7, 6 if bound else 4), layout="constrained")
    above, *below = figure.subplots(2 if bound else 1, 1, sharex=True, squeeze=False).flatten()
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
        if all(value > 0 for line in axes.lines for value in line.get_ydata()):
            axes.set_yscale("log")
    (below[-1] if below else above).set_xlabel("log SNR of the timesteps (natural log)")
    save_picture(figure, path)


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means over a centred window of a twentieth of the curve, shorter at its ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
