import math
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch.distributions import Normal, kl_divergence

from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.models.vae import VAEModel
from diffusers_ext.models.vae_discriminator import PatchDiscriminator, adaptive_weight, hinge_loss
from diffusers_ext.recipes.vae_objective import (
    VAEObjective,
    binarize,
    collapse_warning,
    discriminator_loss,
    free_bits_kl,
)
from diffusers_ext.recipes.vae_perceptual import FeatureDistance, load_perceptual
from diffusers_ext.trainer.adversary import Adversary


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model(**kwargs):
    torch.manual_seed(0)
    config = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8, 8)}
    return VAEModel(**config | {"latent_channels": 2, "likelihood_scale": 0.3} | kwargs)


def batch(count=6, seed=1):
    return {
        "images": draw(count, 1, 8, 8, seed=seed).tanh(),
        "noise": draw(count, 1, 8, 8, seed=seed + 1),
        "latent_noise": draw(count, 2, 4, 4, seed=seed + 2),
    }


def objective(vae, accumulation=1, **kwargs):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    return VAEObjective(
        accelerator, vae.config.likelihood, vae.latent_shape, last_layer=vae.last_layer, **kwargs
    ).train()


def terms_by_hand(vae, data):
    """Distortion and rate of the batch's draw, by torch.distributions."""
    posterior = vae.encode(data["images"]).latent_dist
    q = Normal(posterior.mean, posterior.std)
    out = vae.decode(posterior.mean + posterior.std * data["latent_noise"]).sample
    distortion = -Normal(out, 0.3).log_prob(data["images"]).flatten(1).sum(1).mean()
    kl = kl_divergence(q, Normal(torch.zeros(()), torch.ones(())))
    return distortion, kl


@pytest.mark.parametrize("kl_weight", [0.0, 0.2, 1.0])
def test_the_loss_is_the_weighted_bound_in_nats_for_each_value(kl_weight):
    vae, data = model(), batch()
    distortion, kl = terms_by_hand(vae, data)
    loss = objective(vae, kl_weight=kl_weight)(vae, data)
    torch.testing.assert_close(loss, (distortion + kl_weight * kl.flatten(1).sum(1).mean()) / 64)


def test_free_bits_leave_what_a_channel_spends_below_them_alone():
    vae, data = model(), batch()
    distortion, kl = terms_by_hand(vae, data)
    by_channel = kl.mean((0, 2, 3))  # nats a position
    limit = by_channel.mean().item()
    assert by_channel.min() < limit < by_channel.max()
    expected = distortion + 16 * (limit + by_channel.max())
    watched = objective(vae, free_bits=limit)
    torch.testing.assert_close(watched(vae, data), expected / 64)
    (gradient,) = torch.autograd.grad(free_bits_kl(kl, limit), kl)
    assert (gradient.abs().sum((0, 2, 3)) > 0).tolist() == (by_channel > limit).tolist()
    # What is reported, and what is taken on held-out images, is the rate itself.
    torch.testing.assert_close(watched.eval()(vae, data), (distortion + kl.flatten(1).sum(1).mean()) / 64)
    assert watched.metrics()["rate"] == pytest.approx(kl.flatten(1).sum(1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("accumulation, later", [(1, 1), (2, 2), (4, 1)])
def test_the_kl_weight_rises_over_optimizer_steps_and_goes_on_after_a_resume(accumulation, later):
    """Also with other numbers of batches in a step."""
    vae, data = model(), batch()
    distortion, kl = (term.detach() for term in terms_by_hand(vae, data))
    watched = objective(vae, accumulation, kl_weight=2.0, kl_warmup_steps=4)
    for step in range(1, 7):
        if step == 3:  # broken off here, within a warm-up
            state = {name: value.clone() for name, value in watched.state_dict().items()}
            accumulation, watched = later, objective(vae, later, kl_weight=2.0, kl_warmup_steps=4)
            watched.load_state_dict(state)
            assert watched.current_kl_weight == 2 * 2 / 4
        watched.steps = partial(int, step - 1)  # as the trainer says them
        for _ in range(accumulation):
            loss = watched(vae, data)
            weight = 2 * min(1, step / 4)
            torch.testing.assert_close(loss, (distortion + weight * kl.flatten(1).sum(1).mean()) / 64)
            assert watched.current_kl_weight == weight
    torch.testing.assert_close(watched.eval()(vae, data), (distortion + 2 * kl.flatten(1).sum(1).mean()) / 64)


def test_metrics_are_those_of_all_images_since_the_last_report():
    vae, parts = model(), [batch(4, seed=1), batch(6, seed=5)]
    watched = objective(vae)
    watched(vae, batch(3, seed=20))
    watched.metrics()
    for part in parts:
        watched(vae, part)
    with torch.no_grad():
        watched.eval()(vae, batch(2, seed=9))  # held-out images are not counted
        watched.train()
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        distortion, kl = terms_by_hand(vae, whole)
        means = vae.encode(whole["images"]).latent_dist.mean
    got = watched.metrics()
    assert got["distortion"] == pytest.approx(distortion.item(), rel=1e-5)
    assert got["rate"] == pytest.approx(kl.flatten(1).sum(1).mean().item(), rel=1e-5)
    for channel in range(2):
        assert got[f"kl_of_latent_{channel}"] == pytest.approx(kl[:, channel].mean().item(), rel=1e-5)
    assert got["active_latents"] == (means.var(0, unbiased=False) > 0.01).sum().item() > 0
    assert got["active_share"] == got["active_latents"] / 32
    assert got["likelihood_scale"] == pytest.approx(0.3, rel=1e-5)
    assert "perceptual" not in got and "adversarial" not in got


def test_many_latents_are_summed_up():
    vae = model(architecture="mlp", latent_dim=80)
    watched = objective(vae)
    watched(vae, batch() | {"latent_noise": draw(6, 80)})
    got = watched.metrics()
    assert got["kl_of_latents_min"] <= got["kl_of_latents_median"] <= got["kl_of_latents_max"]
    assert not any(name.startswith("kl_of_latent_") for name in got)


def test_a_collapse_is_told_once_with_what_to_do(capsys):
    vae = model()
    vae.encoder.conv_out.weight.data.zero_()  # the posterior no longer depends on the image
    watched = objective(vae)
    watched.steps = lambda: 600
    for _ in "12":
        watched(vae, batch(120))
        watched.metrics()
    told = capsys.readouterr().out
    assert told.count("posterior collapse: 0 of 32 latents are active") == 1
    assert "--kl_weight" in told and "--kl_warmup_steps" in told and "--free_bits" in told
    assert collapse_warning(4, 32, 1.0) is None and collapse_warning(3, 32, 1.0) is not None


def test_no_collapse_is_told_before_latents_had_time_to_wake(capsys):
    vae = model()
    vae.encoder.conv_out.weight.data.zero_()
    watched = objective(vae)
    watched(vae, batch(120))
    watched.metrics()
    assert "collapse" not in capsys.readouterr().out


def test_binarized_images_are_white_as_often_as_they_are_bright():
    x = torch.linspace(-1, 1, 5).view(1, 1, 1, 5).expand(20000, -1, -1, -1)
    drawn = binarize(x, "stochastic", draw(20000, 1, 1, 5))
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(
        (drawn > 0).double().mean((0, 1, 2)), torch.linspace(0, 1, 5).double(), rtol=0, atol=5 * 0.5 / math.sqrt(20000)
    )
    assert binarize(x[:1], "threshold").flatten().tolist() == [-1, -1, -1, 1, 1]
    assert binarize(x, "none") is x


def adversarial(vae, **kwargs):
    torch.manual_seed(3)
    adversary = Adversary(PatchDiscriminator(1, 8, 1), discriminator_loss, learning_rate=1e-3)
    return adversary, objective(vae, adversary=adversary, **kwargs)


def test_the_hinge_loss_is_zero_only_beyond_the_margin():
    assert hinge_loss(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -3.0])) == 0
    assert hinge_loss(torch.zeros(4), torch.zeros(4)) == 1
    assert hinge_loss(torch.tensor([-1.0]), torch.tensor([0.0])) == pytest.approx(1.5)


def test_the_adaptive_weight_makes_both_gradients_of_one_size():
    vae, data = model(), batch()
    adversary, watched = adversarial(vae, adversarial_weight=0.5)
    last, out = vae.last_layer, vae(data["images"], noise=data["latent_noise"])
    bound = (data["images"] - out.sample).square().sum()
    fooling = -adversary.module(out.sample).mean()
    weight = adaptive_weight(bound, fooling, last)
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (bound, weight * fooling)]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=0.02)  # the paper's 1e-4 in the denominator

    loss = watched(vae, data)
    alone = objective(vae)(vae, data)
    distortion = terms_by_hand(vae, data)[0] / 64
    weight = 0.5 * adaptive_weight(distortion, fooling, last)
    torch.testing.assert_close(loss, alone + weight * fooling, rtol=1e-4, atol=1e-5)
    got = watched.metrics()
    assert got["adversarial_weight"] == pytest.approx(weight.item(), rel=1e-4)
    assert got["adversarial"] == pytest.approx(fooling.item(), rel=1e-4)


def test_the_adversary_counts_only_while_it_is_active_and_in_training():
    vae, data = model(), batch()
    adversary, watched = adversarial(vae, adaptive=False)
    alone = objective(vae)(vae, data)
    fooling = -adversary.module(vae(data["images"], noise=data["latent_noise"]).sample).mean()
    torch.testing.assert_close(watched(vae, data), alone + fooling)
    torch.testing.assert_close(watched.eval()(vae, data), alone)
    adversary.active = False
    torch.testing.assert_close(watched.train()(vae, data), alone)


def test_the_discriminator_is_taught_by_what_the_loss_has_left_in_the_batch():
    vae, data = model(), batch()
    adversary, watched = adversarial(vae)
    watched(vae, data)
    sample = vae(data["images"], noise=data["latent_noise"]).sample
    module = adversary.module
    expected = hinge_loss(module(data["images"]), module(sample))
    torch.testing.assert_close(discriminator_loss(module, data), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_layers, patch", [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_the_size_that_is_said(num_layers, patch):
    """By where the gradient of one logit is not 0, with normalisations, which look everywhere, left out."""
    module = PatchDiscriminator(1, 4, num_layers)
    for child in list(module.modules()):
        if hasattr(child, "groups") and hasattr(child, "eps"):
            child.forward = lambda x: x
    x = draw(1, 1, 128, 128).requires_grad_()
    logits = module(x)
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], x)
    rows = gradient[0, 0].abs().sum(1).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == patch
    smallest = PatchDiscriminator.smallest_side(num_layers)
    assert PatchDiscriminator(1, 4, num_layers)(draw(1, 1, smallest, smallest)).numel() >= 1


def test_a_discriminator_without_layers_is_refused():
    with pytest.raises(ValueError, match="must be at least 1, got 1, 8 and 0"):
        PatchDiscriminator(1, 8, 0)


def features(**kwargs):
    torch.manual_seed(4)
    shape = {"sample_size": 8, "in_channels": 1, "num_classes": 2, "block_out_channels": (4, 6)}
    return FeatureClassifierModel(**shape | kwargs)


def test_the_perceptual_distance_is_that_of_unit_features():
    network = features()
    distance = FeatureDistance(network)
    x, y = draw(3, 1, 8, 8), draw(3, 1, 8, 8, seed=1)
    expected = torch.zeros(3)
    for a, b in zip(network.feature_maps(x), network.feature_maps(y), strict=True):
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
        present = [(maps.norm(dim=1) > 1e-3).float() for maps in (a, b)]
        expected += (present[0] + present[1] - 2 * cosine * present[0] * present[1]).mean((1, 2))
    torch.testing.assert_close(distance(x, y), expected, rtol=1e-2, atol=1e-3)
    assert distance(x, x).abs().max() < 1e-6
    # Each image for itself, in training mode too, and nothing of the network learns.
    torch.testing.assert_close(distance.train()(x[:1], y[:1]), distance(x, y)[:1])
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_the_perceptual_loss_is_added_and_is_no_part_of_the_state(tmp_path):
    from diffusers_ext.evaluation.feature_folders import FEATURES_FILE

    network = features()
    network.save_pretrained(tmp_path)
    (tmp_path / FEATURES_FILE).write_text("{}")
    vae, data, perceptual = model(), batch(), load_perceptual(str(tmp_path), (1, 8, 8))
    watched = objective(vae, perceptual=perceptual, perceptual_weight=0.7)
    sample = vae(data["images"], noise=data["latent_noise"]).sample
    expected = objective(vae)(vae, data) + 0.7 * FeatureDistance(network)(data["images"], sample).mean()
    torch.testing.assert_close(watched(vae, data), expected)
    assert watched.metrics()["perceptual"] > 0
    assert not list(watched.parameters()) and not any("features" in name for name in watched.state_dict())
    with pytest.raises(ValueError, match=r"takes images of .* \(1, 8, 8\), but these are \(3, 8, 8\)"):
        load_perceptual(str(tmp_path), (3, 8, 8))


def test_a_perceptual_network_that_is_not_at_hand_is_told_with_another_way():
    import importlib.util

    with pytest.raises(ValueError, match="lpips takes grey or RGB images, got 2 channels; .*train_features.py"):
        load_perceptual("lpips", (2, 8, 8))
    with pytest.raises(
        ValueError, match="must be lpips or a folder of a feature classifier, got 'nowhere'; .*train_f"
    ):
        load_perceptual("nowhere", (1, 8, 8))
    if importlib.util.find_spec("lpips") is None:
        with pytest.raises(ValueError, match="package lpips, which is not installed .*train_features.py"):
            load_perceptual("lpips", (3, 64, 64))
