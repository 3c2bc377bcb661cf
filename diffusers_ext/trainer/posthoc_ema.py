"""EMA of any width, made after the run from snapshots of a few that were tracked during it.

Karras et al. 2023, "Analyzing and improving the training dynamics of diffusion models", arXiv 2312.02696, section 3.2. The
power-function average of exponent gamma at step t is the integral of p(tau) theta(tau) over (0, t], with

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)

and theta(tau) the weights after the step that tau lies in. So the weighting of a sum of snapshots is the sum of theirs,
and the nearest to the weighting wanted is found by least squares, without a look at the weights. For integer t,
`WeightAverage` is that integral exactly, so that nothing is lost by treating steps as continuous.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusers_ext.atomic_files import PARTIAL, atomic_write
from diffusers_ext.trainer.ema import WeightAverage, power_function_exponent


SNAPSHOT_FOLDER = "ema_snapshots"
# Of the weighting's own norm. The averages then differ by less than 1e-2, since neighbouring weights are alike.
MAX_MISFIT = 0.05

_NAME = re.compile(r"step-(\d+)-std-(\d\.\d+)\.safetensors")


@dataclass(frozen=True)
class Snapshot:
    """The average of width `std` after optimizer step `step`, in a file of float32 tensors by name of parameter."""

    step: int
    std: float
    path: Path


class AverageSnapshots:
    """Power-function averages that are tracked during a run and written to its folder now and then.

    Args:
        model: Whose parameters.
        stds: Widths of the averages, relative to the run's length so far.
        output_dir: Folder of the run; the snapshots get a folder in it.
        sampled: The average that the run samples and updates. If it is one of these, it is not tracked a second time.
    """

    def __init__(
        self, model: nn.Module, stds: Sequence[float], output_dir: Path, sampled: WeightAverage | None = None
    ):
        self.folder = output_dir / SNAPSHOT_FOLDER
        self._averages = {
            std: sampled if sampled and sampled.std == std else WeightAverage(model, std=std) for std in stds
        }
        self._own = {std: average for std, average in self._averages.items() if average is not sampled}

    def update(self, model: nn.Module):
        """Takes the model's present parameters into the averages."""
        for average in self._own.values():
            average.update(model)

    def write(self, step: int):
        """Writes the averages as they stand after optimizer step `step`, each file atomically.

        Raises:
            OSError: if a file cannot be written. The snapshots before it are untouched.
        """
        for std, average in self._averages.items():
            path = self.folder / f"step-{step:07}-std-{_text(std)}.safetensors"
            try:
                self.folder.mkdir(exist_ok=True)
                with atomic_write(path, sync=True) as partial:
                    save_file(average.averages(), partial)
            except Exception as error:  # safetensors reports a full disk as an error of its own
                raise OSError(f"the snapshot {path} could not be written ({error})") from error

    def save(self, folder: Path):
        """Writes the averages that a checkpoint needs beyond the sampled one."""
        for std, average in self._own.items():
            save_file(average.state_dict(), folder / _state_file(std))

    def load(self, folder: Path):
        """Reads what `save` has written."""
        for std, average in self._own.items():
            average.load_state_dict(load_file(folder / _state_file(std)))

    def drop_after(self, step: int):
        """Removes the snapshots that the run, going on from `step`, will take again, and files that were left incomplete."""
        for snapshot in list_snapshots(self.folder.parent):
            if snapshot.step > step:
                snapshot.path.unlink()
        for path in self.folder.glob(f"{PARTIAL}*"):
            path.unlink()


def _text(std: float) -> str:
    # All digits: files of other widths must not share a name.
    return np.format_float_positional(std, min_digits=2)


def _state_file(std: float) -> str:
    return f"average-std-{_text(std)}.safetensors"


def list_snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run, the oldest first."""
    found = [(path, _NAME.fullmatch(path.name)) for path in (run / SNAPSHOT_FOLDER).glob("step-*")]
    snapshots = [Snapshot(int(match[1]), float(match[2]), path) for path, match in found if match]
    return sorted(snapshots, key=lambda snapshot: (snapshot.step, snapshot.std))


def weighting_product(
    step_a: np.ndarray, gamma_a: np.ndarray, step_b: np.ndarray, gamma_b: np.ndarray
) -> np.ndarray | float:
    """The inner product of two power-function weightings, the integral over time of p_a p_b; float64, of units 1/step."""
    end = np.minimum(step_a, step_b)
    # Powers of ratios of at most 1: step^gamma itself would overflow.
    shared = (end / step_a) ** gamma_a * (end / step_b) ** gamma_b * end / (step_a * step_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shared


def fit_weighting(steps: Sequence[int], stds: Sequence[float], step: int, std: float) -> tuple[np.ndarray, float]:
    """The combination of power-function weightings that comes nearest to another one, by least squares in float64.

    Args:
        steps, stds: Of the weightings there are, one of each for each of them; no two are the same.
        step, std: Of the one wanted.

    Returns:
        The coefficients, which sum to 1, and the norm of the difference relative to that of the weighting wanted.
    """
    steps, gammas = np.asarray(steps, np.float64), np.array([power_function_exponent(std) for std in stds])
    gamma = power_function_exponent(std)
    norms = np.sqrt(weighting_product(steps, gammas, steps, gammas))
    norm = np.sqrt(weighting_product(float(step), gamma, float(step), gamma))
    # Between weightings of norm 1, which keeps the equations well conditioned.
    among = weighting_product(steps[:, None], gammas[:, None], steps, gammas) / (norms[:, None] * norms)
    wanted = weighting_product(steps, gammas, float(step), gamma) / (norms * norm)

    # A Lagrange multiplier holds the sum of the coefficients at 1: an average of equal weights is these weights.
    in_sum = norm / norms
    equations = np.block([[among, in_sum[:, None]], [in_sum, np.zeros(1)]])
    scaled = np.linalg.lstsq(equations, np.append(wanted, 1.0), rcond=None)[0][:-1]
    misfit = np.sqrt(max(0.0, 1 - 2 * scaled @ wanted + scaled @ among @ scaled))
    return scaled * in_sum, float(misfit)


def reconstruct(snapshots: Sequence[Snapshot], step: int, std: float) -> tuple[dict[str, Tensor], float]:
    """The power-function average of width `std` at step `step`, made of snapshots of others up to that step.

    Args:
        step: Of a snapshot. A weighting ends with a jump, which those that end elsewhere cannot follow.

    Returns:
        float32 tensors by name of parameter; and the relative misfit of their weighting, see `fit_weighting`.

    Raises:
        ValueError: if there are no snapshots, if they do not span `std` well or have no `step`, or if they are of several models.
    """
    if not snapshots:
        raise ValueError("there are no snapshots of averages: train with --ema_snapshot_steps")
    if step not in {snapshot.step for snapshot in snapshots}:
        near = sorted({snapshot.step for snapshot in snapshots}, key=lambda other: abs(other - step))[:2]
        raise ValueError(f"step must be that of a snapshot, such as {' or '.join(map(str, sorted(near)))}, got {step}")
    snapshots = [snapshot for snapshot in snapshots if snapshot.step <= step]
    steps, stds = [snapshot.step for snapshot in snapshots], [snapshot.std for snapshot in snapshots]
    coefficients, misfit = fit_weighting(steps, stds, step, std)
    if misfit > MAX_MISFIT:
        raise ValueError(
            f"an average of ema_std {std:g} at step {step} cannot be made of these {len(snapshots)} snapshots: the nearest "
            f"weighting is off by {misfit:.1%}, at most {MAX_MISFIT:.0%} may be; {_reach(steps, stds, step)}"
        )
    return _weighted_sum(snapshots, coefficients), misfit


def _reach(steps: Sequence[int], stds: Sequence[float], step: int) -> str:
    ranges = []
    for std in (np.arange(1, 57) * 0.005).round(3).tolist():
        if fit_weighting(steps, stds, step, std)[1] > MAX_MISFIT:
            continue
        if ranges and std - ranges[-1][1] < 0.0075:
            ranges[-1][1] = std
        else:
            ranges.append([std, std])
    return f"within reach at this step are {', '.join(f'{first:g} to {last:g}' for first, last in ranges) or 'none'}"


def _weighted_sum(snapshots: Sequence[Snapshot], coefficients: np.ndarray) -> dict[str, Tensor]:
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(snapshot.path, "pt")) for snapshot in snapshots]
        names = list(files[0].keys())
        for snapshot, file in zip(snapshots, files, strict=True):
            if _shapes(file) != _shapes(files[0]):
                raise ValueError(
                    f"{snapshot.path.name} is of another model than {snapshots[0].path.name}: their parameters differ"
                )
        averages = {}
        for name in names:  # one parameter at a time, since float64 takes twice the room
            total = torch.zeros(files[0].get_slice(name).get_shape(), dtype=torch.float64)
            for coefficient, file in zip(coefficients, files, strict=True):
                total += file.get_tensor(name).double() * float(coefficient)
            averages[name] = total.float()
    return averages


def _shapes(file: safe_open) -> dict[str, list[int]]:
    return {name: file.get_slice(name).get_shape() for name in file.keys()}


@torch.no_grad()
def load_averages(model: nn.Module, averages: Mapping[str, Tensor]):
    """Gives a model's parameters these values, in its own precision.

    Raises:
        ValueError: if they are of another model.
    """
    if not is_of(model, averages):
        raise ValueError("the averages are of another model: the names or shapes of its parameters differ")
    for name, parameter in model.named_parameters():
        parameter.copy_(averages[name])


def is_of(model: nn.Module, averages: Mapping[str, Tensor]) -> bool:
    """Whether averages are of a model with these parameters, by name and shape."""
    return {name: parameter.shape for name, parameter in model.named_parameters()} == {
        name: average.shape for name, average in averages.items()
    }


def models_of(parts: Mapping[str, Any], averages: Mapping[str, Tensor]) -> list[nn.Module]:
    """The models that averages are of, among parts by their names: one or several of them, or parts that were trained together.

    Of the latter, such as a denoiser and its text encoder, the averages have the names of the parts as first names.
    """
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    found = [module for module in modules.values() if is_of(module, averages)]
    if found:
        return found
    first_names = {name.partition(".")[0] for name in averages}
    together = nn.ModuleDict({name: module for name, module in modules.items() if name in first_names})
    return [together] if is_of(together, averages) else []
