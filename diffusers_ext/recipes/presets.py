"""Options for a time that there is: what `--preset` of the commands that train a denoiser stands for.

The rates and widths follow the field's practice, wide and slow for long runs: "best" has the base width, the learning rate and
the dropout of DDPM's model of CIFAR-10 (arXiv 2006.11239, Appendix B), or a DiT-S (arXiv 2212.09748, Table 1) at its learning
rate doubled for small batches. They are a beginning, not a search: nobody knows the data but the user.
"""

from typing import Any


# By the name of the preset, shortest first. Options of one kind of network have no effect with the other, and are left out there.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"max_train_time": "5m", "num_inference_steps": 20},
    "good": {"max_train_time": "1h", "learning_rate": 5e-4},
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

# An option that is given, and those of a preset that it leaves no room for.
_OF_NETWORKS = ("dropout", "block_out_channels", "hidden_size", "num_layers", "num_attention_heads")
REPLACED_BY: dict[str, tuple[str, ...]] = {
    "max_train_steps": ("max_train_time",),
    "dit_size": _OF_NETWORKS,
    "hidden_size": ("num_attention_heads",),
    "pretrained_pipeline": _OF_NETWORKS,
}
