"""DDPM on two moons: noise added and taken away again in the plane, and what fewer steps cost.

python docs/walkthroughs/two_moons.py docs/figures/two_moons.png

Trains a small network, draws the figure and prints the table of docs/walkthroughs/two_moons.md.
"""

import sys

import matplotlib
import torch
from diffusers.models.embeddings import get_timestep_embedding
from sklearn.datasets import make_moons
from torch import Generator, Tensor, nn

from diffusers_ext import ExtDDIMScheduler, ExtDDPMScheduler


matplotlib.use("Agg")
import matplotlib.pyplot as plt


SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "trailing"}
SAMPLERS = {"DDPM": ExtDDPMScheduler(**SCHEDULE), "DDIM": ExtDDIMScheduler(**SCHEDULE)}


def draw_moons(num_samples: int, seed: int) -> Tensor:
    """Points of both moons, shape `(num_samples, 2)`, of about unit variance."""
    points, _ = make_moons(num_samples, noise=0.05, random_state=seed)
    return (torch.tensor(points, dtype=torch.float32) - torch.tensor([0.5, 0.25])) / 0.75


class Denoiser(nn.Module):
    """Predicts the noise in x_t, from x_t and the timestep."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(2 + 32, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU()),
            nn.Linear(width, 2),
        )

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return self.layers(torch.cat([x_t, get_timestep_embedding(timesteps, 32)], dim=1))


def train(network: nn.Module, num_steps: int, batch_size: int = 512) -> list[float]:
    """Minimises L_simple (DDPM, Algorithm 1); the loss of each step."""
    scheduler, generator = SAMPLERS["DDPM"], Generator().manual_seed(0)
    data = draw_moons(20_000, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    losses = []
    for _ in range(num_steps):
        x_0 = data[torch.randint(len(data), (batch_size,), generator=generator)]
        noise = torch.randn(x_0.shape, generator=generator)
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        x_t = scheduler.add_noise(x_0, noise, timesteps)
        loss = (network(x_t, timesteps) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def sample(
    network: nn.Module, scheduler, num_steps: int, num_samples: int, keep: tuple[int, ...] = ()
) -> list[Tensor]:
    """The loop that every sampler of diffusers is called in; x_t before the steps `keep`, and the samples."""
    generator = Generator().manual_seed(1)
    scheduler.set_timesteps(num_steps)
    x, kept = torch.randn(num_samples, 2, generator=generator), []
    for index, t in enumerate(scheduler.timesteps):
        if index in keep:
            kept.append(x)
        noise = network(x, t.expand(num_samples))
        x = scheduler.step(noise, t, x, generator=generator).prev_sample
    return [*kept, x]


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, which is 0 for equal laws alone; over pairs of different points."""
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (2 * torch.cdist(x, y).mean() - sum(within)).item()


def measure(network: nn.Module, numbers_of_steps: tuple[int, ...], num_samples: int) -> dict[str, list[float]]:
    """Energy distance of samples from points of the data, by sampler and number of steps."""
    real = draw_moons(num_samples, seed=1)
    return {
        name: [energy_distance(sample(network, scheduler, n, num_samples)[-1], real) for n in numbers_of_steps]
        for name, scheduler in SAMPLERS.items()
    }


def table_of(distances: dict[str, list[float]], numbers_of_steps: tuple[int, ...]) -> str:
    """In Markdown, in thousandths."""
    rows = [f"| {name} | " + " | ".join(f"{1000 * d:.1f}" for d in row) + " |" for name, row in distances.items()]
    head = "| | " + " | ".join(map(str, numbers_of_steps)) + " |"
    return "\n".join([head, "|---|" + "---|" * len(numbers_of_steps), *rows])


def draw(network: nn.Module, path: str, num_steps: int = 1000, num_samples: int = 2000) -> None:
    """The data with more and more noise above, and below x_t of DDPM at the same timesteps, the other way round."""
    shown = (999, 600, 400, 200, 60)
    steps = tuple((999 - t) * num_steps // 1000 for t in shown)
    backward = sample(network, SAMPLERS["DDPM"], num_steps, num_samples, keep=steps)
    x_0, noise = draw_moons(num_samples, seed=2), torch.randn(num_samples, 2, generator=Generator().manual_seed(3))
    figure, axes = plt.subplots(2, 6, figsize=(13, 4.6), layout="constrained", sharex=True, sharey=True)
    for column, t in enumerate((*shown, -1)):
        noised = x_0 if t < 0 else SAMPLERS["DDPM"].add_noise(x_0, noise, torch.tensor(t))
        axes[0, column].set_title("x_0" if t < 0 else f"x_t, t = {t}")
        for row, (points, color) in enumerate(((noised, "tab:blue"), (backward[column], "tab:orange"))):
            axes[row, column].scatter(*points.T.tolist(), s=2, linewidths=0, color=color)
            axes[row, column].set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=(), yticks=())
    axes[0, 0].set_ylabel("data with noise")
    axes[1, 0].set_ylabel("the sampler, from the left")
    figure.savefig(path, dpi=75)


def main(path: str, num_steps: int = 4000, numbers: tuple[int, ...] = (5, 10, 25, 100, 1000), num_samples: int = 4000):
    torch.manual_seed(0)
    network = Denoiser()
    losses = train(network, num_steps)
    first, last = losses[: num_steps // 10], losses[-num_steps // 10 :]
    print(f"loss {sum(first) / len(first):.3f} at first, {sum(last) / len(last):.3f} at the end")
    print(table_of(measure(network, numbers, num_samples), numbers))
    between = energy_distance(draw_moons(num_samples, seed=3), draw_moons(num_samples, seed=1))
    print(f"two draws of the data: {1000 * between:.1f}")
    draw(network, path)


if __name__ == "__main__":
    main(sys.argv[1])
