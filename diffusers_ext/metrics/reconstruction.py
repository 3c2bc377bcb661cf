"""How close two images are, pixel by pixel and patch by patch; in float64, so on the CPU for a device without it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_ext.diffusion.precision import to_float64


def rmse(x: Tensor, y: Tensor) -> Tensor:
    """Root mean squared error, shape `(batch,)`, in the units of the images.

    Args:
        x, y: Shape `(batch, ...)`.
    """
    return (to_float64(x) - to_float64(y)).square().flatten(1).mean(1).sqrt()


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, shape `(batch,)`: 10 log10(1 / mean squared error); infinite for equal images.

    Args:
        x, y: Images in [0, 1], shape `(batch, channels, height, width)`.
    """
    return -10 * torch.log10((to_float64(x) - to_float64(y)).square().flatten(1).mean(1))


def ssim(x: Tensor, y: Tensor, *, window_size: int = 11, window_std: float = 1.5) -> Tensor:
    """Structural similarity (Wang et al. 2004), in [-1, 1], shape `(batch,)`; averaged over channels and positions.

        (2 m_x m_y + c1) (2 cov + c2) / ((m_x^2 + m_y^2 + c1) (var_x + var_y + c2)),   c = (0.01)^2, (0.03)^2

    Means, variances and covariance are weighted by a Gaussian window, at the positions where it lies inside the image.

    Args:
        x, y: Images in [0, 1], shape `(batch, channels, height, width)`.
        window_size: Odd side of the window; on smaller images the largest odd side that fits.
        window_std: Standard deviation of the window in pixels.
    """
    x, y = _pair(x, y)
    luminance, contrast = _similarity(x, y, window_size, window_std)
    return (luminance * contrast).flatten(1).mean(1)


# Exponents of the scales, the finest first (Wang, Simoncelli and Bovik 2003).
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def multi_scale_ssim(x: Tensor, y: Tensor, *, window_size: int = 11, window_std: float = 1.5) -> Tensor:
    """Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003), in [0, 1], shape `(batch,)`.

    The product over scales, each of half the side of the one before, of the mean of the contrast and structure term of
    `ssim` to the power of its weight, with the luminance term at the coarsest scale alone. A scale at which the images are
    negatively correlated counts as 0. Images of less than 176 pixels a side have as many of the five scales as the window
    fits into, whose weights are scaled to sum to those of all: name the size beside the number.

    Args:
        x, y: Images in [0, 1], shape `(batch, channels, height, width)`.
        window_size, window_std: See `ssim`.
    """
    x, y = _pair(x, y)
    num_scales = sum(min(x.shape[2:]) // 2**i >= window_size for i in range(len(SCALE_WEIGHTS)))
    weights = SCALE_WEIGHTS[: max(num_scales, 1)]
    result = x.new_ones(len(x))
    for i, weight in enumerate(weights):
        luminance, contrast = _similarity(x, y, window_size, window_std)
        term = contrast if i < len(weights) - 1 else luminance * contrast
        # The mean over positions, for each channel; and over channels at the end of each scale.
        mean = term.flatten(2).mean(2).clamp(min=0).mean(1)
        result = result * mean ** (weight * sum(SCALE_WEIGHTS) / sum(weights))
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return result


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"both must have one shape (batch, channels, height, width), got {x.shape} and {y.shape}")
    return to_float64(x), to_float64(y)


def _similarity(x: Tensor, y: Tensor, window_size: int, window_std: float) -> tuple[Tensor, Tensor]:
    """The luminance term, and the product of the contrast and structure terms, at each position of the window."""
    channels, side = x.shape[1], min(*x.shape[2:], window_size)
    side -= 1 - side % 2
    offset = torch.arange(side, dtype=x.dtype, device=x.device) - side // 2
    line = torch.exp(-0.5 * (offset / window_std).square())
    line = line / line.sum()

    def blur(image: Tensor) -> Tensor:
        rows = F.conv2d(image, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(rows, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
    cov = blur(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return luminance, (2 * cov + c2) / (var_x + var_y + c2)
