"""Encode a data set once, for training diffusion models on its latents.

    python training/cache_latents.py --dataset_name path/to/twemoji64 --vae runs/vae --output_dir latents/twemoji64
    python training/train_ddpm.py --dataset_name latents/twemoji64 --vae runs/vae

Writes shards of parquet, each atomically. The processes share them out; a run that was stopped goes on with
those that are missing when the same command is given again. Other splits go into the same folder by `--dataset_split`.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.cache_latents import CacheConfig, main, run


__all__ = ["CacheConfig", "main", "run"]

if __name__ == "__main__":
    run()
