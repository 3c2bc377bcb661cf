"""Images a second of training steps on a GPU, ours beside diffusers', and their share of the card's measured peak.

    PYTHONPATH=.:training python benchmarks/bench_gpu_training.py FOLDER peaks unet dit graphs profile

The networks are of the size for CIFAR-10: 32x32x3, in bf16 autocast, a U-Net of widths 128-256-256 and a DiT of width 384,
12 blocks and patches of 2x2. What a step is stands in `training_step.py`; here batches are on the device from the start.
The settings take turns. Operations are counted for each network by torch's FlopCounterMode; the peaks are those of a
matrix product of 8192x8192 and of the best of the U-Net's 3x3 convolutions, both in bf16. Without a GPU all sizes are
toys, and the figures mean nothing.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from bench_dit import stock as stock_dit
from bench_training import count_flops
from gpu_results import record
from gpu_timing import device, seconds_of_turns, synchronize
from stock import stock_unet
from torch.profiler import ProfilerActivity, profile
from training_step import OurStep, StockStep

from diffusers_ext import DiTModel, UNetModel


ON_GPU = torch.cuda.is_available()
SIZE, CHANNELS, LABELS = (32 if ON_GPU else 16), 3, 10
BATCH_SIZES = (128, 512) if ON_GPU else (2,)
UNET_WIDTHS = (128, 256, 256) if ON_GPU else (32, 32, 32)
DIT_WIDTHS = {"hidden_size": 384, "num_layers": 12, "num_attention_heads": 6, "patch_size": 2}
if not ON_GPU:
    DIT_WIDTHS |= {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
MATRIX_SIDE = 8192 if ON_GPU else 256
SECONDS_OF_A_TURN, ROUNDS, TRACED_STEPS = (0.25, 5, 3) if ON_GPU else (0.0, 1, 1)


def our_unet() -> UNetModel:
    return UNetModel(sample_size=SIZE, block_out_channels=UNET_WIDTHS)


def our_dit() -> DiTModel:
    return DiTModel(sample_size=SIZE, in_channels=CHANNELS, num_classes=LABELS, **DIT_WIDTHS)


NETWORKS = {
    "unet": {"diffusers": lambda: stock_unet(SIZE, CHANNELS, 8, UNET_WIDTHS), "diffusers_ext": our_unet},
    "dit": {"diffusers": lambda: stock_dit(SIZE, CHANNELS, **DIT_WIDTHS), "diffusers_ext": our_dit},
}
PARTS = ("peaks", *NETWORKS, "graphs", "profile")
STEPS = {"diffusers": StockStep, "diffusers_ext": OurStep}
# How a network is run: eagerly, or by torch.compile in one of its modes, the last with CUDA graphs. On CPUs compiling takes longer than a test may.
MODES = {"eager": None, "compiled": "default", "graphs": "reduce-overhead"}
WAYS = ["eager", "compiled"] if ON_GPU else ["eager"]


def make_step(network: str, whose: str, way: str) -> StockStep:
    """A training step of a new network on the device."""
    torch.manual_seed(0)
    model = NETWORKS[network][whose]().to(device())
    if MODES[way] is not None:
        model.compile(mode=MODES[way], dynamic=False)
    return STEPS[whose](model, mixed_precision=ON_GPU)


def make_batch(network: str, batch_size: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """x_t, timesteps and target, and the labels of the DiT."""
    shape = (batch_size, CHANNELS, SIZE, SIZE)
    x_t, target = (torch.randn(shape, device=device()) for _ in range(2))
    timesteps = torch.randint(1000, shape[:1], device=device())
    labels = torch.randint(LABELS, shape[:1], device=device())
    return [x_t, timesteps, target], {"class_labels": labels} if network == "dit" else {}


def measure_peaks(folder: Path):
    """The highest rates, in TFLOP/s, of what networks are made of; and the rate of copying, in TB/s read and written."""
    dtype, repeats = torch.bfloat16, 20 if ON_GPU else 1
    a, b = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device(), dtype=dtype) for _ in range(2))
    runs = {"matrix product": (lambda: a @ b, 2 * MATRIX_SIDE**3 / 1e12)}
    for level, width in enumerate(UNET_WIDTHS):
        side, batch_size = SIZE >> level, BATCH_SIZES[-1]
        x = torch.randn(batch_size, width, side, side, device=device(), dtype=dtype)
        kernel = torch.randn(width, width, 3, 3, device=device(), dtype=dtype)
        x, kernel = (tensor.to(memory_format=torch.channels_last) for tensor in (x, kernel))
        operations = 2 * 9 * width**2 * batch_size * side**2 / 1e12
        name = f"3x3 convolution, {width} channels at {side}x{side}"
        runs[name] = (lambda x=x, kernel=kernel: torch.nn.functional.conv2d(x, kernel, padding=1), operations)
    from_, to = torch.empty(2, 2**30 if ON_GPU else 2**20, dtype=torch.uint8, device=device())
    runs["copy"] = (lambda: to.copy_(from_), 2 * from_.numel() / 1e12)
    times = seconds_of_turns({name: run for name, (run, _) in runs.items()}, rounds=ROUNDS, repeats=repeats)
    rates = {name: runs[name][1] / seconds for name, seconds in times.items()}
    for name, rate in rates.items():
        record(folder, "peaks, TFLOP/s (copy: TB/s)", name, rate)
    best = max(rate for name, rate in rates.items() if "convolution" in name)
    record(folder, "peaks, TFLOP/s (copy: TB/s)", "unet", best)
    record(folder, "peaks, TFLOP/s (copy: TB/s)", "dit", rates["matrix product"])
    return {"unet": best, "dit": rates["matrix product"]}


def flops_of(network: str, whose: str) -> int:
    """Operations of a training step for one image, in the network's attention too."""
    torch.manual_seed(0)
    _, conditions = make_batch(network, 1)
    return count_flops(NETWORKS[network][whose]().to(device()), CHANNELS, (SIZE, SIZE), **conditions)


def warmed_up(step: StockStep, batch, conditions) -> tuple[float, Callable[[], None]]:
    """The memory of a step beyond what was held before, in GiB, and the step ready to be repeated."""

    def run():
        step(*batch, **conditions)

    run()  # compiles, and makes the optimizer's state
    held = 0
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        for _ in range(2):
            run()
        synchronize()
    peak = torch.cuda.max_memory_allocated() - held if ON_GPU else 0
    return peak / 2**30, run


def measure_network(folder: Path, network: str, peak: float, ways: list[str]):
    """A table row for each of whose network, how it is run and the size of the batches."""
    flops = {whose: flops_of(network, whose) for whose in NETWORKS[network]}
    steps = {}
    for way in ways:
        for whose in NETWORKS[network]:
            steps[f"{whose}, {way}"] = make_step(network, whose, way)
    section = f"training, {network}"
    for batch_size in BATCH_SIZES:
        batch, conditions = make_batch(network, batch_size)
        runs, memory = {}, {}
        for name, step in list(steps.items()):
            try:
                memory[name], runs[name] = warmed_up(step, batch, conditions)
            except Exception as error:  # a way that fails is a result, and the others still have theirs
                record(
                    folder,
                    "failures",
                    f"{network}, {name}, batch {batch_size}",
                    f"{type(error).__name__}: {error}"[:500],
                )
                del steps[name]
        one = min(seconds_of_turns(runs, rounds=1, repeats=1, warmup=0).values())
        repeats = max(1, round(SECONDS_OF_A_TURN / one))
        times = seconds_of_turns(runs, rounds=ROUNDS, repeats=repeats, warmup=0)
        for name, seconds in times.items():
            whose, way = name.split(", ")
            stock = times.get(f"diffusers, {way}")
            row = {
                "parameters, M": sum(p.numel() for p in steps[name].model.parameters()) / 1e6,
                "images/s": batch_size / seconds,
                "of diffusers'": None if stock is None else stock / seconds,
                "share of peak": flops[whose] * batch_size / seconds / 1e12 / peak,
                "ms a step": 1000 * seconds,
                "GiB of a step": memory[name],
            }
            record(folder, section, f"{name}, batch {batch_size}", row)


def profile_steps(folder: Path):
    """Which kernels the time of our U-Net's step goes to, and how much of the time the device is busy."""
    for way in WAYS:
        step, (batch, conditions) = make_step("unet", "diffusers_ext", way), make_batch("unet", BATCH_SIZES[0])
        _, run = warmed_up(step, batch, conditions)
        wall = seconds_of_turns({"step": run}, rounds=1, repeats=5 if ON_GPU else 1, warmup=0)["step"]
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * ON_GPU
        with profile(activities=activities) as traced:
            for _ in range(TRACED_STEPS):
                run()
            synchronize()
        kernels = {}
        for event in traced.events():
            on_device = event.device_type != torch.autograd.DeviceType.CPU
            if on_device == ON_GPU and not getattr(event, "is_user_annotation", False):
                seconds, number = kernels.get(event.name, (0.0, 0))
                own = event.time_range.elapsed_us() if ON_GPU else event.self_cpu_time_total
                kernels[event.name] = (seconds + own / 1e6 / TRACED_STEPS, number + 1 / TRACED_STEPS)
        total = sum(seconds for seconds, _ in kernels.values())
        section = f"where the step of our unet goes, {way}, batch {BATCH_SIZES[0]}"
        record(folder, section, "ms a step", 1000 * wall)
        record(folder, section, "share of it in which the device works", min(1.0, total / wall))
        record(folder, section, "kernels a step", round(sum(number for _, number in kernels.values())))
        longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:15]
        for rank, (name, (seconds, number)) in enumerate(longest, 1):
            row = {"ms a step": 1000 * seconds, "share": seconds / total, "calls a step": round(number)}
            # Names that differ in their last template arguments alone are cut to the same one.
            record(folder, section, f"{rank}. {name.replace('|', '/')[:150]}", row)


def compile_once(network: str, whose: str, way: str):
    """Fills the caches of torch.compile, so that the timed run need not wait for it."""
    step = make_step(network, whose, way)
    for batch_size in BATCH_SIZES:
        batch, conditions = make_batch(network, batch_size)
        step(*batch, **conditions)
    synchronize()


def main(arguments: argparse.Namespace):
    torch.backends.cudnn.benchmark = False  # as both training scripts leave it
    if arguments.compile_once:
        compile_once(*arguments.compile_once)
        return
    folder = Path(arguments.folder)
    peaks = measure_peaks(folder) if set(arguments.parts) - {"profile"} else None
    for part in arguments.parts:
        if part == "profile":
            profile_steps(folder)
        elif part == "graphs" and ON_GPU:
            measure_network(folder, "unet", peaks["unet"], ["graphs"])
        elif part in NETWORKS:
            measure_network(folder, part, peaks[part], WAYS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of gpu.json, which is added to")
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}")
    parser.add_argument(
        "--compile_once",
        nargs=3,
        metavar=("NETWORK", "WHOSE", "WAY"),
        help="compile one of the settings, for the caches of torch.compile alone",
    )
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.parts) - set(PARTS)):
        parser.error(f"parts must be among {', '.join(PARTS)}, got {', '.join(unknown)}")
    main(arguments)
