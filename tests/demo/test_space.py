"""The command `demo`, and the Space that it exports: this needs no gradio."""

import importlib.util
import runpy
import sys
from pathlib import Path

import diffusers
import pytest
import yaml

import diffusers_ext
from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel, examples
from diffusers_ext.demo.command import run
from diffusers_ext.demo.space import export_space
from diffusers_ext.hub.push import push_folder
from tiny import tiny_stock_unet


EXAMPLE = Path(examples.__file__).parent / "digits"

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


def test_an_exported_pipeline_of_the_hub_is_loaded_from_there(hub, tmp_path):
    push_folder(EXAMPLE, "alice/digits", token="hf_token_of_alice")
    assert "pipeline/" not in export_space("alice/digits", tmp_path / "space", "1.2")
    assert header_of(tmp_path / "space")["models"] == ["alice/digits"]
    assert "load_pipeline('alice/digits')" in (tmp_path / "space" / "app.py").read_text()
    # Until an index has the package, the one who pushes must bring a wheel.
    assert "diffusers_ext-1.2-py3-none-any.whl" in (tmp_path / "space" / "README.md").read_text()


def test_what_the_page_cannot_ask_is_not_exported(hub, tmp_path):
    unet, scheduler = tiny_stock_unet(), diffusers.DDPMScheduler()
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "stock")
    of_pairs = UNetModel(8, 1, 1, block_out_channels=(8,), layers_per_block=1, condition_channels=1)
    GuidedDiffusionPipeline(of_pairs, ExtDDIMScheduler()).save_pretrained(tmp_path / "pairs")
    push_folder(tmp_path / "stock", "alice/stock", token="hf_token_of_alice")
    for name, message in (
        ("nothing", "nothing is no folder here, and cannot be had from the Hub"),
        (str(tmp_path / "stock"), "the demo takes pipelines of diffusers_ext, got DDPMPipeline"),
        ("alice/stock", "the demo takes pipelines of diffusers_ext, got DDPMPipeline"),
        (str(tmp_path / "pairs"), "condition images, for which the demo has no field"),
        (str(EXAMPLE / "denoiser"), "must hold a pipeline, but has no model_index.json"),
    ):
        with pytest.raises(SystemExit, match=message):
            run([name, "--export", str(tmp_path / "space")])
        assert not (tmp_path / "space").exists()


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
