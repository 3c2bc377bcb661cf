"""Scripts under `accelerate launch`, which adds its own words when a script fails: ours are one line."""

import os
import signal
import time
from pathlib import Path

import pytest

from diffusers_ext import options
from diffusers_ext.commands.train_ddpm import run
from environment import HUNG_AFTER
from processes import Launched, in_ranks


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training" / "train_ddpm.py"


def options_of(tmp_path):
    """Without data."""
    (tmp_path / "data").mkdir()
    return ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]


def test_an_error_is_one_line_of_ours(tmp_path):
    """The traceback of the launcher itself is left out by its --quiet, in one process."""
    process = Launched(SCRIPT, options_of(tmp_path), ["--quiet"])
    output = process.communicate()
    assert process.returncode == 1
    assert output.count("train_ddpm.py: error: ") == 1, output
    assert "run_script" not in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_an_error_of_two_processes_is_one_line_of_ours(tmp_path, monkeypatch):
    """The first says it, though the other fails before; then the other is ended, by `in_ranks` as by the launcher."""
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *options_of(tmp_path), "--num_threads", "1"])
    monkeypatch.setattr(options, "OTHERS_WAIT_SECONDS", HUNG_AFTER)

    def work():
        if os.environ["RANK"] == "0":
            time.sleep(0.3)
        try:
            run()
        finally:
            print(f"process {os.environ['RANK']} has spoken")

    with pytest.raises(AssertionError, match=r"ended with \[1\]") as failed:
        in_ranks(work)
    output = str(failed.value)
    assert output.count("train_ddpm.py: error: ") == 1 and "process 0 has spoken" in output, output
    assert "Traceback" not in output and "process 1 has spoken" not in output
    assert not (tmp_path / "run").exists()


def test_an_interrupt_while_drawing_says_what_is_kept_and_leaves_no_torn_file(tmp_path):
    """As Ctrl-C comes: to the launcher and to the script."""
    words = "--max_train_steps 2 --num_inference_steps 1000 --block_out_channels 8 16 --layers_per_block 1"
    words += " --max_train_samples 40 --train_batch_size 4 --num_threads 1 --output_dir"
    process = Launched(SCRIPT, [*words.split(), tmp_path / "run"])
    seen, end = "", time.monotonic() + HUNG_AFTER
    while "drawing: step 1" not in seen and time.monotonic() < end:
        piece = process.stdout.read(1)
        assert piece, seen
        seen += piece
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate()
    line = f"train_ddpm.py: interrupted: {tmp_path}/run keeps checkpoint-2; the same command with --resume_from_checkpoint"
    assert output.count(line) == 1 and "run_script" not in output
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint-2", "model_index.json", "metrics.jsonl"} <= names
    assert "samples.png" not in names and not [name for name in names if name.startswith(".")]
