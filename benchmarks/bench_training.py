"""Images a second of our training loop beside diffusers', with the same network; share of the convolution peak; memory.

    python benchmarks/bench_training.py
    python benchmarks/bench_training.py --dataset_name path/to/fashion_mnist --resolution 32 --rounds 10

Both loops train diffusers' network and then ours, on the same prepared images, at the same precision and without labels,
in one process. They take turns step by step, so that a machine that slows down slows both, and medians are compared. A step
of ours is all that `Trainer` does from one batch to the next; diffusers' is `StockTraining.step` with the making of its
batch, see `stock.py`.

The peak is the highest rate of a 3x3 convolution in channels_last at one of the network's widths and resolutions. A step's
floating point operations are counted by torch's FlopCounterMode, forward and backward; it leaves out fused attention on CPUs.

Memory is the peak of the resident set of `train_ddpm.py` beside `train_stock.py`, each whole script in a process of its
own, at the same batch size, precision and images.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import median

import torch
from stock import StockTraining, stock_batch, stock_unet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusers_ext.commands.train_ddpm import TrainConfig, build_model, build_objective, build_scheduler
from diffusers_ext.data.latent_cache import SampleSpace
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.machine import is_fast_at_bf16
from diffusers_ext.trainer.config import resolve_for_machine
from diffusers_ext.trainer.loop import Trainer
from diffusers_ext.trainer.run import make_accelerator


ROOT = Path(__file__).parents[1]


class Turns(nn.Module):
    """An objective that lets diffusers' loop take a step before each of ours, and times both."""

    def __init__(self, objective: nn.Module, stock_step: Callable[[], None]):
        super().__init__()
        self.objective, self.stock_step, self.metrics = objective, stock_step, objective.metrics
        self.seconds, self.stock_seconds, self._start = [], [], None

    def forward(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        now = time.perf_counter()
        if self._start is not None:
            self.seconds.append(now - self._start)
        self.stock_step()
        self._start = time.perf_counter()
        self.stock_seconds.append(self._start - now)
        return self.objective(model, batch)


def time_loops(config: TrainConfig, data, make_model) -> dict[str, float]:
    """Median seconds of a step, warm-up left out."""
    accelerator = make_accelerator(config)
    config = resolve_for_machine(config)
    stock = StockTraining(make_model(), 343_750, bf16=config.mixed_precision == "bf16")
    order, batch_size = torch.randperm(len(data)), config.train_batch_size

    def stock_step():
        start = batch_size * len(turns.stock_seconds)
        rows = order[torch.arange(start, start + batch_size) % len(order)]
        stock.step(stock_batch(data.pixels, rows))

    turns = Turns(build_objective(config, build_scheduler(config), accelerator), stock_step)
    Path(config.output_dir).mkdir()
    trainer = Trainer(config, accelerator, make_model(), turns, data)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        trainer.train()
    # The first steps set up caches and the optimizers' states.
    return {"diffusers": median(turns.stock_seconds[2:]), "ours": median(turns.seconds[2:])}


def count_flops(model: nn.Module, channels: int, size: tuple[int, int], **conditions: torch.Tensor) -> int:
    """Floating point operations of a forward and a backward pass of an image, a multiplication and an addition as two.

    Args:
        conditions: Further arguments of the network, for one image.
    """
    x = torch.randn(1, channels, *size, device=model.device)
    timesteps = torch.randint(0, 1000, (1,), device=model.device)
    with FlopCounterMode(display=False) as counter:
        model(x, timesteps, **conditions).sample.square().mean().backward()
    return counter.get_total_flops()


def convolution_peak(
    model: nn.Module, batch_size: int, size: tuple[int, int], dtype: torch.dtype, seconds: float = 2.0
) -> float:
    """The highest rate, in operations a second, of a 3x3 convolution at the network's widths and resolutions.

    Args:
        seconds: For how long each of them is repeated.
    """
    best = 0.0
    for level, width in enumerate(model.config.block_out_channels):
        height, breadth = (side >> level for side in size)
        x = torch.randn(batch_size, width, height, breadth, dtype=dtype).to(memory_format=torch.channels_last)
        kernel = torch.randn(width, width, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
        operations = 2 * 9 * width * width * batch_size * height * breadth
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            nn.functional.conv2d(x, kernel, padding=1)
            best = max(best, operations / (time.perf_counter() - start))
    return best


# Runs a script and writes the peak of its resident set, in kB, to a file. Not `wait4`, whose figure for a child begins at
# what its parent holds.
WATCHED = """
import resource, runpy, sys
report, sys.argv = sys.argv[1], sys.argv[2:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
try:
    lines = open("/proc/self/status").read().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
except OSError:  # macOS, in bytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
open(report, "w").write(str(peak))
"""


def peak_memory(command: list[str], threads: int) -> float:
    """Peak of the resident set of a script, in MB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    with tempfile.NamedTemporaryFile("r") as report:
        words = [sys.executable, "-c", WATCHED, report.name, *command]
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}")
        return int(report.read()) / 1024


def compare_speed(arguments: argparse.Namespace, folder: Path, data):
    precision = arguments.mixed_precision
    config = TrainConfig(
        output_dir=str(folder / "run"),
        resolution=data.size,
        unconditional=True,
        train_batch_size=arguments.batch_size,
        max_train_steps=arguments.rounds + 3,
        mixed_precision=precision,
        num_threads=arguments.threads,
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Each network is in its own memory layout in both loops: the normalisation of diffusers' is slow in the other.
    networks = {
        "UNet2DModel": (lambda: stock_unet(data.size, data.channels), False),
        "UNetModel": (lambda: build_model(config, SampleSpace.of(data, None), data.num_classes), True),
    }
    peak = convolution_peak(
        build_model(config, SampleSpace.of(data, None), data.num_classes), arguments.batch_size, data.size, dtype
    )
    print(f"{precision}, batches of {arguments.batch_size} images, medians of {arguments.rounds} steps by turns")
    print(f"convolution peak: {peak / 1e9:.0f} GFLOP/s\n")
    print(f"{'network':14}{'loop':12}{'images/s':>10}{'of diffusers':>14}{'share of peak':>15}")
    for name, (make_model, channels_last) in networks.items():
        torch.manual_seed(0)
        flops = arguments.batch_size * count_flops(make_model(), data.channels, data.size)
        own = {"output_dir": str(folder / name), "channels_last": channels_last}
        seconds = time_loops(dataclasses.replace(config, **own), data, make_model)
        for loop, value in seconds.items():
            speed, ratio = arguments.batch_size / value, seconds["diffusers"] / value
            print(f"{name:14}{loop:12}{speed:10.1f}{ratio:14.3f}{flops / value / peak:15.1%}", flush=True)


def compare_memory(arguments: argparse.Namespace, folder: Path, data):
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[data.channels]
    common = ["--resolution", str(data.size[0]), "--image_mode", mode]
    common += ["--train_batch_size", str(arguments.batch_size), "--max_train_steps", "6"]
    bf16 = arguments.mixed_precision == "bf16"
    stock = [f"{ROOT}/benchmarks/train_stock.py", arguments.dataset_name, str(folder / "stock"), *common]
    ours = [f"{ROOT}/training/train_ddpm.py", "--dataset_name", arguments.dataset_name, *common]
    ours += ["--output_dir", str(folder / "ours"), "--unconditional", "--mixed_precision", arguments.mixed_precision]
    ours += ["--num_inference_steps", "2", "--num_threads", str(arguments.threads)]
    # `train_stock.py` makes no samples; ours must not be of more images at once than a step has.
    ours += ["--eval_batch_size", str(arguments.batch_size)]
    commands = {"train_stock.py": stock + ["--bf16"] * bf16, "train_ddpm.py": ours}
    peaks = {name: peak_memory(command, arguments.threads) for name, command in commands.items()}
    print(f"\n{'script':26}{'peak RSS':>10}{'of diffusers':>14}")
    for name, value in peaks.items():
        print(f"{name:26}{value:7.0f} MB{value / peaks['train_stock.py']:14.3f}")


def main(arguments: argparse.Namespace):
    torch.set_num_threads(arguments.threads)
    data = prepare_images(arguments.dataset_name, unconditional=True, resolution=(arguments.resolution,))
    with tempfile.TemporaryDirectory() as folder:
        compare_speed(arguments, Path(folder), data)
        compare_memory(arguments, Path(folder), data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--resolution", type=int, default=32, help="side of the images")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a step")
    parser.add_argument("--rounds", type=int, default=10, help="steps of each loop and network that are timed")
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16"), default="bf16" if is_fast_at_bf16("cpu") else "no"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    main(parser.parse_args())
