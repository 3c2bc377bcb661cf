from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.distributions import Normal, kl_divergence

from diffusers_ext.models.hierarchical_vae import HierarchicalVAEModel
from diffusers_ext.recipes.hierarchical_figures import held_fixed, recalled
from diffusers_ext.recipes.hierarchical_vae import (
    HierarchicalObjective,
    describe_levels,
    measure_levels,
    unused_warning,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model():
    """Two levels, with layers filled that start at zero, so that each level spends some nats."""
    torch.manual_seed(0)
    vae = HierarchicalVAEModel(8, 1, 1, (8, 8), num_levels=2, latent_channels=(3, 2), likelihood_scale=0.3)
    generator = torch.Generator().manual_seed(1)
    for parameter in vae.parameters():
        if parameter.ndim and not parameter.any():
            parameter.data.normal_(std=0.2, generator=generator)
    return vae


def batch(vae, count=6, seed=1):
    return {
        "images": draw(count, 1, 8, 8, seed=seed).tanh(),
        "noise": draw(count, 1, 8, 8, seed=seed + 1),
        "latent_noise": draw(count, vae.num_latents, seed=seed + 2),
    }


def objective(vae, **kwargs):
    return HierarchicalObjective(
        Accelerator(cpu=True), vae.config.likelihood, len(vae.levels), last_layer=vae.last_layer, **kwargs
    ).train()


def terms_by_hand(vae, data):
    """Distortion, and the KL divergence of each latent of each level, by torch.distributions."""
    chain = vae.encode(data["images"], noise=data["latent_noise"]).latent_dist
    out = vae.decode(chain.latents[-1]).sample
    distortion = -Normal(out, 0.3).log_prob(data["images"]).flatten(1).sum(1).mean()
    pairs = zip(chain.posteriors, chain.priors, strict=True)
    return distortion, [kl_divergence(Normal(q.mean, q.std), Normal(p.mean, p.std)) for q, p in pairs]


def total(kl):
    return kl.flatten(1).sum(1).mean()


@pytest.mark.parametrize("kl_weight", [0.0, 0.2, 1.0])
def test_the_loss_is_the_weighted_bound_with_the_rates_of_all_levels(kl_weight):
    vae = model()
    data = batch(vae)
    distortion, kl = terms_by_hand(vae, data)
    expected = (distortion + kl_weight * sum(map(total, kl))) / 64
    torch.testing.assert_close(objective(vae, kl_weight=kl_weight)(vae, data), expected)


def test_free_bits_are_for_each_channel_of_each_level():
    """A channel that spends less has no gradient of its rate, and those above the threshold have all of theirs."""
    vae = model()
    data = batch(vae)
    distortion, kl = terms_by_hand(vae, data)
    by_channel = [part.mean((0, 2, 3)) for part in kl]  # nats a position
    spent = torch.cat(by_channel)
    limit = spent.median().item() * 1.0001
    assert (spent < limit).any() and (spent > limit).any()
    pushed = sum(mean.clamp(min=limit).sum() * part[0, 0].numel() for mean, part in zip(by_channel, kl, strict=True))
    watched = objective(vae, free_bits=limit)
    torch.testing.assert_close(watched(vae, data), (distortion + pushed) / 64)
    torch.testing.assert_close(watched.eval()(vae, data), (distortion + sum(map(total, kl))) / 64)


def test_free_bits_above_all_that_is_spent_leave_no_gradient_of_the_rate():
    """The encoder's gradient is then that of the distortion alone."""
    vae = model()
    data, grads = batch(vae), []
    for options in ({"free_bits": 100.0}, {"kl_weight": 0.0}):
        vae.zero_grad()
        objective(vae, **options)(vae, data).backward()
        grads.append([parameter.grad.clone() for parameter in vae.parameters()])
    torch.testing.assert_close(*grads)
    vae.zero_grad()
    objective(vae)(vae, data).backward()
    assert not torch.allclose(vae.top_down[0].posterior_out.weight.grad, grads[0][0].new_zeros(()), atol=1e-6)
    assert any(
        not torch.allclose(parameter.grad, grad) for parameter, grad in zip(vae.parameters(), grads[0], strict=True)
    )


def test_the_kl_weight_of_all_levels_rises_from_zero():
    vae = model()
    data = batch(vae)
    distortion, kl = (part for part in terms_by_hand(vae, data))
    watched = objective(vae, kl_warmup_steps=4)
    for step in range(1, 6):
        watched.steps = partial(int, step - 1)  # as the trainer says them
        expected = (distortion + min(1, step / 4) * sum(map(total, kl))) / 64
        torch.testing.assert_close(watched(vae, data), expected)


def test_the_rates_of_levels_are_logged_by_their_numbers():
    vae = model()
    parts = [batch(vae, 4, seed=1), batch(vae, 6, seed=5)]
    watched = objective(vae)
    for part in parts:
        watched(vae, part)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    distortion, kl = terms_by_hand(vae, whole)
    got = watched.metrics()
    assert got["distortion"] == pytest.approx(distortion.item(), rel=1e-5)
    assert got["kl_of_level_2"] == pytest.approx(total(kl[0]).item(), rel=1e-5)
    assert got["kl_of_level_1"] == pytest.approx(total(kl[1]).item(), rel=1e-5)
    assert got["rate"] == pytest.approx(got["kl_of_level_1"] + got["kl_of_level_2"], rel=1e-5)
    assert "active_latents" not in got
    watched(vae, parts[0])
    assert watched.metrics()["kl_of_level_2"] == pytest.approx(
        total(terms_by_hand(vae, parts[0])[1][0]).item(), rel=1e-5
    )


def test_measured_rates_are_those_of_draws_and_a_level_that_is_not_used_is_named():
    vae = model()
    images = draw(40, 1, 8, 8).tanh()
    measured = measure_levels(vae, images.split(16), seed=3)
    generator, kl = torch.Generator().manual_seed(3), []
    with torch.no_grad():
        for part in images.split(16):
            noise = torch.randn(len(part), vae.num_latents, generator=generator)
            kl.append(terms_by_hand(vae, {"images": part, "latent_noise": noise})[1])
    kl = [torch.cat(parts).mean(0) for parts in zip(*kl, strict=True)]
    assert measured.num_images == 40 and measured.num_latents == [12, 32]
    assert measured.rates == pytest.approx([part.sum().item() for part in kl], rel=1e-5)
    assert measured.num_active == [int((part > 0.01).sum()) for part in kl]
    text = describe_levels(vae, measured)
    assert "| 2 | 3 x 2 x 2 |" in text and "| 1 | 2 x 4 x 4 |" in text and "Warning" not in text
    assert unused_warning([0.2, 3.0]) is None
    assert "of 3 levels of latents, level 3, 2 spends less" in unused_warning([0.01, 0.0, 30.0])


def test_rows_hold_one_more_level_each():
    vae = model()
    rows, names = held_fixed(vae, 5, torch.Generator().manual_seed(0))
    assert names == ["all levels drawn", "level 2 held fixed"]
    torch.testing.assert_close(rows[0][0], rows[1][0])  # that whose latents are held
    deep = HierarchicalVAEModel(8, 1, 1, (8,), num_levels=4)
    names = held_fixed(deep, 2)[1][1:]
    assert names == ["level 4 held fixed", "levels 4 and 3 held fixed", "levels 4, 3 and 2 held fixed"]
    assert all(row.shape == (5, 1, 8, 8) and row.min() >= 0 and row.max() <= 1 for row in rows)


def test_recalled_rows_are_of_all_levels_then_of_fewer():
    vae, images = model(), draw(3, 1, 8, 8).tanh()
    with torch.no_grad():
        rows, names = recalled(vae, images)
        assert names == ["image", "all levels", "from level 2 alone"]
        latents = vae.encode(images).latent_dist.latents
        lowest = vae.prior_of(1, latents[0], 3)[0].mean
        expected = (vae.decode(lowest).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(rows[2], expected)
    torch.testing.assert_close(rows[0], images / 2 + 0.5)
