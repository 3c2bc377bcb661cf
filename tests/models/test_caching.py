"""Caches of diffusers on `DiTModel`: each skips work, forgets the last call, and leaves the plain call as it is."""

from contextlib import contextmanager

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)

from diffusers_ext import DiTModel, ExtDDIMScheduler, GuidedDiffusionPipeline
from diffusers_ext.models.dit_blocks import DiTAttentionProcessor, DiTFeedForward


NUM_STEPS, NUM_LAYERS = 8, 3


def pipeline(num_layers=NUM_LAYERS):
    torch.manual_seed(0)
    model = DiTModel(
        8, 2, 1, hidden_size=16, num_layers=num_layers, num_attention_heads=2, num_classes=2, num_registers=1
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe = GuidedDiffusionPipeline(model, ExtDDIMScheduler(timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, **options):
    options = {"class_labels": [0, 1], "guidance_scale": 2.0, "num_inference_steps": NUM_STEPS} | options
    return pipe(generator=torch.Generator().manual_seed(0), output_type="latent", **options).images


def configs(pipe):
    now = {"current_timestep_callback": lambda: pipe.current_timestep}
    attention = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 900)}
    return {
        "first block": FirstBlockCacheConfig(threshold=0.5),
        "mag": MagCacheConfig(num_inference_steps=NUM_STEPS, mag_ratios=[1.0] * NUM_STEPS),
        "taylor": TaylorSeerCacheConfig(cache_interval=2, taylor_factors_dtype=torch.float32),
        "taylor, blocks": TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=[r"transformer_blocks\.\d+"]),
        "taylor, lite": TaylorSeerCacheConfig(cache_interval=2, use_lite_mode=True),
        "pyramid": PyramidAttentionBroadcastConfig(**attention, **now),
        "faster": FasterCacheConfig(**attention, **now, is_guidance_distilled=True),
    }


@contextmanager
def counted():
    """How often the attention and the feed-forward layer of a block are computed for a sample."""
    counts, before = {"attention": 0, "feed-forward": 0}, (DiTAttentionProcessor.__call__, DiTFeedForward.forward)

    def attend(self, attn, hidden_states, *args, **kwargs):
        counts["attention"] += len(hidden_states)
        return before[0](self, attn, hidden_states, *args, **kwargs)

    def feed(self, hidden_states):
        counts["feed-forward"] += len(hidden_states)
        return before[1](self, hidden_states)

    DiTAttentionProcessor.__call__, DiTFeedForward.forward = attend, feed
    try:
        yield counts
    finally:
        DiTAttentionProcessor.__call__, DiTFeedForward.forward = before


@pytest.mark.parametrize("name", configs(None))
def test_a_cache_skips_work_and_forgets_the_last_call(name):
    pipe = pipeline()
    plain = sample(pipe)
    with counted() as counts:  # patched before the hooks take hold of what is called
        pipe.denoiser.enable_cache(configs(pipe)[name])
        cached = sample(pipe)
    all_calls = 4 * NUM_STEPS * NUM_LAYERS
    assert counts["attention"] < 0.8 * all_calls
    of_whole_blocks = name not in ("taylor", "pyramid", "faster")
    assert counts["feed-forward"] == (counts["attention"] if of_whole_blocks else all_calls)
    assert cached.isfinite().all() and not torch.equal(cached, plain)

    def stop(pipe, i, t, tensors):
        if i == NUM_STEPS // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(pipe, class_labels=1, callback_on_step_end=stop)
    assert torch.equal(sample(pipe), cached)
    pipe.denoiser.disable_cache()
    assert torch.equal(sample(pipe), plain)


@torch.no_grad()
def test_first_block_cache_adds_the_last_residual_to_the_first_block():
    """By hand: tokens after the blocks = the first block's now + (the last block's - the first block's) before."""
    model, tokens = pipeline().denoiser, {}
    for i in (0, NUM_LAYERS - 1):
        model.transformer_blocks[i].register_forward_hook(lambda block, args, output, i=i: tokens.update({i: output}))
    x = torch.randn(2, 1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    first, last = [], []
    for each, t in zip(x, (900, 800), strict=True):
        model(each, t)
        first.append(tokens[0])
        last.append(tokens[NUM_LAYERS - 1])
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    for each, t in zip(x, (900, 800), strict=True):
        with model.cache_context("cond"):
            model(each, t)
    torch.testing.assert_close(tokens[NUM_LAYERS - 1], first[1] + last[0] - first[0])


def test_each_prediction_has_a_cache_of_its_own():
    """A cache that never skips makes the plain image, and predictions of two kinds do not meet in one state."""
    pipe = pipeline()
    plain = sample(pipe, guidance_interval=(0.0, 0.5))
    pipe.denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    # A batch of another size is summed in another order.
    torch.testing.assert_close(sample(pipe, guidance_interval=(0.0, 0.5)), plain, rtol=1e-4, atol=1e-4)
    pipe.denoiser.disable_cache()
    # All that is skipped is the conditional prediction's, as without guidance.
    pipe.denoiser.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    alone = sample(pipe, guidance_scale=1.0)
    torch.testing.assert_close(sample(pipe, guidance_scale=2.0, guidance_interval=(0.0, 0.0)), alone)


def test_attention_of_another_batch_is_not_reused():
    """Where guidance ends, the batch is half as large."""
    pipe = pipeline()
    pipe.denoiser.enable_cache(configs(pipe)["pyramid"])
    assert sample(pipe, guidance_interval=(0.0, 0.5)).isfinite().all()
    pipe.denoiser.disable_cache()
    pipe.denoiser.enable_cache(configs(pipe)["faster"])
    with pytest.raises(ValueError, match="guide in all of them or in none"):
        sample(pipe, guidance_interval=(0.0, 0.5))


def test_a_plain_call_leaves_no_hooks():
    pipe = pipeline()
    sample(pipe)
    assert not any(hasattr(module, "_diffusers_hook") for module in pipe.denoiser.modules())


@pytest.mark.parametrize(
    "config, message",
    [
        (SeaCacheConfig(), "the cache must be one of FirstBlockCacheConfig, .* got SeaCacheConfig"),
        (FasterCacheConfig(), "must have is_guidance_distilled=True"),
        (TaylorSeerCacheConfig(cache_identifiers=["proj_out"]), "proj_out of TaylorSeerCacheConfig must match"),
        (FirstBlockCacheConfig(), "at least 2 blocks, got 1"),
    ],
)
def test_a_cache_that_would_go_wrong_is_refused(config, message):
    model = pipeline(num_layers=1).denoiser
    with pytest.raises(ValueError, match=message):
        model.enable_cache(config)
    assert not model.is_cache_enabled
