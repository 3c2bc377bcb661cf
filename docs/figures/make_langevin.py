"""Langevin dynamics and the weights of modes: plain, annealed, and the reverse SDE on a mixture whose score is known.

python docs/figures/make_langevin.py docs/figures/langevin.png

Draws the figure and prints the table of docs/langevin.md. Each sampler starts from points spread over all of the plane
that is shown, or from the noise of the path, and asks for the score equally often.
"""

import sys
from dataclasses import dataclass

import matplotlib
import torch
from torch import Generator, Tensor

from diffusers_ext import AnnealedLangevinScheduler, ScoreSDEScheduler
from diffusers_ext.diffusion.noising import NoiseLevel
from diffusers_ext.diffusion.reverse_sde import langevin


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# Two Gaussians of unit variance, whose distance is 14 of their standard deviations (Song & Ermon 2019, Section 3.2).
MEANS = torch.tensor([[-5.0, -5.0], [5.0, 5.0]])
WEIGHTS = torch.tensor([0.2, 0.8])
EDGE = 8.0

# Beside the largest noise the distance of the modes is small, or samplers that start from noise about 0 would begin with
# other weights; and the smallest noise is small beside each mode.
PATH = {"path": "ve", "sigma_min": 0.1, "sigma_max": 100.0, "prediction_type": "score"}

STEPS_AT_A_LEVEL = 20
SHOWN = 1500  # samples in a panel
PLAIN_STEP_SIZE = 0.1  # of x + k score + sqrt(2 k) z


@dataclass(frozen=True)
class Result:
    """What a sampler made.

    Attributes:
        samples: Shape `(num_samples, 2)`.
        num_calls: How often each sample asked for the score.
    """

    samples: Tensor
    num_calls: int

    @property
    def weight(self) -> float:
        """The share of samples that are nearer to the smaller mode."""
        return (self.nearest == 0).float().mean().item()

    @property
    def std(self) -> float:
        """Of the samples about the mode that they are nearest to; 1 for the mixture."""
        return (self.samples - MEANS[self.nearest]).square().mean().sqrt().item()

    @property
    def nearest(self) -> Tensor:
        """The mode that each sample is nearest to."""
        return torch.cdist(self.samples, MEANS).argmin(1)


def score(x: Tensor, level: NoiseLevel) -> Tensor:
    """The gradient of log p(x_t) of the mixture with the noise of a level, shape `(num_samples, 2)`."""
    variance = level.alpha**2 + level.sigma**2
    away = level.alpha * MEANS - x[:, None]  # (num_samples, mode, 2)
    shares = (WEIGHTS.log() - away.square().sum(2) / (2 * variance)).softmax(1)
    return (shares[..., None] * away).sum(1) / variance


def sample_plain(num_samples: int, num_calls: int, generator: Generator) -> Result:
    """Langevin dynamics with the score of the data, from points all over the plane."""
    data = NoiseLevel(1.0, 0.0)
    x = (2 * torch.rand(num_samples, 2, generator=generator) - 1) * EDGE
    unit = NoiseLevel(1.0, 1.0)  # in whose units the step is given
    for _ in range(num_calls):
        noise = torch.randn(x.shape, generator=generator)
        x = langevin(x, -score(x, data), unit, PLAIN_STEP_SIZE, noise)
    return Result(x, num_calls)


def sample_by(scheduler, num_inference_steps: int, num_samples: int, generator: Generator) -> Result:
    """The loop that any sampler of diffusers is called in, with the exact score for a network."""
    scheduler.set_timesteps(num_inference_steps)
    x = torch.randn(num_samples, 2, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(score(x, scheduler.level(t, x)), t, x, generator=generator).prev_sample
    return Result(x, len(scheduler.timesteps))


def sample_all(num_samples: int = 4000, num_calls: int = 1000, seed: int = 0) -> dict[str, Result]:
    """The samplers by their names, each with a generator of its own."""
    generators = [Generator().manual_seed(seed + index) for index in range(4)]
    data = MEANS[torch.multinomial(WEIGHTS, num_samples, replacement=True, generator=generators[0])]
    annealed = AnnealedLangevinScheduler(**PATH, num_langevin_steps=STEPS_AT_A_LEVEL)
    sde = ScoreSDEScheduler(**PATH, predictor="reverse_diffusion")
    return {
        "draws of the mixture": Result(data + torch.randn(data.shape, generator=generators[0]), 0),
        "Langevin": sample_plain(num_samples, num_calls, generators[1]),
        "annealed Langevin": sample_by(annealed, num_calls // STEPS_AT_A_LEVEL, num_samples, generators[2]),
        "reverse SDE": sample_by(sde, num_calls, num_samples, generators[3]),
    }


def table_of(results: dict[str, Result]) -> str:
    """The results in Markdown."""
    rows = [f"| {name} | {r.num_calls} | {r.weight:.3f} | {r.std:.3f} |" for name, r in results.items()]
    head = ["| | calls | weight of the smaller mode | std within a mode |", "|---|---|---|---|"]
    return "\n".join([*head, "| exact | | 0.200 | 1.000 |", *rows])


def draw(results: dict[str, Result], path: str) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(13, 4.0), layout="constrained", sharex=True, sharey=True)
    line = torch.linspace(-EDGE, EDGE, 17)
    x, y = torch.meshgrid(line, line, indexing="xy")
    arrows = score(torch.stack([x, y], dim=-1).view(-1, 2), NoiseLevel(1.0, 0.0))
    axes[0].quiver(x, y, *arrows.T.tolist(), color="tab:gray", angles="xy")
    axes[0].set_title("score of the data\n0.20 in the smaller mode")
    for axis, (name, result) in zip(axes[1:], list(results.items())[1:], strict=True):
        shown, nearest = result.samples[:SHOWN], result.nearest[:SHOWN]
        for mode, color in ((0, "tab:orange"), (1, "tab:blue")):
            axis.scatter(*shown[nearest == mode].T.tolist(), s=4, linewidths=0, color=color)
        axis.set_title(f"{name}\n{result.weight:.2f} in the smaller mode")
    for axis in axes:
        axis.scatter(*MEANS.T.tolist(), s=40, marker="+", color="black")
        axis.set(xlim=(-EDGE - 1, EDGE + 1), ylim=(-EDGE - 1, EDGE + 1), aspect="equal")
    figure.savefig(path, dpi=75)


def main(path: str) -> None:
    results = sample_all()
    print(table_of(results))
    draw(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
