"""The commands of `diffusers-cli`, with the classes of this package known to them.

    python -m diffusers_ext demo PIPELINE              a page in the browser to try it out, see docs/demo.md
    python -m diffusers_ext schema --model FOLDER      the arguments of a saved pipeline's call

`diffusers-cli` itself imports diffusers alone, and cannot name the class of a pipeline that is not diffusers' own.
"""

import sys

from diffusers.commands.diffusers_cli import main


if __name__ == "__main__":
    if sys.argv[1:2] == ["demo"]:
        from diffusers_ext.demo.command import run

        run(sys.argv[2:])
    else:
        main()
