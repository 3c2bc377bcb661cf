"""A training step with memory that the process keeps, beside memory that glibc gives back when a tensor is freed.

    python benchmarks/bench_memory.py

Each setting is a process of its own. They take turns of a stretch of steps each, and the medians are compared. Printed too
are the pages that a step touches for the first time, and the most memory that the process had.
"""

import argparse
import multiprocessing
import resource
import time
from statistics import median


NETWORKS = {
    "DiT, width 256, 6 blocks, 256 tokens": {"hidden_size": 256, "num_layers": 6, "patch_size": 2},
    "DiT, width 256, 6 blocks, 64 tokens": {"hidden_size": 256, "num_layers": 6, "patch_size": 4},
    "DiT, width 128, 4 blocks, 64 tokens": {"hidden_size": 128, "num_layers": 4, "patch_size": 4},
    "U-Net, widths 64-128-128": {"block_out_channels": (64, 128, 128)},
}


def steps_on_request(pipe, keeps: bool, widths: dict, threads: int, batch_size: int):
    """A process that keeps its memory or does not, which times the steps of a stretch whenever it is asked to."""
    if keeps:
        from diffusers_ext.runtime import keep_memory

        assert keep_memory(), "the allocator of this machine is not glibc's"
    import torch
    from training_step import OurStep

    from diffusers_ext import DiTModel, UNetModel
    from diffusers_ext.machine import is_fast_at_bf16

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if "hidden_size" in widths:
        heads = widths["hidden_size"] // 64
        model = DiTModel(sample_size=32, in_channels=1, num_classes=10, num_attention_heads=heads, **widths)
    else:
        model = UNetModel(sample_size=32, in_channels=1, out_channels=1, num_classes=10, **widths)
    step = OurStep(model, is_fast_at_bf16("cpu"))
    x_t, target = torch.randn(2, batch_size, 1, 32, 32)
    arguments = (x_t, torch.randint(1000, (batch_size,)), target)
    labels = torch.randint(10, (batch_size,))
    for _ in range(3):
        step(*arguments, class_labels=labels)
    pipe.send(None)
    while num_steps := pipe.recv():
        times, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(num_steps):
            start = time.perf_counter()
            step(*arguments, class_labels=labels)
            times.append(time.perf_counter() - start)
        after = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send((times, (after.ru_minflt - before) / num_steps, after.ru_maxrss / 1024))


def main(rounds: int, steps: int, threads: int, batch_size: int):
    context = multiprocessing.get_context("spawn")
    print(f"{'':40}{'s/step':>9}{'kept':>9}{'ratio':>8}{'pages a step':>16}{'kept':>7}{'MiB':>7}{'kept':>7}")
    for name, widths in NETWORKS.items():
        workers = {}
        for keeps in (False, True):
            ours, theirs = context.Pipe()
            arguments = (theirs, keeps, widths, threads, batch_size)
            context.Process(target=steps_on_request, args=arguments, daemon=True).start()
            ours.recv()
            workers[keeps] = ours
        measured = {keeps: [] for keeps in workers}
        for _ in range(rounds):
            for keeps, pipe in workers.items():
                pipe.send(steps)
                measured[keeps].append(pipe.recv())
        for pipe in workers.values():
            pipe.send(0)
        seconds = [median(value for times, _, _ in measured[keeps] for value in times) for keeps in (False, True)]
        pages = [median(count for _, count, _ in measured[keeps]) for keeps in (False, True)]
        peak = [measured[keeps][-1][2] for keeps in (False, True)]
        print(
            f"{name:40}{seconds[0]:9.4f}{seconds[1]:9.4f}{seconds[1] / seconds[0]:8.3f}"
            f"{pages[0]:16.0f}{pages[1]:7.0f}{peak[0]:7.0f}{peak[1]:7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="stretches of each setting that are timed")
    parser.add_argument("--steps", type=int, default=5, help="steps of a stretch")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a process")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a step")
    main(**vars(parser.parse_args()))
