"""A training step beside a busy process, by how long OpenMP's threads spin before they sleep.

    python benchmarks/bench_waiting.py --spin_counts 0 1000 10000 --rounds 20

libgomp reads GOMP_SPINCOUNT when it is loaded, so each setting is a process of its own. They take turns of a stretch of
steps each, alone and beside a process that keeps one core busy, and sleep otherwise. How much of the cores other
processes of the machine took is printed too: where that is not near 0, "alone" is not alone.
"""

import argparse
import multiprocessing
import os
import time
from collections import defaultdict
from statistics import median

import psutil


def steps_on_request(pipe, spin_count: str | None, threads: int, batch_size: int, seconds: float):
    """A process with this spin count, which times the steps of a stretch whenever it is asked to."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    if spin_count is not None:
        os.environ["GOMP_SPINCOUNT"] = spin_count
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    from training_step import OurStep

    from diffusers_ext import DiTModel
    from diffusers_ext.machine import is_fast_at_bf16

    torch.manual_seed(0)
    widths = {"hidden_size": 256, "num_layers": 6, "num_attention_heads": 4, "patch_size": 2}  # that of docs/speed.md
    model = DiTModel(sample_size=32, in_channels=1, num_classes=10, **widths)
    bf16 = is_fast_at_bf16("cpu")
    step = OurStep(model, bf16)
    x_t, target = torch.randn(2, batch_size, 1, 32, 32)
    arguments = (x_t, torch.randint(1000, (batch_size,)), target)
    labels = torch.randint(10, (batch_size,))
    step(*arguments, class_labels=labels)
    pipe.send(None)
    while pipe.recv():
        times, start = [], time.perf_counter()
        while not times or time.perf_counter() - start < seconds:
            before = time.perf_counter()
            step(*arguments, class_labels=labels)
            times.append(time.perf_counter() - before)
        pipe.send(sum(times) / len(times))


def stay_busy(event):
    while True:
        event.wait()
        end = time.perf_counter() + 0.05
        while time.perf_counter() < end:
            pass


def core_seconds(times) -> float:
    """What has been used of all cores."""
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def main(spin_counts: list[str], rounds: int, threads: int, batch_size: int, seconds: float):
    context = multiprocessing.get_context("spawn")
    settings = {}
    for count in (None, *spin_counts):
        ours, theirs = context.Pipe()
        work = (theirs, count, threads, batch_size, seconds)
        process = context.Process(target=steps_on_request, args=work, daemon=True)
        process.start()
        ours.recv()
        settings[count or "default"] = (ours, psutil.Process(process.pid))
    is_busy = context.Event()
    busy = context.Process(target=stay_busy, args=(is_busy,), daemon=True)
    busy.start()
    busy_process = psutil.Process(busy.pid)

    def used_by_others(process) -> float:
        own = sum(sum(each.cpu_times()[:2]) for each in (process, busy_process))
        return core_seconds(psutil.cpu_times()) - own

    times, others = defaultdict(list), []
    for turn in range(rounds):
        for beside in (False, True):
            (is_busy.set if beside else is_busy.clear)()
            time.sleep(0.1)
            names = list(settings)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                pipe, process = settings[name]
                start, before = time.perf_counter(), used_by_others(process)
                pipe.send(True)
                times[name, beside].append(pipe.recv())
                others.append((used_by_others(process) - before) / (time.perf_counter() - start))
    print(f"s/step of {rounds} stretches of {seconds:g} s, {threads} threads, batch {batch_size}")
    print(f"other processes took {median(others):.2f} cores meanwhile, {max(others):.2f} at most")
    print(f"{'GOMP_SPINCOUNT':>16}{'alone':>9}{'least':>9}{'busy':>9}{'least':>9}")
    for name in settings:
        values = [f(times[name, beside]) for beside in (False, True) for f in (median, min)]
        print(f"{name:>16}" + "".join(f"{value:9.3f}" for value in values))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spin_counts", nargs="+", default=["0", "1000", "10000", "100000"])
    parser.add_argument("--rounds", type=int, default=10, help="stretches of each setting, alone and beside")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--batch_size", type=int, default=8, help="images in a step")
    parser.add_argument("--seconds", type=float, default=1.5, help="length of a stretch")
    main(**vars(parser.parse_args()))
