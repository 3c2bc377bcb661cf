"""Processes that a test needs, as forks of its own, which has imported everything: they start in milliseconds.

`accelerate launch` runs a script in processes that find their ranks in the environment; `in_ranks` gives forks the same.
What only the launcher does, its words and its handling of signals, is tested with the launcher itself, in
tests/training/test_train_ddpm.py and tests/training/test_launcher.py, and so is that a script runs under it.
"""

import os
import signal
import sys
import tempfile
import time
import traceback

from torch.distributed import TCPStore

from environment import HUNG_AFTER
from runs import forget_accelerate


def fork(work, output=None):
    """Runs `work` in a fork of this process, which ends without running what this one has to do at its end.

    Args:
        work: A function without arguments. A script's `SystemExit` ends the process with its status, an error with 1.
        output: A file that gets what the process prints; by default it prints where this one does.

    Returns: The id of the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if output is not None:
            for descriptor in (1, 2):
                os.dup2(output.fileno(), descriptor)
            # Of one file and in pieces of lines, so that what several processes print is not torn.
            sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False, encoding="utf-8") for fd in (1, 2))
        work()
        status = 0
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else exit.code is not None
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def in_ranks(work, number=2):
    """Runs `work` in so many processes, joined as those of `accelerate launch --num_processes NUMBER` on CPUs.

    Each computes in one thread (see `conftest.py`), so a script that `work` calls is not to ask for more.

    Returns: What they printed.

    Raises:
        AssertionError: if one of them fails, which ends the others, or hangs.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "OMP_NUM_THREADS": 1}

    def joined(rank):
        environment = shared | {"RANK": rank, "LOCAL_RANK": rank}
        os.environ |= {name: str(value) for name, value in environment.items()}
        forget_accelerate()
        work()

    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        running = {fork(lambda rank=rank: joined(rank), output) for rank in range(number)}
        failed, end = [], time.monotonic() + HUNG_AFTER
        try:
            while running and not failed and time.monotonic() < end:
                time.sleep(0.01)
                ended = [each for each in (os.waitpid(child, os.WNOHANG) for child in running) if each[0]]
                running -= {child for child, _ in ended}
                failed += [os.waitstatus_to_exitcode(status) for _, status in ended if status]
        finally:
            hung = list(running)
            for child in hung:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        output.seek(0)
        printed = output.read()
    assert not failed and not hung, f"ended with {failed}, or did not end: {hung}\n{printed}"
    return printed
