"""The site of `docs/`: each page is reached, each name and paper is there, and it builds without a warning or a network."""

import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_ext
from diffusers_ext.commands.train_ddpm import TrainConfig
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, NoiseLevel, output_coefficients
from diffusers_ext.foreign_options import FOREIGN_OPTIONS, explain_foreign
from environment import HUNG_AFTER


DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(
    path.relative_to(DOCS).with_suffix("").as_posix()
    for suffix in ("md", "rst")
    for path in DOCS.rglob(f"*.{suffix}")
    if path.stem != "index"
)

HAS_SPHINX = all(importlib.util.find_spec(name) for name in ("sphinx", "furo", "myst_parser"))


def read(name):
    return (DOCS / name).read_text(encoding="utf-8")


def test_every_page_stands_once_in_the_tables_of_contents():
    index = read("index.rst")
    trees = re.findall(r"^\.\. toctree::\n(.*?)(?=^\S|\Z)", index, flags=re.MULTILINE | re.DOTALL)
    listed = [line.strip() for tree in trees for line in tree.splitlines() if re.fullmatch(r" {3}[\w/]+", line)]
    assert sorted(listed) == PAGES and len(PAGES) > 20


@pytest.mark.parametrize("name", [f"{page}.md" for page in PAGES if (DOCS / f"{page}.md").exists()])
def test_links_within_the_repository_lead_to_files_and_headings(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(name)):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = (DOCS / name).parent.joinpath(path).resolve() if path else DOCS / name
        assert file.exists(), target
        assert not heading or heading in headings(file), target


def headings(file):
    """Of a page, as GitHub and the site name them in links."""
    lines = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines]


def test_the_reference_has_every_public_name():
    text = read("reference.rst")
    names = [*diffusers_ext.__all__, *diffusers_ext._OF_TRAINING]
    assert not [
        name for name in names if not re.search(rf"(?:class|function):: {name}$|``{name}``", text, re.MULTILINE)
    ]


def test_the_references_have_every_paper_that_the_code_names():
    pattern = r"(?:arXiv:? ?|arxiv\.org/abs/)(\d{4}\.\d{5})"
    sources = [*Path(diffusers_ext.__file__).parent.rglob("*.py"), *DOCS.glob("*.md")]
    named = {paper for path in sources for paper in re.findall(pattern, path.read_text(encoding="utf-8"))}
    listed = re.findall(r"\[(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/\1\)", read("references.md"))
    assert named == set(listed) and len(listed) == len(named) > 50


def test_the_options_of_other_trainers_have_the_answers_of_the_command():
    """To each a row: its name, what it is here, and the hint."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", read("from_diffusers.md"), flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(FOREIGN_OPTIONS)
    for name, cells in rows:
        here, note = (cell.strip() for cell in cells.split("|"))
        answer = explain_foreign(name, known, "--")
        if answer is None:  # of another script
            assert here == f"`--{FOREIGN_OPTIONS[name].names[0]}` of `training/evaluate.py`"
        elif here:
            assert f"here it is {here.strip('`')}" + (f": {note}" if note else "") == answer
        else:
            assert f"there is none here: {note}" == answer


def test_options_of_the_same_name_are_those_of_the_command():
    aliases = {field.metadata["alias"]: field.name for field in dataclasses.fields(TrainConfig)}
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    same, other = re.search(
        r"^Many options have the same names: (.*?)\. Some are (.*)$", read("from_diffusers.md"), re.M
    ).groups()
    assert set(re.findall(r"`(\w+)`", same)) <= known
    pairs = re.findall(r"`(\w+)` for `(\w+)`", other)
    assert len(pairs) >= 5 and all(aliases[theirs] == ours for theirs, ours in pairs)


def test_the_concepts_have_the_coefficients_of_every_prediction_type():
    """At a level of no unit scale, where those of v differ from alpha and sigma."""
    text = read("concepts.md").partition("## Prediction types")[2].partition("## Formulas")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    level = NoiseLevel(0.6, 0.9)
    letters = {"alpha": level.alpha, "sigma": level.sigma, "h": math.hypot(0.6, 0.9)}
    said = {name: tuple(float(eval(cell, letters)) for cell in (a, b)) for name, a, b, _ in rows[1:]}
    assert said == {name: pytest.approx(output_coefficients(level, name)) for name in PREDICTION_TYPES}


def test_the_formulas_of_the_concepts_are_in_the_files_that_they_name():
    named = re.findall(r"`(\w+\.py)`(?:: `(\w+)`)?", read("concepts.md"))
    assert len(named) >= 10
    for file, name in named:
        source = (Path(diffusers_ext.__file__).parent / "diffusion" / file).read_text(encoding="utf-8")
        assert not name or f"def {name}(" in source, (file, name)


@pytest.mark.skipif(not HAS_SPHINX, reason="the extra docs is not installed")
def test_the_site_builds_without_a_warning(tmp_path):
    """Where there is no network: every address but that of this machine is one of a proxy that nobody is at."""
    nobody = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "-q",
        "-d",
        str(tmp_path / "trees"),
        str(DOCS),
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, env=os.environ | nobody, capture_output=True, text=True, timeout=HUNG_AFTER)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (tmp_path / "site" / f"{page}.html").is_file()
    reference = (tmp_path / "site" / "reference.html").read_text(encoding="utf-8")
    assert all(f'id="diffusers_ext.{name}"' in reference for name in ("ExtDDIMScheduler", "DiTModel", "train"))
