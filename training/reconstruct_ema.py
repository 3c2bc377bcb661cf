"""Make an average of the weights of another width, after the run.

    python training/train_ddpm.py --ema_snapshot_steps 50 --output_dir runs/digits
    python training/reconstruct_ema.py runs/digits --ema_std 0.07 --output_dir runs/digits-0.07

RUN is the folder of a run that took snapshots of averages. What is written is the run's pipeline, or its model, with the weights
that training with this --ema_std would have given it, up to the error that is printed (Karras et al. 2023, arXiv 2312.02696,
section 3.2). Nothing is trained, and the run stays as it is.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.reconstruct_ema import ReconstructConfig, main, run


__all__ = ["ReconstructConfig", "main", "run"]

if __name__ == "__main__":
    run()
