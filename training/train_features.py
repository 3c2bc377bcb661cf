"""Train the network whose features `training/evaluate.py` measures generated images in.

python training/train_features.py --dataset_name digits --output_dir runs/features-digits
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.train_features import FeaturesConfig, main, run


__all__ = ["FeaturesConfig", "main", "run"]

if __name__ == "__main__":
    run()
