"""SIGTERM and SIGINT as a request to save and end, instead of an end in the middle of a step."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


# A signal to a group of processes reaches each of them, and then once more those that a launcher hands it on to.
SAME_REQUEST_SECONDS = 5.0


class StopRequest:
    """Which signal has asked the run to end, if any."""

    signal_number: int | None = None

    @property
    def name(self) -> str:
        return signal.Signals(self.signal_number).name if self.signal_number else ""


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Notes the first SIGTERM or SIGINT; a second one, unless it comes with the first, does what it always does."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield request
        return

    noted = {}

    def note(signal_number, frame):
        request.signal_number = signal_number
        first = noted.setdefault(signal_number, time.monotonic())
        if time.monotonic() - first > SAME_REQUEST_SECONDS:
            signal.signal(signal_number, before[signal_number])
            signal.raise_signal(signal_number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupted(KeyboardInterrupt):
    """An interrupt whose message says what is kept and how to go on; `signal_number` is what ended the work."""

    def __init__(self, message: str, signal_number: int = signal.SIGINT):
        super().__init__(message)
        self.signal_number = signal_number


@contextmanager
def sigterm_as_interrupt(enabled: bool = True) -> Iterator[None]:
    """Lets SIGTERM raise `Interrupted`, so that what is under way is tidied up as it is after Ctrl-C."""
    is_main_thread = threading.current_thread() is threading.main_thread()  # only that may set handlers
    if not enabled or not is_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(signal_number, frame):
        raise Interrupted("", signal_number)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
