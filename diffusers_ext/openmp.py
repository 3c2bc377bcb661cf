"""How the threads of a step wait for one another: settled before torch is loaded, whose OpenMP reads it once.

A step is thousands of pieces of work, each shared by the threads, which wait at its end for the last of them. GNU's
OpenMP lets them spin for milliseconds before they sleep. Where another process is busy, a thread that spins takes the
core from the one that it waits for, and a step takes several times as long. `docs/speed.md` has the measurement.

It is settled for the commands and the scripts of this package alone: a program that imports the package decides for itself.
"""

import os
import sys


# A fraction of a millisecond: longer than most waits within a step, and far shorter than a scheduler's time slice.
SPIN_COUNT = 10_000


def settle() -> None:
    """Sets the environment of this process and of those that it starts, unless the user has."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)


def is_command() -> bool:
    """Whether this process was started as `diffusers-ext` or as `python -m diffusers_ext`."""
    words = sys.orig_argv  # `sys.argv` is not set yet while `-m` imports the package
    name = os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0]
    return name == "diffusers-ext" or ("-m", "diffusers_ext") in zip(words, words[1:], strict=False)
