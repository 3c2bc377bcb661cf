"""The results of a sweep: kept in a file, and shown as a table and a figure."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.evaluation.measured_rows import MeasuredRows
from diffusers_ext.evaluation.report import names_of
from diffusers_ext.figures import save_picture, scale_to


KEYS = ("scheduler", "guidance_scale", "num_inference_steps")

# The measures that the table shows, of those that there are; the figure shows the first and the second.
SHOWN = (
    "frechet_distance",
    "label_accuracy",
    "kernel_distance",
    "feature_precision",
    "feature_recall",
    "pixel_precision",
    "pixel_recall",
    "value_precision",
    "value_recall",
)
LINES = ("-", "--", "-.", ":")


class SweepResults(MeasuredRows):
    """The measures of each cell, in `results.json`; `.md` and `.png` beside it are a table and a figure.

    Args:
        path: Of the first.
        made_with: What all cells share.
        command: That made them.
    """

    def __init__(self, path: Path, made_with: dict, command: str):
        super().__init__(path, made_with, command, KEYS)

    def save(self) -> None:
        """Writes the three files, each of them complete or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = f"{self.describe()}\n\n{self.table()}\n\nMade by `{self.command}`."
        for path, content in (
            (self.path, json.dumps(self.contents(), indent=2)),
            (self.path.with_suffix(".md"), text),
        ):
            with atomic_write(path) as partial:
                partial.write_text(content + "\n")
        draw_sweep(self.rows, self.names, self.path.with_suffix(".png"), self.held_out)

    @property
    def names(self) -> dict[str, str]:
        """Of the measures that are shown, as the field calls them."""
        names = names_of(self.made_with["features"])
        return {name: names[name] for name in SHOWN if any(name in row for row in self.rows)}

    def describe(self) -> str:
        """What was measured, in a sentence or two."""
        made, reference = self.made_with, self.made_with["reference"]
        seeds = made["seeds"]
        sets = f"{len(seeds)} sets of {made['num_images']}" if len(seeds) > 1 else f"{made['num_images']}"
        text = f"{sets} images a cell, image i of each from the same noise"
        if len(seeds) > 1:
            text += f" (seeds {seeds[0]} to {seeds[-1]}; mean and standard deviation over the sets)"
        features = made["features"]
        within = f", in the features of {features.get('name') or features.get('folder')}" if features else ""
        return (
            f"{text}. Against {reference['num_images']} images of {Path(reference['dataset_name']).name}, split "
            f"{reference['dataset_split']}{within}. Calls are of the networks, for an image: two a step for Heun's method, and two "
            "for guidance."
        )

    def table(self) -> str:
        """Markdown, a row for each cell, the cells of a sampler by rising calls."""
        titles = ["scheduler", "guidance", "steps", "calls", *self.names.values(), "seconds"]
        lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
        for line in lines_of(self.rows):
            for row in line:
                scale = "default" if row["guidance_scale"] is None else f"{row['guidance_scale']:g}"
                cells = [row["scheduler"], scale, f"{row['num_inference_steps']}", f"{row['calls']:.4g}"]
                cells += [_format(row, name) for name in self.names]
                lines.append("| " + " | ".join([*cells, f"{row['seconds']:g}"]) + " |")
        if self.held_out is not None:
            cells = ["held-out real images", "", "", "", *(_format(self.held_out, name) for name in self.names), ""]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def name_of(scheduler: str, guidance_scale: float | None) -> str:
    """Of a line of the figure."""
    return scheduler if guidance_scale is None else f"{scheduler}, guidance {guidance_scale:g}"


def lines_of(rows: Sequence[dict]) -> list[list[dict]]:
    """The cells of each scheduler and scale, by rising calls."""
    lines = {}
    for row in rows:
        lines.setdefault((row["scheduler"], row["guidance_scale"]), []).append(row)
    return [sorted(line, key=lambda row: row["calls"]) for line in lines.values()]


def draw_sweep(rows: Sequence[dict], names: dict[str, str], path: Path, held_out: dict | None = None) -> None:
    """The first two measures over the calls of the networks: a line for each scheduler and scale, with bars of the spread."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    measures = list(names)[:2]
    figure = Figure(figsize=(5.5 * len(measures), 4.5), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    schedulers = list(dict.fromkeys(row["scheduler"] for row in rows))
    scales = list(dict.fromkeys(row["guidance_scale"] for row in rows))
    calls = sorted({row["calls"] for row in rows})
    for axes, measure in zip(panels, measures, strict=True):
        for line in lines_of(rows):
            line = [row for row in line if measure in row]
            if not line:
                continue
            scheduler, scale = line[0]["scheduler"], line[0]["guidance_scale"]
            spread = [row.get("spread", {}).get(measure, 0.0) for row in line]
            axes.errorbar(
                *([row["calls"] for row in line], [row[measure] for row in line]),
                yerr=spread if any(spread) else None,
                capsize=3,
                marker="o",
                markersize=4,
                color=f"C{schedulers.index(scheduler) % 10}",
                linestyle=LINES[scales.index(scale) % len(LINES)],
                label=name_of(scheduler, scale),
            )
        if held_out is not None and measure in held_out:
            axes.axhline(held_out[measure], color="grey", linestyle=":", label="held-out real images")
        axes.set_xscale("log", base=2)
        axes.set_xticks(_spaced(calls))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("calls of the networks for an image")
        axes.set_ylabel(names[measure])
        scale_to(axes, np.array([row[measure] for row in rows if measure in row]))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save_picture(figure, path)


def _spaced(values: Sequence[float], ratio: float = 1.3) -> list[float]:
    """Those of rising values that are far enough apart to be written below an axis."""
    kept = []
    for value in values:
        if not kept or value >= ratio * kept[-1]:
            kept.append(value)
    return kept


def _format(row: dict, name: str) -> str:
    if name not in row:
        return "-"
    spread = row.get("spread", {}).get(name)
    return f"{row[name]:.4g}" + ("" if spread is None else f" ± {spread:.2g}")
