import subprocess
import sys


def test_the_metrics_import_no_training_libraries():
    """They are for use in other projects' training loops too, where these may not be installed."""
    code = "import diffusers_ext.metrics, sys; print(sorted({'sklearn', 'datasets', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
