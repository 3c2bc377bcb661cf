"""Images a second of sampling on a GPU, our pipeline beside diffusers', and the time of a scheduler's step there.

    PYTHONPATH=.:training python benchmarks/bench_gpu_sampling.py FOLDER

Both pipelines sample from one `UNetModel`, 50 steps of DDIM for 64 images of 32x32x3, and give arrays. The scheduler's step
is that of `bench_schedulers.py`, with timesteps on the device as pipelines pass them: on a GPU it takes as long as the host
needs to launch its kernels, and to wait where it has to know a value. Without a GPU all sizes are toys.
"""

import argparse
from pathlib import Path

import torch
from bench_gpu_training import CHANNELS, ON_GPU, SIZE, our_unet
from bench_schedulers import NUM_STEPS, sampling_loop
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from gpu_results import record
from gpu_timing import device, seconds_of_turns

from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline


BATCH_SIZE, NUM_INFERENCE_STEPS, ROUNDS = (64, 50, 5) if ON_GPU else (2, 2, 1)
SECTION = f"sampling, DDIM, {NUM_INFERENCE_STEPS} steps, {BATCH_SIZE} images"


def pipelines(dtype: torch.dtype) -> dict:
    """Calls of both pipelines, whose networks are one."""
    torch.manual_seed(0)
    network = our_unet().to(device(), dtype).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=0.02)  # as it is made, the output is zero
    ours = GuidedDiffusionPipeline(network, ExtDDIMScheduler())
    stock = DDIMPipeline(network, DDIMScheduler())
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
    options = {"batch_size": BATCH_SIZE, "num_inference_steps": NUM_INFERENCE_STEPS, "output_type": "np"}
    generator = torch.Generator(device()).manual_seed(0)
    return {
        "diffusers": lambda: stock(**options, generator=generator),
        "diffusers_ext": lambda: ours(**options, generator=generator),
    }


def measure_pipelines(folder: Path, dtype: torch.dtype, way: str):
    runs = pipelines(dtype)
    times = seconds_of_turns(runs, rounds=ROUNDS, repeats=1, warmup=1)
    for name, seconds in times.items():
        row = {
            "images/s": BATCH_SIZE / seconds,
            "of diffusers'": times["diffusers"] / seconds,
            "ms a step": 1000 * seconds / NUM_INFERENCE_STEPS,
        }
        record(folder, SECTION, f"{name}, {way}", row)


def compiled_pipeline():
    """A call of our pipeline with the network compiled, whose kernels are replayed as a CUDA graph."""
    torch.manual_seed(0)
    network = our_unet().to(device(), torch.float16).eval()
    network.compile(mode="reduce-overhead", dynamic=False)
    pipe = GuidedDiffusionPipeline(network, ExtDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    options = {"batch_size": BATCH_SIZE, "num_inference_steps": NUM_INFERENCE_STEPS, "output_type": "np"}
    return lambda: pipe(**options)


def measure_compiled(folder: Path):
    seconds = seconds_of_turns({"ours": compiled_pipeline()}, rounds=ROUNDS, repeats=1)["ours"]
    row = {"images/s": BATCH_SIZE / seconds, "ms a step": 1000 * seconds / NUM_INFERENCE_STEPS}
    record(folder, SECTION, "diffusers_ext, fp16, compiled with CUDA graphs", row)


def measure_schedulers(folder: Path):
    shape = (BATCH_SIZE, CHANNELS, SIZE, SIZE)
    classes = {"DDPM": (DDPMScheduler, ExtDDPMScheduler), "DDIM": (DDIMScheduler, ExtDDIMScheduler)}
    for name, (stock, ours) in classes.items():
        loops = {"diffusers": sampling_loop(stock(), shape, device()), "ours": sampling_loop(ours(), shape, device())}
        times = seconds_of_turns(loops, rounds=ROUNDS, repeats=1)
        row = {f"{whose}, us": 1e6 * seconds / NUM_STEPS for whose, seconds in times.items()}
        row["ratio"] = times["ours"] / times["diffusers"]
        record(folder, f"a scheduler's step, {BATCH_SIZE} images", name, row)


def main(folder: Path, compile_once: bool):
    if compile_once:
        compiled_pipeline()()
        return
    measure_schedulers(folder)
    measure_pipelines(folder, torch.float32, "fp32")
    if ON_GPU:
        measure_pipelines(folder, torch.float16, "fp16")  # diffusers' pipeline makes no array of bfloat16
        measure_compiled(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of gpu.json, which is added to")
    parser.add_argument("--compile_once", action="store_true", help="compile, for the caches of torch.compile alone")
    main(**vars(parser.parse_args()))
