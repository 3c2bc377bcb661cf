"""Rate and distortion along the chain, on data whose curves are known."""

import pytest
import torch

from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.timesteps import make_timesteps
from diffusers_ext.diffusion.variational_bound import optimal_variances, variational_bound
from diffusers_ext.evaluation.likelihood_curves import (
    NUM_POINTS,
    _root,
    curve_columns,
    draw_likelihood,
    summarize_curves,
)
from gaussian_oracle import EPS, VARIANCE, X0, model_output


SCHEDULE = NoiseSchedule(make_betas("linear", 1000))


def answer(x_t, timesteps):
    return model_output(SCHEDULE, "epsilon", x_t, timesteps)


def curves_of(num_steps):
    timesteps = make_timesteps("trailing", num_steps, 1000)
    chain, given = ReverseChain(SCHEDULE, timesteps), {"noise": lambda index: EPS}
    variances = optimal_variances(answer, [X0], chain, "epsilon", **given)
    chain = ReverseChain(SCHEDULE, timesteps, variances)
    terms = variational_bound(answer, X0, chain, "epsilon", "optimal", num_bins=None, **given)
    return summarize_curves(curve_columns(terms, chain), chain)


@pytest.mark.parametrize("num_steps", [NUM_POINTS, 400])
def test_bits_so_far_are_the_information_in_x_t_and_the_error_is_that_of_the_best_prediction(num_steps):
    """Of each timestep, or in the mean over the timesteps of a part."""
    points, timesteps = curves_of(num_steps), torch.from_numpy(make_timesteps("trailing", num_steps, 1000).copy())
    assert len(points) == min(num_steps, NUM_POINTS + 1)
    bits = 0.0
    for point in points:
        inside = timesteps[(timesteps >= point["first_timestep"]) & (timesteps <= point["last_timestep"])]
        snr = VARIANCE * SCHEDULE.level(inside, torch.zeros(1, dtype=torch.float64)).snr
        assert point["bits_so_far"] == pytest.approx(0.5 * (1 + snr).log2().mean().item(), rel=1e-5, abs=1e-6)
        assert point["rmse"] == pytest.approx(127.5 * (VARIANCE / (1 + snr)).mean().sqrt().item(), rel=1e-6)
        bits += len(inside) * point.get("bits_per_timestep", 0)
    assert bits == pytest.approx(points[-1]["bits_so_far"], rel=1e-5)  # without the prior's, which are next to none


def test_the_standard_error_of_the_root_is_the_spread_of_roots():
    """Two thousand sets of a hundred images, of few and unequal weights."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(2000, 100, generator=generator, dtype=torch.float64) * 3
    error = weight * -torch.rand(2000, 100, generator=generator, dtype=torch.float64).log()
    found = [_root("rmse", *each) for each in zip(error, weight, strict=True)]
    roots = torch.tensor([each["rmse"] for each in found], dtype=torch.float64)
    errors = torch.tensor([each["rmse_error"] for each in found], dtype=torch.float64)
    assert errors.mean().item() == pytest.approx(roots.std().item(), rel=0.1)


def test_the_figure_is_drawn(tmp_path):
    draw_likelihood(curves_of(20), tmp_path / "likelihood.png")
    assert (tmp_path / "likelihood.png").stat().st_size > 10_000
