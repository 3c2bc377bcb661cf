"""Training on latents from disk beside encoding the same images at each batch: images/s of `training/train_ddpm.py`.

    PYTHONPATH=.:training python benchmarks/bench_latents.py --dataset_name path/to/twemoji64 --latents latents/twemoji64 --vae runs/vae

The two take turns, and the fastest of each counts; the first steps of a run, up to its first line of the log, do not.
"""

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState

from diffusers_ext.trainer.run_folder import read_metrics
from training.train_ddpm import TrainConfig, main


def images_per_second(dataset_name: str, arguments: argparse.Namespace) -> float:
    """Of a run of so many steps, whose pictures are few."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = TrainConfig(
            dataset_name=dataset_name,
            vae=arguments.vae,
            output_dir=f"{folder}/run",
            max_train_steps=arguments.steps,
            train_batch_size=arguments.batch_size,
            logging_steps=max(1, arguments.steps // 4),
            checkpointing_steps=arguments.steps,
            num_inference_steps=1,
            sample_columns=1,
        )
        main(config)
        speeds = [record["images_per_second"] for record in read_metrics(Path(config.output_dir) / "metrics.jsonl")]
    for state in (AcceleratorState, GradientState, PartialState):  # which keep precision for the life of a process
        state._reset_state()
    return max(speeds[1:])


def compare(arguments: argparse.Namespace) -> tuple[float, float]:
    """Images/s from disk and of encoding at each batch."""
    names = (arguments.latents, arguments.dataset_name)
    rounds = [[images_per_second(name, arguments) for name in names] for _ in range(arguments.rounds)]
    cached, fresh = (max(speeds) for speeds in zip(*rounds, strict=True))
    return cached, fresh


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", required=True, help="the images")
    parser.add_argument("--latents", required=True, help="the folder that training/cache_latents.py made of them")
    parser.add_argument("--vae", required=True)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--rounds", type=int, default=2)
    cached, fresh = compare(parser.parse_args())
    print(f"from disk {cached:.0f} images/s, encoding at each batch {fresh:.0f} images/s, ratio {cached / fresh:.2f}")
