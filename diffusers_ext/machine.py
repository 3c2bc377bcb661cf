"""The machine: its cores, and the precision that its hardware is fast at."""

import os
import platform
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.constants import HF_HOME


# What CPUs are told apart by, of the names of `torch.cpu.get_capabilities`, the fastest at products of matrices first.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")


class Fastest(NamedTuple):
    """What a network runs fastest with on a device.

    Attributes:
        hardware: What of the device decides that, in a few words.
        precision: Under autocast.
        channels_last: Whether that is the memory layout of images.
    """

    hardware: str
    precision: torch.dtype
    channels_last: bool


def fastest(device: str) -> Fastest:
    """What a network runs fastest with on a kind of device: the only place where that is decided."""
    if device == "cpu":
        precision = torch.bfloat16 if is_fast_at_bf16(device) else torch.float32
        return Fastest(f"a CPU with {cpu_instructions()}", precision, channels_last=True)
    if device == "cuda":
        precision = torch.bfloat16 if is_fast_at_bf16(device) else torch.float16
        return Fastest(torch.cuda.get_device_name(), precision, channels_last=True)
    return Fastest(device, torch.float32, channels_last=False)


def cpu_instructions() -> str:
    """The first of `INSTRUCTIONS` that the CPU has, or else its architecture."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
    else:  # torch 2.6 has no public way to ask
        capabilities = {
            "amx_bf16": torch.cpu._is_amx_tile_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "avx512_f": torch.cpu._is_avx512_supported(),
            "avx2": torch.cpu._is_avx2_supported(),
        }
    return next((name for name in INSTRUCTIONS if capabilities.get(name)), platform.machine() or "no vectors")


def is_fast_at_bf16(device: str) -> bool:
    """Whether bf16 is computed by the hardware: AMX or AVX-512 BF16 on a CPU, Ampere and later on CUDA."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and cpu_instructions() in ("amx_bf16", "avx512_bf16")


def runs_in_bf16(mixed_precision: str | None, device: str) -> bool:
    """Whether networks run under bf16 autocast by an option that is "no", "bf16", or None for what the hardware is fast at."""
    return is_fast_at_bf16(device) if mixed_precision is None else mixed_precision == "bf16"


def fast_precision(device: str) -> torch.dtype:
    """The precision that a network runs fastest in under autocast: bfloat16 where the hardware has it, float16 on other
    accelerators of CUDA, or else float32."""
    return fastest(device).precision


def default_device() -> str:
    """The kind of device that runs go to: "cuda", "mps", or "cpu"."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def own_cache() -> Path:
    """Where this package keeps what it makes once: `DIFFUSERS_EXT_CACHE`, or a folder of Hugging Face's cache."""
    return Path(os.environ.get("DIFFUSERS_EXT_CACHE", os.path.join(HF_HOME, "diffusers_ext")))


def available_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def set_threads(num_threads: int | None, num_processes: int):
    """Shares the cores out among the processes of this machine, unless a number is given.

    `accelerate launch` sets OMP_NUM_THREADS=1 where the user has set nothing, which would leave all cores but one idle.
    A number above 1 is the user's own and stays.
    """
    import psutil  # of the extra for training, which pipelines do without

    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if num_threads is None and launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        physical = psutil.cpu_count(logical=False) or len(available_cores())
        num_here = int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
        num_threads = max(1, min(physical, len(available_cores())) // num_here)
    if num_threads is not None:
        torch.set_num_threads(num_threads)


# Kinds of devices that have no float64, as diffusers lists them; of Intel's GPUs (XPU) some have it.
WITHOUT_FLOAT64 = ("mps", "npu", "neuron")


def widest_float(device: torch.device | str | None) -> torch.dtype:
    """float64, or float32 on a device that has none; `None` is the CPU."""
    kind = device.type if isinstance(device, torch.device) else str(device or "cpu").partition(":")[0]
    if kind in WITHOUT_FLOAT64 or (kind == "xpu" and not torch.xpu.get_device_properties(device).has_fp64):
        return torch.float32
    return torch.float64


def process_state():
    """accelerate's `PartialState` of this process, joined with the others of its launch.

    On CPUs accelerate joins them only if it is told that it is to use CPUs; otherwise each would do all of the work, and
    write the same files.
    """
    from accelerate import PartialState  # of the extra for training, which pipelines do without

    return PartialState(cpu=not torch.accelerator.is_available())
