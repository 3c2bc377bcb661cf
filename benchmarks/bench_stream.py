"""Memory and speed of a stream of many small images, over one pass and a bit more.

    python benchmarks/bench_stream.py --format parquet --num_images 1000000

Writes synthetic pictures to files in a temporary folder, streams all of them as a training run would, and prints the
peak of resident memory, of this process and its workers, at 10 %, 50 % and 100 % of the images.
"""

import argparse
import io
import json
import multiprocessing
import os
import tarfile
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from diffusers_ext.data.batches import BatchOptions, make_batches
from diffusers_ext.data.prepare import prepare_stream


NUM_PICTURES = 1024  # different ones; each file has them again and again
NUM_LABELS = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--format", choices=("parquet", "tar"), default="parquet", help="of the files")
    parser.add_argument("--num_images", type=int, default=1_000_000, help="images to stream")
    parser.add_argument("--num_files", type=int, default=20, help="shards")
    parser.add_argument("--side", type=int, default=8, help="of an image in pixels")
    parser.add_argument("--batch_size", type=int, default=256, help="images of a batch")
    parser.add_argument("--shuffle_buffer", type=int, default=1000, help="images of a window")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that make batches")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write = {"parquet": write_parquet, "tar": write_tars}[arguments.format]
        # In a process of its own, whose memory does not count.
        writing = (Path(folder), arguments.num_images, arguments.num_files, make_pictures(arguments.side))
        writer = multiprocessing.Process(target=write, args=writing)
        writer.start()
        writer.join()
        print(json.dumps(vars(arguments) | measure(folder, arguments)))


def measure(folder: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Peak memory in MB at three places, and images a second."""
    names = [str(label) for label in range(NUM_LABELS)]
    data = prepare_stream(folder, label_names=names, shuffle_buffer=arguments.shuffle_buffer)
    options = BatchOptions(seed=0, batch_size=arguments.batch_size)
    batches = make_batches(data, options, num_workers=arguments.num_workers)
    count = arguments.num_images // arguments.batch_size
    places = {max(1, round(share * count)): f"peak_rss_mb_at_{share:.0%}" for share in (0.1, 0.5, 1.0)}
    result, start = {"peak_rss_mb_before": round(peak_memory() / 1e6, 1)}, time.perf_counter()
    for number in range(1, count + 1):
        next(batches)
        if number in places:
            result[places[number]] = round(peak_memory() / 1e6, 1)
    seconds = time.perf_counter() - start
    return result | {"images_per_second": round(count * arguments.batch_size / seconds), "passes": batches.passes}


def peak_memory() -> int:
    """The most bytes of memory that this process and its children have had so far, each for itself."""
    processes = [os.getpid(), *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    lines = [line for pid in processes for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def make_pictures(side: int) -> list[bytes]:
    """PNGs of noise."""
    pictures = []
    for pixels in np.random.default_rng(0).integers(0, 256, (NUM_PICTURES, side, side), dtype=np.uint8):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pictures.append(file.getvalue())
    return pictures


def write_parquet(folder: Path, num_images: int, num_files: int, pictures: list[bytes]):
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for file, numbers in enumerate(np.array_split(np.arange(num_images), num_files)):
        rows = {
            "image": [{"bytes": pictures[number % len(pictures)], "path": None} for number in numbers],
            "label": numbers % NUM_LABELS,
        }
        rows = datasets.Dataset.from_dict(rows, features=features)
        rows.to_parquet(folder / f"train-{file:05}.parquet", batch_size=10_000)


def write_tars(folder: Path, num_images: int, num_files: int, pictures: list[bytes]):
    for file, numbers in enumerate(np.array_split(np.arange(num_images), num_files)):
        with tarfile.open(folder / f"train-{file:05}.tar", "w") as tar:
            for number in numbers:
                parts = {"png": pictures[number % len(pictures)], "cls": str(number % NUM_LABELS).encode()}
                for extension, content in parts.items():
                    entry = tarfile.TarInfo(f"{number:09}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main()
