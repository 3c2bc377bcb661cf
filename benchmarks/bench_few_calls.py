"""The Fréchet distance of calibrated pipelines by sampler and number of steps, with and without their guidance.

    python benchmarks/bench_few_calls.py runs/few_calls --pipelines runs/digits
    python benchmarks/bench_few_calls.py runs/few_calls --pipelines runs/seed_0 runs/seed_1 runs/seed_2 --num_steps 5 10
    python benchmarks/bench_few_calls.py runs/few_calls --pipelines runs/digits --students runs/two_steps runs/one_step

PIPELINES are runs of one recipe with several seeds, calibrated by training/calibrate.py; a cell of the table is their mean,
with the least and the largest, and how many it is of where others are of more. STUDENTS are those of training/distill.py, one
of each pipeline or several. A progressive one is shown at its own number of steps, with those of its halvings, in one row, and a
consistency model at as many of the numbers of steps as it has.
Image i of every set is made from the same noise, none of which the calibration saw, and compared with all training images. Rows
have equal calls of the network in a column: as many an image as there are steps, and one more in each step that is guided. What
the folder's `results.json` has is not measured again, so that rows and columns can be added. Beside it are `table.md` and `few_calls.png`.
"""

import argparse
import json
import statistics
import warnings
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline

import diffusers_ext
from diffusers_ext import ConsistencyScheduler, ExtDDIMScheduler, ExtDDPMScheduler
from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.evaluation.bits_per_dim import measure_bits_per_dim
from diffusers_ext.evaluation.comparison import Comparison
from diffusers_ext.evaluation.network_calls import counted_calls
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.figures import save_picture
from diffusers_ext.recipes.distillation import MOST_CONSISTENCY_STEPS
from diffusers_ext.trainer.run_folder import STAGES


PLAIN = {"optimal_timesteps": None, "variance_type": "fixed_small", "multistep_order": 1}
SOLVERS = ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "EulerDiscrete")
WAYS = ("guided", "plain")
LIKELIHOOD_TERMS = 200  # of the bound of an image: all of fewer steps, and an unbiased estimate of more


def samplers(config: dict) -> dict[str, tuple]:
    """Schedulers by name, and options of the call with them."""
    ours, chosen, of_path = diffusers_ext, config.get("optimal_timesteps"), {}
    if config.get("beta_schedule") is None and config.get("trained_betas") is None:
        flow = ours.FlowScheduler.from_config
        of_path["Euler"] = flow(config, optimal_timesteps=None, multistep_order=1), {}
        of_path["Euler, by the trajectory"] = flow(config, multistep_order=1), {}
        of_path["Euler, second order"] = flow(config, optimal_timesteps=None, multistep_order=2), {}
        of_path["second order, by the trajectory"] = flow(config, multistep_order=2), {}
        of_path["diffusers' FlowMatchEulerDiscrete"] = _stock("FlowMatchEulerDiscrete", config), {}
        return of_path | {f"diffusers' {name}": (_stock(name, config), {}) for name in SOLVERS[:2]}

    def lists_of(objective):
        return {"optimal_timesteps": {"spacing": chosen["spacing"], objective: chosen[objective]}}

    ddpm, ddim = ours.ExtDDPMScheduler.from_config, ours.ExtDDIMScheduler.from_config
    plain = ddim(config, **PLAIN).config
    return {
        "DDPM, fixed_small": (ddpm(config, **PLAIN), {}),
        "DDPM, fixed_large": (ddpm(config, **PLAIN | {"variance_type": "fixed_large"}), {}),
        "DDPM, analytic": (ddpm(config, optimal_timesteps=None), {}),
        "DDPM, analytic, by the bound": (ddpm(config, **lists_of("bound")), {}),
        "DDPM, analytic, by the trajectory": (ddpm(config, **lists_of("trajectory")), {}),
        "DDIM": (ddim(config, **PLAIN), {}),
        "analytic DDIM": (ddim(config, optimal_timesteps=None, multistep_order=1), {"eta": 1e-3}),
        "DDIM, by the trajectory": (ddim(config, multistep_order=1), {}),
        "DDIM, second order": (ddim(config, **PLAIN | {"multistep_order": 2}), {}),
        "second order, by the trajectory": (ddim(config, multistep_order=2), {}),
        **{f"diffusers' {name}": (_stock(name, plain), {}) for name in SOLVERS},
    }


def _stock(name: str, config: dict):
    return getattr(diffusers, f"{name}Scheduler").from_config(config)


def measure(comparison: Comparison, pipe, number: int, settings: dict) -> dict[str, float]:
    """The Fréchet distance of a set of images in so many steps, and the calls of the network for each."""
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_autocast()  # as evaluate.py does
    with counted_calls(pipe) as counts:
        images = comparison.generate(pipe, number, settings)
    distance = comparison.measure(images)["frechet_distance"]
    return {"distance": distance, "calls": counts["denoiser"] / comparison.num_images}


def measure_all(arguments: argparse.Namespace, comparison: Comparison, results: dict, save) -> None:
    """Every cell that is missing, those of few steps first; a pipeline is loaded if it has one."""
    cells = [
        (way, n, path) for way in arguments.ways for n in sorted(arguments.num_steps) for path in arguments.pipelines
    ]
    for way, number, path in cells:
        missing = {}
        for name, sampler in samplers(ExtDDIMScheduler.load_config(path, subfolder="scheduler")).items():
            if name in (arguments.samplers or [name]):
                done = results[way].setdefault(name, {}).setdefault(str(number), {})
                missing |= {} if path in done else {name: (done, *sampler)}
        if not missing:
            continue
        pipe = load_pipeline(path)
        defaults = dict(pipe.config.call_defaults or {})
        defaults.pop("num_inference_steps", None)
        guidance = {"guidance_scale": 1.0} if way == "plain" else defaults or {"guidance_scale": 1.0}
        for name, (done, scheduler, more) in missing.items():
            pipe.scheduler = scheduler
            done[path] = measure(comparison, pipe, number, guidance | more)
            print(f"{way}, {name}, {number} steps, {path}: {done[path]}", flush=True)
            save()
    for student in arguments.students:
        for name, number, path in cells_of_student(student, arguments.num_steps):
            done = results[arguments.ways[0]].setdefault(name, {}).setdefault(str(number), {})
            if path not in done:
                done[path] = measure(comparison, load_pipeline(path), number, {"guidance_scale": 1.0})
                print(f"{name}, {number} steps, {path}: {done[path]}", flush=True)
                save()


def cells_of_student(student: str, num_steps: list[int]) -> list[tuple[str, int, str]]:
    """The row, the number of steps, and the folder of each of its cells."""
    if ExtDDIMScheduler.load_config(student, subfolder="scheduler")["_class_name"] == ConsistencyScheduler.__name__:
        numbers = [number for number in sorted(num_steps) if number <= MOST_CONSISTENCY_STEPS]
        return [("student, consistency", number, student) for number in numbers]
    folders = [student, *map(str, sorted(Path(student, STAGES).glob("*_steps")))]
    numbers = [DiffusionPipeline.load_config(each)["call_defaults"]["num_inference_steps"] for each in folders]
    return [("students, progressive", number, each) for number, each in zip(numbers, folders, strict=True)]


def distances_of(cell: dict) -> list[float]:
    return [each["distance"] for each in cell.values()]


def table(rows: dict[str, dict]) -> str:
    """A row for each sampler, a column for each number of steps."""
    numbers = sorted({int(number) for cells in rows.values() for number, cell in cells.items() if cell})
    lines = [f"| sampler | {' | '.join(f'{number} steps' for number in numbers)} |", "|---" * (len(numbers) + 1) + "|"]
    most = max((len(cell) for cells in rows.values() for cell in cells.values()), default=0)
    for name, cells in rows.items():
        texts = [cell_text(distances_of(cells.get(str(number), {})), most) for number in numbers]
        if any(texts):
            lines.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def cell_text(values: list[float], most: int) -> str:
    """The mean of the pipelines, its range, and their number where other cells are of more."""
    if not values:
        return ""
    notes = [f"{min(values):.3g} to {max(values):.3g}"] if len(values) > 1 else []
    notes += [f"{len(values)} of {most}"] if len(values) < most else []
    return f"{statistics.mean(values):.3g}" + (f" ({', '.join(notes)})" if notes else "")


def draw(results: dict, held_out: float, path: Path) -> None:
    """The distance over the number of steps, guided and without; samplers of diffusers are dashed."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    names = list(dict.fromkeys(name for way in WAYS for name in results[way]))
    colours = {name: colormaps["tab20"](index % 20) for index, name in enumerate(names)}
    ways = [way for way in WAYS if any(any(cells.values()) for cells in results[way].values())]
    figure = Figure(figsize=(6.4 * len(ways), 4.8), layout="constrained")
    panels = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for axes, way in zip(panels, ways, strict=True):
        for name, cells in results[way].items():
            points = sorted(
                (int(number), statistics.mean(distances_of(cell))) for number, cell in cells.items() if cell
            )
            style = {"linestyle": "--" if name.startswith("diffusers'") else "-", "marker": "o", "markersize": 3}
            style |= {"marker": "*", "markersize": 11} if name.startswith("student") else {}
            axes.plot(*zip(*points, strict=True), color=colours[name], label=name, **style) if points else None
        axes.axhline(held_out, color="grey", linestyle=":", label="held-out real images")
        axes.set(xscale="log", yscale="log", xlabel="steps")
        if len(ways) > 1:
            axes.set_title({"guided": "guided", "plain": "without guidance"}[way])
        ticks = sorted({int(number) for cells in results[way].values() for number, cell in cells.items() if cell})
        axes.set_xticks(ticks, labels=[str(number) for number in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("Fréchet distance from the training images")
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    held_out_last = sorted(lines, key=lambda name: name.startswith("held-out"))
    figure.legend([lines[name] for name in held_out_last], held_out_last, loc="outside right", frameon=False)
    save_picture(figure, path)


def likelihood_samplers(config: dict) -> dict[str, ExtDDPMScheduler]:
    """By variance and timesteps: those that end at the cleanest one, as in the papers, those that begin at the noisiest, and
    those that calibration chose for the bound."""
    ancestral, chosen = ExtDDPMScheduler.from_config, config.get("optimal_timesteps") or {}
    rows = {
        f"{variance}, {spacing}": ancestral(config, **PLAIN | {"variance_type": variance, "timestep_spacing": spacing})
        for spacing in ("leading", "trailing")
        for variance in ("fixed_small", "fixed_large", "analytic")
    }
    if "bound" in chosen:
        lists = {name: chosen[name] for name in ("spacing", "bound")}
        rows["analytic, by the bound"] = ancestral(config, variance_type="analytic", optimal_timesteps=lists)
    return rows


def likelihoods(arguments: argparse.Namespace, real) -> str:
    """Bits/dim of held-out images under the bound of as many steps, of the first pipeline."""
    lines = [f"| variance, timesteps | {' | '.join(f'{n} steps' for n in arguments.likelihood_steps)} |"]
    lines.append("|---" * (1 + len(arguments.likelihood_steps)) + "|")
    pipe = load_pipeline(arguments.pipelines[0])
    for name, scheduler in likelihood_samplers(dict(pipe.scheduler.config)).items():
        pipe.scheduler, cells = scheduler, []
        for number in arguments.likelihood_steps:
            bound = measure_bits_per_dim(
                pipe,
                real.held_out,
                num_images=arguments.num_likelihood_images,
                num_steps=number,
                num_terms=None if number <= LIKELIHOOD_TERMS else LIKELIHOOD_TERMS,
                show_progress=False,
            )
            cells.append(f"{bound['bits_per_dim']:.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    first, folder = arguments.pipelines[0], Path(arguments.output_dir)
    size = None if arguments.resolution is None else (arguments.resolution, arguments.resolution)
    comparison = Comparison.of(load_pipeline(first), first, arguments.num_images, arguments.features, size)
    held_out = comparison.held_out_distance
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {way: {} for way in WAYS}

    def save() -> None:
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(results, indent=1) + "\n")

    measure_all(arguments, comparison, results, save)
    texts = [f"{arguments.num_images} held-out real images: {held_out:.3g}\n"]
    texts += [f"{way}\n\n{table(results[way])}" for way in WAYS if results[way]]
    if arguments.likelihood_steps:
        texts.append(likelihoods(arguments, comparison.real))
    draw(results, held_out, folder / "few_calls.png")
    with atomic_write(folder / "table.md") as partial:
        partial.write_text("\n".join(texts))
    print("\n".join(texts))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir")
    parser.add_argument("--pipelines", nargs="+", required=True)
    parser.add_argument("--students", nargs="+", default=[])
    parser.add_argument("--samplers", nargs="+", help="by name; by default all")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--num_steps", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--features", help="folder of training/train_features.py; by default the one that is kept")
    parser.add_argument(
        "--resolution", type=int, help="compare at this size, smaller images on a border like the data's"
    )
    parser.add_argument("--likelihood_steps", type=int, nargs="*", default=[], help="steps of the bound in bits/dim")
    parser.add_argument("--num_likelihood_images", type=int, default=100)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
