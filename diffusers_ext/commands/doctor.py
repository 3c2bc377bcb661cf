"""Say what this machine is, what will be fast on it, and what is wrong.

The command `diffusers-ext doctor`. Nothing is written, and nothing is fetched. It ends with code 1 if something is wrong.
"""

import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from datasets.config import HF_DATASETS_CACHE
from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

import diffusers_ext
from diffusers_ext.machine import available_cores, default_device, fast_precision, own_cache
from diffusers_ext.options import check_options, option, run_script


# The versions that the tests run with, as constraints.txt has them.
TESTED = {
    "torch": "2.13.0",
    "diffusers": "0.42.1",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
    "huggingface_hub": "2.4.0",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "pillow": "13.0.0",
    "peft": "0.21.2",
}
# What the package asks for, where it is not installed but on the path: read from its own metadata otherwise.
OPTIONAL = ("peft",)
LITTLE_DISK, TOO_LITTLE_DISK = 10, 1  # GB
LITTLE_SHARED_MEMORY = 0.25  # GB, of the batches that workers hand over


class Finding(NamedTuple):
    """A fact about the machine.

    Args:
        kind: "wrong" is what keeps the package from working, or makes it work far below what the machine can do.
        subject: Of a few words.
    """

    kind: Literal["ok", "note", "wrong"]
    subject: str
    text: str


@dataclass(frozen=True)
class DoctorConfig:
    """Say what this machine is, what will be fast on it, and what is wrong."""

    output_dir: str = option("runs", "folder that runs are to be saved in, whose disk is looked at")

    def __post_init__(self):
        check_options(self)


def main(config: DoctorConfig) -> None:
    """Prints what is found.

    Raises:
        SystemExit: with code 1 if something is wrong.
    """
    findings = examine(config)
    for title, group in findings.items():
        print(f"{title}:")
        for finding in group:
            mark = {"ok": " ", "note": "!", "wrong": "x"}[finding.kind]
            print(f" {mark} {finding.subject:<18} {finding.text}")
    wrong = sum(finding.kind == "wrong" for group in findings.values() for finding in group)
    notes = sum(finding.kind == "note" for group in findings.values() for finding in group)
    print(f"{wrong or 'nothing'} wrong (x), {notes or 'no'} note{'s' * (notes != 1)} (!)")
    if wrong:
        raise SystemExit(1)


def examine(config: DoctorConfig) -> dict[str, list[Finding]]:
    """What there is to say, by subject."""
    return {
        "machine": [*examine_processor(), *examine_memory(), *examine_devices()],
        "fast here": list(say_what_is_fast()),
        "versions": list(examine_versions()),
        "disk": list(examine_disk(config)),
        "settings": [*examine_threads(), *examine_accelerate(), *examine_hub()],
    }


# The machine.


def examine_processor() -> Iterator[Finding]:
    yield Finding("ok", "system", f"{platform.system()} {platform.release()}, Python {platform.python_version()}")
    cores, physical = available_cores(), psutil.cpu_count(logical=False)
    yield Finding("ok", "processor", f"{processor_name()}, {describe_capabilities()}")
    text = f"{len(cores)} of {os.cpu_count()} for this process, {physical or 'unknown'} physical"
    quota = cpu_quota()
    if quota is not None and quota < len(cores):
        yield Finding(
            "note", "cores", f"{text}; the container may use {quota:g}: give --num_threads {max(1, int(quota))}"
        )
    else:
        yield Finding("ok", "cores", text)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > 1.25 * len(cores):
        load = f"{os.getloadavg()[0]:.1f} on {len(cores)} cores: other processes are busy, and a step may take several times as long"
        yield Finding("note", "load", load)


def processor_name() -> str:
    """As the system calls it."""
    table = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", table.read_text(), re.MULTILINE) if table.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()


def capabilities() -> set[str]:
    """What the processor computes by itself, among avx2, avx512, avx512_bf16 and amx_bf16."""
    if hasattr(torch.cpu, "get_capabilities"):
        known = {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    else:  # torch 2.6 has no public way to ask
        asked = {"avx512_bf16": torch.cpu._is_avx512_bf16_supported, "amx_bf16": torch.cpu._is_amx_tile_supported}
        known = {name for name, is_there in asked.items() if is_there()}
    level = torch.backends.cpu.get_cpu_capability()
    known |= {"AVX2": {"avx2"}, "AVX512": {"avx2", "avx512"}}.get(level, set())
    names = {"avx512_f": "avx512", "amx_tile": "amx"}
    return {names.get(name, name) for name in known} & {"avx2", "avx512", "avx512_bf16", "amx", "amx_bf16"}


def describe_capabilities() -> str:
    there = capabilities()
    wide = "AVX-512" if "avx512" in there else "AVX2" if "avx2" in there else platform.machine()
    if "amx_bf16" in there:
        return f"{wide}, AMX (bf16 in hardware)"
    return f"{wide}, AVX-512 BF16 (bf16 in hardware)" if "avx512_bf16" in there else f"{wide}, no bf16 in hardware"


def cpu_quota() -> float | None:
    """Cores' worth of time that a container may use; None without a limit, or where it is not known."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    words = limit.read_text().split() if limit.is_file() else ["max"]
    return None if words[0] == "max" else int(words[0]) / int(words[1])


def examine_memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    yield Finding("note" if memory.available < 2e9 else "ok", "memory", text)
    shared = Path("/dev/shm")
    if shared.is_dir() and default_device() != "cpu" and shutil.disk_usage(shared).total < LITTLE_SHARED_MEMORY * 1e9:
        size = shutil.disk_usage(shared).total / 1e6
        yield Finding(
            "wrong",
            "shared memory",
            f"/dev/shm has {size:.0f} MB, through which workers hand over batches: start the container with --shm-size 2g, or "
            "give --dataloader_num_workers 0",
        )


def examine_devices() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"{about.name}, compute capability {about.major}.{about.minor}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        yield Finding("note" if free < total / 2 else "ok", f"GPU {index}", text)
    if torch.cuda.is_available():
        return
    if default_device() != "cpu":
        yield Finding("ok", "GPU", default_device())
    elif Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        build = f"torch {torch.__version__} {'is built without CUDA' if torch.version.cuda is None else 'finds none'}"
        remedy = (
            "install the CUDA build of torch" if torch.version.cuda is None else "check the driver with nvidia-smi"
        )
        yield Finding("wrong", "GPU", f"an NVIDIA driver is here, but {build}: {remedy}")
    else:
        yield Finding("ok", "GPU", "none")


def say_what_is_fast() -> Iterator[Finding]:
    device, precision = default_device(), fast_precision(default_device())
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}
    reason = {
        torch.bfloat16: "the hardware computes in it",
        torch.float16: "the GPU has no bf16",
        torch.float32: "lower precision would be emulated, and slower",
    }
    yield Finding("ok", "device", device)
    trains_in = "no" if precision == torch.float16 else names[precision]
    text = f"--mixed_precision {trains_in}, which is the default here: {reason[precision]}"
    if precision == torch.float16:
        text = "--mixed_precision fp16, which must be asked for: the GPU has no bf16"
    yield Finding("ok", "precision", text)
    layout = "channels last" if device in ("cpu", "cuda") else "as it is"
    yield Finding("ok", "memory layout", f"{layout}, by default")
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler:
        yield Finding("ok", "--compile", f"works with {compiler}, and pays in runs of many minutes")
    else:
        yield Finding("note", "--compile", "needs a C++ compiler, and none is found (CXX, c++, g++, clang++)")


# What is installed.


def examine_versions() -> Iterator[Finding]:
    yield Finding("ok", "diffusers_ext", f"{diffusers_ext.__version__}, in {Path(diffusers_ext.__file__).parent}")
    needed = requirements()
    for name, tested in TESTED.items():
        yield examine_version(name, installed_version(name), needed.get(name), tested)
    for name, use in (("torch_fidelity", "FID"), ("imageio", "MP4"), ("tensorboard", "--report_to tensorboard")):
        if installed_version(name) is None:
            yield Finding("ok", name, f"not installed, which {use} needs")


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements() -> dict[str, Requirement]:
    """What the package asks for of each library, by its own metadata; nothing if it is on the path without being installed."""
    try:
        lines = metadata.requires("diffusers_ext") or []
    except metadata.PackageNotFoundError:
        return {}
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def examine_version(name: str, installed: str | None, needed: Requirement | None, tested: str) -> Finding:
    """A library beside what is asked for and what is tested.

    Args:
        installed: Its version; None if it is not there.
    """
    remedy = f"pip install '{name}=={tested}'"
    if installed is None:
        kind = "ok" if name in OPTIONAL else "wrong"
        return Finding(
            kind, name, "not installed, which adapters (LoRA) need" if kind == "ok" else f"not installed: {remedy}"
        )
    if needed is not None and not needed.specifier.contains(installed, prereleases=True):
        return Finding("wrong", name, f"{installed}, and {needed.specifier} is needed: {remedy}")
    try:
        newer = Version(installed).release > Version(tested).release
    except InvalidVersion:
        return Finding("note", name, f"{installed} is no version that can be compared with {tested}, which is tested")
    if newer:
        return Finding("note", name, f"{installed} is newer than {tested}, which is tested")
    return Finding("ok", name, f"{installed} (tested: {tested})")


# The disk.


def examine_disk(config: DoctorConfig) -> Iterator[Finding]:
    caches = {"models": HF_HUB_CACHE, "data sets": HF_DATASETS_CACHE, "own cache": own_cache()}
    for name, folder in {"runs": config.output_dir, **caches}.items():
        yield examine_folder(name, Path(folder).absolute())


def examine_folder(name: str, folder: Path) -> Finding:
    """Room on its disk, and whether something can be written there."""
    there = folder
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free / 1e9
    text = f"{folder}, {free:.1f} GB free"
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        return Finding("wrong", name, f"{folder} cannot be written to: change its owner, or take another folder")
    if free < TOO_LITTLE_DISK:
        return Finding("wrong", name, f"{text}: a checkpoint of a small model with its optimizer takes as much")
    return Finding("note" if free < LITTLE_DISK else "ok", name, text)


# Settings.


def examine_threads() -> Iterator[Finding]:
    cores = min(psutil.cpu_count(logical=False) or len(available_cores()), len(available_cores()))
    given = os.environ.get("OMP_NUM_THREADS")
    if given is not None and given.isdecimal() and int(given) == 1 and cores > 1:
        yield Finding(
            "note", "OMP_NUM_THREADS", f"1 leaves {cores - 1} of {cores} cores idle: unset it, or give --num_threads"
        )
    elif given is not None and given.isdecimal() and int(given) > len(available_cores()):
        yield Finding(
            "wrong",
            "OMP_NUM_THREADS",
            f"{given} threads on {len(available_cores())} cores wait for one another: unset it",
        )
    else:
        yield Finding("ok", "threads", f"{torch.get_num_threads()}" + (f" (OMP_NUM_THREADS={given})" if given else ""))
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        if name == "OMP_WAIT_POLICY" and os.environ.get(name, "").upper() == "ACTIVE":
            yield Finding(
                "note",
                name,
                "ACTIVE: threads that wait take the cores of others; unset it unless the machine is yours alone",
            )


def examine_accelerate() -> Iterator[Finding]:
    if not os.path.isfile(default_config_file):
        yield Finding("ok", "accelerate", "no configuration, so accelerate launch takes its defaults")
        return
    try:
        config = load_config_from_file(default_config_file)
    except Exception as error:  # of whatever YAML and accelerate make of a damaged file
        yield Finding(
            "wrong", "accelerate", f"{default_config_file} cannot be read ({error}): accelerate config writes it anew"
        )
        return
    kind, precision = (getattr(config, name, None) for name in ("distributed_type", "mixed_precision"))
    kind, precision = (str(getattr(value, "value", value)) for value in (kind, precision))
    text = f"{default_config_file}: {kind}, mixed precision {precision}"
    fsdp = (getattr(config, "fsdp_config", None) or {}).get("fsdp_version", 1)
    if kind in ("DEEPSPEED", "MEGATRON_LM") or (kind == "FSDP" and int(fsdp) < 2):
        yield Finding("wrong", "accelerate", f"{text}; training is by DDP or FSDP2: accelerate config")
    elif precision == "fp16" and default_device() == "cpu":
        yield Finding("wrong", "accelerate", f"{text}, which needs a GPU: accelerate config")
    else:
        yield Finding("ok", "accelerate", text)


def examine_hub() -> Iterator[Finding]:
    token = "a token is there" if get_token() else "no token; pushing and gated models need one: hf auth login"
    yield Finding("ok", "Hub", token)
    if HF_HUB_OFFLINE:
        yield Finding("note", "Hub", "HF_HUB_OFFLINE is set: what is not in the caches cannot be had")


run = partial(run_script, DoctorConfig, main)
