"""Checkpoints of denoising_diffusion_pytorch: the weights of its `Unet` or their EMA, its noise schedule and its objective.

A checkpoint is one of

    {"model": ..., "ema": ..., "step": ...}      what its `Trainer` saves
    the state of `GaussianDiffusion`             the network under `model.`, and the tables of its schedule
    the state of `Unet`                          the network alone

`LucidrainsUNetModel` has the names of its weights. Widths, heads and kinds of attention are read from shapes and names; the
betas from their table, and what the network predicts from the table of loss weights, which only that objective has.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_ext.conversion.files import load_all
from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.models.lucidrains_unet import LucidrainsUNetModel
from diffusers_ext.schedulers import ExtDDIMScheduler


FIRST_LAYER = "init_conv.weight"
PREDICTION_OF = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
OBJECTIVES = tuple(PREDICTION_OF)
NOISE_SCHEDULES = ("linear", "cosine", "sigmoid")

# float32 tables of the same schedule differ by their rounding.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        weights: Of the network, by their names in `Unet`.
        tables: Of the diffusion, by their names in `GaussianDiffusion`; empty for the state of a network alone.
    """

    weights: dict[str, Tensor]
    tables: dict[str, Tensor] = field(default_factory=dict)


def is_lucidrains(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is one of that project, by the name of its network's first layer."""
    states = [checkpoint, *(state for state in checkpoint.values() if isinstance(state, Mapping))]
    return any(re.fullmatch(rf"(\w+\.)*{re.escape(FIRST_LAYER)}", str(name)) for state in states for name in state)


def read_checkpoint(checkpoint: Mapping[str, Any], use_ema: bool = True) -> Checkpoint:
    """The network and the tables in a checkpoint.

    Args:
        use_ema: Whether to take the averaged weights of a trainer's checkpoint.

    Raises:
        ValueError: if it holds none.
    """
    state: Mapping[str, Any] = checkpoint
    if isinstance(checkpoint.get("model"), Mapping):
        name = "ema" if use_ema else "model"
        found = checkpoint.get(name)
        if not isinstance(found, Mapping):
            raise ValueError(
                f"the checkpoint must have an {name!r} state beside {', '.join(map(str, checkpoint))}: give --no-use_ema"
            )
        state = found
    prefixes = [name.removesuffix(FIRST_LAYER) for name in state if str(name).endswith(FIRST_LAYER)]
    averaged = [prefix for prefix in prefixes if prefix.startswith("ema_model.")]
    if not prefixes:
        raise ValueError(f"the checkpoint must hold the state of a Unet, which has {FIRST_LAYER}")
    prefix = min(averaged or prefixes, key=len)
    weights = _below(prefix, state)
    if not prefix.endswith("model."):
        return Checkpoint(weights)
    of_diffusion = _below(prefix.removesuffix("model."), state)
    return Checkpoint(weights, {name: value for name, value in of_diffusion.items() if "." not in name})


def _below(prefix: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }


def convert_network(
    weights: Mapping[str, Tensor], image_size: int, *, max_period: float = 10000.0
) -> LucidrainsUNetModel:
    """The network of a checkpoint, in evaluation mode.

    A network that was trained with its own last prediction beside x_t (`self_condition`) becomes the one that has none, as in
    half of its training: the zeros in the place of it add nothing.

    Args:
        weights: Of a `Unet`, or their EMA.
        image_size: Side of the images.
        max_period: There `sinusoidal_pos_emb_theta`.

    Raises:
        ValueError: if it is no `Unet` of a release that has this layout.
    """
    if "mid_block1.block1.norm.weight" in weights or "downs.0.2.fn.norm.g" in weights:
        raise ValueError(
            "the checkpoint is of a release of denoising_diffusion_pytorch before 2.0, whose Unet has other layers (group "
            "normalisation): only those of 2.x are converted"
        )
    for name in ("time_mlp.1.weight", "mid_attn.mem_kv", "final_conv.weight"):
        if name not in weights:
            raise ValueError(f"the checkpoint must be of a Unet of denoising_diffusion_pytorch, which has {name}")
    if weights[FIRST_LAYER].ndim != 4:
        raise ValueError("the checkpoint must be of images, got one of data of another number of dimensions")
    levels = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("downs."))
    attention = [weights[f"downs.{level}.2.mem_kv"] for level in range(levels)]
    # Of a layer over all pairs the projection back is a convolution alone, and its memories come before the features.
    full = tuple(f"downs.{level}.2.to_out.weight" in weights for level in range(levels))
    head_dims = tuple(each.shape[3 if over_pairs else 2] for each, over_pairs in zip(attention, full, strict=True))
    embedding_dim, waves = weights["time_mlp.1.weight"].shape
    channels = _channels(weights)
    network = LucidrainsUNetModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=len(weights["final_conv.weight"]),
        block_out_channels=tuple(
            len(weights[f"ups.{level}.0.block1.proj.weight"]) for level in reversed(range(levels))
        ),
        stem_channels=len(weights[FIRST_LAYER]),
        width=embedding_dim // 4,
        fourier_dim=waves - 1 if "time_mlp.0.weights" in weights else None,
        max_period=max_period,
        full_attention=full,
        num_attention_heads=tuple(each.shape[1] for each in attention),
        attention_head_dim=head_dims,
        num_memories=weights["mid_attn.mem_kv"].shape[2],
    )
    own = {name: value.float() for name, value in weights.items()}
    own[FIRST_LAYER] = own[FIRST_LAYER][:, -channels:]
    load_all(network, own, "the Unet of releases 2.x")
    return network.eval()


def _channels(weights: Mapping[str, Tensor]) -> int:
    """Of the images: outputs are as many, or twice as many with a learned variance; inputs too, with the last prediction.

    The two do not go together there.
    """
    inputs, outputs = weights[FIRST_LAYER].shape[1], len(weights["final_conv.weight"])
    if (inputs, outputs) == (2 * outputs, inputs // 2):  # self_condition
        return outputs
    if outputs not in (inputs, 2 * inputs):
        raise ValueError(
            f"the checkpoint must have as many channels of output as of input, or twice as many with a learned variance, got "
            f"{outputs} and {inputs} (out_dim is not converted)"
        )
    return inputs


def make_scheduler(
    checkpoint: Checkpoint,
    network: LucidrainsUNetModel,
    *,
    objective: str | None = None,
    noise_schedule: str | None = None,
    diffusion_steps: int = 1000,
) -> ExtDDIMScheduler:
    """The path that a converted network was trained on, and what it predicts.

    Args:
        network: With twice the channels if it learned its variance.
        objective: One of `OBJECTIVES`; `None` to read it from the checkpoint.
        noise_schedule: One of `NOISE_SCHEDULES`, of a checkpoint without tables; else `None`.
        diffusion_steps: Timesteps, of a checkpoint without tables.

    Raises:
        ValueError: if the checkpoint does not say something that is not given, or says another thing.
    """
    betas = checkpoint.tables.get("betas")
    if betas is None:
        if noise_schedule not in NOISE_SCHEDULES or objective not in OBJECTIVES:
            raise ValueError(
                "the checkpoint is of a network alone: noise_schedule must be given, one of "
                f"{', '.join(NOISE_SCHEDULES)}, and objective, one of {', '.join(OBJECTIVES)}, got {noise_schedule} and {objective}"
            )
        path = _named(noise_schedule, diffusion_steps)
    else:
        if noise_schedule is not None:
            raise ValueError(
                f"noise_schedule is in the checkpoint's table of betas: leave it out, got {noise_schedule}"
            )
        path, diffusion_steps = _of_table(betas.double()), len(betas)
        read = objective_of(checkpoint.tables)
        if read is None and objective is None:
            raise ValueError(
                "the checkpoint does not say what its network predicts: objective must be given, one of "
                f"{', '.join(OBJECTIVES)}"
            )
        if read is not None and objective not in (None, read):
            raise ValueError(f"objective must be {read}, as the checkpoint's loss weights say, got {objective}")
        objective = objective or str(read)
    scheduler = ExtDDIMScheduler(
        num_train_timesteps=diffusion_steps,
        prediction_type=PREDICTION_OF[objective],
        timestep_spacing="trailing",
        **path,
    )
    if network.config.out_channels == 2 * network.config.in_channels:
        scheduler.register_to_config(variance_type="learned_range")
    return scheduler


def _named(noise_schedule: str, steps: int) -> dict[str, Any]:
    """Options of a scheduler for a schedule by its name there."""
    match noise_schedule:
        case "linear":
            return {"beta_schedule": "linear", "beta_start": 0.1 / steps, "beta_end": 20 / steps}
        case "cosine":
            return {"beta_schedule": "squaredcos_cap_v2"}
    return {"beta_schedule": "sigmoid_alpha_bar"}


def _of_table(betas: Tensor) -> dict[str, Any]:
    """The schedule of that name if these are its betas, which then are those of float64; else the table."""
    for name in NOISE_SCHEDULES:
        options = _named(name, len(betas))
        ends = {key: value for key, value in options.items() if key != "beta_schedule"}
        if max(ends.values(), default=0) > 1:
            continue
        if torch.allclose(make_betas(options["beta_schedule"], len(betas), **ends), betas, rtol=ROUNDING, atol=1e-8):
            return options
    return {"trained_betas": betas.tolist()}


def objective_of(tables: Mapping[str, Tensor]) -> str | None:
    """What the network predicts, by the weights of its loss; `None` if they do not say.

    In units of the error of x_0 they are the SNR, perhaps cut off at a largest value (min-SNR weighting): `loss_weight` is that
    over the SNR for the noise, itself for x_0, and over SNR + 1 for v.
    """
    weight, alpha_bar = tables.get("loss_weight"), tables.get("alphas_cumprod")
    if weight is None or alpha_bar is None or not len(weight):
        return None
    snr = alpha_bar.double() / (1 - alpha_bar.double())
    fitting = []
    for objective, scale in (("pred_noise", snr), ("pred_x0", torch.ones_like(snr)), ("pred_v", snr + 1)):
        of_x0 = weight.double() * scale
        # 1 - alpha_bar of float32 keeps few digits where there is hardly any noise.
        if torch.allclose(of_x0, snr.clamp(max=of_x0.max()), rtol=1e-2):
            fitting.append(objective)
    return fitting[0] if len(fitting) == 1 else None
