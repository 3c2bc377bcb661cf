"""The likelihood of held-out images under a pipeline's model, by the variational bound in bits/dim."""

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Generator, Tensor
from tqdm.auto import tqdm

from diffusers_ext.command_names import name_commands
from diffusers_ext.diffusion.analytic_variance import X0Variances
from diffusers_ext.diffusion.data_units import DataUnits
from diffusers_ext.diffusion.noising import NoiseSchedule, dynamic_threshold
from diffusers_ext.diffusion.probability_flow import flow_bound
from diffusers_ext.diffusion.reverse_chain import LEARNED_VARIANCES, ReverseChain
from diffusers_ext.diffusion.timesteps import make_timesteps
from diffusers_ext.diffusion.variational_bound import (
    bits_per_dim,
    chain_variances,
    optimal_variances,
    variational_bound,
)
from diffusers_ext.evaluation.flow_settings import FlowSettings
from diffusers_ext.evaluation.generate import SEED_STRIDE
from diffusers_ext.evaluation.labelled_images import LabelledImages, convert_channels, drawn_order
from diffusers_ext.evaluation.latent_likelihood import LatentCoder, without_autoencoder
from diffusers_ext.evaluation.likelihood_curves import (
    curve_columns,
    mean_error,
    part_of,
    summarize_curves,
    summed_by_part,
)
from diffusers_ext.evaluation.pipeline_facts import image_size_of, num_labels_of
from diffusers_ext.machine import widest_float
from diffusers_ext.schedulers import ExtDDPMScheduler
from diffusers_ext.schedulers.levels import model_schedule, prediction_type_of


# Fixed ones that can be asked for; the learned one follows from the model.
FIXED_VARIANCES = ("fixed_small", "fixed_large", "analytic", "optimal")

# The rate is reported by parts of the timesteps, of about equal numbers.
NUM_PARTS = 20

# Timesteps of a chain at which the variance "optimal" is measured; between them it is interpolated.
NUM_MEASURED = 64

# Of a transition, for which a log is finite; in 8 bits a millionth of a bin.
SMALLEST_VARIANCE = 1e-16


@dataclass(frozen=True)
class LikelihoodModel:
    """The part of a pipeline that has a likelihood: its network and the noising path, without guidance.

    Args:
        network: Called `network(x_t, timesteps, class_labels=...)`.
        schedule: The noising path, at the scale at which the network sees x_t.
        timesteps: Of the chain whose bound it is, descending.
        prediction_type: What the network outputs.
        clip: The clipping of the predicted x_0 in the sampler, or None.
        num_classes: Number of labels that the network takes, or None.
        null_label: The label that stands for none, or None.
        variance_type: Of the pipeline's scheduler, or None.
        analytic_variance: Of the pipeline's scheduler, for the variance "analytic".
        statistics: Of the data, by which the network's samples are normalised, or None. The likelihood is that of the data.
    """

    network: torch.nn.Module
    schedule: NoiseSchedule
    timesteps: list[int]
    prediction_type: str
    clip: Callable[[Tensor], Tensor] | None
    num_classes: int | None
    null_label: int | None
    variance_type: str | None
    analytic_variance: Mapping[str, Any] | None = None
    statistics: torch.nn.Module | None = None

    @classmethod
    def of(cls, pipeline, num_steps: int | None = None) -> "LikelihoodModel":
        """The model of a pipeline in pixels, unconditional or with labels.

        Args:
            num_steps: Number of timesteps, spaced as the pipeline's scheduler does, or those chosen for the bound; all of the
                training's by default.

        Raises:
            ValueError: If the pipeline works in latents, from text, or not on a Gaussian noising path.
        """
        name = type(pipeline).__name__
        if getattr(pipeline, "vae", None) is not None:
            raise ValueError(f"{name} makes latents, whose bits are not those of images: it has no bits_per_dim")
        networks = [getattr(pipeline, part, None) for part in ("denoiser", "unet", "transformer")]
        network = next((network for network in networks if isinstance(network, torch.nn.Module)), None)
        if network is None or getattr(pipeline, "text_encoder", None) is not None:
            raise ValueError(f"bits_per_dim needs a network that takes images and labels alone, {name} has none")
        config, schedule = pipeline.scheduler.config, model_schedule(pipeline.scheduler)
        variance = config.get("variance_type")
        is_plain = (
            schedule.preserves_variance and config.get("path", "vp") == "vp" and "_learned_timesteps" not in config
        )
        if variance is None and not is_plain:
            # Which of the fixed ones is the better there depends on the number of steps, and is wrong by bits for the other.
            variance = "optimal"
        timesteps = range(len(schedule) - 1, -1, -1)
        if schedule.preserves_variance:  # with the defaults of the ancestral sampler, whose bound it is
            ancestral = ExtDDPMScheduler.from_config(config)
            config = ancestral.config
            if num_steps is not None:
                timesteps = ancestral.list_timesteps(num_steps, "bound")
        elif num_steps is not None:
            # A flow has no such key; with evenly spaced times "trailing" is what its scheduler does.
            spacing = config.get("timestep_spacing", "trailing")
            timesteps = make_timesteps(spacing, num_steps, len(schedule), config.get("steps_offset", 0))
        return cls(
            network,
            schedule,
            [int(timestep) for timestep in timesteps],
            prediction_type_of(pipeline.scheduler),
            clip_of(config),
            num_labels_of(pipeline),
            getattr(pipeline, "null_label", None),
            variance,
            config.get("analytic_variance"),
            getattr(pipeline, "statistics", None),
        )

    @property
    def channels(self) -> int:
        return self.network.config.in_channels

    @property
    def variance(self) -> str:
        """The model's own kind of variance: learned, or that of its scheduler or path, or fixed_large if that has none."""
        given = (self.variance_type or "fixed_large").removesuffix("_log")
        if given == "analytic":
            return given
        if self.network.config.out_channels == 2 * self.channels:
            return given if given in LEARNED_VARIANCES else "learned_range"
        if given in LEARNED_VARIANCES:
            raise ValueError(
                f"variance_type {given!r} needs a network with twice the output channels of its {self.channels} input "
                f"channels, got {self.network.config.out_channels}"
            )
        return given

    def chain(self, variances: Tensor | None = None) -> ReverseChain:
        return ReverseChain(self.schedule, self.timesteps, variances)

    def analytic_chain(self) -> ReverseChain:
        """The chain with the variances that the scheduler's `analytic_variance` says.

        Raises:
            ValueError: If it has none.
        """
        table, chain = self.analytic_variance, self.chain()
        if table is None:
            raise ValueError(
                name_commands(
                    "the variance 'analytic' needs a scheduler with analytic_variance: measure it with training/calibrate.py"
                )
            )
        x0_variance = X0Variances(table, chain.schedule).values[chain.timesteps]
        return self.chain(chain_variances(chain, x0_variance.clamp(min=SMALLEST_VARIANCE)))

    def prepare(
        self, images: LabelledImages, rows: list[int], by_label: bool, channels: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Samples of the network, and the labels or the null label of them, on the device of this process.

        Args:
            channels: Of the images; by default those that the network takes.
        """
        device = PartialState().device
        x0 = (
            convert_channels(images.images[rows], channels or self.channels).to(device, widest_float(device))
            * (2 / 255)
            - 1
        )
        labels = None
        if self.num_classes is not None:
            labels = (images.labels[rows] if by_label else torch.full((len(rows),), self.null_label)).to(device)
        return x0 if self.statistics is None else self.statistics.normalise(x0, labels), labels

    def units(self, labels: Tensor | None, like: Tensor) -> DataUnits | None:
        """From samples of the network to images in [-1, 1]; None if they are the same."""
        return None if self.statistics is None else self.statistics.units(labels, like)

    def denoiser(self, labels: Tensor | None, variance: str) -> Callable[[Tensor, Tensor], Tensor]:
        """The network in its own precision, without its variances if they are not asked for."""
        dtype = next(self.network.parameters()).dtype
        takes_labels = "class_labels" in inspect.signature(self.network.forward).parameters
        more = {"class_labels": labels} if takes_labels else {}

        def denoise(x_t: Tensor, timesteps: Tensor) -> Tensor:
            output = self.network(x_t.to(dtype), timesteps, **more).sample
            return output if variance in LEARNED_VARIANCES else output[:, : x_t.shape[1]]

        return denoise


def clip_of(config: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """What a scheduler of this config does to the predicted x_0, if anything."""
    if config.get("thresholding"):
        ratio, largest = config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0)
        return lambda x0: dynamic_threshold(x0, ratio, largest)
    if not config.get("clip_sample"):
        return None
    bound = config.get("clip_sample_range", 1.0)
    return lambda x0: x0.clamp(-bound, bound)


@torch.no_grad()
def measure_bits_per_dim(
    pipeline,
    images: LabelledImages,
    *,
    train: LabelledImages | None = None,
    num_images: int = 1000,
    num_steps: int | None = None,
    num_terms: int | None = 100,
    variance: str | None = None,
    num_flow_steps: int | None = None,
    flow_tolerance: float | None = None,
    dequantization: str = "decoder",
    with_curves: bool = False,
    batch_size: int = 64,
    bf16: bool = False,
    seed: int = 0,
    show_progress: bool = True,
) -> dict:
    """The variational bound of images in 8 bits, without guidance; the processes share the images.

    Each of the 256 values is a bin of a width of 2/255 on the scale of the images, [-1, 1], also for a model of normalised
    samples, and bits/dim is what a lossless code
    of these images would take for each value of a pixel, whether or not the data use all 256. Image i of the set, and
    its noise, depend on the seed and i alone.

    Args:
        pipeline: See `LikelihoodModel.of`; or one in the latents of a `VAEModel`, whose rate is then that of the latents: the
            entropy of their posterior, taken from the bound of their density (see `diffusers_ext.evaluation.latent_likelihood`).
        images: Held-out images, with labels if the model takes them; without labels it is given the null label.
        train: The training images; the variance "optimal" is measured on `batch_size` of them, at `NUM_MEASURED` timesteps.
        num_images: Number of images to measure, drawn by the seed; at most all.
        num_steps: Timesteps of the sampler whose bound it is; all of the training's by default.
        num_terms: Number of timesteps evaluated for each image, see `variational_bound`; None for all.
        variance: "fixed_small", "fixed_large", "analytic", as the scheduler's config has it, or "optimal"; by default the
            model's own: learned, its scheduler's, or else fixed_large for the variance-preserving path and optimal for others
            and for a learned schedule, or without `train` fixed_large.
        num_flow_steps: Measure the bound by the probability flow too, in this number of steps, each of four evaluations
            and gradients of the network; without clipping of the predicted x_0.
        flow_tolerance: Or to this tolerance, with steps that follow from the images of a batch together.
        dequantization: Where the flow starts, one of `DEQUANTIZATIONS`.
        with_curves: Add `curves`, see `summarize_curves`.
        batch_size: Images at a time.
        bf16: Run the network under bf16 autocast, but for the flow.
        seed: Of the draw of images, the noise and the draw of terms.

    Returns:
        In bits/dim: `bits_per_dim`, `rate`, `distortion`, `prior` (L_T, a part of the rate), and the rest of the rate by parts
        of the timesteps; `flow_bits_per_dim` if asked for, and `flow_calls` of the network for a batch; the standard error
        of each, and how it was measured. As each image has noise and timesteps of its own, the errors are over all of these.

    Raises:
        ValueError: If the pipeline has no such likelihood, or the images or their labels are not for it.
    """
    state = PartialState()
    coder = LatentCoder.of(pipeline)
    model = LikelihoodModel.of(pipeline if coder is None else without_autoencoder(pipeline), num_steps)
    flow = FlowSettings.of(num_flow_steps, flow_tolerance, dequantization)
    if coder is not None and (with_curves or dequantization != "decoder"):
        raise ValueError(
            "curves and dequantization are of pixels, which the network of latents does not see: leave them out"
        )
    channels = model.channels if coder is None else coder.vae.config.in_channels
    kind = _choose_variance(model, variance, can_measure=train is not None)
    by_label = _check_images(model, images, image_size_of(pipeline))
    order = drawn_order(len(images), seed)[:num_images].tolist()
    model.network.eval()
    with torch.autocast(state.device.type, torch.bfloat16) if bf16 else nullcontext():
        chain = model.chain()
        if kind == "optimal":
            chain = model.chain(_measure_variances(model, coder, chain, train, by_label, batch_size, seed))
        elif kind == "analytic":
            chain = model.analytic_chain()
        if num_terms is not None and num_terms >= len(chain) - 1:
            num_terms = None
        of_chain = "optimal" if chain.has_variances else kind
        bound = ImageBound(model, coder, chain, of_chain, num_terms, flow, seed, with_curves)
        mine, measured = order[state.process_index :: state.num_processes], []
        hidden = not (show_progress and state.is_main_process)
        with tqdm(total=len(mine), desc="bits/dim", unit="image", disable=hidden) as progress:
            for start in range(0, len(mine), batch_size):
                rows = mine[start : start + batch_size]
                measured += bound.of(*model.prepare(images, rows, by_label, channels), rows).tolist()
                progress.update(len(rows))
    if state.num_processes > 1:
        measured = gather_object(measured)
    return _summarize(measured, chain, flow, with_curves) | {
        "num_images": len(measured),
        "num_dims": channels * images.images[0, 0].numel(),
        "num_bins": 256,
        "num_steps": len(chain),
        "num_terms": num_terms or len(chain) - 1,
        "variance": kind,
        "by_label": by_label,
        "mixed_precision": "bf16" if bf16 else "no",
        "seed": seed,
    }


def _choose_variance(model: LikelihoodModel, variance: str | None, can_measure: bool) -> str:
    if variance is None:
        return "fixed_large" if model.variance == "optimal" and not can_measure else model.variance
    if variance not in FIXED_VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(FIXED_VARIANCES)}, or None, got {variance!r}")
    return variance


def _check_images(model: LikelihoodModel, images: LabelledImages, size: tuple[int, int]) -> bool:
    """Whether the network gets the labels of these images, which must be of its size and have its labels or none."""
    if tuple(images.images.shape[2:]) != size:
        raise ValueError(f"the network takes images of {size} (height, width), got {tuple(images.images.shape[2:])}")
    by_label = model.num_classes is not None and len(images.label_names) > 0
    if by_label and len(images.label_names) != model.num_classes:
        raise ValueError(f"the network takes {model.num_classes} labels, the images have {len(images.label_names)}")
    if model.num_classes is not None and not by_label and model.null_label is None:
        raise ValueError("the network takes labels and none for no label, but the images have no labels")
    return by_label


def _measure_variances(
    model: LikelihoodModel,
    coder: LatentCoder | None,
    chain: ReverseChain,
    train: LabelledImages | None,
    by_label: bool,
    number: int,
    seed: int,
) -> Tensor:
    """The best variance of each step, on `number` training images that the seed draws."""
    if train is None:
        raise ValueError("the variance 'optimal' is measured on training images: give train")
    rows = drawn_order(len(train), seed)[:number].tolist()
    x0, labels = model.prepare(train, rows, by_label, None if coder is None else coder.vae.config.in_channels)
    if coder is not None:
        x0 = coder.encode(x0, labels, _generators(seed, rows)).x0
    return optimal_variances(
        model.denoiser(labels, "optimal"),
        *([x0], chain, model.prediction_type),
        clip=model.clip,
        generator=torch.Generator().manual_seed(seed),
        num_measured=NUM_MEASURED,
    )


@dataclass(frozen=True)
class ImageBound:
    """The terms of the bound of each image, with noise that depends on the seed and the image's row alone.

    Args:
        coder: Of a model of latents, which are drawn from the posterior of each image; None for one of pixels.
        num_terms, with_curves: See `measure_bits_per_dim`.
        flow: None for no bound by the flow.
    """

    model: LikelihoodModel
    coder: LatentCoder | None
    chain: ReverseChain
    variance: str
    num_terms: int | None
    flow: FlowSettings | None
    seed: int
    with_curves: bool = False

    def of(self, x0: Tensor, labels: Tensor | None, rows: list[int]) -> Tensor:
        """Shape `(batch, 6 + NUM_PARTS)`, on the CPU; in bits/dim but for the second.

        The columns: the bound by the flow and the calls of the network for it (NaN if not asked for), the bound, the rate, the
        distortion, the prior, and the rate of each part of the timesteps; then those of `curve_columns`, if asked for.
        """
        generators, num_dims, num_bins, nats_of_coder = _generators(self.seed, rows), x0[0].numel(), 256, 0.0
        if self.coder is not None:
            with torch.autocast(x0.device.type, enabled=False):
                coded = self.coder.encode(x0, labels, generators)
            # The terms are those of the density of the latents.
            x0, num_bins, nats_of_coder = coded.x0, None, coded.distortion + coded.rate
        denoise, units = self.model.denoiser(labels, self.variance), self.model.units(labels, x0)
        path = (x0, self.chain, self.model.prediction_type, self.variance)
        more = {"num_bins": num_bins, "units": units}
        terms = variational_bound(
            *(denoise, *path), num_terms=self.num_terms, clip=self.model.clip, generator=generators, **more
        )
        flow = torch.full((len(x0), 2), math.nan, dtype=x0.dtype, device=x0.device)
        if self.flow is not None:
            with torch.autocast(x0.device.type, enabled=False):
                options = {"generator": _generators(self.seed, rows)} | more | self.flow.options
                found = flow_bound(denoise, *path, **options)
            flow[:, 0], flow[:, 1] = bits_per_dim(found.total + nats_of_coder, num_dims), found.num_calls
        total, distortion = terms.total + nats_of_coder, terms.distortion if self.coder is None else coded.distortion
        nats = torch.stack([total, total - distortion, distortion, terms.prior], 1)
        by_part = summed_by_part(terms.weight * terms.kl, terms, self.chain, NUM_PARTS)
        columns = [flow, bits_per_dim(torch.cat([nats, by_part], 1), num_dims)]
        return torch.cat(columns + ([curve_columns(terms, self.chain)] if self.with_curves else []), 1).cpu()


def _generators(seed: int, rows: list[int]) -> list[Generator]:
    # On the CPU, so that the noise is the same on every device.
    return [Generator().manual_seed(seed * SEED_STRIDE + row) for row in rows]


def _summarize(measured: list[list[float]], chain: ReverseChain, flow: FlowSettings | None, with_curves: bool) -> dict:
    """Means over the images, with their standard errors.

    Args:
        measured: The columns of `ImageBound.of`, a row for each image.
    """
    # Sorted, so that the sums are the same to the last digit whatever the number of processes.
    columns = torch.tensor(sorted(measured), dtype=torch.float64)
    columns, curves = columns[:, : 6 + NUM_PARTS], columns[:, 6 + NUM_PARTS :]
    of_flow, calls, total, rate, distortion, prior = columns[:, :6].T
    result = {"bits_per_dim": total.mean().item(), "standard_error": mean_error(total)}
    for name, values in (("rate", rate), ("distortion", distortion), ("prior", prior)):
        result |= {name: values.mean().item(), f"{name}_standard_error": mean_error(values)}
    if flow is not None:
        result |= {
            "flow_bits_per_dim": of_flow.mean().item(),
            "flow_standard_error": mean_error(of_flow),
            "flow_calls": calls.mean().item(),
            **flow.describe(),
        }
    result["rate_by_timesteps"] = _by_timesteps(columns[:, 6:], chain)
    return result | ({"curves": summarize_curves(curves, chain)} if with_curves else {})


def _by_timesteps(parts: Tensor, chain: ReverseChain) -> list[dict]:
    """The rate of each part of the timesteps that has any."""
    transitions = torch.arange(1, len(chain))
    parts_of, rows = part_of(transitions, chain, NUM_PARTS), []
    for part in parts_of.unique().tolist():
        timesteps, values = chain.timesteps[transitions[parts_of == part]].tolist(), parts[:, part]
        ends = {"first_timestep": timesteps[0], "last_timestep": timesteps[-1]}
        rows.append(ends | {"bits_per_dim": values.mean().item(), "standard_error": mean_error(values)})
    return rows
