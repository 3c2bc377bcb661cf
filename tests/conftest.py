"""What has to stand before any test module is imported: threads, and a Hub of our own in place of the real one."""

import os
import sys
import tempfile

import pytest
from hypothesis import settings

from local_hub import LocalHub


# The suite is many small computations; more threads than cores make each of them slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A busy machine is no failure, and what fails for one fails for all.
settings.register_profile("same everywhere", deadline=None, derandomize=True)
settings.load_profile("same everywhere")

# huggingface_hub reads these once, when it is first imported. Whatever a test asks the Hub for goes to loopback, in
# processes that a test starts too.
assert "huggingface_hub" not in sys.modules
_hf_home = tempfile.TemporaryDirectory(prefix="diffusers_ext_tests_")
_hub = LocalHub({"hf_token_of_alice": "alice", "hf_token_of_bob": "bob"}).__enter__()
os.environ |= {"HF_ENDPOINT": _hub.url, "HF_HOME": _hf_home.name, "HF_HUB_DISABLE_XET": "1"}
os.environ.pop("HF_TOKEN", None)


@pytest.fixture
def hub() -> LocalHub:
    """An empty Hub with the accounts "alice" and "bob", whose tokens are "hf_token_of_alice" and "hf_token_of_bob"."""
    _hub.repos.clear()
    _hub.requests.clear()
    return _hub


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """accelerate keeps precision, accumulation and processes for the life of a process."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


def pytest_unconfigure():
    _hub.__exit__()
    _hf_home.cleanup()
