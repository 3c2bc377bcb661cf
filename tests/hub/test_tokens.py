"""Who may read and write what: with a token, without one, with that of somebody else, and with none that there is."""

import os
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

import diffusers_ext
from diffusers_ext import UNetModel
from diffusers_ext.data.sources import load_source
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.hub.push import push_folder, push_patiently
from diffusers_ext.recipes.text_encoder import load_text_encoder
from tiny import save_run


ALICE, BOB, WRONG = "hf_token_of_alice", "hf_token_of_bob", "hf_token_of_nobody"


@pytest.fixture
def private(hub, tmp_path, monkeypatch):
    """A private pipeline and a private data set of alice."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    push_folder(save_run(tmp_path / "run"), "alice/for-herself", token=ALICE, private=True)
    api = HfApi(token=ALICE)
    api.create_repo("alice/pictures", repo_type="dataset", private=True)
    table = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"value": [1, 2]}).to_parquet(table)
    api.upload_file(path_or_fileobj=table, path_in_repo="train.parquet", repo_id="alice/pictures", repo_type="dataset")
    return tmp_path


READERS = {
    "pipeline": lambda: DiffusionPipeline.from_pretrained("alice/for-herself"),
    "pipeline to measure": lambda: load_pipeline("alice/for-herself"),
    "model": lambda: UNetModel.from_pretrained("alice/for-herself", subfolder="denoiser"),
    "data set": lambda: load_source("alice/pictures"),
    "text encoder": lambda: load_text_encoder("alice/for-herself"),
}


@pytest.mark.parametrize("token", [None, BOB, WRONG])
def test_a_private_repository_is_refused_to_others_and_nothing_of_it_is_kept(private, monkeypatch, token):
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    for name, read in READERS.items():
        with pytest.raises((OSError, ValueError)) as error:
            read()
        assert "for-herself" in str(error.value) or "pictures" in str(error.value), name
        assert token is None or token not in str(error.value), name
    cached = [path for path in Path(os.environ["HF_HOME"]).rglob("*") if path.is_file()]
    assert not [
        path for path in cached if "alice--for-herself" in str(path) and path.suffix in (".json", ".safetensors")
    ]


def test_its_owner_reads_it_by_the_token_of_the_environment(private, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", ALICE)
    assert torch.is_tensor(READERS["model"]().conv_out.weight)
    assert isinstance(READERS["pipeline to measure"](), diffusers_ext.GuidedDiffusionPipeline)
    assert len(READERS["data set"]()) == 2


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "there is none: pass `token`"), (BOB, "gives no right to write"), (WRONG, "does not accept")],
)
def test_nobody_else_writes_to_a_repository(private, hub, token, message):
    """By which what was there stays, and no second try is made of what cannot succeed."""
    before = hub.files("alice/for-herself")
    with pytest.raises(PermissionError, match=message):
        push_folder(private / "run", "alice/for-herself", token=token)
    address, line = push_patiently(
        private / "run", "alice/for-herself", token=token, sleep=lambda seconds: pytest.fail()
    )
    assert address is None and message in line
    assert hub.files("alice/for-herself") == before and len(hub.titles("alice/for-herself")) == 2


def test_a_token_is_written_nowhere(private, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", ALICE)
    push_folder(private / "run", "alice/for-herself", branch="more")
    READERS["pipeline to measure"]()
    files = [path for root in (private, Path(os.environ["HF_HOME"])) for path in root.rglob("*") if path.is_file()]
    assert not [path for path in files if ALICE.encode() in path.read_bytes()]
