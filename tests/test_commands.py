"""`diffusers-ext`: its table, its errors, and how a run that it started is named."""

import ast
import importlib
import re
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from diffusers_ext import __version__, runtime
from diffusers_ext.__main__ import COMMANDS, main
from diffusers_ext.command_names import command_of, name_commands, started_as
from diffusers_ext.commands import train_ddpm
from diffusers_ext.options import to_command


ROOT = Path(__file__).parents[1]
ALL = {name: command for group in COMMANDS.values() for name, command in group.items()}
OURS = {name: command for name, command in ALL.items() if command.module is not None}


def ended(arguments, capsys):
    """The exit code of a command and what it printed to stderr."""
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return exit.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize("name", OURS)
def test_each_command_of_the_table_says_its_own_name_in_its_help(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    assert not exit.value.code
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: diffusers-ext {name} ")
    assert not re.search("(Raises|Args|Attributes|Returns):", printed)  # which are for those who write Python


def test_each_script_of_training_is_a_command_and_starts_the_same_function():
    modules = {command.module for command in OURS.values()}
    scripts = [path.stem for path in (ROOT / "training").glob("*.py") if "import runtime" in path.read_text()]
    assert len(scripts) > 15
    for stem in set(scripts) - {"make_example"}:  # which is for those who release the package
        assert f"commands.{stem}" in modules
        script = importlib.import_module(f"training.{stem}")
        assert script.run is importlib.import_module(f"diffusers_ext.commands.{stem}").run


def test_a_command_is_found_by_the_name_of_its_script(capsys):
    for word in ("train", "training/train_ddpm.py", "train_ddpm"):
        assert ended([word, "--lr", "1"], capsys) == (2, unknown_option())


def unknown_option():
    usage = "usage: diffusers-ext train [--OPTION VALUE ...]\n"
    return f"{usage}diffusers-ext train: error: unknown option --lr; here it is --learning_rate\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["trian"], "there is no command trian; did you mean train or train-vae?"),
        (["zzz"], "there is no command zzz; --help lists the commands"),
        (["evaluate_vea"], "there is no command evaluate_vea; did you mean evaluate-vae or evaluate?"),
    ],
)
def test_an_unknown_command_is_answered_with_the_near_ones(arguments, message, capsys):
    assert ended(arguments, capsys) == (2, f"diffusers-ext: error: {message}\n")


def test_an_error_of_a_command_is_a_line_by_its_name(tmp_path, capsys):
    code, printed = ended(["evaluate", str(tmp_path)], capsys)
    assert code == 1 and printed.startswith("diffusers-ext evaluate: error: ") and printed.count("\n") == 1


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "diffusers_ext.commands.train_vae", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setitem(sys.modules, "accelerate.utils", None)
    code, printed = ended(["train-vae"], capsys)
    assert code == 1 and "pip install 'diffusers_ext[train]'" in printed


def test_the_list_of_commands_has_all_of_them_and_is_what_no_command_gives(capsys):
    main([])
    listed = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == listed
    assert all(f"\n  {name} " in listed and command.help in listed for name, command in ALL.items())
    main(["--version"])
    assert capsys.readouterr().out == f"diffusers-ext {__version__}\n"


def test_a_command_of_diffusers_knows_the_classes_of_this_package(capsys):
    main(["schema", "--model", str(ROOT / "diffusers_ext" / "examples" / "digits")])
    assert "class_labels" in capsys.readouterr().out


def test_a_run_is_named_by_the_command_that_started_it(monkeypatch):
    config = train_ddpm.TrainConfig(max_train_steps=3)
    script = "training/train_ddpm.py"
    options = to_command(config, script).removeprefix("accelerate launch training/train_ddpm.py ")
    assert options.startswith("--max_train_steps 3 ")
    with started_as("diffusers-ext train"):
        assert to_command(config, script) == f"diffusers-ext train {options}"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with started_as("diffusers-ext train"):
        assert to_command(config, script) == f"accelerate launch -m diffusers_ext train {options}"
    assert to_command(config, script).startswith("accelerate launch training/")


def test_every_script_has_the_command_of_the_table():
    modules = {command.module: name for name, command in OURS.items()}
    scripts = [path.stem for path in (ROOT / "diffusers_ext" / "commands").glob("*.py") if path.stem != "__init__"]
    assert all(modules[f"commands.{stem}"] == command_of(stem) for stem in scripts) and len(scripts) > 15


def test_texts_name_the_command_that_the_user_has(monkeypatch, capsys):
    text = (
        "make one with accelerate launch training/train_features.py --seed 1, or see `training/convert_checkpoint.py`"
    )
    assert name_commands(text) == text  # in a checkout
    as_command = "make one with diffusers-ext train-features --seed 1, or see `diffusers-ext convert`"
    with started_as("diffusers-ext train"):
        assert name_commands(text) == as_command
    monkeypatch.setattr("diffusers_ext.command_names._in_checkout", lambda: False)  # as in an installed wheel
    assert name_commands(text) == as_command
    assert to_command(train_ddpm.TrainConfig(), "training/train_ddpm.py").startswith("diffusers-ext train --")
    assert ended(["evaluate"], capsys)[1].endswith(
        "say what to evaluate: diffusers-ext evaluate PIPELINE, a folder or a name on the Hub\n"
    )
    for name, rest in (
        ("compare-guidance", "PIPELINE, a folder"),
        ("study", "noise_end|scaling|data_draws|embedding"),
    ):
        assert f": diffusers-ext {name} {rest}" in ended([name], capsys)[1]
    with pytest.raises(SystemExit):
        main(["train-vae", "--help-all"])
    assert "diffusers-ext train-features" in capsys.readouterr().out


HAND_ON = ("name_commands", "to_command", "refuse_sequences", "option", "Foreign")  # the end of a function's name


def texts_by_themselves(node):
    """The texts under a node that are neither docstrings nor handed to `name_commands` or to what hands them on to it."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(HAND_ON):
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield from texts_by_themselves(child)


def test_texts_that_name_a_script_are_shown_by_the_name_that_the_user_has():
    script, bare = re.compile(r"training/\w+\.py"), []
    for path in (ROOT / "diffusers_ext").rglob("*.py"):
        if path.stem != "command_names" and script.search(source := path.read_text(encoding="utf-8")):
            texts = texts_by_themselves(ast.parse(source))
            bare += [f"{path.name}:{text.lineno}" for text in texts if script.search(text.value)]
    assert not bare


def test_the_entry_point_is_the_table():
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["options.entry_points"]["console_scripts"].strip() == "diffusers-ext = diffusers_ext.__main__:main"


@pytest.mark.parametrize(
    "words, first, is_one",
    [
        (["python", "/bin/diffusers-ext", "train"], "/bin/diffusers-ext", True),
        (["python", "-u", "-m", "diffusers_ext", "train"], "-m", True),
        (["python", "notebook.py", "diffusers_ext"], "notebook.py", False),
        (["python", "-m", "pytest"], "-m", False),
    ],
)
def test_a_command_is_known_before_the_package_is_imported(words, first, is_one, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", words)
    monkeypatch.setattr(sys, "argv", [first])
    assert runtime.is_command() == is_one


def test_the_runtime_is_settled_for_a_command_before_torch_is_loaded():
    body = ast.parse((ROOT / "diffusers_ext" / "__init__.py").read_text(encoding="utf-8")).body
    settled = next(
        i for i, node in enumerate(body) if isinstance(node, ast.If) and "runtime.settle" in ast.unparse(node)
    )
    before = [node for node in body[:settled] if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in before}
    assert names <= {"importlib", "typing", "diffusers_ext"}  # of the last, runtime alone
    needs = ast.walk(ast.parse(Path(runtime.__file__).read_text(encoding="utf-8")))
    assert {each.names[0].name for each in needs if isinstance(each, ast.Import | ast.ImportFrom)} == {
        "ctypes",
        "os",
        "sys",
    }


def test_the_commands_are_those_of_their_page():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| `")]
    named = {name for line in table for name in re.findall(r"`([\w-]+)`", line.split("|")[1])} & set(ALL)
    assert named == set(ALL)
    for line in table:
        name = line.split("`")[1]
        if name in OURS and "training/" in line:
            assert OURS[name].module == f"commands.{re.search(r'training/([a-z_]+).py', line)[1]}"
