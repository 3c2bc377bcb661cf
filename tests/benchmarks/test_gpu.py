"""`benchmarks/gpu.sh` as it is where there is no GPU, at toy size."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from environment import HUNG_AFTER


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module("gpu_results")
    sys.path.remove(str(ROOT / "benchmarks"))


def run(out, **settings):
    environment = os.environ | {"OUT": str(out), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | settings
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), str(out / "no wheels")]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_stage_leaves_figures_and_a_table_of_them(tmp_path):
    done = run(tmp_path, STAGES="training_dit", BUDGET=str(HUNG_AFTER))
    assert done.returncode == 0, done.stdout + (tmp_path / "gpu.log").read_text()
    figures = json.loads((tmp_path / "gpu.json").read_text())
    rows = figures["training, dit"]
    assert set(rows) == {"diffusers, eager, batch 2", "diffusers_ext, eager, batch 2"}
    assert all(row["images/s"] > 0 and row["share of peak"] > 0 for row in rows.values())
    assert rows["diffusers, eager, batch 2"]["of diffusers'"] == 1
    assert "| diffusers_ext, eager, batch 2 |" in (tmp_path / "gpu.md").read_text()
    assert "peaks, TFLOP/s (copy: TB/s)" in figures and "tests" not in figures["seconds"]


def test_without_time_the_stages_are_named_as_failed_and_the_rest_is_written(tmp_path):
    done = run(tmp_path, STAGES="sampling loop", BUDGET="0")
    assert done.returncode == 1
    assert "failed: sampling (no time was left)\nfailed: loop (no time was left)\n" in done.stdout
    assert (tmp_path / "gpu.md").exists()


def test_a_table_has_a_column_for_each_figure_that_occurs(results):
    rows = {"first": {"a": 1234.5, "b": None}, "second": {"a": 0.123456, "c": 7}}
    assert results.table(rows) == [
        "| | a | b | c |",
        "|---|---|---|---|",
        "| first | 1234 |  |  |",
        "| second | 0.123 |  | 7 |",
    ]


def test_figures_are_added_to_those_that_there_are(results, tmp_path):
    results.record(tmp_path, "one", "a", 1.0)
    results.record(tmp_path, "two", "b", {"x": 2.0})
    results.record(tmp_path, "one", "c", 3.0)
    figures = results.read(tmp_path)
    assert figures["one"] == {"a": 1.0, "c": 3.0} and figures["two"] == {"b": {"x": 2.0}}
    assert figures["machine"]["torch"] and [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
