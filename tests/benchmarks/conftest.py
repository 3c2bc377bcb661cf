import importlib
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script():
    """Imports a script of `benchmarks/` by its name; the scripts import their neighbours."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    yield importlib.import_module
    sys.path.remove(folder)
