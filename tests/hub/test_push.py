import subprocess
import sys

import diffusers
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

import diffusers_ext
from diffusers_ext import GuidedDiffusionPipeline
from diffusers_ext.hub.cards import write_card
from diffusers_ext.hub.push import prepare_repo, push_folder
from diffusers_ext.hub.saved_folder import loading_lines
from tiny import assert_same_pipeline, assert_same_weights, save_run, tiny_unet


ALICE, BOB = "hf_token_of_alice", "hf_token_of_bob"


@pytest.fixture
def folder(tmp_path):
    return save_run(tmp_path / "my-digits")


@pytest.mark.parametrize("library", [diffusers, diffusers_ext])
def test_pushed_pipeline_loads_from_the_hub(hub, folder, library):
    push_folder(folder, "alice/my-digits", token=ALICE)
    pulled = library.DiffusionPipeline.from_pretrained("alice/my-digits")
    assert_same_pipeline(pulled, GuidedDiffusionPipeline.from_pretrained(folder))


def test_push_is_one_commit_of_the_pipeline_alone(hub, folder):
    write_card(folder, data="Digits.", repo_id="alice/my-digits")
    address = push_folder(folder, "my-digits", token=ALICE, commit_message="Upload digits")
    assert hub.titles("alice/my-digits") == ["initial commit", "Upload digits"]
    assert address.startswith(f"{hub.url}/alice/my-digits/commit/")

    uploaded = hub.files("alice/my-digits")
    assert set(uploaded) == {
        ".gitattributes",
        "README.md",
        "metrics.jsonl",
        "model_index.json",
        "samples.png",
        "scheduler/scheduler_config.json",
        "denoiser/config.json",
        "denoiser/diffusion_pytorch_model.safetensors",
    }
    for name in set(uploaded) - {".gitattributes"}:
        assert uploaded[name] == (folder / name).read_bytes()


def test_second_push_leaves_no_stale_weights(hub, folder):
    pipeline = GuidedDiffusionPipeline.from_pretrained(folder)
    push_folder(folder, "alice/my-digits", token=ALICE)
    HfApi(token=ALICE).upload_file(path_or_fileobj=b"notes", path_in_repo="notes.md", repo_id="alice/my-digits")
    (folder / "denoiser" / "diffusion_pytorch_model.safetensors").unlink()
    pipeline.denoiser.save_pretrained(folder / "denoiser", max_shard_size="10KB")
    push_folder(folder, "alice/my-digits", token=ALICE)

    weights = [name for name in hub.files("alice/my-digits") if name.startswith("denoiser/diffusion_pytorch_model")]
    assert len(weights) > 2 and "denoiser/diffusion_pytorch_model.safetensors" not in weights
    assert hub.files("alice/my-digits")["notes.md"] == b"notes"  # what is not part of a component stays
    assert_same_pipeline(diffusers.DiffusionPipeline.from_pretrained("alice/my-digits"), pipeline)


def test_pushing_the_same_again_makes_no_commit(hub, folder):
    push_folder(folder, "alice/my-digits", token=ALICE)
    push_folder(folder, "alice/my-digits", token=ALICE)
    assert len(hub.titles("alice/my-digits")) == 2


def test_private_repo_is_its_owners_alone(hub, folder):
    push_folder(folder, "alice/secret", token=ALICE, private=True)
    pulled = diffusers.DiffusionPipeline.from_pretrained("alice/secret", token=ALICE)
    assert type(pulled) is GuidedDiffusionPipeline
    for token in (BOB, False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("alice/secret")


def test_token_is_taken_from_the_environment(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", ALICE)
    assert prepare_repo("my-digits") == "alice/my-digits"


def test_refuses_to_publish_what_should_be_private(hub, folder):
    prepare_repo("alice/my-digits", token=ALICE)
    with pytest.raises(ValueError, match="'alice/my-digits' exists and is public, but private=True was asked for"):
        push_folder(folder, "alice/my-digits", token=ALICE, private=True)
    assert hub.titles("alice/my-digits") == ["initial commit"]


def test_push_errors_name_the_cause(hub, folder):
    with pytest.raises(PermissionError, match="there is none: pass `token`, set the environment variable HF_TOKEN"):
        push_folder(folder, "alice/my-digits")
    with pytest.raises(PermissionError, match="does not accept the access token for 'alice/my-digits'"):
        push_folder(folder, "alice/my-digits", token="hf_mistyped")
    with pytest.raises(PermissionError, match="gives no right to write to 'alice/my-digits'"):
        push_folder(folder, "alice/my-digits", token=BOB)
    for repo_id in ("a/b/c", "alice/my digits", "alice/x--y", ""):
        with pytest.raises(ValueError, match="a repo id must be 'name' or 'namespace/name'"):
            push_folder(folder, repo_id, token=ALICE)
    assert hub.repos == {}


def test_no_right_to_write_to_a_repo_that_exists(hub, folder):
    prepare_repo("alice/my-digits", token=ALICE)
    with pytest.raises(PermissionError, match="gives no right to write to 'alice/my-digits'"):
        push_folder(folder, "alice/my-digits", token=BOB)
    assert hub.titles("alice/my-digits") == ["initial commit"]


def test_a_broken_folder_is_not_pushed(hub, folder, tmp_path):
    with pytest.raises(ValueError, match="has no model_index.json"):
        push_folder(tmp_path, "alice/my-digits", token=ALICE)
    weights = folder / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors' is damaged"):
        push_folder(folder, "alice/my-digits", token=ALICE)
    for file in (folder / "scheduler").iterdir():
        file.unlink()
    (folder / "scheduler").rmdir()
    weights.unlink()
    with pytest.raises(ValueError, match="names the component 'scheduler', but has no such folder"):
        push_folder(folder, "alice/my-digits", token=ALICE)
    assert hub.repos == {}


def test_loading_lines_run_as_they_stand(hub, folder):
    push_folder(folder, "alice/my-digits", token=ALICE)
    for name in (folder, "alice/my-digits"):
        code = loading_lines(name) + "\nprint(type(pipeline).__name__)"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert result.stdout == "GuidedDiffusionPipeline\n"


def test_a_model_by_itself_is_pushed_and_loads(hub, tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    push_folder(tmp_path, "alice/unet", token=ALICE)
    assert hub.titles("alice/unet") == ["initial commit", "Upload the model"]
    namespace = {}
    exec(loading_lines("alice/unet", "UNetModel"), namespace)
    assert_same_weights(namespace["model"], tiny_unet())
