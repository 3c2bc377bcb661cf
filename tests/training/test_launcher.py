"""Scripts under `accelerate launch`, which adds its own words when a script fails: ours are one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ("--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0")


def launch(launcher, arguments, **kwargs):
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *launcher]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / "training" / "train_ddpm.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )


@pytest.mark.parametrize("launcher, is_quiet", [(["--quiet"], True), (TWO_PROCESSES, False)])
def test_an_error_is_one_line_of_ours(tmp_path, launcher, is_quiet):
    """Once for all processes; the traceback of the launcher itself is left out by its --quiet, in one process."""
    folder = tmp_path / "data"
    folder.mkdir()
    process = launch(launcher, ["--dataset_name", folder, "--output_dir", tmp_path / "run"])
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 1
    assert output.count("train_ddpm.py: error: ") == 1, output
    assert "run_script" not in output and "[rank1]" not in output
    assert not is_quiet or "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_an_interrupt_while_drawing_says_what_is_kept_and_leaves_no_torn_file(tmp_path):
    """As Ctrl-C comes: to the launcher and to the script."""
    words = "--max_train_steps 2 --num_inference_steps 1000 --block_out_channels 8 16 --layers_per_block 1"
    words += " --max_train_samples 40 --train_batch_size 4 --num_threads 1 --output_dir"
    process = launch(
        [],
        [*words.split(), tmp_path / "run"],
        start_new_session=True,
        # A process that is started in the background may have SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen, end = "", time.monotonic() + 150
    while "drawing: step 1" not in seen and time.monotonic() < end:
        piece = process.stdout.read(1)
        assert piece, seen
        seen += piece
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    line = f"train_ddpm.py: interrupted: {tmp_path}/run keeps checkpoint-2; the same command with --resume_from_checkpoint"
    assert output.count(line) == 1 and "run_script" not in output
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint-2", "model_index.json", "metrics.jsonl"} <= names
    assert "samples.png" not in names and not [name for name in names if name.startswith(".")]
