"""The suite takes threads and kernels from its caller, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

from environment import HUNG_AFTER


ROOT = Path(__file__).parents[1]

# As shells, jobs and launchers set them; each of the first group would make tests fail.
HOSTILE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_TOKEN": "hf_somebody_elses",
    "HF_ENDPOINT": "http://localhost:9",
    "DIFFUSERS_VERBOSITY": "critical",
    "DIFFUSERS_EXT_CACHE": "/nowhere",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "7",
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "http_proxy": "http://localhost:9",
    "ALL_PROXY": "http://localhost:9",
    "MPLBACKEND": "no_such_backend",
    "TQDM_DISABLE": "1",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONWARNINGS": "error",
    "FORCE_COLOR": "1",
    "COLUMNS": "20",
    "LC_ALL": "C",
    "TZ": "Asia/Kathmandu",
}
KEPT = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "3", "TMPDIR": "/tmp"}


def run(*command):
    environment = os.environ | HOSTILE | KEPT
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": HUNG_AFTER, "umask": 0o077}
    done = subprocess.run([sys.executable, "-W", "default", *command], env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_changes_results_is_cleared_and_what_chooses_kernels_is_kept():
    code = """
import json, os, sys, time
sys.path.insert(0, "tests")
import environment
environment.settle("http://127.0.0.1:80", "/tmp/hf_home")
environment.settle_terminal()
print(json.dumps(dict(os.environ) | {"umask": os.umask(0), "zone": time.tzname[0]}))
"""
    seen = json.loads(run("-c", code))
    assert KEPT.items() <= seen.items()
    settled = {"HF_ENDPOINT": "http://127.0.0.1:80", "MPLBACKEND": "agg", "TZ": "UTC", "LC_ALL": "C.UTF-8"}
    settled |= {"COLUMNS": "100"}
    assert settled.items() <= seen.items() and (seen["umask"], seen["zone"]) == (0o022, "UTC")
    assert not (HOSTILE.keys() - settled.keys()) & seen.keys()


def test_the_suite_passes_in_a_hostile_environment():
    """The Hub on loopback; figures; a run; files of others to read."""
    tests = ["tests/hub/test_push.py", "tests/test_figures.py", "tests/trainer/test_run_folder.py"]
    chosen = "pushed_pipeline or loss_curve or letters_beyond or test_run_folder"
    output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-k", chosen, *tests)
    assert " passed" in output and "failed" not in output
