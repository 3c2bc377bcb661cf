"""How a process computes on CPUs: settled before torch is loaded, whose OpenMP reads the environment once.

A step is thousands of pieces of work. Each is shared by the threads, which wait at its end for the last of them, and makes
tensors that the next step makes again.

- **Threads.** GNU's OpenMP lets threads that wait spin for milliseconds before they sleep. Where another process is busy, a
  thread that spins takes the core from the one that it waits for, and a step takes several times as long.
- **Memory.** glibc gives a large tensor back to the system when it is freed, and a page that comes anew is cleared at its
  first touch. Kept, the same pages serve the next step, in as much memory at its peak.

`docs/speed.md` has the measurements. It is settled for the commands and the scripts of this package alone: a program that
imports the package decides for itself.
"""

import ctypes
import os
import sys


# A fraction of a millisecond: longer than most waits within a step, and far shorter than a scheduler's time slice.
SPIN_COUNT = 10_000

# glibc's numbers of its options (malloc.h), the names by which users set them, and the largest values that it takes.
MALLOC_OPTIONS = {"MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1), "MALLOC_MMAP_THRESHOLD_": (-3, 31 * 2**20)}


def settle() -> None:
    """Sets how threads wait, for this process and those that it starts, and how it keeps memory; not what the user has set."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    if not MALLOC_OPTIONS.keys() & os.environ.keys() and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", ""):
        keep_memory()


def keep_memory() -> bool:
    """Lets the process keep the memory of freed tensors for the next ones.

    Returns:
        Whether its allocator is one that can be told so: glibc's.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return set_option is not None and all(set_option(*option) == 1 for option in MALLOC_OPTIONS.values())


def is_command() -> bool:
    """Whether this process was started as `diffusers-ext` or as `python -m diffusers_ext`."""
    words = sys.orig_argv  # `sys.argv` is not set yet while `-m` imports the package
    name = os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0]
    return name == "diffusers-ext" or ("-m", "diffusers_ext") in zip(words, words[1:], strict=False)
