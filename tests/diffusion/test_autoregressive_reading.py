"""The chain read as an autoregressive model (DDPM, Section 4.3), on data whose every term is known."""

import math

import torch

from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.noising import NoiseSchedule, Normal, normal_kl
from diffusers_ext.diffusion.reverse_chain import ReverseChain, reverse_transition
from diffusers_ext.diffusion.timesteps import make_timesteps
from diffusers_ext.diffusion.variational_bound import optimal_variances, variational_bound
from gaussian_oracle import EPS, VARIANCE, X0, model_output


SCHEDULE = NoiseSchedule(make_betas("linear", 1000))
TIMESTEPS = make_timesteps("trailing", 25, 1000)
ENTROPY = 0.5 * math.log(2 * math.pi * math.e * VARIANCE)


def answer(x_t, timesteps):
    return model_output(SCHEDULE, "epsilon", x_t, timesteps)


def levels(chain):
    return SCHEDULE.level(chain.timesteps, torch.zeros(1, dtype=torch.float64))


def prior_gap(chain):
    """KL(q(x_T) || N(0, 1))."""
    level = chain.at_noise(torch.zeros(1, dtype=torch.float64))
    std = (VARIANCE * level.alpha**2 + level.sigma**2).sqrt()
    return normal_kl(Normal(torch.zeros_like(std), std), Normal(torch.zeros_like(std), torch.ones_like(std))).item()


def bound(chain, variance):
    terms = variational_bound(answer, X0, chain, "epsilon", variance, num_bins=None, noise=lambda i: EPS)
    return terms.prior.mean(), terms.kl.mean(0), terms.decoder.mean()


def test_each_transition_of_the_best_chain_tells_what_is_new_in_it_and_all_of_them_the_entropy():
    """As a coordinate does in an autoregressive model: I(x_0; x_s) - I(x_0; x_t), which is the conditional information."""
    chain = ReverseChain(SCHEDULE, TIMESTEPS)
    variances = optimal_variances(answer, [X0], chain, "epsilon", noise=lambda i: EPS)
    chain = ReverseChain(SCHEDULE, TIMESTEPS, variances)
    prior, kl, decoder = bound(chain, "optimal")
    information = 0.5 * (1 + VARIANCE * levels(chain).snr).log()
    torch.testing.assert_close(prior.item(), information[-1].item() + prior_gap(chain), rtol=1e-9, atol=0)
    torch.testing.assert_close(kl, -information.diff(), rtol=1e-6, atol=1e-12)
    # What is left to tell after x_t1 is the entropy of x_0 given it.
    torch.testing.assert_close(decoder.item(), ENTROPY - information[0].item(), rtol=1e-8, atol=1e-10)
    assert abs((prior + kl.sum() + decoder).item() - ENTROPY - prior_gap(chain)) < 1e-9


def test_the_bound_of_any_chain_is_the_entropy_and_how_far_each_transition_is_from_the_true_one():
    """L = KL(q(x_T) || p(x_T)) + sum of E KL(q(x_s | x_t) || p(x_s | x_t)) + H(x_0)."""
    chain = ReverseChain(SCHEDULE, TIMESTEPS)
    prior, kl, decoder = bound(chain, "fixed_large")
    t = levels(chain)
    total = prior_gap(chain) + ENTROPY
    for index in range(len(chain)):
        step = chain.at(torch.tensor([index]), X0)
        x_t = step.t.alpha * X0 + step.t.sigma * EPS
        # q(x_s | x_t) by regression: x_s and x_t are jointly normal.
        covariance = (
            step.s.alpha / step.t.alpha * (VARIANCE * step.t.alpha**2) + step.s.sigma**2 * step.t.alpha / step.s.alpha
        )
        var_t, var_s = (VARIANCE * level.alpha**2 + level.sigma**2 for level in (step.t, step.s))
        q = Normal(covariance / var_t * x_t, (var_s - covariance**2 / var_t).sqrt())
        x0_hat = VARIANCE * step.t.alpha * x_t / var_t
        total += normal_kl(q, reverse_transition(x0_hat, x_t, step, step.log_std_large)).mean().item()
    assert len(t.alpha) == 25
    assert abs((prior + kl.sum() + decoder).item() - total) < 1e-9
