"""Time of a training step of `UNetModel` beside diffusers' `UNet2DModel`, in one run.

    python benchmarks/bench_unet.py

Both have widths 64-128-128, two layers a level, attention at 16x16 and about 6.5M parameters, and train on batches of 32
images of 1x32x32. What a step is and how it is timed stands in `training_step.py`.
"""

from stock import stock_unet
from training_step import OurStep, StockStep, compare, parser

from diffusers_ext import UNetModel


def ours() -> UNetModel:
    return UNetModel(sample_size=32, in_channels=1, out_channels=1, block_out_channels=(64, 128, 128))


SETTINGS = {
    "diffusers, fp32": lambda: StockStep(stock_unet(32, 1), False),
    "diffusers, bf16 autocast": lambda: StockStep(stock_unet(32, 1), True),
    "diffusers, bf16 autocast, head dim 64": lambda: StockStep(stock_unet(32, 1, attention_head_dim=64), True),
    "diffusers_ext, fp32": lambda: OurStep(ours(), False),
    "diffusers_ext, bf16 autocast": lambda: OurStep(ours(), True),
}


def main(rounds: int, batch_size: int, threads: int):
    compare(SETTINGS, rounds, threads, (batch_size, 1, 32, 32))


if __name__ == "__main__":
    main(**vars(parser(__doc__.splitlines()[0]).parse_args()))
