"""Processes that a test needs, as forks of its own, which has imported everything: they start in milliseconds.

`accelerate launch` runs a script in processes that find their ranks in the environment; `in_ranks` gives forks the same.
What only the launcher does, its words and its handling of signals, is tested with the launcher itself (`Launched`), in
tests/training/test_train_ddpm.py and tests/training/test_launcher.py, and so is that a script runs under it.
"""

import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

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


class Launched:
    """`accelerate launch` of a script, in a session of its own: the launcher is a fork, what it starts are new processes.

    Args:
        script: Its path.
        arguments: Of the script.
        launcher: Options of the launcher.

    Attributes:
        pid: Of the launcher, and of its group of processes.
        stdout: What all of them print.
        returncode: Of the launcher, once it has ended.
    """

    def __init__(self, script, arguments, launcher=()):
        words = [*launcher, str(script), *map(str, arguments)]
        reading, writing = os.pipe()
        self.stdout, self.returncode = os.fdopen(reading, encoding="utf-8"), None
        with os.fdopen(writing, "w") as output:
            self.pid = fork(lambda: self._launch(words), output)

    @staticmethod
    def _launch(words):
        from accelerate.commands.launch import launch_command, launch_command_parser

        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which may be ignored in what runs in the background
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        os.environ |= {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        launch_command(launch_command_parser().parse_args(words))

    def poll(self):
        """The launcher's exit status; None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def communicate(self):
        """Waits for the end of all processes, and returns what they have printed since the last reading."""
        output = self.stdout.read()
        self.stdout.close()
        while self.poll() is None:
            time.sleep(0.01)
        return output


def serve_store():
    """A store by which ranks find one another, in a process of its own.

    It answers in a thread, which asks for the names of those that connect. A fork made meanwhile would have the lock of
    the names taken for good: whatever is to be forked is forked from a process without that thread.

    Returns: The id of the process, which serves until it is killed or this one ends, and the port of its store.
    """
    parent, (reading, writing) = os.getpid(), os.pipe()

    def serve():
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(writing, f"{store.port}\n".encode())
        while os.getppid() == parent:
            time.sleep(1)

    server = fork(serve)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as lines:
        return server, int(lines.readline())


def in_ranks(work, number=2):
    """Runs `work` in so many processes, joined as those of `accelerate launch --num_processes NUMBER` on CPUs.

    Each computes in one thread (see `conftest.py`), so a script that `work` calls is not to ask for more.

    Returns: What they printed.

    Raises:
        AssertionError: if one of them fails, which ends the others, or hangs: then it says where each of them was.
    """
    server, port = serve_store()
    shared = {"WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "OMP_NUM_THREADS": 1}

    def joined(rank):
        faulthandler.register(signal.SIGUSR1, file=sys.stderr)
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
            if hung and not failed:
                for child in hung:
                    os.kill(child, signal.SIGUSR1)
                time.sleep(1)
            for child in (*hung, server):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        output.seek(0)
        printed = output.read()
    assert not failed and not hung, f"ended with {failed}, or did not end: {hung}\n{printed}"
    return printed
