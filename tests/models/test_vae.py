import itertools

import pytest
import torch
from diffusers import (
    AutoModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from diffusers_ext.latents import decode_latents, encode_latents
from diffusers_ext.models.layers import AffineGroupNorm
from diffusers_ext.models.vae import VAEModel
from diffusers_ext.models.vae_tiling import apply_tiled
from tiny import assert_same_output, assert_same_weights


def tiny(**kwargs):
    torch.manual_seed(0)
    config = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (8, 16)}
    return VAEModel(**(config | kwargs))


def mlp(**kwargs):
    return tiny(**{"architecture": "mlp", "sample_size": 8, "in_channels": 1, "out_channels": 1} | kwargs)


def awake(model):
    """The model with its zero-initialised layers filled, so that every path has an effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim and not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "config, shape, latents",
    [
        ({}, (2, 3, 16, 16), (4, 8, 8)),
        ({}, (1, 3, 8, 20), (4, 4, 10)),
        ({"block_out_channels": (8,)}, (1, 3, 16, 16), (4, 16, 16)),
        ({"block_out_channels": (8, 8, 12, 8, 8)}, (1, 3, 16, 32), (4, 1, 2)),
        ({"in_channels": 5, "out_channels": 2, "latent_channels": 7}, (1, 5, 16, 16), (7, 8, 8)),
        ({"sample_size": (8, 12), "mid_block_add_attention": False, "layers_per_block": 2}, (1, 3, 8, 12), (4, 4, 6)),
        ({"dims": 1, "sample_size": 24}, (2, 3, 24), (4, 12)),
        ({"architecture": "mlp", "sample_size": (4, 6), "latent_dim": 5, "hidden_dims": (9, 8)}, (2, 3, 4, 6), (5,)),
        ({"architecture": "mlp", "dims": 1, "hidden_dims": ()}, (2, 3, 16), (16,)),
    ],
)
def test_every_size_that_the_config_allows(config, shape, latents):
    model, x = tiny(**config), draw(*shape)
    posterior = model.encode(x).latent_dist
    assert posterior.mean.shape == posterior.logvar.shape == (shape[0], *latents)
    out = model.decode(posterior.sample(torch.Generator().manual_seed(0))).sample
    assert out.shape == (shape[0], model.config.out_channels, *shape[2:])
    assert posterior.kl().shape == shape[:1]
    assert model.sample_prior(2).shape == (2, *model.latent_shape)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"sample_size": 15}, "sample_size must be a multiple of 2, .* got 15 x 15"),
        (
            {"sample_size": (16, 16, 16)},
            r"sample_size must be one positive number or one for each of 2 axes, got \(16, 16, 16\)",
        ),
        ({"block_out_channels": ()}, "block_out_channels must be one or more positive numbers"),
        ({"dims": 3}, "dims must be one of 1, 2, got 3"),
        ({"architecture": "vq"}, "architecture must be one of conv, mlp, got 'vq'"),
        ({"likelihood": "beta"}, "likelihood must be one of bernoulli, gaussian, laplace, got 'beta'"),
        ({"likelihood_scale": 0.0}, "likelihood_scale must be positive, got 0"),
        ({"likelihood": "bernoulli", "learn_scale": True}, "learn_scale has no meaning"),
        ({"latent_channels": 0}, "latent_channels must be at least 1, got 0"),
        ({"architecture": "mlp", "hidden_dims": (0,)}, "hidden_dims must be positive"),
        ({"scaling_factor": -1.0}, "scaling_factor must be positive, got -1"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)


def test_inputs_that_do_not_fit_are_refused():
    model = tiny()
    with pytest.raises(ValueError, match=r"multiple of 2, .* got 15 x 16"):
        model.encode(draw(1, 3, 15, 16))
    with pytest.raises(ValueError, match=r"x must have shape \(batch, 3, height, width\), got \(1, 1, 16, 16\)"):
        model.encode(draw(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"z must have shape \(batch, 4, height, width\), got \(1, 3, 8, 8\)"):
        model.decode(draw(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"takes samples of sample_size 8 alone, got 16 x 16"):
        mlp().encode(draw(1, 1, 16, 16))
    with pytest.raises(ValueError, match=r"z must have shape \(batch, 16\), got \(1, 4, 8, 8\)"):
        mlp().decode(draw(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"z must have shape \(batch, 4, width\), got"):
        tiny(dims=1).decode(draw(1, 3, 8))


def test_a_forward_pass_is_encoding_then_decoding():
    model, x, noise = awake(tiny(likelihood="laplace", likelihood_scale=0.5)), draw(2, 3, 16, 16), draw(2, 4, 8, 8)
    posterior, out = model.encode(x).latent_dist, model(x, noise=noise)
    z = posterior.mean + posterior.std * noise
    torch.testing.assert_close(out.sample, model.decode(z).sample)
    torch.testing.assert_close((out.mean, out.logvar, out.latents), (posterior.mean, posterior.logvar, z))
    assert out.log_scale.exp().item() == pytest.approx(0.5)
    torch.testing.assert_close(model(x, return_dict=False)[0], model.decode(posterior.mode(), return_dict=False)[0])
    generators = [torch.Generator().manual_seed(4) for _ in "12"]
    drawn = model(x, sample_posterior=True, generator=generators[0]).latents
    torch.testing.assert_close(drawn, posterior.sample(generators[1]))


@pytest.mark.parametrize("build", [tiny, mlp])
def test_means_of_bernoulli_and_of_the_fully_connected_form_stay_in_range(build):
    """The mean of p(x | z), where data is in [-1, 1], is 2 sigmoid(logits) - 1."""
    model = build(likelihood="bernoulli")
    if build is tiny:
        model.decoder.conv_out.weight.data *= 30
    z = 50 * draw(4, *model.latent_shape)
    logits = model.decode_parameters(z)
    torch.testing.assert_close(model.decode(z).sample, 2 * logits.sigmoid() - 1)
    assert logits.abs().max() > 5
    bounded = mlp(likelihood="gaussian").decode(1000 * draw(4, 16)).sample
    assert bounded.abs().max() <= 1


@pytest.mark.parametrize("build", [tiny, mlp])
def test_every_parameter_gets_a_gradient(build):
    model = awake(build(learn_scale=True))
    out = model(draw(4, *([3, 16, 16] if build is tiny else [1, 8, 8])), sample_posterior=True)
    (out.parameters.square().sum() + out.logvar.exp().sum() + out.log_scale).backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


@pytest.mark.parametrize("build", [tiny, mlp])
def test_checkpointing_changes_memory_and_not_gradients(build):
    x = draw(2, *([3, 16, 16] if build is tiny else [1, 8, 8]))
    grads = []
    for checkpointing in (False, True):
        model = awake(build())
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()(x).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_the_training_path_computes_what_the_inference_path_does():
    model, x = awake(tiny()), draw(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x).sample
    torch.testing.assert_close(model(x).sample, expected)


def test_it_compiles_without_graph_breaks():
    model, x, noise = awake(tiny()), draw(2, 3, 16, 16), draw(2, 4, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, noise=noise).sample, model(x, noise=noise).sample, rtol=1e-4, atol=1e-5)


def test_slices_give_what_the_batch_gives():
    model, x = awake(tiny()), draw(3, 3, 16, 16)
    with torch.no_grad():
        whole = model(x).sample
        model.enable_slicing()
        torch.testing.assert_close(model(x).sample, whole, rtol=1e-4, atol=1e-5)
        model.disable_slicing()
        assert not model.use_slicing


@pytest.mark.parametrize("sides", [(10, 13), (9, 4), (30, 5)])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_tiles_of_a_function_of_each_position_are_the_whole(sides, overlap):
    """Enlarging by repetition, and shrinking by averages, look at no neighbour: blending must not show at all."""
    x = draw(2, 3, *sides).double()
    tiling = {"tile": (5, 4), "overlap": (overlap, overlap)}
    up = torch.nn.Upsample(scale_factor=2)
    torch.testing.assert_close(apply_tiled(up, x, out_scale=2, **tiling), up(x), rtol=1e-12, atol=1e-12)
    pixels, down = up(x), torch.nn.AvgPool2d(2)
    torch.testing.assert_close(apply_tiled(down, pixels, in_scale=2, **tiling), x, rtol=1e-12, atol=1e-12)


def test_tiles_are_blended_in_proportion_to_the_distance_from_their_edges():
    """Tiles that are 0, 1, 2, ... throughout, in the order in which they are made."""

    def tiles(side, tile, overlap):
        made = itertools.count()
        out = apply_tiled(
            lambda x: torch.full_like(x, next(made)), torch.zeros(1, 1, side), tile=tile, overlap=overlap
        )
        return out.flatten().tolist(), next(made)

    ramp = [0.125, 0.375, 0.625, 0.875]
    assert tiles(12, (8,), (4,)) == (pytest.approx([0] * 4 + ramp + [1] * 4), 2)
    values, count = tiles(16, (8,), (4,))
    assert count == 3 and values == pytest.approx([0] * 4 + ramp + [1 + part for part in ramp] + [2] * 4)
    assert tiles(16, (8,), (0,)) == ([0] * 8 + [1] * 8, 2)
    assert tiles(17, (8,), (0,))[1] == 3  # the last one ends where the sample does
    assert tiles(8, (8,), (4,)) == ([0] * 8, 1)


def test_tiles_reach_no_further_than_a_network_looks():
    """Without statistics over the sample, a decoder's tiles equal the whole wherever a tile's edge is out of sight."""
    model = awake(tiny(mid_block_add_attention=False, block_out_channels=(8, 8)))
    for module in model.modules():
        if isinstance(module, AffineGroupNorm):
            module.forward = torch.nn.functional.tanh
    model.eval().double()
    z = draw(1, 4, 8, 96).double()
    with torch.no_grad():
        whole = model.decode(z).sample
        model.enable_tiling(tile_size=128, overlap=0.5)
        tiled = model.decode(z).sample
        # Tiles of 64 latents that begin at 0 and 32 share the latents from 32 to 64. A pixel is made of 12 latents to
        # either side: 9 convolutions at their resolution and 6 at the double one.
        seen = 12
        for alone in (slice(0, 2 * 32), slice(2 * 64, None), slice(2 * (32 + seen), 2 * (64 - seen))):
            torch.testing.assert_close(tiled[..., alone], whole[..., alone], rtol=1e-9, atol=1e-9)
        encoded = model.encode(whole).latent_dist.mean
        model.disable_tiling()
        torch.testing.assert_close(encoded[..., :30], model.encode(whole).latent_dist.mean[..., :30])
        assert not torch.equal(tiled, whole)


def test_tiling_is_off_until_asked_for_and_says_what_does_not_fit():
    model, x = awake(tiny()), draw(1, 3, 16, 16)
    whole = model(x).sample
    model.enable_tiling()
    torch.testing.assert_close(model(x).sample, whole)  # one tile
    large = model(draw(1, 3, 32, 48)).sample
    assert large.shape == (1, 3, 32, 48) and large.isfinite().all()
    with pytest.raises(ValueError, match="tile_size must be a multiple of 2"):
        model.enable_tiling(tile_size=7)
    with pytest.raises(
        ValueError, match=r"tile_size must be one positive number or one for each of 2 axes, got \(8, 8, 8\)"
    ):
        model.enable_tiling(tile_size=(8, 8, 8))
    with pytest.raises(ValueError, match=r"overlap must be in \[0, 1\), got 1"):
        model.enable_tiling(overlap=1.0)
    with pytest.raises(ValueError, match="tiling needs architecture 'conv'"):
        mlp().enable_tiling()


@pytest.mark.parametrize("build", [tiny, mlp])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_keep_weights_dtype_and_scale(tmp_path, build, dtype):
    model = awake(build(learn_scale=True, scaling_factor=0.7, shift_factor=0.0, latent_offset=0.3)).to(dtype)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path), torch_dtype=dtype)
    assert isinstance(loaded, VAEModel) and loaded.is_measured
    assert (loaded.config.scaling_factor, loaded.config.shift_factor, loaded.config.latent_offset) == (0.7, 0.0, 0.3)
    x = draw(2, *([3, 16, 16] if build is tiny else [1, 8, 8])).to(dtype)
    assert_same_weights(loaded, model.eval())
    assert loaded(x).sample.dtype == dtype
    assert_same_output(loaded(x).sample, model(x).sample)


def test_bf16_autocast_is_as_close_as_its_rounding():
    model, x = awake(tiny()), draw(2, 3, 16, 16)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(x)
    assert rounded.sample.dtype == rounded.mean.dtype == torch.float32
    assert (rounded.sample - exact.sample).norm() < 0.03 * exact.sample.norm()


def test_a_scale_is_measured_once_it_was_given():
    assert not tiny().is_measured
    assert tiny(shift_factor=0.0, scaling_factor=1.0).is_measured and tiny(scaling_factor=0.2).is_measured


def test_normalised_latents_go_there_and_back():
    model, x = awake(tiny(scaling_factor=0.4, shift_factor=0.1)), draw(2, 3, 16, 16)
    z = encode_latents(model, x)
    torch.testing.assert_close(z, (model.encode(x).latent_dist.mean - 0.1) * 0.4)
    torch.testing.assert_close(decode_latents(model, z), model(x).sample, rtol=1e-4, atol=1e-5)


def measured():
    """A VAE as `train_vae.py` leaves it: centred, with a scale."""
    return awake(tiny(scaling_factor=0.5, shift_factor=0.0, latent_offset=0.25)).eval()


def unet():
    torch.manual_seed(2)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
PROMPT = {"prompt_embeds": draw(1, 7, 8, seed=3), "negative_prompt_embeds": draw(1, 7, 8, seed=4)}


def test_stable_diffusion_decodes_by_our_scale():
    """Its images are those of our formula for the latents it ends at, although it knows no shift."""
    vae = measured()
    pipe = StableDiffusionPipeline(vae, None, None, unet(), DDIMScheduler(), **NO_CHECKER)
    pipe.set_progress_bar_config(disable=True)
    settings = PROMPT | {"num_inference_steps": 2, "height": 16, "width": 16}
    z = pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert z.shape == (1, 4, 8, 8)
    images = pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(images, (decode_latents(vae, z) / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-5)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    again = pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(again, images, rtol=1e-4, atol=1e-5)


def test_image_to_image_encodes_by_our_scale():
    """One step that changes nothing, of a network that predicts no noise at the level 0, gives the image's own draw."""
    vae, x = measured(), draw(1, 3, 16, 16, seed=5).tanh()
    pipe = StableDiffusionImg2ImgPipeline(vae, None, None, unet(), DDIMScheduler(clip_sample=False), **NO_CHECKER)
    z = pipe.prepare_latents(
        x, torch.tensor([0]), 1, 1, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(1)
    )
    generator = torch.Generator().manual_seed(1)
    clean = encode_latents(vae, x, generator, sample=True)
    noise = torch.randn(clean.shape, generator=generator)
    torch.testing.assert_close(z, pipe.scheduler.add_noise(clean, noise, torch.tensor([0])), rtol=1e-4, atol=1e-5)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(image=x / 2 + 0.5, **PROMPT, strength=0.5, num_inference_steps=2, output_type="pt").images
    assert image.shape == (1, 3, 16, 16)


def test_the_dit_pipeline_saves_loads_and_decodes_by_our_scale(tmp_path):
    vae = measured()
    torch.manual_seed(6)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
        norm_num_groups=4,
    )
    pipe = DiTPipeline(transformer.eval(), vae, DDIMScheduler())
    pipe.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.vae, VAEModel)
    seen = []
    decode = loaded.vae.decode
    loaded.vae.decode = lambda z, *args, **kwargs: (seen.append(z), decode(z, *args, **kwargs))[1]
    images = []
    for one in (pipe, loaded):
        one.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(
            one([3], guidance_scale=1.0, num_inference_steps=2, generator=generator, output_type="np").images
        )
    torch.testing.assert_close(*map(torch.from_numpy, images))
    z = seen[0] * vae.config.scaling_factor  # what the denoiser has made
    expected = (decode_latents(vae, z) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).detach()
    torch.testing.assert_close(torch.from_numpy(images[0]), expected, rtol=1e-4, atol=1e-5)
