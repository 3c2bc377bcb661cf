"""Time of `import diffusers_ext` beside importing just the parts of diffusers that it builds on, each in a new process.

python benchmarks/bench_import.py
"""

import argparse
import statistics
import subprocess
import sys
import time


DIFFUSERS_PARTS = (
    "from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin\n"
    "from diffusers.guiders import BaseGuidance"
)


def seconds_to_run(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main(repeats: int) -> None:
    codes = {"diffusers parts": DIFFUSERS_PARTS, "diffusers_ext": "import diffusers_ext"}
    for code in codes.values():
        seconds_to_run(code)  # fills the caches of the disk and of compiled modules
    # In turn, so that a change in the machine's load meets both alike.
    times = {name: [] for name in codes}
    for _ in range(repeats):
        for name, code in codes.items():
            times[name].append(seconds_to_run(code))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        print(f"{name:16} {median:.3f} s (median of {repeats}; {min(times[name]):.3f} to {max(times[name]):.3f})")
    print(f"{'ratio':16} {medians['diffusers_ext'] / medians['diffusers parts']:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="processes of each kind")
    main(parser.parse_args().repeats)
