"""A patch discriminator of decoded and real images (Isola et al. 2017), and its losses.

It makes an autoencoder's images sharp where the likelihood alone would blur them (Esser et al. 2021, VQGAN).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_ext.models.layers import AffineGroupNorm


class PatchDiscriminator(nn.Module):
    """Images `(batch, in_channels, height, width)` to one logit for each patch, `(batch, 1, *)`, positive for real.

    Args:
        in_channels: Channels of the images.
        width: Channels of the first convolution; each further one has twice as many, up to eight times.
        num_layers: Convolutions that halve the side. A logit sees a patch of 16, 34 or 70 pixels for 1, 2 or 3.
    """

    def __init__(self, in_channels: int, width: int = 32, num_layers: int = 2):
        super().__init__()
        if min(in_channels, width, num_layers) < 1:
            raise ValueError(
                f"in_channels, width and num_layers must be at least 1, got {in_channels}, {width} and {num_layers}"
            )
        layers = [nn.Conv2d(in_channels, width, 4, 2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for number in range(1, num_layers + 1):
            # The last one keeps the side.
            wider, stride = width * min(2**number, 8), 2 if number < num_layers else 1
            layers.append(nn.Conv2d(channels, wider, 4, stride, padding=1, bias=False))
            # Not batch normalisation, as in the paper: its statistics would mix real images with decoded ones.
            layers += [AffineGroupNorm(wider), nn.LeakyReLU(0.2)]
            channels = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    @staticmethod
    def smallest_side(num_layers: int) -> int:
        """The smallest side of an image that has at least one logit."""
        return 3 * 2**num_layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's: (E[max(0, 1 - D(real))] + E[max(0, 1 + D(fake))]) / 2."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def adaptive_weight(loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """The weight of the adversarial loss with which both gradients have the same norm at the last layer (VQGAN).

    |grad loss| / (|grad adversarial_loss| + 1e-4),   at most 1e4
    """
    grads = [torch.autograd.grad(term, last_layer, retain_graph=True)[0] for term in (loss, adversarial_loss)]
    of_loss, of_adversarial = (grad.detach().float().norm() for grad in grads)
    return (of_loss / (of_adversarial + 1e-4)).clamp(0, 1e4)
