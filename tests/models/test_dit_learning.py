"""That `DiTModel` learns what depends on label, time and place, below what a network blind to one of them can reach."""

import torch

from diffusers_ext import DiTModel, ExtDDIMScheduler
from diffusers_ext.diffusion.noising import add_noise


# Two pictures of 4x4 patches of 2x2 pixels, each half +1 and half -1, which agree in half of the patches.
STRIPES = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat_interleave(2).expand(8, 8)
PICTURES = torch.stack([STRIPES, STRIPES.T])[:, None]


def train(loss, steps):
    """Trains a small network and returns the mean loss of the last fifth of the steps, each on noise of its own."""
    torch.manual_seed(0)
    model = DiTModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        hidden_size=32,
        num_layers=2,
        num_attention_heads=2,
        mlp_ratio=2.0,
        num_classes=2,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99), weight_decay=0.0)
    generator, values = torch.Generator().manual_seed(1), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, step / 20) * (1 - step / steps)
        value = loss(model, generator)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        values.append(value.item())
    return sum(values[-steps // 5 :]) / len(values[-steps // 5 :])


def test_it_learns_by_time_label_and_place():
    """From noise alone to the picture of the label, whose sign follows from the time.

    Blind to the time, the best answer is 0, with a squared error of 1; blind to the place it is 0 too, since each picture
    is as much +1 as -1; blind to the label it is the mean of the two pictures, with an error of 1/2.
    """

    def loss(model, generator):
        noise = torch.randn(16, 1, 8, 8, generator=generator)
        labels, late = torch.randint(2, (2, 16), generator=generator)
        target = PICTURES[labels] * (1 - 2 * late.view(-1, 1, 1, 1))
        return (model(noise, 100 + 800 * late, labels).sample - target).square().mean()

    assert train(loss, 150) < 0.1


def test_it_learns_gaussian_data_nearly_to_the_optimum():
    """x0 ~ N(picture of the label, c^2): the error of the best velocity is c^2 / (c^2 alpha^2 + sigma^2).

    Blind to the label, the best is the mixture of the two, weighted by how likely each makes x_t.
    """
    c, batch = 0.3, 16
    schedule = ExtDDIMScheduler(beta_schedule="cosine").schedule

    def draw(generator, batch=batch):
        labels = torch.randint(2, (batch,), generator=generator)
        x0 = PICTURES[labels] + c * torch.randn(batch, 1, 8, 8, generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        timesteps = ((torch.arange(batch) + torch.rand(1, generator=generator)) / batch * 1000).long()
        level = schedule.level(timesteps, x0)
        x_t = add_noise(x0, eps, level)
        return x_t, level.alpha * eps - level.sigma * x0, level, timesteps, labels

    def loss(model, generator):
        x_t, v, _, timesteps, labels = draw(generator)
        return (model(x_t, timesteps, labels).sample - v).square().mean()

    x_t, v, level, _, _ = draw(torch.Generator().manual_seed(2), 4096)
    variance = (c * level.alpha) ** 2 + level.sigma**2
    distances = torch.stack([(x_t - level.alpha * picture).square().sum((1, 2, 3), True) for picture in PICTURES])
    share = (-distances / (2 * variance)).softmax(0)
    means = torch.stack([p + c**2 * level.alpha / variance * (x_t - level.alpha * p) for p in PICTURES])
    blind = (level.alpha * x_t - (share * means).sum(0)) / level.sigma
    optimum, error_of_blind = (c**2 / variance).mean().item(), (blind - v).square().mean().item()

    learned = train(loss, 250)
    assert 0.97 * optimum < learned < 1.15 * optimum < error_of_blind
