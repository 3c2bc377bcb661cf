"""The objective of a variational autoencoder, and the figures that are logged of it.

    loss = (distortion + kl_weight * rate) / dims  +  perceptual_weight * perceptual  +  weight * adversarial

Distortion and rate are the terms of the negative ELBO in nats for an image of `dims` values, so that with a kl_weight of 1
and nothing else the loss is the bound in nats for each of them.
"""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from diffusers_ext.models.vae_discriminator import adaptive_weight, hinge_loss
from diffusers_ext.models.vae_likelihood import DiagonalGaussian, log_likelihood
from diffusers_ext.recipes.running_sums import RunningSums
from diffusers_ext.trainer.adversary import Adversary


BINARIZATIONS = ("none", "threshold", "stochastic")

# A latent counts as active if the variance of its mean over the data is above this (Burda et al. 2016).
ACTIVE_VARIANCE = 0.01
# Less than this share of active latents is called a collapse.
COLLAPSED_BELOW = 0.1
# Optimizer steps after the warm-up within which latents may still wake up.
STEPS_TO_WAKE = 500
# Of more latents than these, only the least, median and greatest KL divergence are logged.
MAX_NAMED_LATENTS = 64

TERMS = ("distortion", "rate", "perceptual", "adversarial", "adversarial_weight")


def binarize(x: Tensor, how: str, noise: Tensor | None = None) -> Tensor:
    """Images in [-1, 1] as black and white, -1 and 1.

    Args:
        how: "none"; "threshold", white above 0; "stochastic", white with the brightness as probability (Salakhutdinov &
            Murray 2008).
        noise: Standard normal noise of the shape of `x`, for "stochastic".
    """
    if how == "none":
        return x
    limit = 0.0 if how == "threshold" else 2 * torch.special.ndtr(noise) - 1
    return torch.where(x > limit, 1.0, -1.0).to(x.dtype)


def free_bits_kl(kl_per_latent: Tensor, free_bits: float) -> Tensor:
    """The rate in nats with at least `free_bits` nats for each latent (Kingma et al. 2016, IAF).

    What a latent dimension or channel spends on average over batch and positions is not pushed below that.

    Args:
        kl_per_latent: Shape `(batch, dims)` or `(batch, channels, *spatial)`.
    """
    mean = kl_per_latent.transpose(0, 1).flatten(1).mean(1)
    positions = kl_per_latent[0, 0].numel()
    return mean.clamp(min=free_bits).sum() * positions


def collapse_warning(num_active: float, num_latents: int, rate: float) -> str | None:
    """Advice where hardly any latents carry information about the image; None if enough of them do."""
    if num_active >= COLLAPSED_BELOW * num_latents:
        return None
    return (
        f"posterior collapse: {num_active:.0f} of {num_latents} latents are active (variance of the mean over images above "
        f"{ACTIVE_VARIANCE}), at a rate of {rate:.3g} nats an image. Lower --kl_weight, raise it slowly from 0 by "
        "--kl_warmup_steps, grant each latent some nats by --free_bits 0.1, or take fewer latents"
    )


class VAEObjective(RunningSums):
    """The loss of a batch, as `Trainer` calls it. In evaluation mode: without free bits, warm-up and adversary.

    Args:
        accelerator: Of the run.
        likelihood: p(x | z), as in the model's config.
        latent_shape: Of one image.
        last_layer: Weight of the decoder's last layer, where the adversary's weight is taken.
        kl_weight: Of the rate; 1 for the ELBO (beta of Higgins et al. 2017).
        kl_warmup_steps: Optimizer steps in which it rises from 0 in proportion (Bowman et al. 2016).
        free_bits: Nats; see `free_bits_kl`.
        binarization: See `binarize`.
        perceptual: A distance between images, or None; see `load_perceptual`.
        adversary: The discriminator's, or None; this loss calls it only while it is active.
        adversarial_weight: Of the decoder's loss -E[D(reconstruction)].
        adaptive: Whether that is multiplied by `adaptive_weight`. It is taken from this process's images alone.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        likelihood: str,
        latent_shape: tuple[int, ...],
        *,
        last_layer: Tensor | None = None,
        kl_weight: float = 1.0,
        kl_warmup_steps: int = 0,
        free_bits: float = 0.0,
        binarization: str = "none",
        perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
        perceptual_weight: float = 1.0,
        adversary: Adversary | None = None,
        adversarial_weight: float = 1.0,
        adaptive: bool = True,
    ):
        super().__init__(
            accelerator,
            terms=len(TERMS),
            count=(),
            **self.latent_sums(latent_shape),
        )
        self.register_buffer("log_scale", torch.zeros(()))
        self.likelihood, self.binarization = likelihood, binarization
        self.kl_weight, self.kl_warmup_steps, self.free_bits = kl_weight, kl_warmup_steps, free_bits
        self.perceptual_weight, self.adversarial_weight, self.adaptive = (
            perceptual_weight,
            adversarial_weight,
            adaptive,
        )
        self.adversary = adversary
        # Kept from `nn.Module`: neither a network's weights nor the model's belong into the objective's state.
        self._outside = {"perceptual": perceptual, "last_layer": last_layer}
        # Set by the trainer: optimizer steps that are done, whatever the batches of each were.
        self.steps: Callable[[], int] = lambda: 0
        self._begun, self._warned = 0, False  # optimizer steps that have begun

    @property
    def current_kl_weight(self) -> float:
        if not self.training or not self.kl_warmup_steps:
            return self.kl_weight
        return self.kl_weight * min(1.0, self._begun / self.kl_warmup_steps)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if self.training:
            self._begun = self.steps() + 1
        x = binarize(batch["images"], self.binarization, batch.get("noise"))
        out = model(x, noise=batch["latent_noise"])
        dims = x[0].numel()
        distortion = -log_likelihood(self.likelihood, x, out.parameters, out.log_scale).mean()
        kl_of_levels = self.kl_of_levels(out)
        rate = sum(kl.flatten(1).sum(1).mean() for kl in kl_of_levels)
        pushed = rate
        if self.free_bits and self.training:
            pushed = sum(free_bits_kl(kl, self.free_bits) for kl in kl_of_levels)
        zero = torch.zeros_like(distortion)
        perceptual = adversarial = weight = zero
        with_distortion = distortion / dims
        if self._outside["perceptual"] is not None:
            with self.accelerator.autocast():
                perceptual = self._outside["perceptual"](x, out.sample).mean()
            with_distortion = with_distortion + self.perceptual_weight * perceptual
        loss = with_distortion + self.current_kl_weight / dims * pushed
        if self.adversary is not None and self.adversary.active and self.training:
            adversarial = -self.adversary.module(out.sample).mean()
            weight = zero + self.adversarial_weight
            if self.adaptive:
                weight = weight * adaptive_weight(with_distortion, adversarial, self._outside["last_layer"])
            loss = loss + weight * adversarial
            batch["target"], batch["reconstruction"] = x, out.sample
        if self.training:
            terms = torch.stack([distortion, rate, perceptual, adversarial, weight]).detach()
            self._take_note(terms, out, [kl.detach() for kl in kl_of_levels])
        return loss

    @torch.no_grad()
    def _take_note(self, terms: Tensor, out: BaseOutput, kl_of_levels: list[Tensor]):
        number = len(out.sample)
        self.log_scale.copy_(out.log_scale)
        self.summand("terms").add_(terms * number)
        self.summand("count").add_(number)
        self.note_latents(out, kl_of_levels)

    # What is particular to latents of one level.

    def latent_sums(self, latent_shape: tuple[int, ...]) -> dict[str, int | tuple[int, ...]]:
        """Names and shapes of the sums over latents."""
        return {"kl_sum": latent_shape[0], "mean_sum": latent_shape, "square_sum": latent_shape}

    def kl_of_levels(self, out: BaseOutput) -> Sequence[Tensor]:
        """KL divergence of each latent in nats, shape `(batch, *latent_shape)`, for each level of latents."""
        return [DiagonalGaussian(out.mean, out.logvar).kl_per_latent()]

    def note_latents(self, out: BaseOutput, kl_of_levels: list[Tensor]) -> None:
        """Adds those of a batch to the sums over latents."""
        mean, (kl,) = out.mean.float(), kl_of_levels
        self.summand("kl_sum").add_(kl.transpose(0, 1).flatten(1).mean(1) * len(mean))
        self.summand("mean_sum").add_(mean.sum(0))
        self.summand("square_sum").add_(mean.square().sum(0))

    def figures_of_latents(self, count: Tensor) -> Tensor:
        """Figures of the `count` images in the sums, as one tensor."""
        kl, mean, square = (self._wide(values) / count for values in (self.kl_sum, self.mean_sum, self.square_sum))
        num_active = (square - mean.square() > ACTIVE_VARIANCE).sum()
        return torch.cat([num_active.to(kl)[None], kl])

    def describe_latents(self, figures: list[float], rate: float) -> tuple[dict[str, float], str | None]:
        """These figures as they are logged; and a warning if there is reason for one, else None."""
        num_active, *kl = figures
        num_latents = self.mean_sum.numel()
        record = {"active_latents": num_active, "active_share": num_active / num_latents, **_by_latent(kl)}
        return record, collapse_warning(num_active, num_latents, rate)

    def metrics(self) -> dict[str, float]:
        """Means since the last call, over all processes.

        Distortion and rate in nats an image, the latents' KL divergences in nats (averaged over the positions of a
        channel), and how many latents are active.
        """
        self.collect()
        count = self._wide(self.count)
        packed = [torch.stack([count, self.log_scale.exp().to(count)]), self._wide(self.terms) / count]
        # To the host in one go, which waits for the device once.
        num_images, scale, *values = torch.cat([*packed, self.figures_of_latents(count)]).tolist()
        self.clear()
        terms = dict(zip(TERMS, values[: len(TERMS)], strict=True))
        of_latents, warning = self.describe_latents(values[len(TERMS) :], terms["rate"])
        if num_images >= 100 and self._begun >= self.kl_warmup_steps + STEPS_TO_WAKE and warning and not self._warned:
            self.accelerator.print(f"\nwarning: {warning}")
            self._warned = True
        return {
            **{name: value for name, value in terms.items() if self._has(name)},
            "kl_weight": self.current_kl_weight,
            **({} if self.likelihood == "bernoulli" else {"likelihood_scale": scale}),
            **of_latents,
        }

    @staticmethod
    def _wide(sums: Tensor) -> Tensor:
        return sums.double() if sums.device.type == "cpu" else sums

    def _has(self, term: str) -> bool:
        if term == "perceptual":
            return self._outside["perceptual"] is not None
        return self.adversary is not None or not term.startswith("adversarial")

    def _apply(self, fn, recurse: bool = True):
        if isinstance(self._outside["perceptual"], nn.Module):
            self._outside["perceptual"]._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._begun)

    def set_extra_state(self, state: Tensor):
        self._begun = int(state)


def _by_latent(kl: list[float]) -> dict[str, float]:
    if len(kl) <= MAX_NAMED_LATENTS:
        digits = len(str(len(kl) - 1))
        return {f"kl_of_latent_{number:0{digits}}": value for number, value in enumerate(kl)}
    kl = sorted(kl)
    return {"kl_of_latents_min": kl[0], "kl_of_latents_median": kl[len(kl) // 2], "kl_of_latents_max": kl[-1]}


def discriminator_loss(discriminator: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The adversary's loss on what `VAEObjective` has left in the batch."""
    logits = discriminator(torch.cat([batch["target"], batch["reconstruction"]]))
    return hinge_loss(*logits.chunk(2))
