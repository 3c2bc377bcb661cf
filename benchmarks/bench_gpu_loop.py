"""The first seconds of `training/train_ddpm.py` on images of CIFAR-10's size: images a second as logged, and its time's shares.

    PYTHONPATH=.:training python benchmarks/bench_gpu_loop.py FOLDER

The images are noise, 32x32x3 with ten labels, in parquet. The script runs as users call it, once for so many seconds and
once with `--profile`, which waits for the device at both ends of each part of a step. Without a GPU it is a few steps of a
toy.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import torch
from gpu_results import record
from PIL import Image

from diffusers_ext.trainer.run_folder import read_metrics


ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
NUM_IMAGES, SIDE, LABELS = (10_000, 32, 10) if ON_GPU else (16, 8, 2)
NETWORK = ["--block_out_channels", *(("128", "256", "256") if ON_GPU else ("8", "8"))]


def save_images(folder: Path) -> None:
    """Noise of few values, so that PNG has something to do."""
    pixels = np.random.default_rng(0).integers(0, 8, (NUM_IMAGES, SIDE, SIDE, 3), np.uint8) * 32
    columns = {"image": [Image.fromarray(image) for image in pixels], "label": [i % LABELS for i in range(NUM_IMAGES)]}
    names = [f"label {number}" for number in range(LABELS)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train-00000-of-00001.parquet")


def train(data: Path, output_dir: Path, *options: str, limit: float = 100) -> str:
    """Runs the script, and gives what it printed; after `limit` seconds it is ended, and its log is what counts."""
    words = [sys.executable, str(ROOT / "training" / "train_ddpm.py"), "--dataset_name", str(data)]
    words += ["--output_dir", str(output_dir), "--cache_dir", str(data / "cache"), *NETWORK, *options]
    words += ["--num_inference_steps", "2", "--sample_columns", "1", "--mixed_precision", "bf16" if ON_GPU else "no"]
    words += ["--train_batch_size", "128" if ON_GPU else "4"]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"ended after {limit:.0f} s"
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def record_run(folder: Path, way: str, output_dir: Path, printed: str):
    section = "training/train_ddpm.py, batches of 128 images of 32x32x3, bf16"
    speeds = [line["images_per_second"] for line in read_metrics(output_dir / "metrics.jsonl")]
    if not speeds:
        raise RuntimeError(f"the run logged nothing: {printed[-4000:]}")
    record(folder, section, f"{way}, images/s of the last line of the log", speeds[-1])
    record(folder, section, f"{way}, images/s of the best line of the log", max(speeds))
    if time := re.search(r"time: (.*)", printed):
        record(folder, section, f"{way}, time", time[1])


def main(folder: Path, seconds: int, compile: bool, compile_once: bool):
    with tempfile.TemporaryDirectory() as work:
        data = Path(work, "images")
        data.mkdir()
        save_images(data)
        if compile_once:
            train(data, Path(work, "run"), "--max_train_steps", "2", "--compile", limit=140)
        elif compile:  # by steps, since compiling takes a part of the time
            printed = train(data, Path(work, "run"), "--max_train_steps", "1000", "--compile")
            record_run(folder, "compiled", Path(work, "run"), printed)
        else:
            if ON_GPU:
                printed = train(data, Path(work, "run"), "--max_train_time", f"{seconds}s")
                record_run(folder, "eager", Path(work, "run"), printed)
            steps = ["--max_train_steps", "100" if ON_GPU else "6", "--logging_steps", "20" if ON_GPU else "2"]
            printed = train(data, Path(work, "profile"), *steps, "--profile")
            record_run(folder, "eager, with --profile", Path(work, "profile"), printed)
            table = printed[printed.index("time: ") :].split("trace of")[0]
            (folder / "train_ddpm_profile.txt").write_text(table)
            print(table, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of gpu.json, which is added to")
    parser.add_argument("--seconds", type=int, default=25, help="of training")
    parser.add_argument("--compile", action="store_true", help="train with --compile, for 1000 steps")
    parser.add_argument("--compile_once", action="store_true", help="compile, for the caches of torch.compile alone")
    main(**vars(parser.parse_args()))
