"""How close two images are, pixel by pixel and patch by patch; in float64, so on the CPU for a device without it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_ext.diffusion.precision import to_float64


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
    if x.shape != y.shape or x.ndim != 4:
        raise ValueError(f"both must have one shape (batch, channels, height, width), got {x.shape} and {y.shape}")
    channels, side = x.shape[1], min(*x.shape[2:], window_size)
    side -= 1 - side % 2
    x, y = to_float64(x), to_float64(y)
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
    return (luminance * (2 * cov + c2) / (var_x + var_y + c2)).flatten(1).mean(1)
