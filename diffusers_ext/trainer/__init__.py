"""The training loop that every script shares, with its options, EMA, checkpoints and log.

Needs the extra `train`. Importing `diffusers_ext` does not import it.
"""
