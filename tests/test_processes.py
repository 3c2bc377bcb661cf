"""The processes that tests start: where they hang is said, and nothing of them is left."""

import os
import time

import psutil
import pytest

import processes
from processes import in_ranks


def wait_in_vain():
    print("rank", os.environ["RANK"])
    if os.environ["RANK"] == "1":
        time.sleep(1000)


def test_where_a_process_hangs_is_said_and_it_is_ended(monkeypatch):
    monkeypatch.setattr(processes, "HUNG_AFTER", 2)
    before = psutil.Process().children()
    with pytest.raises(AssertionError, match=r"did not end: \[\d+\]\n(?s:.*)line \d+ in wait_in_vain"):
        in_ranks(wait_in_vain)
    assert psutil.Process().children() == before


def test_an_error_of_one_ends_the_others_at_once():
    def fail_or_wait():
        wait_in_vain()
        raise ValueError("of rank 0")

    with pytest.raises(AssertionError, match=r"ended with \[1\](?s:.*)ValueError: of rank 0"):
        in_ranks(fail_or_wait)


def test_ranks_are_forked_where_no_thread_serves_them(monkeypatch):
    """A lock that another thread holds while a process is forked stays locked there, and whoever needs it hangs."""
    fork, threads = processes.fork, []

    def counting(work, output=None):
        threads.append(psutil.Process().num_threads())
        return fork(work, output)

    monkeypatch.setattr(processes, "fork", counting)
    in_ranks(lambda: None)
    assert len(threads) == 3 and max(threads) == threads[0]
