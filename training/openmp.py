"""How the threads of a step wait for one another: imported by every script before torch, whose OpenMP reads it once.

A step is thousands of pieces of work, each shared by the threads, which wait at its end for the last of them. GNU's
OpenMP lets them spin for milliseconds before they sleep. Where another process is busy, a thread that spins takes the
core from the one that it waits for, and a step takes several times as long. `docs/speed.md` has the measurement.
"""

import os


# A fraction of a millisecond: longer than most waits within a step, and far shorter than a scheduler's time slice.
SPIN_COUNT = 10_000

if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
