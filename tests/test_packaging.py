"""What an installed wheel and a source archive hold, built without network from a copy of this checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from environment import HUNG_AFTER


ROOT = Path(__file__).parents[1]
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, "build_" + sys.argv[1])(sys.argv[2]))
"""


def run(*command, cwd, **environment):
    result = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=HUNG_AFTER
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What is under version control, as far as a build reads it."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("diffusers_ext", "training"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "setup.cfg",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, folder)
    return folder


def test_a_wheel_is_the_package_and_works_without_its_sources(sources, tmp_path):
    name = run(sys.executable, "-c", BUILD, "wheel", str(tmp_path), cwd=sources).splitlines()[-1]
    with zipfile.ZipFile(tmp_path / name) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffusers_ext").rglob("*.py")}
    others = {"diffusers_ext/py.typed", "diffusers_ext/hub/model_card_template.md"}
    others |= {f"diffusers_ext/trainer/page.{kind}" for kind in ("css", "html", "js")}
    examples = [path for path in (ROOT / "diffusers_ext" / "examples").rglob("*") if path.is_file()]
    others |= {path.relative_to(ROOT).as_posix() for path in examples if "__pycache__" not in path.parts} - package
    assert {name for name in names if ".dist-info/" not in name} == package | others
    script = "import diffusers_ext; from diffusers_ext.hub import cards; diffusers_ext.example('digits'); "
    script += "print(diffusers_ext.__file__)"
    where = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert Path(where.strip()) == tmp_path / "installed" / "diffusers_ext" / "__init__.py"
    about = next((tmp_path / "installed").glob("*.dist-info"))
    metadata = (about / "METADATA").read_text(encoding="utf-8")
    assert "diffusers-ext = diffusers_ext.__main__:main" in (about / "entry_points.txt").read_text(encoding="utf-8")
    assert "Apache-2.0" in metadata and "Provides-Extra: train" in metadata


def test_a_source_archive_has_the_scripts_and_builds_again(sources, tmp_path):
    name = run(sys.executable, "-c", BUILD, "sdist", str(tmp_path), cwd=sources).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        names = {"/".join(each.split("/")[1:]) for each in archive.getnames()}
    assert {"training/train_ddpm.py", "CHANGELOG.md", "constraints.txt", "LICENSE", "diffusers_ext/py.typed"} <= names
    assert "diffusers_ext/examples/digits/model_index.json" in names
    assert not [each for each in names if "__pycache__" in each]
