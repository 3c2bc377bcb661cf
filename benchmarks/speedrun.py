"""What makes a small diffusion model good soonest: recipes trained for the same time, and the distance of their images.

    python benchmarks/speedrun.py runs/speedrun --dataset_name path/to/fashion_mnist --resolution 32 --minutes 10
    python benchmarks/speedrun.py runs/speedrun --rows base linear --seeds 0 1 --minutes 4 -- --hidden_size 128 --num_layers 4

Each row of `ROWS` is `training/train_ddpm.py` with its options, for each seed; what comes after `--` is given to all. Image i of
every set is made from the same noise, and compared with all training images in the features of one classifier, which is trained
first if `--features` names none. A row may train on smaller images: its own are then compared on a border like that of the data.
A run whose pipeline is in its folder is not trained again. The folder gets `results.json`, `table.md`, and `rows.png`, in which
each row of pictures is one recipe.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import PartialState
from PIL import Image

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.evaluation.comparison import Comparison
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.hub.cards import describe_machine


ROOT = Path(__file__).resolve().parents[1]
SHOWN = 16  # images of a row of the picture

# Options of train_ddpm.py by the name of the recipe. Those of `base` are of all of them, and the others differ from it in what
# they are named after.
BASE = "--path linear --optimizer muon"
ROWS: dict[str, str] = {
    "base": "",
    "cosine": "--path cosine",
    "logit_normal": "--timestep_sampling logit_normal",
    "shift_2": "--timestep_shift 2",
    "x_prediction": "--prediction_type sample --loss_weighting velocity",
    "adamw": "--optimizer adamw",
    "muon_0.01": "--muon_learning_rate 0.01",
    "muon_0.04": "--muon_learning_rate 0.04",
    "rope": "--position_embedding rope",
    "rms_norm": "--norm rms",
    "qk_norm": "--qk_norm",
    "swiglu": "--mlp swiglu",
    "value_residual": "--value_residual",
    "conv_stem": "--patch_embedding conv",
    "long_skips": "--long_skips",
    "internal_guidance": "--internal_guidance_layer 2",
    "batch_16": "--train_batch_size 16",
    "batch_64": "--train_batch_size 64",
    "learning_rate_2e-3": "--learning_rate 2e-3",
    "stable_decay": "--lr_scheduler warmup_stable_decay",
    "flip": "--random_flip",
    "patch_2": "--patch_size 2",
    "resolution_28": "--resolution 28",  # that of MNIST's kind, without the border to 32
    "model_guidance": "--model_guidance_scale 4",
    "best": "--resolution 28 --learning_rate 2e-3 --timestep_sampling logit_normal --model_guidance_scale 3",
    # Where bf16 is fast, as with AMX, a network of three times the size has steps enough in ten minutes.
    "best_192": "--resolution 28 --learning_rate 2e-3 --timestep_sampling logit_normal --model_guidance_scale 2.5 "
    "--hidden_size 192 --num_layers 6",
    "together": "--mlp swiglu --value_residual --long_skips --timestep_sampling logit_normal",
}

# Keywords of the pipeline's call that belong to a recipe, at no further call of the network.
CALLS = {"internal_guidance": {"internal_guidance_scale": 1.4}}


def options_of(name: str) -> list[str]:
    return shlex.split(f"{BASE} {ROWS[name]}")


def train(name: str, folder: Path, seed: int, arguments: argparse.Namespace) -> None:
    """One run, unless its pipeline is there."""
    if (folder / "model_index.json").is_file():
        return
    command = [sys.executable, f"{ROOT}/training/train_ddpm.py", "--dataset_name", arguments.dataset_name]
    command += ["--resolution", str(arguments.resolution), "--model", "dit", "--seed", str(seed), "--no-calibrate"]
    command += ["--max_train_time", f"{arguments.minutes}m", "--output_dir", str(folder), "--overwrite_output_dir"]
    command += [*arguments.common, *options_of(name)]
    print(f"\n{name}, seed {seed}: {shlex.join(command[1:])}", flush=True)
    with (folder.parent / f"{folder.name}.log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{name} failed, see {log.name}")


class Judge:
    """Measures runs by the images that they make of the same noise."""

    def __init__(self, pipe, run: Path, arguments: argparse.Namespace):
        self.num_steps = arguments.num_inference_steps
        size = (arguments.resolution, arguments.resolution)
        self.comparison = Comparison.of(pipe, run, arguments.num_images, arguments.features, size)
        self.held_out = self.comparison.held_out_distance

    def measure(self, pipe, scale: float, settings: dict) -> tuple[float, float | None, torch.Tensor]:
        """The Fréchet distance, the share of the labels that the classifier reads, and the images."""
        pipe.enable_autocast()  # as evaluate.py does
        images = self.comparison.generate(pipe, self.num_steps, settings | {"guidance_scale": scale})
        measured = self.comparison.measure(images)
        return measured["frechet_distance"], measured.get("label_accuracy"), images[:SHOWN]


def last_line(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def table(results: dict, arguments: argparse.Namespace) -> str:
    """The rows, the nearest first, each with its seeds and its mean beside that of the base."""
    kept = {name: runs for name, runs in results.items() if name in arguments.rows}
    means = {
        name: {scale: statistics.mean(run["distance"][scale] for run in runs.values()) for scale in arguments.scales}
        for name, runs in kept.items()
    }
    first = arguments.scales[0]
    head = ["recipe", "options", "steps", "seconds", *(f"distance, scale {scale}" for scale in arguments.scales)]
    lines = [f"| {' | '.join([*head, 'beside base'])} |", "|---" * (len(head) + 1) + "|"]
    for name in sorted(kept, key=lambda name: means[name][first]):
        runs = [kept[name][seed] for seed in sorted(kept[name])]
        cells = [name, f"`{ROWS[name] or BASE}`"]
        cells += [", ".join(str(run["steps"]) for run in runs), ", ".join(f"{run['seconds']:.0f}" for run in runs)]
        cells += [", ".join(f"{run['distance'][scale]:.3g}" for run in runs) for scale in arguments.scales]
        cells.append(f"{means[name][first] / means['base'][first]:.2f}" if "base" in means else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rows_image(pictures: dict[str, torch.Tensor]) -> Image.Image:
    """A row of images for each recipe."""
    rows = [torch.cat(list(images), dim=-1) for images in pictures.values()]
    whole = torch.cat(rows, dim=-2).movedim(0, -1)
    return Image.fromarray(whole.squeeze(-1).numpy())


def main(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    PartialState()
    folder, judge, pictures = Path(arguments.output_dir), None, {}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {}
    arguments.scales = [str(scale) for scale in arguments.guidance_scales]
    for seed in arguments.seeds:
        for name in arguments.rows:
            run = folder / f"{name}_{seed}"
            train(name, run, seed, arguments)
            of_row = results.setdefault(name, {}).setdefault(str(seed), {"distance": {}, "labels": {}})
            missing = [scale for scale in arguments.scales if scale not in of_row["distance"]]
            pipe = load_pipeline(str(run))
            pipe.set_progress_bar_config(disable=True)
            judge = judge or Judge(pipe, run, arguments)
            for scale in missing:
                of_row["distance"][scale], of_row["labels"][scale], images = judge.measure(
                    pipe, float(scale), CALLS.get(name, {})
                )
                if scale == arguments.scales[-1]:
                    pictures[name] = images
            of_row |= {"steps": last_line(run)["step"], "seconds": last_line(run)["seconds"]}
            for path, text in (
                (file, json.dumps(results, indent=2) + "\n"),
                (folder / "table.md", table(results, arguments)),
            ):
                with atomic_write(path) as partial:
                    partial.write_text(text)
            print(f"{name}, seed {seed}: {of_row}", flush=True)
    if pictures:
        whole = rows_image(pictures)
        whole.resize((2 * whole.width, 2 * whole.height), Image.Resampling.NEAREST).save(folder / "rows.png")
        print(f"rows.png, from above: {', '.join(pictures)}")
    print(f"\n{describe_machine()}; held-out real images {judge.held_out:.3g}\n\n{table(results, arguments)}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--features", help="folder of training/train_features.py; by default the one that is kept")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--minutes", type=float, default=10, help="of training, with its end")
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 1.5], help="1 is no guidance")
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    return SimpleNamespace(**vars(parser.parse_args(argv[:split])), common=argv[split + 1 :])


if __name__ == "__main__":
    main(parse())
