import pytest
import torch

from diffusers_ext.latents import encode_latents
from diffusers_ext.models.vae import VAEModel
from diffusers_ext.models.vae_likelihood import DiagonalGaussian
from diffusers_ext.recipes.vae_figures import (
    decoded,
    draw_pictures,
    interpolate,
    manifold_latents,
    pictures_of,
    prior_title,
)
from diffusers_ext.recipes.vae_scale import LatentStatistics, measure_latents, store_scale


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(**kwargs):
    """With weights large enough that latents are neither centred nor of unit size."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "latent_channels": 3,
    }
    vae = VAEModel(**config | kwargs).eval()
    last = vae.encoder.layers[-1] if vae.config.architecture == "mlp" else vae.encoder.conv_out
    last.weight.data *= 4
    last.bias.data += 1.5
    return vae


def flat(**kwargs):
    return model(architecture="mlp", latent_dim=5, hidden_dims=(16,), **kwargs)


def test_moments_are_those_of_draws():
    """Of posteriors with known means and variances, against 40 draws of each."""
    mean, logvar = 2 + 0.5 * draw(500, 4, 3, 3), 0.3 * draw(500, 4, 3, 3, seed=1)
    statistics = LatentStatistics((4, 3, 3))
    for rows in (slice(0, 7), slice(7, 300), slice(300, 500)):
        statistics.update(DiagonalGaussian(mean[rows], logvar[rows]))
    moments = statistics.moments()
    generator = torch.Generator().manual_seed(2)
    draws = torch.cat([DiagonalGaussian(mean, logvar).sample(generator) for _ in range(40)])
    assert moments.mean == pytest.approx(draws.mean().item(), abs=5 / draws.numel() ** 0.5 * 1.2)
    assert moments.std == pytest.approx(draws.std().item(), rel=5 / (2 * draws.numel()) ** 0.5)
    torch.testing.assert_close(moments.mean_var, mean.double().var(0, unbiased=False), rtol=1e-5, atol=1e-7)
    kl = DiagonalGaussian(mean, logvar).kl_per_latent().double()
    torch.testing.assert_close(moments.kl, kl.mean((0, 2, 3)), rtol=1e-5, atol=0)
    assert moments.rate == pytest.approx(kl.flatten(1).sum(1).mean().item(), rel=1e-5)
    assert moments.num_images == 500


def test_moments_of_a_tiny_spread_about_a_large_mean_are_exact():
    mean = 300 + 1e-3 * draw(2000, 1).double()
    statistics = LatentStatistics((1,))
    statistics.update(DiagonalGaussian(mean, torch.full_like(mean, -30.0)))
    assert statistics.moments().std == pytest.approx(mean.std(unbiased=False).item(), rel=1e-4)


@pytest.mark.parametrize("build", [model, flat])
def test_stored_scale_makes_latents_of_mean_0_and_std_1(build):
    """What a denoiser is trained on: draws from the posteriors, by the formula of the pipelines, within 2 %."""
    vae, images = build(), draw(400, 1, 8, 8).tanh()
    decoded_before = vae(images).sample
    before = measure_latents(vae, images.split(64))
    assert abs(before.mean) > 0.3 and abs(before.std - 1) > 0.1
    store_scale(vae, before)
    assert vae.is_measured and vae.config.shift_factor == 0.0
    with torch.no_grad():
        z = encode_latents(vae, images, torch.Generator().manual_seed(1), sample=True)
    assert z.mean().abs() < 0.02 and abs(z.std() - 1) < 0.02
    torch.testing.assert_close(vae(images).sample, decoded_before, rtol=1e-4, atol=1e-5)
    again = measure_latents(vae, images.split(64))
    assert again.mean == pytest.approx(0, abs=1e-6) and again.std == pytest.approx(before.std, rel=1e-6)
    assert again.rate == pytest.approx(before.rate, rel=1e-5)  # the prior has moved with the latents
    store_scale(vae, again)
    assert vae.config.latent_offset == pytest.approx(before.mean, rel=1e-5)


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        measure_latents(model(), [])
    statistics = LatentStatistics((2,))
    statistics.update(DiagonalGaussian(torch.ones(3, 2), torch.full((3, 2), -30.0)))
    statistics.sums[2] = 0
    with pytest.raises(ValueError, match="all the same"):
        statistics.moments()


@pytest.mark.parametrize("build", [model, flat])
@pytest.mark.parametrize("offset", [0.0, 0.7])
def test_interpolations_begin_and_end_at_the_images(build, offset):
    vae = build(latent_offset=offset)
    first, second = draw(1, 1, 8, 8), draw(1, 1, 8, 8, seed=1)
    line, circle = interpolate(vae, first, second, torch.linspace(0, 1, 5))
    for way in (line, circle):
        torch.testing.assert_close(decoded(vae, way[:1]), decoded(vae, vae.encode(first).latent_dist.mean))
        torch.testing.assert_close(decoded(vae, way[-1:]), decoded(vae, vae.encode(second).latent_dist.mean))
    torch.testing.assert_close(line[2], (line[0] + line[-1]) / 2)
    # On the great circle, about the mean of the prior, the length goes evenly from one end's to the other's.
    lengths = (circle + offset).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.linspace(0, 1, 5) * (lengths[-1] - lengths[0]) + lengths[0])
    assert ((line[2] + offset).norm() < lengths[2]).item()


def test_the_manifold_lies_at_equal_steps_of_the_prior_s_probability():
    grid = manifold_latents(10, prior_mean=0.5)
    assert grid.shape == (10, 10, 2)
    probability = torch.distributions.Normal(0.5, 1.0).cdf(grid)
    steps = (torch.arange(10) + 0.5) / 10
    torch.testing.assert_close(probability[3, :, 0], steps, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(probability[:, 3, 1], steps.flip(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "vae, manifold", [(model(), False), (flat(), False), (model(architecture="mlp", latent_dim=2), True)]
)
def test_all_pictures_are_drawn(tmp_path, vae, manifold):
    from PIL import Image

    draw_pictures(vae, draw(12, 1, 8, 8).tanh(), tmp_path / "pictures", columns=4)
    names = pictures_of(vae)
    assert ("manifold.png" in names) == manifold
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == set(names)
    sizes = {name: Image.open(tmp_path / "pictures" / name).size for name in names}
    assert sizes["samples.png"][0] == 4 * 66 + 2  # 64 pixels and a margin each
    assert 4 * 66 + 10 < sizes["samples.png"][1] < 4 * 66 + 100  # below a title
    assert sizes["interpolations.png"][1] > 6 * 66
    rows = vae.latent_shape[0]
    assert sizes["traversals.png"][1] == pytest.approx(rows * 66, abs=30)


def test_draws_from_the_prior_say_what_they_are():
    """A feature map's prior knows of no neighbours, so that its draws are not what the model makes."""
    assert prior_title(flat()) == "decoded draws from the prior"
    assert "no objects" in prior_title(model()) and "diffusion model" in prior_title(model())


def test_pictures_leave_the_default_generator_alone(tmp_path):
    vae, images = flat(), draw(8, 1, 8, 8)  # the first seeds it
    torch.manual_seed(5)
    state = torch.get_rng_state()
    draw_pictures(vae, images, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
