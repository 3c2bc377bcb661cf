"""Time of a training step of `DiTModel` beside diffusers' `DiTTransformer2DModel`, in one run.

    python benchmarks/bench_dit.py --compiled
    python benchmarks/bench_dit.py --name DiT-S/2 --size 32 --channels 4 --batch_size 8

Both have the same widths, depth and heads, ten labels and batches of square samples; by default 1x32x32 in patches of 2,
which makes 256 tokens. What a step is and how it is timed stands in `training_step.py`.
"""

from diffusers import DiTTransformer2DModel
from training_step import OurStep, StockStep, compare, parser

from diffusers_ext import DiTModel
from diffusers_ext.models.dit import dit_config


WIDTHS = {"hidden_size": 256, "num_layers": 6, "num_attention_heads": 4, "patch_size": 2}


def stock(
    sample_size: int, channels: int, hidden_size: int, num_layers: int, num_attention_heads: int, patch_size: int
):
    return DiTTransformer2DModel(
        sample_size=sample_size,
        in_channels=channels,
        num_layers=num_layers,
        num_attention_heads=num_attention_heads,
        attention_head_dim=hidden_size // num_attention_heads,
        patch_size=patch_size,
        num_embeds_ada_norm=10,
    )


def main(name: str | None, size: int, channels: int, rounds: int, batch_size: int, threads: int, compiled: bool):
    widths = WIDTHS if name is None else dit_config(name)

    def ours() -> DiTModel:
        return DiTModel(sample_size=size, in_channels=channels, num_classes=10, **widths)

    settings = {
        "diffusers, fp32": lambda: StockStep(stock(size, channels, **widths), False),
        "diffusers, bf16 autocast": lambda: StockStep(stock(size, channels, **widths), True),
        "diffusers_ext, fp32": lambda: OurStep(ours(), False),
        "diffusers_ext, bf16 autocast": lambda: OurStep(ours(), True),
    }
    if compiled:
        settings["diffusers, bf16 autocast, compiled"] = lambda: StockStep(
            stock(size, channels, **widths), True, compiled=True
        )
        settings["diffusers_ext, bf16 autocast, compiled"] = lambda: OurStep(ours(), True, compiled=True)
    print(", ".join(f"{key} {value}" for key, value in widths.items()))
    compare(settings, rounds, threads, (batch_size, channels, size, size), num_classes=10)


if __name__ == "__main__":
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--name", help="a size of the paper, such as DiT-S/2, in place of width 256 and 6 blocks")
    options.add_argument("--size", type=int, default=32, help="side of the samples")
    options.add_argument("--channels", type=int, default=1, help="channels of the samples")
    options.add_argument("--compiled", action="store_true", help="both compiled too, as by --compile")
    main(**vars(options.parse_args()))
