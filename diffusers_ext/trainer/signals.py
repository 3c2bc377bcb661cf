"""SIGTERM and SIGINT as a request to save and end, instead of an end in the middle of a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StopRequest:
    """Which signal has asked the run to end, if any."""

    signal_number: int | None = None

    @property
    def name(self) -> str:
        return signal.Signals(self.signal_number).name if self.signal_number else ""


@contextmanager
def catch_signals() -> Iterator[StopRequest]:
    """Notes the first SIGTERM or SIGINT; a second one does what it always does."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield request
        return

    def note(signal_number, frame):
        request.signal_number = signal_number
        signal.signal(signal_number, before[signal_number])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
