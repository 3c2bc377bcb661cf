"""Train a Gaussian diffusion model on images or sequences, by label if there are labels.

    accelerate launch training/train_ddpm.py
    accelerate launch training/train_ddpm.py --pretrained_pipeline runs/digits --output_dir runs/on_from_digits
    python training/train_ddpm.py --dataset_name path/to/fashion_mnist --resolution 32 --max_train_time 10m

Without options it trains on scikit-learn's handwritten digits. `--help` lists the options, `--config FILE.yaml` reads
them from a file.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.train_ddpm import TrainConfig, main, run


__all__ = ["TrainConfig", "main", "run"]

if __name__ == "__main__":
    run()
