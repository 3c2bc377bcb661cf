"""The base of the autoencoders: networks that end in a likelihood p(x | z) with a scale."""

import math

import torch
from torch import Tensor, nn

from diffusers_ext.models.network import Network
from diffusers_ext.models.vae_likelihood import LIKELIHOODS


class AutoencoderNetwork(Network):
    """A network with `likelihood`, `likelihood_scale` and `learn_scale` in its config."""

    def start_scale(self) -> None:
        """Makes the likelihood's scale a parameter, if it is learned."""
        scale = torch.tensor(float(self.config.likelihood_scale)).log()
        self.log_scale = nn.Parameter(scale) if self.config.learn_scale else None

    @property
    def likelihood_log_scale(self) -> Tensor:
        """Log of the likelihood's scale, shape `()`."""
        if self.log_scale is not None:
            return self.log_scale
        # Filled in on the device: a copy from the host would wait for it.
        return torch.full((), math.log(self.config.likelihood_scale), device=self.device)


def check_likelihood(config) -> None:
    """Refuses a likelihood, or a scale of it, that cannot be.

    Raises:
        ValueError: with what was got.
    """
    if config.likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {config.likelihood!r}")
    if config.likelihood_scale <= 0:
        raise ValueError(f"likelihood_scale must be positive, got {config.likelihood_scale:g}")
    if config.learn_scale and config.likelihood == "bernoulli":
        raise ValueError("learn_scale has no meaning for likelihood 'bernoulli', which has no scale")
