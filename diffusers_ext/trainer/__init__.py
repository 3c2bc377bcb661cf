"""What every training script shares: options, data, loop, averages of the weights, checkpoints and figures.

Needs the extra `train`. Importing `diffusers_ext` does not import it.
"""
