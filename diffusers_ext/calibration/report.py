"""What a calibration found: a file of figures, a picture, and a section of the card."""

import json
from collections.abc import Mapping
from pathlib import Path

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.figures import save_picture
from diffusers_ext.hub.cards import CALIBRATION_FILE


PICTURE_FILE = "calibration.png"
NAMED_INTERVALS = 4

TIMESTEPS = {"spacing": "the scheduler's own timesteps", "trajectory": "timesteps by the trajectory"}


def write(folder: Path, report: Mapping) -> None:
    """Writes `calibration.json`, complete or not at all, and `calibration.png` if there is something to show."""
    picture = folder / PICTURE_FILE
    report = {**report, "lines": describe(report), "picture": PICTURE_FILE if draw(report, picture) else None}
    with atomic_write(folder / CALIBRATION_FILE) as partial:
        partial.write_text(json.dumps(report, indent=2) + "\n")


def describe(report: Mapping) -> list[str]:
    """The report in lines of Markdown."""
    lines, bits = [], report.get("bits_per_dim_of_steps", {})
    if "quick_features" in report:
        quick = report["quick_features"]
        how = "a classifier" if quick["by_label"] else "a network without labels"
        lines.append(
            f"Images were compared in the features of {how} that was trained for it, in {quick['num_steps']} steps and "
            f"{quick['seconds']:.0f} s; distances in others are on another scale."
        )
    if "analytic_variance" in report:
        lines.append(
            f"The mean squared error of the predicted x_0, for the analytic variance, was measured on "
            f"{report['analytic_variance']['num_images']} training images."
        )
    if "10" in bits:
        lines.append(
            f"By these errors the bound of 10 steps with the analytic variance is {bits['10']['spacing']:.2f} bits/dim at the "
            f"scheduler's own timesteps and {bits['10']['chosen']:.2f} at those chosen by it."
        )
    distances = report["distance_from_fine_trajectory"]
    shown = [number for number in ("5", "10", str(report["num_inference_steps"])) if number in distances]
    if shown:
        each = ", ".join(
            f"{distances[number]['chosen']:.3g} and {distances[number]['spacing']:.3g} in {number} steps"
            for number in dict.fromkeys(shown)
        )
        lines.append(
            "Without noise, images end as far as this from a fine trajectory, by root mean square, with the timesteps by it and "
            f"with the scheduler's own: {each}."
        )
    guidance = report.get("guidance")
    if guidance:
        chosen, tried = guidance["chosen"], len(guidance["tried"])
        what = "no guidance"
        if chosen["scale"] != 1:
            where = "in all steps"
            if (chosen["start"], chosen["stop"]) != (0, 1):
                where = f"in the part from {chosen['start']:g} to {chosen['stop']:g} of the steps"
            what = f"a guidance scale of {chosen['scale']:g} {where}"
        lines.append(
            f"Of {tried} guidances, each of {guidance['num_images']} images from the same noise in {guidance['num_inference_steps']} "
            f"steps, {what} was chosen by the Fréchet distance from {guidance['source']}."
        )
    averages = report.get("averages")
    if averages and averages["tried"]:
        chosen = averages["chosen"]
        what = "the weights as saved" if chosen is None else f"the average of ema_std {chosen:g}"
        lines.append(f"Of {len(averages['tried'])} averages of the weights, {what} was chosen.")
    if "steps" in report:
        lines.append(_steps_in_words(report["steps"]))
    for row in report.get("gained", ()):
        before, after = (row[name]["frechet_distance"] for name in ("before", "after"))
        accuracy = row["after"].get("label_accuracy")
        right = (
            "" if accuracy is None else f", with {row['before']['label_accuracy']:.1%} and {accuracy:.1%} right labels"
        )
        lines.append(
            f"In {row['num_inference_steps']} steps, on {row['num_images']} images and real ones that nothing was chosen by, the "
            f"Fréchet distance is {after:.3g}, where it was {before:.3g}{right}."
        )
    lines += report.get("left_out", ())
    return lines


def _steps_in_words(found: Mapping) -> str:
    """Which order and timesteps were chosen, and by what."""

    def name(row: Mapping) -> str:
        order = {1: "first", 2: "second"}[row["order"]]
        return f"{order} order at {TIMESTEPS[row['timesteps']]}"

    def distance(row: Mapping) -> float:
        return next(each["frechet_distance"] for each in found["tried"] if row.items() <= each.items())

    own, chosen = {"order": 1, "timesteps": "spacing"}, found["chosen"]
    beside = f" for {distance(own):.3g} of {name(own)}" if chosen != own else ""
    return (
        f"Of {len(found['tried'])} ways to make {found['num_inference_steps']} steps, each of {found['num_images']} images from the "
        f"same noise, steps of {name(chosen)} were chosen by the Fréchet distance from {found['source']}: {distance(chosen):.3g}"
        f"{beside}.{_few(found)}"
    )


def _few(found: Mapping) -> str:
    """From how many steps on timesteps by the trajectory hold, if any do."""
    if "fewest_by_trajectory" not in found:
        return ""
    tried = [
        f"{row['trajectory']:.3g} for {row['spacing']:.3g} in {row['num_inference_steps']}"
        for row in found["few_tried"]
    ]
    those = f" ({', '.join(tried)})" if tried else ""
    return (
        f" These timesteps hold from {found['fewest_by_trajectory']} steps on, and the scheduler's own below{those}."
    )


def draw(report: Mapping, path: Path) -> bool:
    """The curves by which guidance and timesteps were chosen; whether there are any."""
    from matplotlib.figure import Figure

    guidance, distances = report.get("guidance"), report["distance_from_fine_trajectory"]
    panels = []
    if guidance and len(guidance["tried"]) > 1:
        panels.append(lambda axes: _draw_guidance(axes, guidance))
    if len(distances) > 1:
        panels.append(lambda axes: _draw_distances(axes, distances))
    if not panels:
        return False
    figure = Figure(figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for draw_panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw_panel(axes)
    save_picture(figure, path)
    return True


def _draw_distances(axes, distances: Mapping) -> None:
    """How far images end from a fine trajectory over the number of steps."""
    numbers = [int(number) for number in distances]
    for name, label in (("spacing", "the scheduler's own"), ("chosen", "by the trajectory")):
        axes.plot(numbers, [distances[str(number)][name] for number in numbers], marker=".", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("distance from a fine trajectory, root mean square")
    axes.legend(frameon=False)


def _draw_guidance(axes, guidance: Mapping) -> None:
    """The distance over the scale, a line for each interval that was tried with several scales."""
    groups: dict[tuple, list] = {}
    none = next((row for row in guidance["tried"] if row["scale"] == 1), None)
    for row in guidance["tried"]:
        if row["scale"] != 1:
            groups.setdefault((row["start"], row["stop"]), []).append(row)
    for (start, stop), rows in sorted(groups.items(), key=lambda group: -len(group[1])):
        rows = sorted(rows if none is None else [none, *rows], key=lambda row: row["scale"])
        label = "all steps" if (start, stop) == (0, 1) else f"{start:g} to {stop:g} of the steps"
        is_line = (
            len(rows) > 2 or len(groups) <= NAMED_INTERVALS
        )  # of many, those of one scale are points without a name
        style = {"marker": ".", "label": label} if is_line else {"marker": "x", "linestyle": "", "color": "grey"}
        rows = rows if is_line or none is None else rows[1:]
        axes.plot([row["scale"] for row in rows], [row["frechet_distance"] for row in rows], **style)
    if none is not None:
        axes.axhline(none["frechet_distance"], color="grey", linestyle="--", label="no guidance")
    chosen = guidance["chosen"]
    axes.axvline(chosen["scale"], color="grey", linestyle=":", label="chosen")
    axes.set_xlabel("guidance scale")
    axes.set_ylabel("Fréchet distance from the images to choose by")
    axes.legend(frameon=False, fontsize="small")
