"""Let a trained pipeline start below its noisiest level, from a distribution fitted to the data (arXiv 2202.09671).

    python training/fit_prior.py runs/digits --start_timestep 600
    python training/fit_prior.py runs/digits --start_timestep 400 --by_label --num_inference_steps 10
    python training/fit_prior.py runs/digits --start_timestep 300 --vae_prior runs/vae

PIPELINE is the folder of a run of training/train_ddpm.py, or another GuidedDiffusionPipeline. The prior is a normal distribution with
the mean and the covariance of the data, as the network knows them, or an autoencoder of training/train_vae.py, whose decoded
draws get the noise of the start. It is saved with the pipeline, whose calls then start there by default.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.fit_prior import FitPriorConfig, main, parse, run


__all__ = ["FitPriorConfig", "main", "parse", "run"]

if __name__ == "__main__":
    run()
