"""Options for a time that there is: what `--preset` of the commands that train a denoiser stands for.

"quick" and "good" are a transformer on the linear path by Muon, which makes good images soonest of what was measured
(docs/speedrun.md), at a width that a core can train in that time; they learn their guidance along, where images have labels.
"best" has the base width, the learning rate and the dropout of DDPM's model of CIFAR-10 (arXiv 2006.11239, Appendix B), or a
DiT-S (arXiv 2212.09748, Table 1) at its learning rate doubled for small batches. They are a beginning, not a search: nobody knows the data but the user.
"""

from pathlib import Path
from typing import Any

from diffusers_ext.recipes.training_path import SCHEDULERS
from diffusers_ext.trainer.config import default_output_dir
from diffusers_ext.trainer.run_folder import CONFIG_FILE
from diffusers_ext.trainer.schedule import parse_duration
from diffusers_ext.untrusted import read_yaml_mapping


# By the name of the preset, shortest first. Options of one kind of network have no effect with the other, and are left out there.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "max_train_time": "5m",
        "model": "dit",
        "hidden_size": 128,
        "num_layers": 4,
        "path": "linear",
        "timestep_sampling": "logit_normal",
        "model_guidance_scale": 2.5,
        "train_batch_size": 16,
        "num_inference_steps": 20,
    },
    "good": {
        "max_train_time": "1h",
        "model": "dit",
        "hidden_size": 256,
        "num_layers": 6,
        "path": "linear",
        "timestep_sampling": "logit_normal",
        "model_guidance_scale": 2.5,
        "learning_rate": 2e-3,
    },
    "best": {
        "max_train_time": "10h",
        "learning_rate": 2e-4,
        "dropout": 0.1,
        "block_out_channels": (128, 256, 256),
        "hidden_size": 384,
        "num_layers": 12,
        "num_attention_heads": 6,
    },
}
DESCRIBED_PRESETS = ", ".join(f"{name} ({options['max_train_time']})" for name, options in PRESETS.items())

# From which time to train, in seconds, a run that says nothing of how takes which; the others are taken by their names.
BY_TIME: dict[str, float] = {"quick": 60, "good": 20 * 60}

_OF_NETWORKS = ("dropout", "block_out_channels", "hidden_size", "num_layers", "num_attention_heads")
# Options of a U-Net, and of sequences, which a transformer does not take; and those of a path of betas alone.
_FOR_UNETS = (
    "block_out_channels",
    "layers_per_block",
    "attention_resolutions",
    "attention_head_dim",
    "fourier_features",
)
_FOR_SEQUENCES = ("sequence_column", "sequence_layout", "sequence_scale")
_OF_LINEAR = ("path", "timestep_sampling", "model_guidance_scale")
_FOR_BETAS = ("beta_schedule", "beta_start", "beta_end", "beta_reference_timesteps", "rescale_betas_zero_snr")

# An option that is given, and not off, and those of a preset that it leaves no room for.
# An option at a value is "option=value".
REPLACED_BY: dict[str, tuple[str, ...]] = {
    "max_train_steps": ("max_train_time",),
    "dit_size": _OF_NETWORKS,
    "hidden_size": ("num_attention_heads",),
    "pretrained_pipeline": (*_OF_NETWORKS, "model", "path", "timestep_sampling", "model_guidance_scale"),
    "path": ("timestep_sampling", "model_guidance_scale"),
    "objective": ("model_guidance_scale",),
    "timestep_shift": ("timestep_sampling",),
    # The linear path has a sampler of its own, and spacings.
    **dict.fromkeys(
        (*(f"scheduler={name}" for name in SCHEDULERS if name != "flow"), "timestep_spacing=leading"), _OF_LINEAR
    ),
    **dict.fromkeys((*_FOR_UNETS, *_FOR_SEQUENCES), ("model",)),
    **dict.fromkeys(_FOR_BETAS, ("path",)),
}


# Options that say how to train, beside which no preset is taken that nobody named.
_RECIPE = {name for options in PRESETS.values() for name in options} - {"train_batch_size", "num_inference_steps"}
_SAYS_HOW = {*_RECIPE, *REPLACED_BY, "prediction_type", "loss_weighting", "optimizer"} - {"max_train_time"}


def preset_for(values: dict[str, Any]) -> str | None:
    """The preset of a run by time that says nothing of its network, its path or its optimizer; None for one that does, and for
    the digits, of 8x8: after 90 s of a core "quick" has a Fréchet distance of 3.7 there, and the defaults 2.2. A run that goes on
    has the preset that it began with.

    Args:
        values: The options that are given, by name.
    """
    if values.get("resume_from_checkpoint") is not None:
        return _preset_of_run(values)
    if values.get("max_train_time") is None or not _SAYS_HOW.isdisjoint(values):
        return None
    if values.get("dataset_name", "digits") == "digits":
        return None
    seconds = parse_duration(values["max_train_time"])
    return max((name for name, least in BY_TIME.items() if seconds >= least), key=BY_TIME.__getitem__, default=None)


def _preset_of_run(values: dict[str, Any]) -> str | None:
    """The preset in the options of the checkpoint, or of the folder with the latest one, that a run goes on from."""
    request = values["resume_from_checkpoint"]
    folder = Path(values.get("output_dir") or default_output_dir(values.get("dataset_name", "digits")))
    places = [folder] if request == "latest" else [Path(request), folder / request]
    found = next((place / CONFIG_FILE for place in places if (place / CONFIG_FILE).is_file()), None)
    return None if found is None else read_yaml_mapping(found).get("preset")
