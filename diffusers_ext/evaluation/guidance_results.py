"""The results of a comparison of ways to guide: kept in a file, and shown as a table, lines and a figure."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.evaluation.guidance_comparison import METHODS, UNGUIDED, UNGUIDED_TITLE
from diffusers_ext.evaluation.measured_rows import MeasuredRows
from diffusers_ext.figures import save_picture


class Results(MeasuredRows):
    """The measures of each method and scale, in `guidance.json`, with a table and a figure.

    Args:
        folder: Where the files go.
        made_with: What all sets share.
        command: That made them.
    """

    def __init__(self, folder: Path, made_with: dict, command: str):
        super().__init__(folder / "guidance.json", made_with, command, ("method", "guidance_scale"))
        self._asked = set()

    def show(self, plan: list[tuple[str, float, dict]]) -> None:
        """Puts into table and figure what this command asks for, of all that is kept."""
        self._asked = {(method, scale) for method, scale, _ in plan}

    @property
    def shown(self) -> list[dict]:
        return [row for row in self.rows if (row["method"], row["guidance_scale"]) in self._asked]

    def table(self, methods: list[str]) -> str:
        return markdown_table(self.shown, methods, self.held_out)

    def save(self, methods: list[str]) -> None:
        """Writes the three files, each of them complete or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        made = self.made_with
        text = "\n".join(
            [
                f"{made['num_images']} images of each by {made['scheduler_class']} in {made['num_inference_steps']} steps, "
                f"image i of each from the same noise, labels {made['label_proportions']}. Right labels, Fréchet distance, "
                f"precision and recall by the features of a classifier of real images of {Path(made['dataset_name']).name}.",
                "",
                self.table(methods),
                "",
                *(f"- {line}" for line in describe_best(self.shown, methods)),
                "",
                f"Made by `{self.command}`.",
            ]
        )
        contents = {self.path: json.dumps(self.contents(), indent=2), self.path.with_suffix(".md"): text}
        for path, content in contents.items():
            with atomic_write(path) as partial:
                partial.write_text(content + "\n")
        draw_comparison(self.shown, methods, self.path.with_suffix(".png"), self.held_out)


def rows_of(rows: Sequence[dict], method: str) -> list[dict]:
    """The results of a method by rising scale, with the one without guidance, which is every method's at a scale of 1."""
    return sorted((row for row in rows if row["method"] in (method, UNGUIDED)), key=lambda row: row["guidance_scale"])


def best_of(rows: Sequence[dict]) -> dict | None:
    """The result of least Fréchet distance, if there is any."""
    return min(rows, key=lambda row: row["frechet_distance"], default=None)


def num_calls(row: dict) -> float:
    """Calls of all networks an image."""
    return sum(row["calls"].values())


def saved_share(rows: Sequence[dict]) -> float | None:
    """Share of the network calls of classifier-free guidance that its interval saves, of the scales that both have."""
    full, limited = (
        {row["guidance_scale"]: num_calls(row) for row in rows if row["method"] == method}
        for method in ("cfg", "cfg_interval")
    )
    both = full.keys() & limited.keys()
    return 1 - sum(limited[scale] for scale in both) / sum(full[scale] for scale in both) if both else None


def describe_best(rows: Sequence[dict], methods: Sequence[str]) -> list[str]:
    """For each method the scale of least Fréchet distance, in a line; and what the interval saves."""
    lines = []
    for method in methods:
        best = best_of(rows_of(rows, method))
        if best is not None:
            lines.append(
                f"{METHODS[method]}: least Fréchet distance {best['frechet_distance']:.4g} at scale "
                f"{best['guidance_scale']:g}, where {best['label_accuracy']:.1%} of the labels are right and an image takes "
                f"{_calls(best)} network calls."
            )
    share = saved_share(rows)
    if share is not None:
        full, limited = (
            min(row["frechet_distance"] for row in rows_of(rows, method)) for method in ("cfg", "cfg_interval")
        )
        verdict = "no worse than" if limited <= full else "worse than"
        lines.append(
            f"The interval saves {share:.1%} of the network calls of CFG; its least distance, {limited:.4g}, is {verdict} "
            f"that of full CFG, {full:.4g}."
        )
    return lines


def markdown_table(rows: Sequence[dict], methods: Sequence[str], held_out: dict | None = None) -> str:
    """The measures of every method and scale."""
    lines = [
        "| guidance | scale | labels right | Fréchet distance | precision | recall | network calls an image |",
        "|---|---|---|---|---|---|---|",
    ]
    ordered = [row for row in rows if row["method"] == UNGUIDED]
    for method in methods:
        ordered += [row for row in rows_of(rows, method) if row["method"] == method]
    for row in ordered:
        title = METHODS.get(row["method"], UNGUIDED_TITLE)
        lines.append(f"| {title} | {row['guidance_scale']:g} | {_measures(row)} | {_calls(row)} |")
    if held_out is not None:
        lines.append(f"| held-out real images | | {_measures(held_out)} | |")
    return "\n".join(lines)


def draw_comparison(rows: Sequence[dict], methods: Sequence[str], path: Path, held_out: dict | None = None) -> None:
    """Label accuracy and Fréchet distance over the scale, a line for each method."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    measures = ("label_accuracy", "frechet_distance")
    for number, method in enumerate(methods):
        mine = rows_of(rows, method)
        if not mine:
            continue
        label = f"{METHODS[method]} ({_calls(mine[-1])} calls)"
        for axes, measure in zip(panels, measures, strict=True):
            scales, values = zip(*((row["guidance_scale"], row[measure]) for row in mine), strict=True)
            axes.plot(scales, values, marker=".", color=f"C{number}", label=label)
    for axes, measure in zip(panels, measures, strict=True):
        if held_out is not None:
            axes.axhline(held_out[measure], color="grey", linestyle=":", label="held-out real images")
        axes.set_xlabel("guidance scale")
    panels[0].set_ylabel("share of the labels that a classifier of real images finds")
    panels[1].set_ylabel("Fréchet distance in its features")
    if all(row["frechet_distance"] > 0 for row in rows):
        panels[1].set_yscale("log")
    panels[1].legend(frameon=False, fontsize="small")
    save_picture(figure, path)


def _calls(row: dict) -> str:
    names = {"denoiser": "", "weak_denoiser": " weaker", "classifier": " classifier"}
    return " + ".join(f"{row['calls'][name]:.4g}{word}" for name, word in names.items() if row["calls"].get(name))


def _measures(row: dict) -> str:
    return (
        f"{row['label_accuracy']:.1%} | {row['frechet_distance']:.4g} | {row['feature_precision']:.3f} | "
        f"{row['feature_recall']:.3f}"
    )
