"""The command `demo`, and the Space that it exports: this needs no gradio."""

import importlib.util
import runpy
import sys

import pytest
import yaml

import diffusers_ext
from diffusers_ext.demo.command import run
from diffusers_ext.demo.space import export_space


HAS_GRADIO = importlib.util.find_spec("gradio") is not None


def header_of(folder):
    _, header, _ = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header)


def test_an_exported_pipeline_of_a_folder_goes_along(tmp_path, capsys):
    pipe = diffusers_ext.example("digits")
    source = tmp_path / 'a "strange": name'
    pipe.save_pretrained(source)
    for name in ("checkpoint-5/model.safetensors", "logs/x", "samples.png", "index.html", ".hidden"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("of the run")
    run([str(source), "--export", str(tmp_path / "space")])
    space = tmp_path / "space"
    assert "app.py, requirements.txt, README.md, pipeline/" in capsys.readouterr().out
    header = header_of(space)
    assert header["title"] == source.name and (header["sdk"], header["app_file"]) == ("gradio", "app.py")
    assert (space / "requirements.txt").read_text() == f"diffusers_ext[demo]>={diffusers_ext.__version__}\n"
    there = {path.name for path in (space / "pipeline").iterdir()}
    assert {"model_index.json", "denoiser", "scheduler"} <= there
    assert not there & {"checkpoint-5", "logs", "samples.png", "index.html", ".hidden"}
    loaded = diffusers_ext.DiffusionPipeline.from_pretrained(space / "pipeline")
    assert loaded.config.id2label == pipe.config.id2label
    compile((space / "app.py").read_text(), "app.py", "exec")


def test_an_exported_pipeline_of_the_hub_is_loaded_from_there(tmp_path):
    assert "pipeline/" not in export_space("somebody/digits", tmp_path / "space", "1.2")
    assert header_of(tmp_path / "space")["models"] == ["somebody/digits"]
    assert "load_pipeline('somebody/digits')" in (tmp_path / "space" / "app.py").read_text()


@pytest.mark.skipif(not HAS_GRADIO, reason="takes gradio")
def test_the_app_of_a_space_makes_the_page(tmp_path):
    run(["digits", "--export", str(tmp_path / "space")])
    made = runpy.run_path(str(tmp_path / "space" / "app.py"))
    assert type(made["app"]).__name__ == "Blocks"


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(SystemExit, match="must be a new or an empty folder"):
        run(["digits", "--export", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_cannot_be_served_is_said_in_a_line(tmp_path, monkeypatch):
    if HAS_GRADIO:
        with pytest.raises(SystemExit, match="no folder here, and no name of a pipeline on the Hub"):
            run(["no such/pipeline/here"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit, match=r"needs gradio, which is not installed: pip install 'diffusers_ext\[demo\]'"):
        run(["digits"])
