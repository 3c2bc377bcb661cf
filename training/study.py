"""Answer a question about trained models by a figure and a table.

    python training/study.py noise_end --pipelines runs/plain runs/mean runs/class runs/scaled
    python training/study.py scaling --pipelines runs/plain runs/mean
    python training/study.py data_draws --pipelines runs/plain
    python training/study.py embedding --pipelines runs/plain

noise_end: how far the noisiest level is from N(0, 1), and the Fréchet distance of samples, by the length of the chain and
by what was subtracted from the data and divided by. scaling: is eps(c x, t) = c eps(x, t)? data_draws: sampling with the mean of x_0
given x_t, over the data, and with draws of it, in the place of the network's prediction. embedding: t-SNE and UMAP of
images, samples and latents. docs/study.md shows what came out for small models.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.study import StudyConfig, main, parse, run


__all__ = ["StudyConfig", "main", "parse", "run"]

if __name__ == "__main__":
    run()
