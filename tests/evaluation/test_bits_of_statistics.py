"""Bits/dim of a pipeline with statistics are those of the images in 8 bits."""

import math

import pytest
import scipy.stats
import torch

from diffusers_ext import DataStatisticsModel, ExtDDIMScheduler, GuidedDiffusionPipeline
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.variational_bound import bits_per_dim, variational_bound
from diffusers_ext.evaluation.bits_per_dim import measure_bits_per_dim
from diffusers_ext.evaluation.labelled_images import LabelledImages
from tiny import tiny_unet


SCHEDULE = {"num_train_timesteps": 12, "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}


def images(number=3, with_labels=True):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(60, 190, (number, 1, 8, 8), generator=generator).to(torch.uint8)
    labels = torch.arange(number) % 3 if with_labels else torch.full([number], -1)
    return LabelledImages(pixels, labels, ["zero", "one", "two"] if with_labels else [])


def make_pipeline(mean, std):
    parts = {"sample_size": 8, "in_channels": 1, "num_classes": 3, "data_mean": "class", "data_scale": "overall"}
    statistics = DataStatisticsModel.of(mean, torch.tensor([std]), **parts)
    return GuidedDiffusionPipeline(tiny_unet(3), ExtDDIMScheduler(**SCHEDULE), statistics=statistics)


def measure(pipe, data, **settings):
    return measure_bits_per_dim(pipe, data, num_terms=None, show_progress=False, **settings)


def test_the_mean_0_and_the_standard_deviation_1_change_nothing():
    pipe, data = make_pipeline(torch.zeros(4, 1, 8, 8), 1.0), images()
    with_them = measure(pipe, data, num_flow_steps=2)
    pipe.register_modules(statistics=None)
    without = measure(pipe, data, num_flow_steps=2)
    for name in ("bits_per_dim", "flow_bits_per_dim", "rate", "distortion", "prior"):
        assert with_them[name] == pytest.approx(without[name], rel=1e-12)


@pytest.mark.parametrize("with_labels", [True, False])
def test_the_rate_is_of_the_normalised_and_the_distortion_of_bins_of_their_width_there(with_labels):
    mean, std = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5, 0.35
    pipe, data = make_pipeline(mean, std), images(with_labels=with_labels)
    result = measure(pipe, data, seed=2)
    chain = ReverseChain(pipe.scheduler.schedule)
    rates, distortions = [], []
    for row in range(3):
        label, number = (row % 3, torch.tensor([row % 3])) if with_labels else (3, torch.tensor([3]))
        y = data.images[row : row + 1].double() / 127.5 - 1
        x0 = (y - mean[label].double()) / torch.tensor(std).double()

        def denoise(x_t, timesteps, number=number):
            return pipe.denoiser(x_t.float(), timesteps, class_labels=number).sample.detach()

        seen = []
        generator = [torch.Generator().manual_seed(2_000_000 + row)]
        terms = variational_bound(
            *(lambda x_t, t, seen=seen: seen.append(x_t) or denoise(x_t, t), x0, chain, "epsilon", "fixed_large"),
            num_bins=None,
            generator=generator,
        )
        rates.append(bits_per_dim(terms.rate, 64))
        # The first x_t is that of the last transition, whose mean is the predicted x_0 and whose variance is beta.
        level = chain.schedule.level(0, x0)
        x0_hat = (seen[0] - level.sigma * denoise(seen[0], torch.tensor([0])).double()) / level.alpha
        p = scipy.stats.norm(x0_hat.numpy(), chain.schedule.betas[0].sqrt().item())
        half = 1 / 255 / torch.tensor(std).item()
        mass = p.cdf(x0.numpy() + half) - p.cdf(x0.numpy() - half)
        distortions.append(-torch.from_numpy(mass).log().sum() / (64 * math.log(2)))
    assert result["by_label"] == with_labels and result["variance"] == "fixed_large"
    assert result["rate"] == pytest.approx(torch.cat(rates).mean().item(), rel=1e-6)
    assert result["distortion"] == pytest.approx(torch.stack(distortions).mean().item(), rel=1e-4)
