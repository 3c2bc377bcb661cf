"""How a bound is made up: bits and error of the predicted x_0 along the chain, with standard errors and a figure.

Progressive coding (DDPM, Section 4.3, Table 4 and Figure 5): whoever has received x_t by the bits of the transitions before
it can show the x_0 that the network predicts from it. The distortion is the root of its mean squared error.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.variational_bound import BoundTerms, bits_per_dim
from diffusers_ext.figures import save_picture, scale_to


NUM_POINTS = 50  # of the curves, each of about equally many timesteps
WHITE = 127.5  # from [-1, 1] to the 256 values of images in 8 bits


def part_of(index: Tensor, chain: ReverseChain, number: int) -> Tensor:
    """Which of `number` parts of the chain a transition is in, the noisiest in the last; that to the data, 0, is in none."""
    return (index - 1) * number // max(1, len(chain) - 1)


def summed_by_part(values: Tensor, terms: BoundTerms, chain: ReverseChain, number: int) -> Tensor:
    """Sums of values of the terms over the parts of the chain, shape `(batch, number)`."""
    sums = torch.zeros(len(values), number, dtype=values.dtype, device=values.device)
    return sums.scatter_add_(1, part_of(terms.index, chain, number), values)


def curve_columns(terms: BoundTerms, chain: ReverseChain) -> Tensor:
    """What the curves need of each image, shape `(batch, 2 + 4 NUM_POINTS)`.

    The columns: prior in bits/dim and squared error at x_t1; and by parts of the chain bits/dim, the bits/dim before the mean
    transition of the part, weights times squared errors, and weights. The weights make each sum an unbiased estimate of that
    over all transitions of the part.
    """
    bits = bits_per_dim(terms.weight * terms.kl, terms.num_dims)
    values = (bits, bits * _share_after(chain).to(bits)[terms.index], terms.weight * terms.error, terms.weight)
    first = torch.stack([bits_per_dim(terms.prior, terms.num_dims), terms.decoder_error], 1)
    return torch.cat([first, *(summed_by_part(each, terms, chain, NUM_POINTS) for each in values)], 1)


def _share_after(chain: ReverseChain) -> Tensor:
    """The share of a transition's part that comes after it, nearer to the data; shape `(len(chain),)`."""
    parts = part_of(torch.arange(1, len(chain)), chain, NUM_POINTS)
    _, of_part, counts = parts.unique(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    rank = torch.arange(len(parts)) - first[of_part]
    return torch.cat([torch.zeros(1), rank / counts[of_part]]).double()


def summarize_curves(columns: Tensor, chain: ReverseChain) -> list[dict[str, float]]:
    """The points of the curves, from the noisiest on; the last is that of x_t1, of the whole rate.

    Args:
        columns: Of `curve_columns`, a row for each image, float64.

    Returns:
        For each: `first_timestep` and `last_timestep`; `log_snr`, the mean there; `bits_so_far`, received before x_t, in
        bits/dim; `rmse` of the predicted x_0, of 256 values; `bits_per_timestep`, the mean term of the bound in bits/dim. With a
        standard error each, over the images and their noise, under the name with `_error` (None from a single image).
    """
    prior, last_error = columns[:, 0], columns[:, 1]
    bits, within, error, weight = columns[:, 2:].split(NUM_POINTS, 1)
    transitions = torch.arange(1, len(chain))
    parts, points = part_of(transitions, chain, NUM_POINTS), []
    log_snr = chain.schedule.level(chain.timesteps, torch.zeros(1, dtype=torch.float64)).snr.log()
    so_far = prior
    for part in parts.unique().flip(0).tolist():
        inside = transitions[parts == part]
        before, so_far = so_far + within[:, part], so_far + bits[:, part]
        if weight[:, part].sum() > 0:
            points.append(
                {
                    "first_timestep": int(chain.timesteps[inside[0]]),
                    "last_timestep": int(chain.timesteps[inside[-1]]),
                    "log_snr": log_snr[inside].clamp(min=-100).mean().item(),
                    **_with_error("bits_so_far", before),
                    **_root("rmse", error[:, part], weight[:, part]),
                    **_with_error("bits_per_timestep", bits[:, part] / len(inside)),
                }
            )
    first = int(chain.timesteps[0])
    ends = {"first_timestep": first, "last_timestep": first, "log_snr": log_snr[0].item()}
    rmse = _root("rmse", last_error, torch.ones_like(last_error))
    return [*points, ends | _with_error("bits_so_far", so_far) | rmse]


def mean_error(values: Tensor) -> float | None:
    """The standard error of the mean of a number for each image, each of its own noise; None from a single image."""
    return None if len(values) < 2 else (values.std() / math.sqrt(len(values))).item()


def _with_error(name: str, values: Tensor) -> dict[str, float | None]:
    return {name: values.mean().item(), f"{name}_error": mean_error(values)}


def _root(name: str, error: Tensor, weight: Tensor) -> dict[str, float | None]:
    """The root of the mean squared error of 256 values; its standard error to first order, as of a ratio of means."""
    square = (error.sum() / weight.sum()).item()
    root = math.sqrt(square)
    spread = mean_error((error - square * weight) / weight.mean())
    return {
        name: WHITE * root,
        f"{name}_error": None if spread is None or root == 0 else WHITE * spread / (2 * root),
    }


def draw_likelihood(points: Sequence[dict], path: Path) -> None:
    """Distortion over the rate, and the bound's term over the timestep; bands are of two standard errors."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    terms = [point for point in points if "bits_per_timestep" in point]
    timesteps = [(point["first_timestep"] + point["last_timestep"]) / 2 for point in terms]
    for axes, x, shown, name in (
        (left, [point["bits_so_far"] for point in points], points, "rmse"),
        (right, timesteps, terms, "bits_per_timestep"),
    ):
        values = torch.tensor([point[name] for point in shown])
        errors = torch.tensor([point[f"{name}_error"] or 0.0 for point in shown])
        axes.plot(x, values, marker=".")
        low = (values - 2 * errors).clamp(min=values.min().item() / 2)
        axes.fill_between(x, low, values + 2 * errors, alpha=0.25)
    left.set_xlabel("rate: bits/dim so far")
    left.set_ylabel("distortion: RMSE of the predicted x_0, of 256 values")
    left.set_ylim(bottom=0)
    right.set_xlabel("timestep")
    right.set_ylabel("term of the bound, bits/dim")
    scale_to(right, torch.tensor([point["bits_per_timestep"] for point in terms]).numpy())
    save_picture(figure, path)
