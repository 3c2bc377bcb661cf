"""Guidance that is trained into a network: what its targets are led by, and where that ends."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusers_ext.commands.train_ddpm import TrainConfig
from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.losses import model_guidance
from diffusers_ext.diffusion.noising import NoiseSchedule, add_noise, training_target
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.recipes.denoising_objective import DenoisingObjective
from diffusers_ext.recipes.denoising_parts import build_objective
from diffusers_ext.recipes.model_guidance import START, ModelGuidance, left_to_labels, unconditional_inputs
from diffusers_ext.recipes.training_path import build_scheduler


NULL = {"class_labels": torch.tensor([3])}


def make_objective(guidance=None, prediction_type="v_prediction", **settings):
    schedule = NoiseSchedule(make_betas("cosine", 10))
    return DenoisingObjective(schedule, prediction_type, guidance=guidance, **settings)


def make_batch(size=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images, noise = torch.randn(2, size, 1, 2, 3, generator=generator)
    time = torch.arange(size, dtype=torch.float64) / size
    return {"images": images, "noise": noise, "time": time, "labels": torch.arange(size) % 3}


class Network(nn.Module):
    """Its output depends on all that it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.tensor(0.7)), []

    def forward(self, sample, timesteps, class_labels):
        self.calls.append((class_labels.clone(), torch.is_grad_enabled()))
        of_label = (1 + class_labels + 0.1 * timesteps).view(-1, 1, 1, 1)
        return SimpleNamespace(sample=self.weight * of_label * sample.sin())


def test_the_best_prediction_of_led_targets_is_the_guided_one():
    generator = torch.Generator().manual_seed(0)
    target, unconditional = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    for scale in (1.0, 1.5, 4.0):
        f = target
        for _ in range(200):  # each time the best prediction, given the last one
            f = target + model_guidance(f, unconditional, scale)
        torch.testing.assert_close(f, unconditional + scale * (target - unconditional))


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample", "flow"])
@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_the_loss_is_that_of_led_targets_within_the_interval(prediction_type, weighting):
    scale, network, batch = 2.5, Network(), make_batch()
    led = make_objective(ModelGuidance(scale, NULL, (0.2, 0.7)), prediction_type, weighting=weighting)
    plain = make_objective(None, prediction_type, weighting=weighting)
    loss = led(network, batch)

    timesteps = torch.arange(20) // 2
    level = led.schedule.level(timesteps, batch["images"])
    x_t = add_noise(batch["images"], batch["noise"], level)
    conditional = network(x_t, timesteps, batch["labels"]).sample
    unconditional = network(x_t, timesteps, torch.full((20,), 3)).sample
    inside = ((timesteps >= 3) & (timesteps <= 7)).view(-1, 1, 1, 1)  # 0.2 and 0.7 of ten, from noise
    target = training_target(batch["images"], batch["noise"], level, prediction_type)
    target = target + torch.where(inside, (1 - 1 / scale) * (conditional - unconditional), 0.0)
    error = (conditional - target.detach()).square().flatten(1).mean(1)
    unled = (conditional - training_target(batch["images"], batch["noise"], level, prediction_type)).square()
    factor = plain.losses(conditional, batch["images"], batch["noise"], x_t, timesteps)[1] / unled.flatten(1).mean(1)
    expected = (factor * error).mean()
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, network.weight)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, network.weight)[0])

    plain(network, batch)
    metrics, of_plain = led.metrics(), plain.metrics()  # the error is that of the targets themselves
    for quarter in "1234":
        name = "error" if weighting == "min_snr" else "loss"
        assert metrics[f"error_q{quarter}"] == pytest.approx(of_plain[f"{name}_q{quarter}"])
    assert metrics["loss_q2"] != pytest.approx(of_plain["loss_q2"])


def test_the_unconditional_prediction_comes_first_without_gradients_and_not_before_its_time():
    guidance, network, batch = ModelGuidance(3.0, NULL), Network(), make_batch()
    objective, plain = make_objective(guidance), make_objective()
    objective(network, batch)
    (null, with_gradients), (labels, without) = network.calls
    assert torch.equal(null, torch.full((20,), 3)) and not with_gradients
    assert torch.equal(labels, batch["labels"]) and without

    network.calls.clear()
    guidance.progress = lambda: START - 0.01
    assert torch.equal(objective(network, batch), plain(network, batch)) and len(network.calls) == 2
    guidance.progress = lambda: 1.0
    assert objective(network, batch) != plain(network, batch)
    objective.eval(), plain.eval()
    assert torch.equal(objective(network, batch), plain(network, batch))


def test_images_without_their_label_are_not_led():
    network, batch = Network(), make_batch()
    batch["labels"] = torch.full((20,), 3)
    torch.testing.assert_close(
        make_objective(ModelGuidance(3.0, NULL))(network, batch), make_objective()(network, batch)
    )


def test_a_network_learns_its_guided_prediction():
    """Images of two labels are -1 and 1, and 0 without: at a scale of 3, one that can say one number a label says -3 and 3."""
    config = DenoisingConfig(
        prediction_type="sample", loss_weighting="sample", model_guidance_scale=3.0, model_guidance_interval=(0.0, 1.0)
    )
    null = {"class_labels": torch.tensor([2])}
    objective = build_objective(config, build_scheduler(config), unconditional=null)
    table = nn.Embedding(3, 1)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.2)

    def network(sample, timesteps, class_labels):
        return SimpleNamespace(sample=table(class_labels).view(-1, 1, 1, 1).expand_as(sample))

    own = torch.arange(64) % 2
    labels = torch.where(torch.arange(64) < 32, own, 2)
    images = (2.0 * own - 1).view(-1, 1, 1, 1)
    batch = {"images": images, "noise": torch.randn(64, 1, 1, 1), "time": torch.rand(64).double(), "labels": labels}
    for _ in range(500):
        optimizer.zero_grad()
        objective(network, batch).backward()
        optimizer.step()
    torch.testing.assert_close(table.weight.detach(), torch.tensor([[-3.0], [3.0], [0.0]]), rtol=0, atol=1e-3)


def test_what_stands_for_no_condition_is_that_of_the_data():
    learned = {"learned": True, "dropout": "label_dropout"}
    labels = SimpleNamespace(name="x", num_classes=3, has_label_sets=False)
    assert unconditional_inputs(labels, **learned) == {"class_labels": torch.tensor([3])}
    sets = unconditional_inputs(SimpleNamespace(name="x", num_classes=3, has_label_sets=True), **learned)
    assert torch.equal(sets["class_labels"], torch.zeros(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="model_guidance_scale needs labels or texts, and x has none"):
        unconditional_inputs(SimpleNamespace(name="x", num_classes=None), **learned)
    with pytest.raises(ValueError, match="a label_dropout of 0 trains none"):
        unconditional_inputs(labels, learned=False, dropout="label_dropout")


def test_a_presets_guidance_is_left_out_where_there_is_nothing_to_lead_by():
    labels, none = SimpleNamespace(num_classes=3), SimpleNamespace(num_classes=None)
    quick = TrainConfig(preset="quick")
    assert left_to_labels(quick, labels, learned=True) is quick
    for data, learned in ((none, True), (labels, False)):
        left = left_to_labels(quick, data, learned=learned)
        assert left.model_guidance_scale is None and left.timestep_sampling == "logit_normal"
        own = TrainConfig(preset="quick", model_guidance_scale=2.0)
        assert left_to_labels(own, data, learned=learned) is own  # and is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_guidance_scale": 1.0}, "model_guidance_scale must be finite and above 1, which would be none, got 1"),
        ({"model_guidance_scale": float("inf")}, "model_guidance_scale must be finite"),
        ({"model_guidance_scale": 2.0, "model_guidance_interval": (0.8, 0.2)}, "0 <= from < to <= 1"),
        ({"model_guidance_interval": (0.0, 1.0)}, "has no meaning without model_guidance_scale"),
        ({"model_guidance_scale": 2.0, "objective": "hybrid"}, "targets of objective simple, which hybrid is not"),
        ({"model_guidance_scale": 2.0, "path": "learned"}, "targets of objective simple, which bound is not"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DenoisingConfig(**options)


def test_an_objective_without_targets_is_refused():
    with pytest.raises(ValueError, match="objective simple, which vlb is not"):
        make_objective(ModelGuidance(2.0, NULL), objective="vlb")
