"""The commands: one module for each, with a table of options, a `main` and `run`, which reads the command line.

`diffusers-ext NAME`, `python -m diffusers_ext NAME` and the scripts in `training/` start them.
"""
