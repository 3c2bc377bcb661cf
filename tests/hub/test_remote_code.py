"""What is saved loads with the package and without it, from a folder and from the Hub, and in parts."""

import ast
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoModel, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import save_file

import diffusers_ext
from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, TextGuidedDiffusionPipeline, UNetModel, VAEModel
from diffusers_ext.hub import remote_code
from diffusers_ext.hub.push import push_folder
from diffusers_ext.hub.remote_code import ForeignParts, add_code, code_of_component, code_of_pipeline
from environment import HUNG_AFTER
from tiny import ROUNDING, assert_same_output, assert_same_weights, image_of, tiny_unet
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer


sys.path.insert(0, str(Path(__file__).parent))
import loading_process


ALICE = "hf_token_of_alice"


def latent_pipeline():
    torch.manual_seed(0)
    unet = UNetModel(sample_size=4, in_channels=2, out_channels=2, block_out_channels=(8, 16), layers_per_block=1)
    vae = VAEModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), latent_channels=2, scaling_factor=1.7
    )
    for parameter in [*unet.parameters(), *vae.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    return GuidedDiffusionPipeline(unet, ExtDDIMScheduler(clip_sample=False), vae)


@pytest.fixture(scope="module")
def pipeline():
    return latent_pipeline()


@pytest.fixture
def folders(pipeline, tmp_path):
    """The pipeline with weights in float32 and a variant beside them, and in shards."""
    folders = tmp_path / "variants", tmp_path / "sharded"
    pipeline.save_pretrained(folders[1], max_shard_size="10KB")
    assert (folders[1] / "denoiser" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    pipeline.save_pretrained(folders[0])
    latent_pipeline().to(torch.bfloat16).save_pretrained(folders[0], variant="bf16")
    for folder in folders:
        save_file(pipeline.denoiser.state_dict(), folder / "expected.safetensors")
        np.save(folder / "expected.npy", image_of(pipeline))
    return folders


def load_without_package(tmp_path, *names):
    """In a process with an empty cache, which takes seconds to start: all that is claimed of such a one is tried in it."""
    environment = os.environ | {
        "HF_HOME": tempfile.mkdtemp(dir=tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, loading_process.__file__, *map(str, names)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HUNG_AFTER)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_every_part_loads_in_every_way(hub, folders, pipeline, tmp_path, capfd):
    """Where the package is imported, and where it is not installed."""
    repos = []
    for folder in folders:
        push_folder(folder, f"alice/{folder.name}", token=ALICE)
        repos += [f"alice/{folder.name}", str(folder)]
    parts = save_parts(tmp_path / "parts")
    for way, package in (("package", "diffusers_ext"), ("code", remote_code.package_name())):
        capfd.readouterr()
        if way == "package":
            found = loading_process.load_all(way, [*zip(repos[::2], repos[1::2], strict=True)])
            printed = capfd.readouterr().err
        else:
            found, printed = load_without_package(tmp_path, tmp_path / "parts", *repos)
        assert len(found) == 2 * (9 + 7)
        for name, loaded in found.items():
            assert loaded.get("package", package) == package, name
            assert not loaded.get("wrong tensors") and loaded.get("same config", True), name
            assert loaded.get("image", 0) < ROUNDING[torch.float32], name
            if way == "code" and name.endswith("without consent"):  # the file that it names says what to install
                assert (
                    "custom code in pipeline.py" in loaded["refused"] and "trust_remote_code=True" in loaded["refused"]
                )
        classes = {
            "GuidedDiffusionPipeline",
            "GuidedDiffusionBlocks",
            "UNetModel",
            "VAEModel",
            "ExtDDIMScheduler",
            None,
        }
        assert {loaded.get("class") for loaded in found.values()} == classes
        # No file is missed, no import unknown, no key of a config unexpected.
        for word in ("might require", "Could not locate", "not expected"):
            assert word not in printed, printed
        again = folders[-1].with_name(f"{folders[-1].name}-again")
        for name in ("pipeline.py", "vae/diffusers_ext.py"):
            assert (again / name).read_bytes() == (folders[-1] / name).read_bytes()
        indices = [json.loads((each / "model_index.json").read_text()) for each in (again, folders[-1])]
        assert indices[0] | {"_name_or_path": 0} == indices[1] | {"_name_or_path": 0}
        assert_same_weights(GuidedDiffusionPipeline.from_pretrained(again).denoiser, pipeline.denoiser)
    check_parts(tmp_path / "parts", parts)


def save_parts(folder):
    """A pipeline of diffusers, a model by itself, and a pipeline of texts, which is returned.

    Whatever loads the parts of a pipeline of diffusers loads `pipeline.py` for the class, and nothing else of it. The
    pipeline of texts has the tokenizer and the text encoder of transformers.
    """
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()).save_pretrained(folder / "stock")
    add_code(folder / "stock")
    tiny_unet().save_pretrained(folder / "unet")
    push_folder(folder / "unet", "alice/unet", token=ALICE)
    tokenizer = tiny_tokenizer()
    parts = {"tokenizer": tokenizer, "text_encoder": tiny_clip(tokenizer)}
    texts = TextGuidedDiffusionPipeline(tiny_text_unet(), ExtDDIMScheduler(), **parts)
    texts.save_pretrained(folder / "texts")
    return texts


def check_parts(folder, texts):
    """What was loaded by the code and saved again is what it was, and loads as a class of this package."""
    assert_same_weights(UNetModel.from_pretrained(folder / "stock" / "again"), tiny_unet())
    assert type(DiffusionPipeline.from_pretrained(folder / "stock").unet) is UNetModel
    for name in (folder / "again", "alice/unet"):
        assert_same_weights(UNetModel.from_pretrained(name), tiny_unet())
        model = AutoModel.from_pretrained(str(name))
        assert type(model) is UNetModel and "auto_map" not in model.config
    expected = texts("a", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert_same_output(np.load(folder / "images.npy"), expected)


# The code.


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    """`pipeline.py` as a module."""
    file = tmp_path_factory.mktemp("code") / "pipeline.py"
    file.write_text(code_of_pipeline(), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("pipeline_of_a_repository", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_code_is_that_of_every_exported_class(bundled):
    """With comments; only the imports of this package are relative."""
    for name, cls in remote_code.public_classes().items():
        assert getattr(diffusers_ext, name) is cls
        theirs = getattr(bundled, name)
        assert theirs is not cls and theirs.__module__.partition(".")[2] == cls.__module__.partition(".")[2]
        # A module by its lines: of the imports, those of the package are relative.
        lines = [inspect.getsource(sys.modules[each.__module__]).splitlines() for each in (theirs, cls)]
        assert [re.sub(r"from \.+ ", "from diffusers_ext.", line) for line in lines[0]] == lines[1]
    assert {"UNetModel", "ExtDDIMScheduler", "GuidedDiffusionPipeline"} <= remote_code.public_classes().keys()


def test_code_begins_with_licence_version_and_how_to_load():
    for text in (code_of_pipeline(), code_of_component()):
        head = text[:900]
        for part in ("Apache License, Version 2.0", diffusers_ext.__version__, "`pip install diffusers_ext`"):
            assert part in head
        assert "`import diffusers_ext`" in head and "trust_remote_code=True" in head and ast.parse(text)


def test_code_is_one_file_to_diffusers(bundled):
    """It copies the files of relative imports, and warns of modules that it cannot import."""
    assert dynamic_modules_utils.check_imports(bundled.__file__) == []
    names = {"torch", "diffusers", "numpy", "PIL", "transformers", "importlib", "sys"}
    assert "diffusers_ext" not in re.findall(r"^\s*(?:import|from)\s+(\w+)", code_of_pipeline(), flags=re.MULTILINE)
    assert names <= set(re.findall(r"^(?:import|from)\s+(\w+)", code_of_pipeline(), flags=re.MULTILINE))


@pytest.mark.parametrize(
    "text, message",
    [
        ("import diffusers_ext.draws\n", "must import from the modules of diffusers_ext"),
        ("from diffusers_ext import UNetModel\n", "must not import from diffusers_ext itself"),
        ("TEXT = '''text'''\n", "must write its texts with double quotes"),
    ],
)
def test_a_module_that_cannot_be_moved_is_named(monkeypatch, text, message):
    source = remote_code._own_source
    monkeypatch.setattr(remote_code, "_own_source", lambda name: text if name == "draws" else source(name))
    with pytest.raises(ValueError, match=f"draws {message}"):
        code_of_pipeline.__wrapped__()


# Which folders have it.


def test_a_pipeline_with_parts_of_others_is_saved_without_code(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(diffusers.utils.logging.get_logger("diffusers_ext"), "propagate", True)
    theirs = type("TheirUNet", (UNetModel,), {"__module__": "their_library.models"})
    model = theirs(**tiny_unet().config)
    GuidedDiffusionPipeline(model, ExtDDIMScheduler()).save_pretrained(tmp_path)
    assert "since its denoiser is a TheirUNet of their_library.models, whose code is not saved with it" in caplog.text
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "GuidedDiffusionPipeline"
    assert not [*tmp_path.rglob("*.py")]
    with pytest.raises(ForeignParts):
        add_code(tmp_path)


def test_a_folder_of_diffusers_stays_as_it_is(tmp_path):
    DDPMPipeline(unet=tiny_stock(), scheduler=DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    tiny_stock().save_pretrained(tmp_path / "model")
    for folder in (tmp_path / "pipeline", tmp_path / "model", tmp_path):
        assert remote_code.files_with_code(folder) == {}


def tiny_stock():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(8, 1, 1, **blocks, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
