"""The commands of `diffusers-cli`, with the classes of this package known to them.

    python -m diffusers_ext schema --model FOLDER      the arguments of a saved pipeline's call

`diffusers-cli` itself imports diffusers alone, and cannot name the class of a pipeline that is not diffusers' own.
"""

from diffusers.commands.diffusers_cli import main


if __name__ == "__main__":
    main()
