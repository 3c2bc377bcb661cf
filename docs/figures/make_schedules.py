"""Draws the noise schedules and the timesteps of each spacing.

python docs/figures/make_schedules.py docs/figures/schedules.png
"""

import sys
import warnings

import matplotlib
import torch

from diffusers_ext.diffusion.betas import make_betas, rescale_zero_terminal_snr
from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.diffusion.timesteps import TIMESTEP_SPACINGS, make_timesteps


matplotlib.use("Agg")
import matplotlib.pyplot as plt


NUM_TRAIN_TIMESTEPS = 1000
NUM_INFERENCE_STEPS = 20
SCHEDULES = {
    "linear": make_betas("linear", NUM_TRAIN_TIMESTEPS),
    "linear, zero terminal SNR": rescale_zero_terminal_snr(make_betas("linear", NUM_TRAIN_TIMESTEPS)),
    "scaled_linear (Stable Diffusion)": make_betas(
        "scaled_linear", NUM_TRAIN_TIMESTEPS, beta_start=0.00085, beta_end=0.012
    ),
    "cosine": make_betas("cosine", NUM_TRAIN_TIMESTEPS),
    "sigmoid": make_betas("sigmoid", NUM_TRAIN_TIMESTEPS),
    "sigmoid_alpha_bar": make_betas("sigmoid_alpha_bar", NUM_TRAIN_TIMESTEPS),
    "laplace": make_betas("laplace", NUM_TRAIN_TIMESTEPS),
}


def main(path: str):
    figure, (levels, ratios, steps) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for name, betas in SCHEDULES.items():
        schedule = NoiseSchedule(betas)
        alpha_bar = schedule.alpha_bar[:-1]
        style = {"label": name, "linewidth": 1.3, "linestyle": "--" if "zero" in name else "-"}
        levels.plot(alpha_bar, **style)
        log_snr = alpha_bar.log() - 2 * schedule.sigma[:-1].log()
        ratios.plot(torch.where(log_snr.isinf(), torch.nan, log_snr), **style)
    levels.set(xlabel="timestep", title="alpha_bar")
    ratios.set(xlabel="timestep", title="log SNR (nats)", ylim=(-16, 11))
    ratios.legend(fontsize=7, loc="lower left")
    for row, spacing in enumerate(reversed(TIMESTEP_SPACINGS)):
        timesteps = make_timesteps(spacing, NUM_INFERENCE_STEPS, NUM_TRAIN_TIMESTEPS)
        steps.plot(timesteps, [row] * len(timesteps), "|", markersize=14)
    steps.set(
        xlabel="timestep",
        title=f"{NUM_INFERENCE_STEPS} timesteps",
        yticks=range(len(TIMESTEP_SPACINGS)),
        ylim=(-0.5, 3.5),
    )
    steps.set_yticklabels(TIMESTEP_SPACINGS[::-1])
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main(*sys.argv[1:])
