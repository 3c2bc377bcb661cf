import signal
import time

import pytest

from diffusers_ext.trainer import signals
from diffusers_ext.trainer.signals import Interrupted, catch_signals, sigterm_as_interrupt


def send(number):
    signal.raise_signal(number)  # to this thread, so that it is there when the call returns


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_that_come_together_are_one_request(number):
    before = signal.getsignal(number)
    with catch_signals() as request:
        assert request.signal_number is None and request.name == ""
        send(number)
        send(number)
        assert request.signal_number == number and request.name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_later_signal_does_what_it_always_does(monkeypatch):
    monkeypatch.setattr(signals, "SAME_REQUEST_SECONDS", 0.05)
    # A shell starts what it runs in the background with SIGINT ignored, which is then what it always does.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), catch_signals() as request:
            send(signal.SIGINT)
            assert request.name == "SIGINT"
            time.sleep(0.1)
            send(signal.SIGINT)
            for _ in range(1000):  # the interpreter handles a signal between two instructions
                pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_interrupts_and_is_the_default_again_afterwards():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(Interrupted) as interrupt, sigterm_as_interrupt():
            send(signal.SIGTERM)
            for _ in range(1000):  # the interpreter handles a signal between two instructions
                pass
        assert interrupt.value.signal_number == signal.SIGTERM and isinstance(interrupt.value, KeyboardInterrupt)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
