"""Noise schedules by name, as the variances beta_1..beta_T of the single noising steps, in float64.

References:
    DDPM: Ho, Jain, Abbeel 2020, arXiv 2006.11239 ("linear").
    Nichol, Dhariwal 2021, Improved Denoising Diffusion Probabilistic Models, arXiv 2102.09672 ("cosine").
    Chen 2023, On the Importance of Noise Scheduling for Diffusion Models, arXiv 2301.10972.
    Jabri, Fleet, Chen 2022, Scalable Adaptive Computation for Iterative Generation, arXiv 2212.11972 (sigmoid).
    Lin et al. 2023, Common Diffusion Noise Schedules and Sample Steps are Flawed, arXiv 2305.08891 (zero terminal SNR).
"""

import torch
from torch import Tensor


BETA_SCHEDULES = (
    "linear",
    "scaled_linear",
    "squaredcos_cap_v2",
    "cosine",
    "sigmoid",
    "sigmoid_alpha_bar",
    "laplace",
)

# Of timesteps and the like: each takes tables of float64.
LARGEST_INTEGER = 2**20

# Above it a step would add nearly all the noise there is, and the last step of an alpha_bar that ends at 0 exactly all.
MAX_BETA = 0.999


def make_betas(
    name: str,
    num_train_timesteps: int,
    *,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    reference_timesteps: int | None = None,
) -> Tensor:
    """The betas of a schedule.

    Args:
        name: One of `BETA_SCHEDULES`.
            "linear": beta rises evenly from `beta_start` to `beta_end`.
            "scaled_linear": its square root does (Stable Diffusion).
            "cosine": alpha_bar falls as a squared cosine, each beta at most 0.999; diffusers calls it
            "squaredcos_cap_v2", and both names are accepted.
            "sigmoid": beta rises as a sigmoid of [-6, 6] from `beta_start` to `beta_end` (diffusers, GeoDiff).
            "sigmoid_alpha_bar": alpha_bar falls as a sigmoid of [-3, 3], scaled to run from 1 to 0 (Jabri et al.
            2022), each beta at most 0.999.
            "laplace": alpha_bar as in diffusers' schedule of that name.
        num_train_timesteps: Number of steps T.
        beta_start, beta_end: Ends of "linear", "scaled_linear" and "sigmoid", each in [0, 1].
        reference_timesteps: Length of the path that `beta_start` and `beta_end` were chosen for. If given, its
            log alpha_bar is read at T evenly spaced places, so that a path of another length still ends at the same
            alpha_bar. Schedules defined by alpha_bar do so by themselves.

    Returns: float64, shape `(num_train_timesteps,)`.

    Raises:
        ValueError: If the name is unknown or a number out of range.
    """
    if name not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, got {name!r}")
    check_integer("num_train_timesteps", num_train_timesteps)
    if name in ("squaredcos_cap_v2", "cosine", "sigmoid_alpha_bar", "laplace"):
        return _betas_of_alpha_bar(name, num_train_timesteps)
    for key, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        if not 0 <= value <= 1:
            raise ValueError(f"{key} must be in [0, 1], got {value}")
    if reference_timesteps is None:
        return _betas_between(name, num_train_timesteps, beta_start, beta_end)
    check_integer("reference_timesteps", reference_timesteps)
    return respace_betas(_betas_between(name, reference_timesteps, beta_start, beta_end), num_train_timesteps)


def respace_betas(betas: Tensor, num_train_timesteps: int) -> Tensor:
    """Betas of a path of `num_train_timesteps` that has the alpha_bar of the path of `betas`.

    log alpha_bar is interpolated linearly between the steps given, so that taking every k-th of them is exact and the
    last alpha_bar stays what it was.
    """
    log_alpha_bar = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])
    log_alpha_bar = log_alpha_bar.clamp(min=-1e4)  # stands for -inf, with which there is no interpolating
    place = torch.linspace(0, len(betas), num_train_timesteps + 1, dtype=torch.float64, device="cpu")
    low = place.floor().long().clamp(max=len(betas) - 1)
    log_alpha_bar = torch.lerp(log_alpha_bar[low], log_alpha_bar[low + 1], place - low)
    return -torch.expm1(log_alpha_bar.diff())


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas whose last alpha_bar is exactly 0 and whose first is kept (Lin et al. 2023, Algorithm 1).

    Raises:
        ValueError: If there is one step only, whose alpha_bar cannot be both.
    """
    if len(betas) < 2:
        raise ValueError(f"rescale_betas_zero_snr needs at least 2 timesteps, got {len(betas)}")
    alpha = (0.5 * torch.log1p(-betas).cumsum(0)).exp()
    if alpha[0] == alpha[-1]:
        raise ValueError("rescale_betas_zero_snr needs betas that add noise after the first step, got none")
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return torch.cat([betas[:1], 1 - (alpha[1:] / alpha[:-1].clamp(min=1e-300)).square()])


def _betas_between(name: str, num_timesteps: int, beta_start: float, beta_end: float) -> Tensor:
    match name:
        case "linear":
            return torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64, device="cpu")
        case "scaled_linear":
            return torch.linspace(
                beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64, device="cpu"
            ).square()
        case "sigmoid":
            gate = torch.linspace(-6, 6, num_timesteps, dtype=torch.float64, device="cpu").sigmoid()
            return gate * (beta_end - beta_start) + beta_start


def _betas_of_alpha_bar(name: str, num_timesteps: int) -> Tensor:
    u = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64, device="cpu")  # time, 0 clean and 1 noise
    match name:
        case "squaredcos_cap_v2" | "cosine":  # Nichol & Dhariwal 2021, Eq. 17, s = 0.008
            alpha_bar = ((u + 0.008) / 1.008 * (torch.pi / 2)).cos().square()
        case "sigmoid_alpha_bar":
            start, end = torch.tensor([-3.0, 3.0], dtype=torch.float64, device="cpu").sigmoid()
            alpha_bar = (end - (6 * u - 3).sigmoid()) / (end - start)
        case "laplace":
            # The root of snr / (1 + snr) with snr = exp(log_snr / 2): diffusers' own reading of the schedule.
            half = 0.5 - u
            snr = (-0.5 * torch.where(half < 0, -1.0, 1.0) * torch.log(1 - 2 * half.abs() + 1e-6)).exp()
            alpha_bar = (snr / (1 + snr)).sqrt()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=MAX_BETA)


def check_integer(key: str, value: int, at_least: int = 1, at_most: int = LARGEST_INTEGER) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{key} must be an integer of at least {at_least}, got {value!r}")
    if value > at_most:
        raise ValueError(f"{key} must be at most {at_most}, got {value}")
