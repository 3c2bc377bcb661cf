"""Repositories, folders and files made by somebody who means harm: each is refused in a sentence, and nothing of it is run.

A case is a function that makes one and does with it what a user would. What it must not do is written down once: run code
(`CANARY`), write or remove anything beside its own folder, take more memory than a few pictures, or end in an error that
says nothing.
"""

import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoModel, DDPMPipeline, DDPMScheduler, DiffusionPipeline
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import save_file

from diffusers_ext import (
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    GuidedDiffusionPipeline,
    NoisyClassifierModel,
    TextGuidedDiffusionPipeline,
    UNetModel,
    VAEModel,
)
from diffusers_ext.data.latent_cache import load_vae, read_info
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.data.sources import load_source
from diffusers_ext.evaluation.feature_folders import load_features
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.hub.push import push_folder
from diffusers_ext.hub.remote_code import add_code
from diffusers_ext.hub.saved_folder import SavedFolder
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.options import parse_config
from diffusers_ext.recipes.text_encoder import load_text_encoder
from diffusers_ext.trainer.checkpoints import find_checkpoint
from diffusers_ext.trainer.config import TrainerConfig
from diffusers_ext.trainer.run_folder import clear_output_dir
from runs import trainer
from tiny import save_run, tiny_unet
from tiny_text import tiny_clip, tiny_text_unet, tiny_tokenizer


ALICE, BOB = "hf_token_of_alice", "hf_token_of_bob"
CANARY = Path(os.environ["HF_HOME"]) / "canary"
# Code that tells that it was run.
HARM = f"open({str(CANARY)!r}, 'w').close()\n"
MOST_MEMORY = 300 * 1024  # KiB beyond what the process has used before


class Harm:
    """Unpickling it is running it."""

    def __reduce__(self):
        return exec, (HARM,)


CASES = {}


def case(match, *parameters, **named):
    """Registers what is refused with an error of this text; with parameters, a case for each of them."""

    def register(function):
        for parameter in parameters or [None]:
            title = function.__name__.replace("_", " ") + (f" [{parameter}]" if parameters else "")
            CASES[title] = (function, match, () if parameter is None else (parameter,))
        return function

    return register


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saved pipelines, models, data and checkpoints that are as they should be, of which a case spoils one thing."""
    root = tmp_path_factory.mktemp("saved")
    save_run(root / "run")
    torch.manual_seed(0)
    vae = VAEModel(8, 1, 1, block_out_channels=(8, 8), latent_channels=2, scaling_factor=1.0)
    unet = UNetModel(4, 2, 2, block_out_channels=(8, 16), layers_per_block=1)
    GuidedDiffusionPipeline(unet, ExtDDIMScheduler(clip_sample=False), vae).save_pretrained(root / "latent")
    tokenizer = tiny_tokenizer()
    parts = {"tokenizer": tokenizer, "text_encoder": tiny_clip(tokenizer)}
    TextGuidedDiffusionPipeline(tiny_text_unet(), ExtDDIMScheduler(), **parts).save_pretrained(root / "texts")
    DDPMPipeline(unet=tiny_unet(), scheduler=DDPMScheduler()).save_pretrained(root / "stock")
    NoisyClassifierModel(8, 1, 2, block_out_channels=(8,)).save_pretrained(root / "classifier")
    FeatureClassifierModel(8, 1, 2, block_out_channels=(8,)).save_pretrained(root / "features")
    (root / "features" / "features.json").write_text("{}")
    run = trainer(prepare_images("digits", max_samples=8), root / "trained", max_train_steps=2)
    run.train()
    (root / "pictures").mkdir()
    for number in range(2):
        Image.new("L", (8, 8), number).save(root / "pictures" / f"{number}.png")
    return root


class Box:
    """A folder of the attacker's, and what lies beside it."""

    def __init__(self, saved, root, hub):
        self.saved, self.root, self.hub = saved, root, hub
        self.beside = root / "beside"
        self.beside.mkdir()
        save_file({"secret": torch.ones(2)}, self.beside / "secret.safetensors")
        Image.new("L", (8, 8)).save(self.beside / "secret.png")
        self.folder = root / "theirs"

    def take(self, name):
        """The folder, as a copy of what was saved under this name."""
        shutil.copytree(self.saved / name, self.folder)
        return self.folder

    def put(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def edit(self, name, **changes):
        """Changes entries of a JSON file of the folder."""
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def publish(self):
        """The folder as a repository, uploaded as it is; the name of the repository."""
        api = HfApi(token=ALICE)
        api.create_repo("alice/theirs")
        api.upload_folder(folder_path=self.folder, repo_id="alice/theirs")
        return "alice/theirs"

    def resign(self, checkpoint):
        """Makes the manifest of a checkpoint fit the files, which whoever changes them can do too."""
        import hashlib

        files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
        entries = {
            str(path.relative_to(checkpoint)): {
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        }
        (checkpoint / "manifest.json").write_text(json.dumps({"step": 2, "files": entries}))


def pickled():
    file = io.BytesIO()
    torch.save({"weight": Harm()}, file)
    return file.getvalue()


def nested(depth=100_000, start="[", end="]"):
    return start * depth + end * depth


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def png_of(width, height, data=b""):
    """A PNG that says to have so many pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def listing(folder, without):
    """Everything that lies beside the attacker's folder, with sizes."""
    return {
        str(path.relative_to(folder)): path.lstat().st_size if path.is_file() else None
        for path in sorted(folder.rglob("*"))
        if without not in (path, *path.parents)
    }


# Pickles, under each name that a loader looks for.


@case("Unable to load weights|Weights only load failed", "run/denoiser", "latent/vae", "classifier", "features")
def weights_of_a_model(box, name):
    box.take(name)
    (box.folder / "diffusion_pytorch_model.safetensors").unlink()
    box.put("diffusion_pytorch_model.bin", pickled())
    config = json.loads((box.folder / "config.json").read_text())
    known = (UNetModel, VAEModel, NoisyClassifierModel, FeatureClassifierModel)
    {each.__name__: each for each in known}[config["_class_name"]].from_pretrained(box.folder)


@case("Unable to load weights|Weights only load failed", "folder", "Hub")
def weights_of_a_component(box, where):
    box.take("run")
    (box.folder / "denoiser/diffusion_pytorch_model.safetensors").unlink()
    box.put("denoiser/diffusion_pytorch_model.bin", pickled())
    DiffusionPipeline.from_pretrained(box.folder if where == "folder" else box.publish())


@case("Unable to load weights|Weights only load failed")
def shards_of_weights(box):
    box.take("run/denoiser")
    (box.folder / "diffusion_pytorch_model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {"weight": "one-00001-of-00001.bin"}}
    box.put("diffusion_pytorch_model.bin.index.json", json.dumps(index))
    box.put("one-00001-of-00001.bin", pickled())
    UNetModel.from_pretrained(box.folder, use_safetensors=False)


@case("cannot be loaded: |Weights only load failed", "pipeline", "by itself", "trained with")
def weights_of_a_text_encoder(box, way):
    box.take("texts")
    (box.folder / "text_encoder/model.safetensors").unlink()
    box.put("text_encoder/pytorch_model.bin", pickled())
    if way == "pipeline":
        DiffusionPipeline.from_pretrained(box.folder)
    for path in (box.folder / "tokenizer").iterdir():
        shutil.copy(path, box.folder / "text_encoder")
    load_text_encoder(str(box.folder / "text_encoder" if way == "by itself" else box.folder))


@case("cannot be loaded as an autoencoder|Unable to load weights|Weights only load failed")
def weights_of_the_autoencoder_to_train_with(box):
    box.take("latent/vae")
    (box.folder / "diffusion_pytorch_model.safetensors").unlink()
    box.put("diffusion_pytorch_model.bin", pickled())
    load_vae(str(box.folder))


@case("Unable to load weights|Weights only load failed")
def weights_of_a_feature_classifier(box):
    box.take("features")
    (box.folder / "diffusion_pytorch_model.safetensors").unlink()
    box.put("diffusion_pytorch_model.bin", pickled())
    load_features(box.folder)


@case(
    "cannot be read",
    "model.safetensors",
    "pytorch_model.bin",
    "optimizer.bin",
    "average.safetensors",
)
def a_part_of_a_checkpoint(box, name):
    checkpoint = box.take("trained") / "checkpoint-2"
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    box.put(f"checkpoint-2/{name}", pickled())
    box.resign(checkpoint)
    settings = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    trainer(prepare_images("digits", max_samples=8), box.folder, **settings).train()


@case(None)
def random_states_of_a_checkpoint(box):
    """accelerate passes over what it cannot read; each step seeds its generators by its position."""
    checkpoint = box.take("trained") / "checkpoint-2"
    box.put("checkpoint-2/random_states_0.pkl", pickled())
    box.resign(checkpoint)
    settings = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    trainer(prepare_images("digits", max_samples=8), box.folder, **settings).train()


@case("cannot be loaded")
def a_shard_of_latents(box):
    box.folder.mkdir()
    box.put("train-00000-of-00001.parquet", pickled())
    load_source(str(box.folder), cache_dir=str(box.root / "cache"))


@case("allow_pickle=False")
def an_array_of_objects(box):
    from diffusers_ext.data.captions import EmbeddingTable

    box.folder.mkdir()
    np.save(box.folder / "states.mask.npy", np.array([Harm()], dtype=object), allow_pickle=True)
    EmbeddingTable(box.folder / "states.npy", in_memory=True, mask_padding=True)


# Names of classes and modules.


@case("must be of one of the libraries|does not exist", "folder", "Hub")
def a_module_that_lies_about(box, where):
    box.take("stock")
    (box.root / "lying_about.py").write_text(HARM)
    sys.path.insert(0, str(box.root))
    try:
        box.edit("model_index.json", unet=["lying_about", "UNet"])
        DiffusionPipeline.from_pretrained(box.folder if where == "folder" else box.publish())
    finally:
        sys.path.remove(str(box.root))
        sys.modules.pop("lying_about", None)


@case(
    "a component must|no class|does not exist|trust_remote_code=True",
    "diffusers.__loader__",
    "builtins.exec",
    "os.system",
    "subprocess.Popen",
    "diffusers.utils",
    "diffusers_ext.__builtins__",
    "diffusers_ext.__class__",
    "__main__.Path",
    "__main__.__loader__",
    "_pickle.Pickler",
    "_not_imported.Model",
    "..beside.secret",
    ".relative",
)
def a_component_of_another_kind(box, name):
    box.take("run")
    library, _, class_name = name.rpartition(".")
    box.edit("model_index.json", denoiser=[library, class_name])
    DiffusionPipeline.from_pretrained(box.folder)


LISTS = ("[]", '["pipeline"]', '["pipeline", "__loader__"]', '["../beside/pipeline", "Theirs"]', '["a", "b", "c"]')


@case("_class_name|class_name", "__loader__", "utils", "logging.os", "", "7", "null", *LISTS)
def a_pipeline_of_another_kind(box, name):
    box.take("run")
    value = json.loads(name) if name in ("7", "null", *LISTS) else name
    box.edit("model_index.json", _class_name=value)
    DiffusionPipeline.from_pretrained(box.folder)


@case("must name a class of pipelines under _class_name", "folder", "Hub")
def a_pipeline_without_a_class(box, where):
    box.take("run")
    index = json.loads((box.folder / "model_index.json").read_text())
    del index["_class_name"]
    box.put("model_index.json", json.dumps(index))
    DiffusionPipeline.from_pretrained(box.folder if where == "folder" else box.publish())


@case("trust_remote_code=True", "folder", "Hub", "says it itself")
def a_pipeline_with_code(box, where):
    box.take("stock")
    box.put("pipeline.py", HARM + "class Theirs: pass\n")
    box.edit("model_index.json", _class_name=["pipeline", "Theirs"])
    if where == "says it itself":
        box.edit("model_index.json", trust_remote_code=True, custom_pipeline="pipeline")
    DiffusionPipeline.from_pretrained(box.publish() if where == "Hub" else box.folder)


@case("trust_remote_code=True", "folder", "Hub")
def a_component_with_code(box, where):
    box.take("stock")
    box.put("unet/theirs.py", HARM + "class Theirs: pass\n")
    box.edit("model_index.json", unet=["theirs", "Theirs"])
    DiffusionPipeline.from_pretrained(box.publish() if where == "Hub" else box.folder)


@case("trust_remote_code=True", "unknown class", "known class")
def a_model_with_code(box, which):
    box.take("run/denoiser")
    box.put("theirs.py", HARM + "class Theirs: pass\n")
    name = "UNetModel" if which == "known class" else "Theirs"
    box.edit("config.json", auto_map={"AutoModel": "theirs.Theirs"}, trust_remote_code=True, _class_name=name)
    AutoModel.from_pretrained(box.folder)


@case("cannot be loaded", "folder", "Hub")
def a_text_encoder_with_code(box, where):
    box.take("texts/text_encoder")
    for path in (box.saved / "texts/tokenizer").iterdir():
        shutil.copy(path, box.folder)
    box.put("theirs.py", HARM + "class Theirs: pass\n")
    auto_map = {"AutoConfig": "theirs.Theirs", "AutoModel": "theirs.Theirs"}
    box.edit("config.json", auto_map=auto_map, model_type="theirs", trust_remote_code=True)
    load_text_encoder(box.publish() if where == "Hub" else str(box.folder))


@case("attn_implementation|attention|kernels|cannot be loaded")
def a_text_encoder_with_a_kernel_of_the_hub(box):
    box.take("texts/text_encoder")
    for path in (box.saved / "texts/tokenizer").iterdir():
        shutil.copy(path, box.folder)
    box.edit("config.json", _attn_implementation="alice/kernel", _attn_implementation_internal="alice/kernel")
    load_text_encoder(str(box.folder))


# Paths that leave the folder.

LEAVING = ("../beside/secret.safetensors", "ABSOLUTE", "..", "a/../../beside/secret.safetensors")


@case("must name shards in its own folder|path separator|parent-directory", *LEAVING)
def shards_of_another_folder(box, name):
    box.take("run")
    (box.folder / "denoiser/diffusion_pytorch_model.safetensors").unlink()
    name = name.replace("ABSOLUTE", str(box.beside / "secret.safetensors"))
    index = {"metadata": {"total_size": 1}, "weight_map": {"secret": name}}
    box.put("denoiser/diffusion_pytorch_model.safetensors.index.json", json.dumps(index))
    DiffusionPipeline.from_pretrained(box.folder)


@case("must name shards in its own folder", "pipeline", "by itself")
def shards_of_a_text_encoder_of_another_folder(box, way):
    """transformers 5.23 reads them from there."""
    box.take("texts")
    (box.folder / "text_encoder/model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {"secret": "../../beside/secret.safetensors"}}
    box.put("text_encoder/model.safetensors.index.json", json.dumps(index))
    if way == "pipeline":
        DiffusionPipeline.from_pretrained(box.folder)
    load_text_encoder(str(box.folder))


@case("must name components", "../beside", "ABSOLUTE", "..", "a\nb")
def a_component_in_another_folder(box, name):
    box.take("run")
    name = name.replace("ABSOLUTE", str(box.beside))
    box.edit("model_index.json", **{name: ["diffusers_ext", "UNetModel"]})
    for read in (SavedFolder.read, add_code):
        with pytest.raises(ValueError, match="must name components"):
            read(box.folder)
    clear_output_dir(box.folder)  # removes nothing that is not its own
    box.edit("config.json") if (box.folder / "config.json").exists() else None
    shutil.rmtree(box.folder)
    box.take("run")
    box.edit("model_index.json", **{name: ["diffusers_ext", "UNetModel"]})
    push_folder(box.folder, "alice/theirs", token=ALICE)


@case("is a link to", "file", "folder")
def a_link_that_would_be_uploaded(box, kind):
    box.take("run")
    if kind == "file":
        (box.folder / "notes.txt").symlink_to(box.beside / "secret.png")
    else:
        (box.folder / "notes").symlink_to(box.beside, target_is_directory=True)
        (box.folder / "more.png").symlink_to(box.folder / "notes" / "secret.png")
    push_folder(box.folder, "alice/theirs", token=ALICE)


@case("manifest.json cannot be read", "../../beside/secret.png", "ABSOLUTE")
def a_manifest_of_files_elsewhere(box, name):
    checkpoint = box.take("trained") / "checkpoint-2"
    name = name.replace("ABSOLUTE", str(box.beside / "secret.png"))
    entry = {"size": 1, "sha256": ""}
    box.edit("checkpoint-2/manifest.json", files={name: entry})
    find_checkpoint(checkpoint.parent, "checkpoint-2")


@case("must name files below its own folder", "../beside/secret.png", "ABSOLUTE", "http://a/b.png", "7")
def a_table_of_pictures_elsewhere(box, name):
    box.take("pictures")
    name = name.replace("ABSOLUTE", str(box.beside / "secret.png"))
    box.put("metadata.csv", f"file_name,label\n{name},a\n")
    load_source(str(box.folder), cache_dir=str(box.root / "cache"))


@case("must name files in ", "relative", "absolute")
def a_column_of_paths_elsewhere(box, kind):
    box.take("pictures")
    table = box.folder / "tables"
    table.mkdir()
    secret = "../beside/secret.png" if kind == "relative" else box.beside / "secret.png"
    for path in box.folder.glob("*.png"):
        path.rename(table / path.name)
    (box.folder / "rows.csv").write_text(f"file,label\ntables/0.png,a\n{secret},b\n")
    load_source(str(box.folder / "rows.csv"), cache_dir=str(box.root / "cache"))


@case("must name files in its own folder", "../../beside/x.arrow", "ABSOLUTE")
def a_saved_data_set_elsewhere(box, name):
    box.folder.mkdir()
    box.put("dataset_info.json", "{}")
    name = name.replace("ABSOLUTE", str(box.beside / "x.arrow"))
    box.put("state.json", json.dumps({"_data_files": [{"filename": name}]}))
    load_source(str(box.folder), cache_dir=str(box.root / "cache"))


@case("must name files in its own folder", "../beside", "ABSOLUTE")
def splits_of_a_saved_data_set_elsewhere(box, name):
    box.folder.mkdir()
    name = name.replace("ABSOLUTE", str(box.beside))
    box.put("dataset_dict.json", json.dumps({"splits": [name]}))
    load_source(str(box.folder), cache_dir=str(box.root / "cache"))


@case("must name files in its own folder", "../beside/*.png", "ABSOLUTE", "https://example.com/a.csv")
def a_declared_data_set_elsewhere(box, name):
    box.take("pictures")
    name = name.replace("ABSOLUTE", str(box.beside / "*.png"))
    config = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": name}]}]}
    box.put("README.md", f"---\n{yaml.safe_dump(config)}---\n")
    load_source(str(box.folder), cache_dir=str(box.root / "cache"))


@case(None)
def a_tar_with_members_that_leave(box):
    """They are read as names of samples, and unpacked nowhere."""
    box.folder.mkdir()
    with tarfile.open(box.folder / "train.tar", "w") as archive:
        for name in ("../beside/a.png", "/tmp/b.png"):
            content = (box.beside / "secret.png").read_bytes()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert len(load_source(str(box.folder), cache_dir=str(box.root / "cache"))) == 2


@case(None)
def a_zip_with_members_that_leave(box):
    box.folder.mkdir()
    with zipfile.ZipFile(box.folder / "train.zip", "w") as archive:
        archive.write(box.beside / "secret.png", "../beside/a.png")
        archive.write(box.beside / "secret.png", "/b.png")
    data = prepare_images(str(box.folder), cache_dir=str(box.root / "cache"))
    assert len(data) == 1  # the other is in a hidden folder, `..`


# Sizes.


@case(
    "must|has to be|at most",
    *[
        f"{name}={value}"
        for name, values in {
            "layers_per_block": ("1000000000", "-1", "1.5", '"many"', "NaN", "null"),
            "block_out_channels": ("[8, 1000000000]", "[-8]", "[]", "[[8]]", "8", '["8"]'),
            "in_channels": ("1000000000", "-3", "true"),
            "num_classes": ("1000000000000", "-1"),
            "sample_size": ("1e300", "-8", '"8"', "[8, 8, 8]"),
            "dims": ("3",),
            "dropout": ("NaN", "-1", "2"),
            "cross_attention_dim": ("1000000000000", "-1"),
        }.items()
        for value in values
    ],
)
def a_number_of_a_network(box, change):
    box.take("run/denoiser")
    name, _, value = change.partition("=")
    box.edit("config.json", **{name: json.loads(value)})
    UNetModel.from_pretrained(box.folder)


@case(
    "must",
    *[
        f"{name}={value}"
        for name, values in {
            "num_train_timesteps": ("1000000000000", "-1", "0", "1.5", '"many"', "NaN", "null", "true"),
            "beta_start": ("NaN", "-1", "2", '"a"', "1e999"),
            "beta_schedule": ('"__class__"', "7", "null"),
            "trained_betas": ("[2]", "[]", '["a"]', "[[0.1]]", '"a"', "[NaN]"),
            "prediction_type": ('"exec"', "null"),
            "steps_offset": ("-1", "1e9"),
            "clip_sample_range": ("NaN", "-1"),
            "timestep_spacing": ('"../"',),
        }.items()
        for value in values
    ],
)
def a_number_of_a_scheduler(box, change):
    box.take("run/scheduler")
    name, _, value = change.partition("=")
    box.edit("scheduler_config.json", **{name: json.loads(value)})
    ExtDDPMScheduler.from_pretrained(box.folder)


LIES = {
    "a header of 4 TB": safetensors({}, length=2**42),
    "a header of 99 MB": safetensors({}, length=99_000_000),
    "no JSON": safetensors(b"\xff" * 64),
    "deep nesting": safetensors(nested(50_000).encode()),
    "data that is not there": safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "a shape of 16 EB": safetensors(
        {"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "a shape below 0": safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, bytes(4)),
    "offsets that overlap": safetensors(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, bytes(4)
    ),
    "offsets below 0": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, bytes(4)),
    "an unknown type": safetensors({"a": {"dtype": "exec", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
}


@case("Unable to load weights|damaged|[Ee]rror|missing|keys", *LIES)
def weights_that_lie(box, which):
    box.take("run/denoiser")
    box.put("diffusion_pytorch_model.safetensors", LIES[which])
    with pytest.raises(ValueError, match="damaged"):
        SavedFolder.read(box.folder)
    UNetModel.from_pretrained(box.folder)


@case("must have at most|pixels|cannot be decoded|limit", "folder", "column", "zip")
def a_picture_of_many_pixels(box, where):
    box.folder.mkdir()
    bomb = png_of(60_000, 60_000, zlib.compress(bytes(1000)))
    if where == "folder":
        box.put("bomb.png", bomb)
    elif where == "zip":
        with zipfile.ZipFile(box.folder / "a.zip", "w") as archive:
            archive.writestr("bomb.png", bomb)
    else:
        table = datasets.Dataset.from_dict({"image": [{"bytes": bomb, "path": None}]})
        table.cast_column("image", datasets.Image()).to_parquet(box.folder / "train.parquet")
    prepare_images(str(box.folder), cache_dir=str(box.root / "cache"))


@case("would have .* bytes")
def a_zip_that_swells(box):
    box.folder.mkdir()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("bomb.png", b"x")
    data = bytearray(file.getvalue())
    at = data.rfind(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 2**32 - 2)  # the size that the list of members gives
    box.put("a.zip", bytes(data))
    prepare_images(str(box.folder), cache_dir=str(box.root / "cache"))


@case("at most")
def a_caption_without_end(box):
    box.take("pictures")
    with (box.folder / "0.txt").open("wb") as file:
        file.truncate(2**31)
    list(load_source(str(box.folder), cache_dir=str(box.root / "cache")))


# Texts that are read: JSON and YAML.

READERS = {
    "model_index.json": ("run", lambda box: DiffusionPipeline.from_pretrained(box.folder)),
    "denoiser/config.json": ("run", lambda box: UNetModel.from_pretrained(box.folder / "denoiser")),
    "scheduler/scheduler_config.json": ("run", lambda box: ExtDDPMScheduler.from_pretrained(box.folder / "scheduler")),
    "config.json": ("classifier", lambda box: NoisyClassifierModel.from_pretrained(box.folder)),
    "features.json": ("features", lambda box: load_features(box.folder)),
    "checkpoint-2/manifest.json": ("trained", lambda box: find_checkpoint(box.folder, "checkpoint-2")),
    "dataset_dict.json": ("pictures", lambda box: load_source(str(box.folder))),
    "0.json": ("pictures", lambda box: list(load_source(str(box.folder), cache_dir=str(box.root / "cache")))),
}
TEXTS = {
    "deep": nested().encode(),
    "deep objects": nested(100_000, '{"a":', "").encode(),
    "a list": b"[]",
    "a text": b'"a"',
    "not closed": b'{"a": ',
    "bytes": b"\xff\xfe\x00",
    "a huge integer": b'{"a": ' + b"9" * 100_000 + b"}",
    "empty": b"",
}


@case(
    "must be|must hold|must have|cannot be|is not valid|not a valid|complete|It looks like",
    *[f"{name}: {text}" for name in READERS for text in TEXTS if (name, text) != ("0.json", "a text")],
)
def a_json_file(box, which):
    name, _, text = which.partition(": ")
    base, read = READERS[name]
    box.take(base)
    box.put(name, TEXTS[text])
    read(box)


@case("must have at most|cannot be read|It looks like", *[name for name in READERS if name != "0.json"])
def a_json_file_without_end(box, name):
    base, read = READERS[name]
    box.take(base)
    with box.put(name, b"").open("wb") as file:
        file.truncate(2**32)
    read(box)


YAML = {
    "a tag": f"!!python/object/apply:builtins.exec [{json.dumps(HARM)}]\n",
    "a tag in a value": f"output_dir: !!python/object/apply:builtins.exec [{json.dumps(HARM)}]\n",
    "a new object": "output_dir: !!python/object/new:os.system [ls]\n",
    "a module": "output_dir: !!python/module:antigravity\n",
    "aliases of aliases": "a: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{y}: &{y} [{','.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)),
    "a mapping of itself": "&a\nb: *a\n",
    "deep": nested(5_000),
    "a list": "- 1\n",
    "bytes": "a: \x00",
    "dunder": "__class__: exec\n",
}


@case("2", *YAML)  # the code with which a command line that is refused ends
def options_of_a_script(box, which):
    box.folder.mkdir()
    path = box.put("options.yaml", YAML[which])
    parse_config(TrainerConfig, ["--config", str(path)])


@case("must|cannot be read|has no", *YAML)
def options_of_a_run(box, which):
    from diffusers_ext.evaluation.options import DataOptions, take_options_of_run

    box.folder.mkdir()
    box.put("train_config.yaml", YAML[which])
    take_options_of_run(DataOptions(), box.folder)


@case("must|cannot be read", *YAML)
def a_description_of_latents(box, which):
    box.folder.mkdir()
    box.put("latents.yaml", YAML[which])
    read_info(box.folder)


GOOD_INFO = {
    "dataset_name": "a",
    "dataset_config_name": None,
    "dataset_split": "train",
    "resolution": [8, 8],
    "resize_mode": "auto",
    "pad_value": 0,
    "image_mode": None,
    "max_train_samples": None,
    "label_column": None,
    "latent_shape": [2, 4, 4],
    "num_images": 3,
    "random_flip": False,
    "id2label": None,
    "vae": "a",
    "vae_fingerprint": "b",
}


@case(
    "latents.yaml",
    "latent_shape=[2, 4]",
    "latent_shape=[2, -4, 4]",
    "latent_shape=[2, 10000000000, 4]",
    "latent_shape=[2.5, 4, 4]",
    "resolution=7",
    "num_images=-1",
    "num_images=true",
    "vae=7",
    "vae=null",
    "random_flip=1",
    "__class__=1",
    "id2label=[1]",
)
def an_entry_of_a_description_of_latents(box, change):
    box.folder.mkdir()
    name, _, value = change.partition("=")
    box.put("latents.yaml", yaml.safe_dump({"splits": {"train": GOOD_INFO | {name: json.loads(value)}}}))
    read_info(box.folder)


@case("run_state.json", "__class__=1", "take_means=1", 'step="1"', "step=null", "losses=7", "num_images=[]")
def an_entry_of_the_state_of_a_run(box, change):
    checkpoint = box.take("trained") / "checkpoint-2"
    name, _, value = change.partition("=")
    box.edit("checkpoint-2/run_state.json", **{name: json.loads(value)})
    box.resign(checkpoint)
    settings = {"max_train_steps": 3, "resume_from_checkpoint": "latest"}
    trainer(prepare_images("digits", max_samples=8), box.folder, **settings).train()


@case("must name|must have")
def labels_of_another_kind(box):
    box.take("run")
    box.edit("model_index.json", id2label=[["a"]])
    push_folder(box.folder, "alice/theirs", token=ALICE)


@case(
    "no folder here|has no model_index.json",
    "../beside",
    "a/b/c",
    "a\nb",
    "--upload-pack=x",
    "file:///etc/passwd",
    "a b",
)
def the_name_of_a_pipeline(box, name):
    load_pipeline(name)


# The matrix.


# The last is torch's, with a sentence of its own, where diffusers has transformers load a component.
CLEAR = (ValueError, OSError, pickle.UnpicklingError)


@pytest.mark.parametrize("title", CASES)
def test_is_refused_in_a_sentence_and_does_no_harm(title, saved, hub, tmp_path, capsys, monkeypatch):
    act, match, parameters = CASES[title]
    box = Box(saved, tmp_path, hub)
    monkeypatch.chdir(box.beside)
    CANARY.unlink(missing_ok=True)
    before = listing(tmp_path, without=box.folder)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if match is None:
        act(box, *parameters)
    else:
        with pytest.raises((*CLEAR, SystemExit)) as error:
            act(box, *parameters)
        assert re.search(match, str(error.value)), str(error.value)
        assert " " in str(error.value) or isinstance(error.value, SystemExit)
    assert not CANARY.exists(), "code of theirs was run"
    own = ("cache", "lying_about.py")
    after = listing(tmp_path, without=box.folder)
    assert {name: size for name, size in after.items() if not name.startswith(own)} == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MOST_MEMORY


def test_the_matrix_is_large_enough():
    assert len({act.__name__ for act, _, _ in CASES.values()}) >= 30
