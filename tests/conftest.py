"""What has to stand before any test module is imported: the environment, and a Hub of our own in place of the real one.

Two options look for tests that rest on what another machine may do otherwise:

    python -m pytest --shuffle 3        # files, and the tests of each, in an order drawn from this seed
    python -m pytest --other-kernels    # sums are rounded by shape and address, see other_kernels.py

And one chooses how many cases of a product of parameters are run, see cases.py:

    python -m pytest                    # of tests marked `product`, so many that each value of each parameter occurs
    python -m pytest --cases all        # all of them
    python -m pytest --cases covering   # of every test as of those that are marked
"""

import gc
import os
import random
import sys
import tempfile
from collections import defaultdict
from itertools import groupby

import pytest
from hypothesis import settings

import environment
from cases import covering, parameters_of
from local_hub import LocalHub


# A busy machine is no failure, and what fails for one fails for all.
settings.register_profile("same everywhere", deadline=None, derandomize=True)
settings.load_profile("same everywhere")

# Whatever a test asks the Hub for goes to loopback, in processes that a test starts too.
assert not {"huggingface_hub", "torch"} & sys.modules.keys()
_hf_home = tempfile.TemporaryDirectory(prefix="diffusers_ext_tests_")
_hub = LocalHub({f"hf_token_of_{name}": name for name in ("alice", "bob", "you")}).__enter__()
environment.settle(_hub.url, _hf_home.name)


def compute_in_one_thread():
    """In a fork, which has none of the threads that OpenMP believes to have, and would wait for them without end."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


os.register_at_fork(after_in_child=compute_in_one_thread)


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order")
    parser.addoption(
        "--cases", choices=("all", "covering"), help="all cases of products of parameters, or few of each"
    )
    parser.addoption("--every-write", type=int, metavar="N", help="end each script at each N-th of its writes")
    parser.addoption("--other-kernels", action="store_true", help="round as a CPU with other kernels would")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    choose_cases(config, items)
    shuffle(config, items)


def choose_cases(config, items):
    """Of the tests that were asked for: a case that is named alone is run."""
    which, left_out = config.getoption("cases"), set()
    if which == "all":
        return
    cases_of = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and (which == "covering" or item.get_closest_marker("product")):
            cases_of[item.path, item.cls, item.originalname].append(item)
    for cases in cases_of.values():
        chosen = covering([parameters_of(item) for item in cases])
        left_out |= set(cases) - {cases[index] for index in chosen}
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def shuffle(config, items):
    if (seed := config.getoption("shuffle")) is None:
        return
    # The tests of a file stay together, since they share what is costly to make.
    generator = random.Random(seed)
    files = [list(tests) for _, tests in groupby(items, key=lambda item: item.path)]
    generator.shuffle(files)
    for tests in files:
        generator.shuffle(tests)
    items[:] = [test for tests in files for test in tests]


# Half a million objects of libraries stay for good: the garbage collector looks through them less often, and not again.
gc.set_threshold(20_000, 10, 10)


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


def seed_generators():
    """What a test draws does not depend on those before it. Its own seeds are small numbers, and draw something else."""
    random.seed(1_234_567)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(1_234_567)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(1_234_567)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    seed_generators()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():  # again, since the first test of a file sets up what the others only take
    seed_generators()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if not item.config.getoption("other_kernels"):
        return (yield)
    from other_kernels import OtherKernels

    with OtherKernels():
        return (yield)


@pytest.fixture(autouse=True, scope="session")
def terminal():
    environment.settle_terminal()


@pytest.fixture
def hub() -> LocalHub:
    """An empty Hub with the accounts "alice", "bob" and "you", whose tokens are "hf_token_of_alice" and so on."""
    _hub.repos.clear()
    _hub.requests.clear()
    _hub.refuse = lambda number, path: None
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
