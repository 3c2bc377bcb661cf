"""The parts of the studies, each against an answer in closed form."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.studies import data_draws, embeddings, noise_end, scaling
from diffusers_ext.studies.report import Report
from gaussian_oracle import model_output


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule(make_betas("linear", 1000))


def levels(schedule, timestep):
    level = schedule.level(timestep, torch.zeros(1, dtype=torch.float64))
    return level.alpha.item(), level.sigma.item()


@pytest.mark.parametrize("timestep", [99, 999])
def test_l_t_follows_from_the_mean_square_of_the_data(schedule, timestep):
    x0 = torch.randn(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha, sigma = levels(schedule, timestep)
    nats = 0.5 * (alpha**2 * x0.double().square().mean().item() + sigma**2 - 1 - math.log(sigma**2))
    assert noise_end.prior_bits(x0, schedule, timestep) == pytest.approx(nats / math.log(2), rel=1e-9)
    # Of what has no mean it is less by the mean's own square.
    mean = 0.5 * alpha**2 * 0.7**2 / math.log(2)
    shifted = noise_end.prior_bits(x0 - x0.mean() + 0.7, schedule, timestep)
    assert shifted - noise_end.prior_bits(x0 - x0.mean(), schedule, timestep) == pytest.approx(mean, rel=1e-4)


def test_x_t_of_one_image_is_a_gaussian_off_by_its_signal_and_of_none_is_gaussian_where_sigma_is_1(schedule):
    image = torch.full((1, 1, 2, 2), 0.5)
    projections = noise_end.principal_projections(image)
    assert projections.item() == pytest.approx(1.0)  # its length
    alpha, sigma = levels(schedule, 300)
    points = np.linspace(-4, 4, 20001)
    ndtr = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
    expected = np.abs(ndtr((points - alpha) / sigma) - ndtr(points)).max()
    assert noise_end.distance_from_gaussian(projections, schedule, 300) == pytest.approx(expected, rel=1e-3)
    first = noise_end.gaussian_from(projections, schedule)
    distances = [noise_end.distance_from_gaussian(projections, schedule, t) for t in (first - 1, first)]
    assert distances[0] > noise_end.SMALL_DISTANCE >= distances[1]
    # Without a mean the same image is Gaussian much earlier: as soon as its noise is of unit variance.
    nothing = noise_end.principal_projections(torch.zeros(1, 1, 2, 2))
    assert noise_end.gaussian_from(nothing, schedule) < first - 100


def test_the_network_of_gaussian_data_is_homogeneous_and_that_of_a_point_off_by_its_signal(schedule):
    x0 = torch.randn(20, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def linear(x_t, timesteps):
        return model_output(schedule, "epsilon", x_t, timesteps)

    def of_point(x_t, timesteps):
        level = schedule.level(timesteps, x_t)
        return (x_t - level.alpha * 0.3) / level.sigma

    settings = {"timesteps": [10, 900], "factors": [0.5, 2.0]}
    assert scaling.relative_errors(linear, x0, schedule, "epsilon", **settings).max() < 1e-12
    point = torch.full_like(x0, 0.3)
    errors = scaling.relative_errors(of_point, point, schedule, "epsilon", **settings, generator=torch.Generator())
    noise = torch.Generator()
    for row, timestep in zip(errors.tolist(), (10, 900), strict=True):
        alpha, sigma = levels(schedule, timestep)
        size = torch.randn(x0.shape, generator=noise).square().mean().sqrt().item()  # of eps, which it answers
        for error, factor in zip(row, (0.5, 2.0), strict=True):
            assert error == pytest.approx(abs(factor - 1) * alpha * 0.3 / sigma / (factor * size), rel=1e-5)


def test_the_data_say_of_x_0_what_bayes_says(schedule):
    """Two images, at 1 and -1: E[x_0 | x_t] = tanh(alpha x_t / sigma^2)."""
    images = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    posterior, x = data_draws.DataPosterior(images), torch.tensor([-2.0, 0.3, 1.0]).view(3, 1, 1, 1)
    level = schedule.level(700, x)
    alpha, sigma = levels(schedule, 700)
    torch.testing.assert_close(posterior.mean(x, level), torch.tanh(alpha * x / sigma**2), rtol=1e-5, atol=1e-6)
    one = data_draws.DataPosterior(images, torch.tensor([0, 1]), torch.tensor([1, 0, 1]))
    assert one.mean(x, level).flatten().tolist() == [-1.0, 1.0, -1.0]
    assert one.any(x).flatten().tolist() == [-1.0, 1.0, -1.0]


def test_draws_in_the_place_of_x_0_make_the_data_in_any_number_of_steps_and_means_do_not(schedule):
    images = torch.tensor([1.0, -1.0, -1.0, -1.0]).view(4, 1, 1, 1)
    posterior, generator = data_draws.DataPosterior(images), torch.Generator().manual_seed(0)
    x = torch.randn(4000, 1, 1, 1, generator=generator)

    def share(x0_of):
        samples = data_draws.ancestral(x0_of, x, schedule, [999, 500], generator)
        return samples, (samples > 0).double().mean().item()

    samples, positive = share(lambda x, level, t: posterior.draw(x, level, generator))
    assert data_draws.nearest(samples, images).max() == 0 and abs(positive - 0.25) < 0.03
    samples, _ = share(lambda x, level, t: posterior.mean(x, level))
    assert data_draws.nearest(samples, images).mean() > 0.05  # between them


def test_neighbours_agree_in_clusters_and_not_in_noise():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    noise = torch.randn(60, 5, generator=generator)
    clusters = noise + 20 * torch.nn.functional.one_hot(labels, 5)
    assert embeddings.label_agreement(clusters, labels) == 1
    assert abs(embeddings.label_agreement(noise, labels) - 1 / 3) < 0.12
    plane = embeddings.embed(clusters, "t-SNE")
    assert plane.shape == (60, 2) and embeddings.label_agreement(plane, labels) > 0.95
    with pytest.raises(ValueError, match="method must be one of t-SNE, UMAP, got 'PCA'"):
        embeddings.embed(clusters, "PCA")


def test_a_table_has_as_many_cells_as_columns_whatever_is_in_them(tmp_path):
    rows = [{"x_0": "E[x_0 | x_t]", "value": 0.12345}, {"x_0": "a draw", "value": None}]
    page = Report("What?", ["So."], rows, Image.new("L", (8, 8))).write(tmp_path, "what")
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert lines == ["| x_0 | value |", "| --- | --- |", r"| E[x_0 \| x_t] | 0.123 |", "| a draw | - |"]
    assert json.loads((tmp_path / "what.json").read_text())["rows"] == rows and (tmp_path / "what.png").is_file()
