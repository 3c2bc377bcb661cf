"""The scripts settle how threads wait and memory is kept before torch is loaded, and leave the user's own settings alone."""

import ast
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_ext.runtime import MALLOC_OPTIONS
from environment import HUNG_AFTER


TRAINING = Path(__file__).parents[2] / "training"
SCRIPTS = sorted(path for path in TRAINING.glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_is_settled_before_anything_that_loads_torch(script):
    imports = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    others = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
    assert others[0] == "runtime"


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, ("10000", None)),
        ({"GOMP_SPINCOUNT": "7"}, ("7", None)),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, (None, "ACTIVE")),
    ],
)
def test_what_the_user_has_set_stays(given, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    code = f"import os, sys, runtime; print(tuple(map(os.environ.get, {names})), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=TRAINING, env=environment, capture_output=True, text=True, check=True, timeout=HUNG_AFTER
    )
    assert done.stdout == f"{expected} False\n"


def test_a_script_that_is_imported_finds_it_too():
    code = "import training, runtime; print(runtime.SPIN_COUNT)"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONPATH": str(TRAINING.parent)}
    done = subprocess.run(
        command, cwd="/", env=environment, capture_output=True, text=True, check=True, timeout=HUNG_AFTER
    )
    assert done.stdout == "10000\n"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
@pytest.mark.parametrize(
    "given, is_kept",
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, False),
    ],
)
def test_memory_that_is_freed_serves_what_comes_next(given, is_kept):
    # Each allocation of 24 MiB touches 6144 pages, which are new to the process if it gave them back.
    code = """if True:
        import resource, runtime
        bytearray(24 * 2**20)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            bytearray(24 * 2**20)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    own = {name: value for name, value in os.environ.items() if name not in {*MALLOC_OPTIONS, "GLIBC_TUNABLES"}}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=TRAINING, env=own | given, capture_output=True, text=True, check=True, timeout=HUNG_AFTER
    )
    assert (int(done.stdout) < 6144) == is_kept
