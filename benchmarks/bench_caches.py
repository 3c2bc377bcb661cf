"""The Fréchet distance of a pipeline under each cache of diffusers, and how often a block is computed for an image.

    python benchmarks/bench_caches.py runs/fashion --num_images 400 --num_inference_steps 50

Image i of every set is made from the same noise, and compared with all training images. `blocks` counts the feed-forward layers
that are computed for an image, `attention` those of attention: some caches skip whole blocks, some attention alone; `fewer` is by
which factor they are fewer than without a cache, and `change` what the distance is to that without. MagCache is calibrated here,
on other noise. The caches are of the pipeline's `DiTModel`; one image at a time would not be slower, and each set runs in
batches, of which a cache of first blocks decides for all images at once.
"""

import argparse
import time
import warnings
from collections.abc import Iterator

import torch
from accelerate import PartialState
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from diffusers_ext.evaluation.comparison import Comparison
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.models.dit_blocks import DiTAttentionProcessor, DiTFeedForward


COUNTS = {"blocks": 0, "attention": 0}


def count_calls() -> None:
    """From here on, adds the samples of each call of these layers to `COUNTS`."""
    attend, feed = DiTAttentionProcessor.__call__, DiTFeedForward.forward

    def counted_attention(self, attn, hidden_states, *args, **kwargs):
        COUNTS["attention"] += len(hidden_states)
        return attend(self, attn, hidden_states, *args, **kwargs)

    def counted_feed_forward(self, hidden_states):
        COUNTS["blocks"] += len(hidden_states)
        return feed(self, hidden_states)

    DiTAttentionProcessor.__call__, DiTFeedForward.forward = counted_attention, counted_feed_forward


def caches(pipe, num_steps: int, ratios: list[float]) -> Iterator[tuple[str, object]]:
    """Configs by name; `None` for no cache."""
    now = {"current_timestep_callback": lambda: pipe.current_timestep}
    yield "none", None
    for threshold in (0.05, 0.1, 0.2, 0.3):
        yield f"FirstBlockCache, {threshold}", FirstBlockCacheConfig(threshold)
    for threshold, skipped in ((0.06, 2), (0.12, 1), (0.12, 3)):
        config = MagCacheConfig(threshold, skipped, 0.1, num_steps, ratios)
        yield f"MagCache, {threshold}, at most {skipped}", config
    blocks = {"cache_identifiers": [r"transformer_blocks\.\d+"], "taylor_factors_dtype": torch.float32}
    for interval in (2, 3, 4):
        yield f"TaylorSeer of blocks, each {interval}", TaylorSeerCacheConfig(interval, **blocks)
    for interval in (2, 3):
        yield (
            f"PyramidAttentionBroadcast, each {interval}",
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=interval, spatial_attention_timestep_skip_range=(-1, 1000), **now
            ),
        )
    yield (
        "FasterCache",
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 900),
            is_guidance_distilled=True,
            **now,
        ),
    )


def magnitude_ratios(pipe, num_steps: int, **call) -> list[float]:
    """MagCache's calibration: how the blocks' residual grows from step to step, averaged over tokens and images."""
    residuals, ends = [], {}
    blocks = pipe.denoiser.transformer_blocks

    def note(block, arguments, output):
        residuals.append((output - ends["first"]).float().norm(dim=-1))

    hooks = [
        blocks[0].register_forward_pre_hook(lambda block, arguments: ends.update(first=arguments[0])),
        blocks[-1].register_forward_hook(note),
    ]
    pipe(num_inference_steps=num_steps, guidance_scale=1.0, output_type="latent", **call)
    for hook in hooks:
        hook.remove()
    return [1.0, *((b / a).mean().item() for a, b in zip(residuals, residuals[1:], strict=False))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline")
    parser.add_argument(
        "--features", help="folder of a feature classifier; by default it is trained, or taken from the cache"
    )
    parser.add_argument("--num_images", type=int, default=400)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--only", nargs="*", help="beginnings of the names of caches to measure, beside none")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    PartialState()
    pipe = load_pipeline(options.pipeline)
    pipe.set_progress_bar_config(disable=True)
    comparison = Comparison.of(pipe, options.pipeline, options.num_images, options.features)
    labels = comparison.labels
    number, num_steps = options.num_images, options.num_inference_steps
    ratios = magnitude_ratios(pipe, num_steps, class_labels=labels[:16], generator=torch.Generator().manual_seed(1))
    count_calls()
    print("| cache | blocks | fewer | attention | fewer | Fréchet distance | change | seconds |", flush=True)
    print(f"|{'---|' * 8}", flush=True)
    plain, plain_distance = {}, None
    for name, config in caches(pipe, num_steps, ratios):
        if config is not None and options.only is not None and not name.startswith(tuple(options.only)):
            continue
        if config is not None:
            pipe.denoiser.enable_cache(config)
        COUNTS.update(blocks=0, attention=0)
        start = time.perf_counter()
        images = comparison.generate(pipe, num_steps, {"guidance_scale": options.guidance_scale})
        seconds = time.perf_counter() - start
        distance = comparison.measure(images)["frechet_distance"]
        if config is None:
            plain, plain_distance = dict(COUNTS), distance
        calls = " | ".join(f"{count / number:.1f} | {plain[kind] / count:.2f}" for kind, count in COUNTS.items())
        change = f"{distance / plain_distance - 1:+.1%}"
        print(f"| {name} | {calls} | {distance:.4g} | {change} | {seconds:.0f} |", flush=True)
        if config is not None:
            pipe.denoiser.disable_cache()


if __name__ == "__main__":
    main()
