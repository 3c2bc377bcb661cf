"""What training has particular to several levels of latents: the figures that are logged, and those of the trained model."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers.utils import BaseOutput
from torch import Tensor

from diffusers_ext.models.hierarchical_levels import LatentChain
from diffusers_ext.models.hierarchical_vae import HierarchicalVAEModel
from diffusers_ext.recipes.vae_objective import VAEObjective


# A level that spends less than these nats an image says nothing of the image.
USED_NATS = 0.1
# A latent counts as active if it spends more than these nats on average over the images.
ACTIVE_NATS = 0.01


class HierarchicalObjective(VAEObjective):
    """`VAEObjective` of latents of several levels, whose rates add up; free bits are for each channel of each level.

    Args:
        num_levels: Of the model.
        args, options: Of `VAEObjective`, but for its `latent_shape`.
    """

    def __init__(self, accelerator: Accelerator, likelihood: str, num_levels: int, **options):
        super().__init__(accelerator, likelihood, (num_levels,), **options)

    def latent_sums(self, latent_shape: tuple[int, ...]) -> dict[str, int | tuple[int, ...]]:
        return {"level_kl": latent_shape}

    def kl_of_levels(self, out: BaseOutput) -> tuple[Tensor, ...]:
        return out.kl

    def note_latents(self, out: BaseOutput, kl_of_levels: list[Tensor]) -> None:
        self.summand("level_kl").add_(torch.stack([kl.sum() for kl in kl_of_levels]))

    def figures_of_latents(self, count: Tensor) -> Tensor:
        return self._wide(self.level_kl) / count

    def describe_latents(self, figures: list[float], rate: float) -> tuple[dict[str, float], str | None]:
        return by_level(figures), unused_warning(figures)


def by_level(rates: list[float]) -> dict[str, float]:
    """Rates of levels from the top, by the levels' numbers."""
    return {f"kl_of_level_{len(rates) - index}": rate for index, rate in enumerate(rates)}


def unused_warning(rates: list[float]) -> str | None:
    """Advice where a level carries no information about the image; None if all of them do.

    Args:
        rates: Nats an image of each level, from the top.
    """
    unused = [str(len(rates) - index) for index, rate in enumerate(rates) if rate < USED_NATS]
    if not unused:
        return None
    return (
        f"posterior collapse: of {len(rates)} levels of latents, level {', '.join(unused)} spends less than {USED_NATS} nats an "
        "image and says nothing of it. Raise --kl_weight slowly from 0 by --kl_warmup_steps, grant each channel some nats "
        "by --free_bits 0.02, or take fewer levels"
    )


@dataclass(frozen=True)
class LevelRates:
    """What the levels spend on a set of images.

    Attributes:
        rates: KL divergence of each level in nats an image, from the top.
        num_active, num_latents: Of each level, the latents that spend more than `ACTIVE_NATS`; and all of them.
        num_images: How many were encoded.
    """

    rates: list[float]
    num_active: list[int]
    num_latents: list[int]
    num_images: int


class LevelStatistics:
    """Gathers `LevelRates` in one pass, in float64."""

    def __init__(self, vae: HierarchicalVAEModel):
        self.count = 0
        self.sums = [torch.zeros(level.shape, dtype=torch.float64) for level in vae.levels]

    def update(self, chain: LatentChain) -> None:
        """Adds a batch: what each level spends given the latents above it in the chain."""
        kl = [part.detach().cpu().double().sum(0) for part in chain.kl_per_latent()]
        self.sums = [total + part for total, part in zip(self.sums, kl, strict=True)]
        self.count += len(chain.latents[0])

    def rates(self) -> LevelRates:
        """Raises: ValueError: if nothing was encoded."""
        if not self.count:
            raise ValueError("the rates of levels need at least one image")
        kl = [total / self.count for total in self.sums]
        return LevelRates(
            rates=[part.sum().item() for part in kl],
            num_active=[int((part > ACTIVE_NATS).sum()) for part in kl],
            num_latents=[part.numel() for part in kl],
            num_images=self.count,
        )


@torch.no_grad()
def measure_levels(
    vae: HierarchicalVAEModel, batches: Iterable[Tensor], accelerator: Accelerator | None = None, seed: int = 0
) -> LevelRates:
    """What each level spends on batches of images in [-1, 1], for one draw of the latents of each.

    Args:
        accelerator: Whose processes each encode a part, or None.
        seed: Of the draws.
    """
    statistics = LevelStatistics(vae)
    generator = torch.Generator(vae.device).manual_seed(seed)
    for images in batches:
        statistics.update(vae.encode(images, sample_posterior=True, generator=generator).latent_dist)
    if accelerator is not None and accelerator.num_processes > 1:
        parts = gather_object([(statistics.count, statistics.sums)])
        statistics.count = sum(count for count, _ in parts)
        statistics.sums = [sum(totals) for totals in zip(*(sums for _, sums in parts), strict=True)]
    return statistics.rates()


def describe_levels(vae: HierarchicalVAEModel, measured: LevelRates) -> str:
    """The rates of the levels, for the card, and a warning if one of them is not used."""
    lines = [
        f"{len(vae.levels)} levels of latents, each drawn given the one above it; KL divergence from their priors on "
        f"{measured.num_images} training images, {sum(measured.rates):.4g} nats an image in all:",
        "| level | shape | nats an image | active latents |\n|---|---|---|---|\n"
        + "\n".join(
            f"| {level.number} | {' x '.join(map(str, level.shape))} | {rate:.4g} | {active} of {number} |"
            for level, rate, active, number in zip(
                vae.levels, measured.rates, measured.num_active, measured.num_latents, strict=True
            )
        ),
    ]
    warning = unused_warning(measured.rates)
    return "\n\n".join([*lines, f"Warning: {warning}."] if warning else lines)
