"""Time of a training step of `UNetModel` beside diffusers' `UNet2DModel`, in one run.

    python benchmarks/bench_unet.py

Both have widths 64-128-128, two layers a level, attention at 16x16 and about 6.5M parameters, and train on batches of 32
images of 1x32x32: forward, backward, clipping, AdamW and averaging of the weights. diffusers' network runs as
`train_unconditional.py` runs it; ours as `train_ddpm.py` does, without compiling. The settings take turns, so that a
machine that slows down slows all of them, and the medians are compared.
"""

import argparse
import time
from statistics import median

import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel

from diffusers_ext import UNetModel
from diffusers_ext.trainer.ema import WeightAverage


class StockStep:
    """diffusers' network, optimizer and average, as `train_unconditional.py` has them."""

    def __init__(self, mixed_precision: bool, attention_head_dim: int = 8):
        torch.manual_seed(0)
        self.mixed_precision = mixed_precision
        self.model = UNet2DModel(
            sample_size=32,
            in_channels=1,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(64, 128, 128),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=attention_head_dim,
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=1e-6)
        ema = EMAModel(self.model.parameters(), decay=0.9999, use_ema_warmup=True)
        self.average = lambda: ema.step(self.model.parameters())

    def __call__(self, x_t: torch.Tensor, timesteps: torch.Tensor, target: torch.Tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.mixed_precision):
            output = self.model(x_t, timesteps).sample
        (output.float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average()


class OurStep(StockStep):
    """Our network, optimizer and average, as `diffusers_ext.trainer` has them."""

    def __init__(self, mixed_precision: bool):
        torch.manual_seed(0)
        self.mixed_precision = mixed_precision
        self.model = UNetModel(sample_size=32, in_channels=1, out_channels=1, block_out_channels=(64, 128, 128))
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        average = WeightAverage(self.model, std=0.1)
        self.average = lambda: average.update(self.model)


SETTINGS = {
    "diffusers, fp32": lambda: StockStep(False),
    "diffusers, bf16 autocast": lambda: StockStep(True),
    "diffusers, bf16 autocast, head dim 64": lambda: StockStep(True, attention_head_dim=64),
    "diffusers_ext, fp32": lambda: OurStep(False),
    "diffusers_ext, bf16 autocast": lambda: OurStep(True),
}


def main(rounds: int, batch_size: int, threads: int):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(2, batch_size, 1, 32, 32, generator=generator)
    timesteps = torch.randint(1000, (batch_size,), generator=generator)
    steps = {name: make() for name, make in SETTINGS.items()}
    seconds = {name: [] for name in steps}
    for round in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(batch[0], timesteps, batch[1])
            if round:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)

    medians = {name: median(values) for name, values in seconds.items()}
    print(f"median of {rounds} steps, batch {batch_size}, {threads} threads, torch {torch.__version__}")
    print(f"{'':40}{'parameters':>12}{'s/step':>9}{'of fp32':>9}{'of bf16':>9}")
    for name, value in medians.items():
        parameters = sum(p.numel() for p in steps[name].model.parameters())
        ratios = [value / medians[f"diffusers, {stock}"] for stock in ("fp32", "bf16 autocast")]
        print(f"{name:40}{parameters / 1e6:11.2f}M{value:9.3f}{ratios[0]:9.3f}{ratios[1]:9.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="steps of each setting that are timed")
    parser.add_argument("--batch_size", type=int, default=32, help="images in a step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()
    main(arguments.rounds, arguments.batch_size, arguments.threads)
