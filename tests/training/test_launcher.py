"""Scripts under `accelerate launch`, which adds its own words when a script fails: ours are one line."""

import os
import signal
import time
from pathlib import Path

import pytest

from environment import HUNG_AFTER
from processes import Launched


ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")


SCRIPT = ROOT / "training" / "train_ddpm.py"


@pytest.mark.parametrize("launcher, is_quiet", [(["--quiet"], True), (TWO_PROCESSES, False)])
def test_an_error_is_one_line_of_ours(tmp_path, launcher, is_quiet):
    """Once for all processes; the traceback of the launcher itself is left out by its --quiet, in one process."""
    folder = tmp_path / "data"
    folder.mkdir()
    process = Launched(SCRIPT, ["--dataset_name", folder, "--output_dir", tmp_path / "run"], launcher)
    output = process.communicate()
    assert process.returncode == 1
    assert output.count("train_ddpm.py: error: ") == 1, output
    assert "run_script" not in output and "[rank1]" not in output
    assert not is_quiet or "Traceback" not in output
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
