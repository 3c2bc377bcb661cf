import pytest
import torch
from diffusers import AutoModel

from diffusers_ext import ExtDDPMScheduler, NoisyClassifierModel
from diffusers_ext.models.classifier import AttentionPool
from diffusers_ext.schedulers.levels import describe_path
from tiny import assert_same_output


def classifier(**kwargs):
    torch.manual_seed(0)
    config = {"sample_size": 8, "in_channels": 1, "num_classes": 3, "block_out_channels": (8, 16), "dropout": 0.0}
    model = NoisyClassifierModel(**config | kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def sample(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "config, shape",
    [
        ({}, (2, 1, 8, 8)),
        ({"sample_size": (4, 8), "in_channels": 3}, (2, 3, 4, 8)),
        ({"dims": 1, "sample_size": 16}, (2, 1, 16)),
        ({"block_out_channels": (8,), "attention_resolutions": (), "layers_per_block": 2}, (2, 1, 8, 8)),
    ],
)
def test_logits_of_any_sample(config, shape):
    logits = classifier(**config)(sample(*shape), torch.tensor([1, 500])).logits
    assert logits.shape == (2, 3)
    alone = classifier(**config)(sample(*shape)[1:], 500, return_dict=False)[0]
    torch.testing.assert_close(alone[0], logits[1], rtol=1e-4, atol=1e-5)


def test_it_sees_the_place_and_the_noise_level():
    model, x = classifier().eval(), sample(1, 1, 8, 8)
    assert not torch.allclose(model(x, 10).logits, model(x, 900).logits, rtol=1e-2)
    assert not torch.allclose(model(x, 10).logits, model(x.flip(-1), 10).logits, rtol=1e-2)


def test_pooling_knows_where_features_are():
    torch.manual_seed(0)
    pool, x = AttentionPool(8, num_positions=6), sample(2, 8, 2, 3)
    assert pool(x).shape == (2, 8)
    assert not torch.allclose(pool(x), pool(x.flip(-1)), rtol=1e-2, atol=1e-3)
    torch.nn.init.zeros_(pool.positions)
    torch.testing.assert_close(pool(x), pool(x.flip(-1)))


def test_a_new_one_finds_all_labels_equally_likely():
    model = NoisyClassifierModel(8, 1, 3, block_out_channels=(8, 16))
    assert torch.equal(model(sample(2, 1, 8, 8), 10).logits, torch.zeros(2, 3))


def test_gradients_are_those_of_differences_and_of_checkpointing():
    model, x = classifier().double().eval(), sample(1, 1, 8, 8).double().requires_grad_()
    direction = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(model(x, 10).logits[0, 1], x)
    with torch.no_grad():
        ahead, behind = (model(x + step * direction, 10).logits[0, 1] for step in (1e-5, -1e-5))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-6, atol=1e-9)
    model.train()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(model(x, 10).logits[0, 1], x)[0], gradient)


def test_it_learns_labels_of_noisy_samples():
    """Two labels that differ in the sign of the mean, at half the signal."""
    torch.manual_seed(0)
    model = NoisyClassifierModel(8, 1, 2, block_out_channels=(8, 16))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    labels = torch.arange(64) % 2
    for _ in range(60):
        x = 0.5 * (2 * labels - 1).view(-1, 1, 1, 1) + 0.9 * torch.randn(64, 1, 8, 8)
        loss = torch.nn.functional.cross_entropy(model(x, torch.randint(1000, (64,))).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_it_is_saved_with_the_path_that_it_was_trained_on(tmp_path):
    path = describe_path(ExtDDPMScheduler(beta_schedule="cosine"))
    model = classifier(noise_schedule=path)
    model.save_pretrained(tmp_path)
    for loaded in (NoisyClassifierModel.from_pretrained(tmp_path), AutoModel.from_pretrained(str(tmp_path))):
        assert loaded.config.noise_schedule == path
        assert_same_output(loaded(sample(2, 1, 8, 8), 5).logits, model(sample(2, 1, 8, 8), 5).logits)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"sample_size": 9}, "must be a multiple of 2"),
        ({"num_classes": 0}, "at least 1"),
        ({"dims": 3}, "dims must be 1 or 2, got 3"),
    ],
)
def test_options_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        classifier(**config)


def test_a_sample_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"must have shape \(batch, 1, 8, 8\), got \(2, 1, 16, 16\)"):
        classifier()(sample(2, 1, 16, 16), 5)
