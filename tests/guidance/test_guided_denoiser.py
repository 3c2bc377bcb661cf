"""Guidance where the scores are known: two Gaussians in the plane."""

import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler

from diffusers_ext import ClassifierGuidance, ExtDDIMScheduler, ExtDDPMScheduler
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, add_to_score, output_eps, predict_x0, training_target
from diffusers_ext.guidance.guided_denoiser import GuidedDenoiser
from diffusers_ext.guidance.guiding import guided_steps
from diffusers_ext.schedulers.levels import describe_path, noise_level, path_difference
from mixture_oracle import MEANS, STDS, MixtureClassifier, MixtureDenoiser, log_density


SCHEDULERS = [ExtDDPMScheduler, ExtDDIMScheduler]


def points(count=64):
    return torch.randn(count, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def scheduler_of(prediction_type, cls=ExtDDIMScheduler):
    return cls(prediction_type=prediction_type, clip_sample=False)


def guided_score(guider, scheduler, x_t, labels, timestep):
    """The score that the guided output of the exact network means."""
    nulls = torch.full_like(labels, 2)
    denoise = GuidedDenoiser(
        MixtureDenoiser.make(scheduler).double(),
        scheduler,
        guider,
        {"class_labels": (labels, nulls)},
        channels=2,
        classifier=MixtureClassifier(scheduler),
    )
    output = denoise(x_t, torch.tensor(timestep))
    level = scheduler.schedule.level(timestep, x_t)
    return -output_eps(output, x_t, level, scheduler.config.prediction_type) / level.sigma


def score_by_density(x_t, labels, level, weight):
    """grad log p(x) + weight grad log p(y | x), by differentiating the density."""
    x_t = x_t.clone().requires_grad_()
    joint = log_density(x_t, level)
    marginal = joint.logsumexp(1)
    of_label = joint.gather(1, labels[:, None])[:, 0] - marginal
    return torch.autograd.grad((marginal + weight * of_label).sum(), x_t)[0]


@pytest.mark.product
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("timestep", [5, 300, 900])
@pytest.mark.parametrize(
    "guider, weight",
    [
        (ClassifierFreeGuidance(3.0), 3.0),
        (ClassifierGuidance(3.0, guidance_scale=0.0), 3.0),
        (ClassifierGuidance(3.0), 4.0),  # on the conditional prediction, as in the paper
        (ClassifierGuidance(1.5, guidance_scale=2.5), 4.0),
        (ClassifierGuidance(0.0, guidance_scale=2.5), 2.5),
    ],
    ids=["classifier-free", "classifier", "classifier and condition", "both", "none of the classifier"],
)
def test_the_guided_field_is_the_score_of_the_sharpened_label(guider, weight, timestep, prediction_type):
    scheduler, x_t = scheduler_of(prediction_type), points()
    labels = torch.arange(len(x_t)) % 2
    expected = score_by_density(x_t, labels, scheduler.schedule.level(timestep, x_t), weight)
    guided = guided_score(guider, scheduler, x_t, labels, timestep)
    torch.testing.assert_close(guided, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_shifted_score_is_another_output_of_the_same_type(prediction_type):
    """By x_0 and eps, whose shifts the score's says: the same x_t, and Tweedie's formula for x_0."""
    x_t, output, gradient = torch.randn(3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = ExtDDPMScheduler().schedule.level(400, x_t)
    shifted = add_to_score(output, gradient, level, prediction_type)
    eps = output_eps(output, x_t, level, prediction_type) - level.sigma * gradient
    x0 = (x_t + level.sigma**2 * (-eps / level.sigma)) / level.alpha
    torch.testing.assert_close(training_target(x0, eps, level, prediction_type), shifted)
    torch.testing.assert_close(predict_x0(shifted, x_t, level, prediction_type), x0)


def test_a_shifted_score_changes_nothing_where_there_is_no_signal():
    scheduler = ExtDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    output, gradient = torch.randn(2, 4, 3)
    level = scheduler.schedule.level(999, output)
    assert torch.equal(add_to_score(output, gradient, level, "v_prediction"), output)


@pytest.mark.product
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("cls", SCHEDULERS)
def test_sampling_by_the_exact_classifier_gives_the_labels_law(cls, prediction_type):
    """From the unconditional network, classifier_scale 1 is p(x | y)."""
    scheduler = scheduler_of(prediction_type, cls)
    scheduler.set_timesteps(200)
    labels, x = torch.arange(4000) % 2, points(4000).float()
    denoise = GuidedDenoiser(
        MixtureDenoiser.make(scheduler, num_classes=None),
        scheduler,
        ClassifierGuidance(1.0),
        {"class_labels": (labels, labels)},  # the classifier's alone
        channels=2,
        classifier=MixtureClassifier(scheduler, torch.float32),
    )
    generator = {} if cls is ExtDDIMScheduler else {"generator": torch.Generator().manual_seed(1)}
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            x = scheduler.step(denoise(x, t, i, 200), t, x, **generator).prev_sample
    for label in (0, 1):
        own = x[labels == label, :, 0]
        # 2000 draws leave 0.02 of a standard deviation; the rest is the step size.
        torch.testing.assert_close(own.mean(0), torch.tensor(MEANS[label]), rtol=0, atol=0.03)
        torch.testing.assert_close(own.std(0), torch.full((2,), STDS[label]), rtol=0.08, atol=0)


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_levels_of_diffusers_schedulers_are_ours(cls):
    ours, stock, like = ExtDDPMScheduler(), cls(), torch.zeros(2, 1, 1)
    for timestep in (0, 500, 999):
        torch.testing.assert_close(noise_level(stock, timestep, like).alpha, ours.schedule.level(timestep, like).alpha)
    level = noise_level(stock, torch.tensor(500.5), like)
    ratios = [(lambda level: level.sigma / level.alpha)(ours.schedule.level(t, like)) for t in (500, 501)]
    torch.testing.assert_close(level.sigma / level.alpha, sum(ratios) / 2)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(1, 1, 1))


@pytest.mark.parametrize("cls", [DDPMScheduler, DDIMScheduler])
def test_a_level_without_signal_is_pure_noise(cls):
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    stock, ours, like = cls(**config), ExtDDPMScheduler(**config), torch.zeros(2, 1, dtype=torch.float64)
    last = noise_level(stock, 999, like)
    assert (last.alpha.item(), last.sigma.item()) == (0, 1)
    for timestep in (0, 500, 998):
        expected = ours.schedule.level(timestep, like)
        torch.testing.assert_close(noise_level(stock, timestep, like), expected, rtol=1e-3, atol=1e-4)
    interval = {"sigma": (1.0, float("inf"))}
    assert guided_steps(interval, stock, torch.tensor([999, 500, 0])) == [True, True, False]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "cosine"},
        {"beta_schedule": "scaled_linear", "num_train_timesteps": 400, "beta_end": 0.04},
        {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
        {"trained_betas": [0.1, 0.2, 0.3, 0.99], "num_train_timesteps": 4},
    ],
)
def test_a_path_is_described_so_that_it_can_be_made_again(config):
    scheduler = ExtDDIMScheduler(**config)
    path = describe_path(scheduler)
    assert path_difference(path, scheduler) < 1e-6
    assert ("trained_betas" in path) == ("trained_betas" in config)
    assert path_difference(path, EulerDiscreteScheduler.from_config(scheduler.config)) < 1e-6
    assert path_difference(path, ExtDDIMScheduler(beta_schedule="sigmoid")) > 0.01
