"""A training step in a process that keeps its memory, beside one whose tensors' memory glibc gives back to the system.

    python benchmarks/bench_memory.py

What a step is and how it is timed stands in `training_step.py`. Printed too are the pages that a step touches for the first
time, and the most memory that the process had.
"""

from bench_dit import WIDTHS
from bench_unet import ours as unet
from training_step import OurStep, Setting, measure, parser

from diffusers_ext import DiTModel
from diffusers_ext.machine import is_fast_at_bf16


def dit(**widths) -> DiTModel:
    return DiTModel(sample_size=32, in_channels=1, num_classes=10, **WIDTHS | widths)


NETWORKS = {
    "DiT, width 256, 6 blocks, 256 tokens": dit,
    "DiT, width 256, 6 blocks, 64 tokens": lambda: dit(patch_size=4),
    "DiT, width 128, 4 blocks, 64 tokens": lambda: dit(patch_size=4, hidden_size=128, num_layers=4),
    "U-Net, widths 64-128-128": unet,
}


def main(rounds: int, batch_size: int, threads: int):
    bf16 = is_fast_at_bf16("cpu")
    print(f"{'':40}{'s/step':>9}{'kept':>9}{'ratio':>8}{'pages a step':>16}{'kept':>7}{'MiB':>7}{'kept':>7}")
    for name, make in NETWORKS.items():
        settings = {keeps: Setting(lambda make=make: OurStep(make(), bf16), keeps) for keeps in (False, True)}
        given_back, kept = measure(settings, rounds, threads, (batch_size, 1, 32, 32)).values()
        print(
            f"{name:40}{given_back.seconds:9.4f}{kept.seconds:9.4f}{kept.seconds / given_back.seconds:8.3f}"
            f"{given_back.pages:16.0f}{kept.pages:7.0f}{given_back.peak_memory:7.0f}{kept.peak_memory:7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main(**vars(parser(__doc__.splitlines()[0]).parse_args()))
