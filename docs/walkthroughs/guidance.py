"""What guidance does to a distribution: two labels in the plane whose scores are known.

python docs/walkthroughs/guidance.py docs/figures/guidance_plane.png

Draws the figure and prints the table of docs/walkthroughs/guidance.md. No network is trained: its place has the exact one.
"""

import sys
from dataclasses import dataclass

import matplotlib
import torch
from torch import Generator, Tensor

from diffusers_ext import ExtDDIMScheduler


matplotlib.use("Agg")
import matplotlib.pyplot as plt


# Label 0 on the left and label 1 on the right, each a Gaussian of this standard deviation; they overlap.
MEANS, STD = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), 0.8
SCHEDULER = ExtDDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, timestep_spacing="trailing")
EVERYWHERE, MIDDLE = (0.0, 1.0), (0.2, 0.8)


def predict_noise(x_t: Tensor, t: int, label: int | None) -> Tensor:
    """What the best network of epsilon would say: with a label of its Gaussian, without one of the mixture."""
    level = SCHEDULER.schedule.level(t, x_t)
    variance = (level.alpha * STD).square() + level.sigma.square()
    away = x_t[:, None] - level.alpha * MEANS  # (num_samples, label, 2)
    if label is not None:
        return level.sigma * away[:, label] / variance
    shares = (-away.square().sum(2) / (2 * variance)).softmax(1)
    return level.sigma * (shares[..., None] * away).sum(1) / variance


def sample(scale: float, interval: tuple[float, float], num_samples: int, num_steps: int = 100) -> tuple[Tensor, int]:
    """Samples of label 1, and the calls of the network for each; guidance acts in that part of the steps."""
    SCHEDULER.set_timesteps(num_steps)
    x, calls = torch.randn(num_samples, 2, generator=Generator().manual_seed(0)), 0
    for index, t in enumerate(SCHEDULER.timesteps.tolist()):
        noise = predict_noise(x, t, label=1)
        calls += 1
        if scale != 1 and interval[0] <= index / num_steps < interval[1]:
            unconditional = predict_noise(x, t, label=None)
            noise = unconditional + scale * (noise - unconditional)  # classifier-free guidance
            calls += 1
        x = SCHEDULER.step(noise, t, x).prev_sample
    return x, calls


def log_tilted(x: Tensor, scale: float) -> Tensor:
    """log of p(x | 1) p(1 | x)^(scale - 1) up to a constant: the law whose score guidance has where there is no noise."""
    logits = -(x[:, None] - MEANS).square().sum(2) / (2 * STD**2)
    return logits[:, 1] + (scale - 1) * logits.log_softmax(1)[:, 1]


def moments_of_tilted(scale: float) -> tuple[float, float]:
    """Mean and standard deviation of that law along the line between the labels, by the sum over a grid."""
    line = torch.linspace(-6, 8, 4001)
    points = torch.stack([line, torch.zeros_like(line)], dim=1)
    weights = log_tilted(points, scale).softmax(0)
    mean = (weights * line).sum()
    return mean.item(), (weights * (line - mean).square()).sum().sqrt().item()


@dataclass(frozen=True)
class Result:
    """What one way to guide made."""

    scale: float
    interval: tuple[float, float]
    samples: Tensor
    num_calls: int

    @property
    def label_share(self) -> float:
        """How many samples are nearer to their own label than to the other."""
        return (self.samples[:, 0] > 0).float().mean().item()

    @property
    def row(self) -> str:
        mean, std = (getattr(self.samples[:, 0], name)().item() for name in ("mean", "std"))
        law = "{:.2f}, {:.2f}".format(*moments_of_tilted(self.scale)) if self.interval == EVERYWHERE else ""
        where = "" if self.interval == EVERYWHERE else ", in the middle"
        return f"| {self.scale:g}{where} | {self.num_calls} | {self.label_share:.1%} | {mean:.2f}, {std:.2f} | {law} |"


def guide_all(num_samples: int = 4000, num_steps: int = 100) -> list[Result]:
    """The scales 1, 2, 4 and 8, and 4 in the middle of the steps alone."""
    ways = [(1.0, EVERYWHERE), (2.0, EVERYWHERE), (4.0, EVERYWHERE), (8.0, EVERYWHERE), (4.0, MIDDLE)]
    return [Result(scale, interval, *sample(scale, interval, num_samples, num_steps)) for scale, interval in ways]


def table_of(results: list[Result]) -> str:
    """In Markdown."""
    head = "| scale | calls | of its label | mean, standard deviation | of the sharpened law |"
    return "\n".join([head, "|---|---|---|---|---|", *(result.row for result in results)])


def draw(results: list[Result], path: str) -> None:
    figure, axes = plt.subplots(1, len(results), figsize=(13, 3.2), layout="constrained", sharex=True, sharey=True)
    line = torch.linspace(-4, 5, 91)
    x, y = torch.meshgrid(line, line, indexing="xy")
    points = torch.stack([x, y], dim=-1).view(-1, 2)
    for axis, result in zip(axes, results, strict=True):
        for label, color in ((0, "tab:gray"), (1, "tab:blue")):
            density = (-(points - MEANS[label]).square().sum(1) / (2 * STD**2)).exp().view(x.shape)
            axis.contour(x, y, density, levels=[0.14, 0.6], colors=color, linewidths=1)
        axis.scatter(*result.samples[:1500].T.tolist(), s=2, linewidths=0, color="tab:orange")
        where = "" if result.interval == EVERYWHERE else "\nin the middle"
        axis.set_title(f"scale {result.scale:g}{where}")
        axis.set(xlim=(-4, 5), ylim=(-3.5, 3.5), aspect="equal", xticks=(), yticks=())
    figure.savefig(path, dpi=75)


def main(path: str) -> None:
    results = guide_all()
    print(table_of(results))
    draw(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
