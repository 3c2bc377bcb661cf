import json

import diffusers
import pytest
import torch
from diffusers import ModularPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

import diffusers_ext
from diffusers_ext import GuidedDiffusionPipeline
from diffusers_ext.hub.__main__ import main
from diffusers_ext.hub.cards import write_card
from diffusers_ext.hub.push import prepare_repo, push_folder, push_patiently
from diffusers_ext.hub.remote_code import code_of_pipeline
from diffusers_ext.hub.saved_folder import loading_lines
from tiny import assert_same_pipeline, assert_same_weights, save_run, tiny_stock_unet, tiny_unet


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
        "modular_config.json",
        "modular_model_index.json",
        "pipeline.py",
        "samples.png",
        "scheduler/diffusers_ext.py",
        "scheduler/scheduler_config.json",
        "denoiser/config.json",
        "denoiser/diffusers_ext.py",
        "denoiser/diffusion_pytorch_model.safetensors",
    }
    for name in set(uploaded) - {".gitattributes", "modular_model_index.json"}:
        assert uploaded[name] == (folder / name).read_bytes()
    # From where diffusers loads the components of a modular pipeline: a folder can be moved and names none.
    assert weights_of_index(uploaded["modular_model_index.json"]) == ("alice/my-digits", None)
    assert weights_of_index((folder / "modular_model_index.json").read_bytes()) == (None, None)


def weights_of_index(content):
    spec = json.loads(content)["denoiser"][2]
    return spec["pretrained_model_name_or_path"], spec["revision"]


def test_a_branch_has_its_own_components_in_a_modular_pipeline_too(hub, folder):
    push_folder(folder, "alice/my-digits", token=ALICE)
    pipe = GuidedDiffusionPipeline.from_pretrained(folder)
    torch.nn.init.zeros_(pipe.denoiser.conv_out.weight)
    pipe.denoiser.save_pretrained(folder / "denoiser")
    push_folder(folder, "alice/my-digits", token=ALICE, branch="later")
    for branch, is_zero in (("main", False), ("later", True)):
        modular = ModularPipeline.from_pretrained("alice/my-digits", revision=branch)
        modular.load_components()
        assert bool((modular.denoiser.conv_out.weight == 0).all()) == is_zero


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
    names = ("alice/my-digits", folder)
    for name in names:
        lines, namespace = loading_lines(name), {}
        assert lines.startswith("import diffusers_ext\n")  # which is all that a new process needs, see test_loading.py
        exec(lines, namespace)
        assert type(namespace["pipeline"]) is GuidedDiffusionPipeline


def test_a_model_by_itself_is_pushed_and_loads(hub, tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    push_folder(tmp_path, "alice/unet", token=ALICE)
    assert hub.titles("alice/unet") == ["initial commit", "Upload the model"]
    namespace = {}
    exec(loading_lines("alice/unet", "UNetModel"), namespace)
    assert_same_weights(namespace["model"], tiny_unet())


# What fails.


def test_a_push_cut_at_any_request_leaves_what_was_there(hub, folder):
    """All requests from some number on are refused: the commit, which is one of them, is made or is not."""
    push_folder(folder, "alice/my-digits", token=ALICE)
    before = hub.files("alice/my-digits")
    pipeline = GuidedDiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        next(pipeline.denoiser.parameters()).add_(1)
    pipeline.save_pretrained(folder)
    for branch in (None, "half-way"):
        for last in range(100):
            hub.requests.clear()
            hub.lfs.clear()
            hub.refuse = lambda number, path, last=last: 418 if number >= last else None
            try:
                push_folder(folder, "alice/my-digits", token=ALICE, branch=branch)
                break
            except (HfHubHTTPError, ConnectionError):
                hub.refuse = lambda number, path: None
                assert hub.files("alice/my-digits") == before
        assert 5 < last < 20
        assert hub.files("alice/my-digits", branch=branch or "main") != before
        hub.refuse = lambda number, path: None
        push_folder(save_run(folder.parent / f"first for {branch}"), "alice/my-digits", token=ALICE)
        assert hub.files("alice/my-digits") == before


def test_a_branch_that_is_made_for_a_push_that_fails_goes_again(hub, folder):
    push_folder(folder, "alice/my-digits", token=ALICE)
    repo = hub.repos["model", "alice/my-digits"]
    (folder / "metrics.jsonl").write_text("")
    made = []

    def refuse(number, path):
        made.extend(repo.branches)
        return 418 if "/commit/" in path else None

    hub.refuse = refuse
    with pytest.raises(HfHubHTTPError):
        push_folder(folder, "alice/my-digits", token=ALICE, branch="half-way")
    assert "half-way" in made and set(repo.branches) == {"main"}


@pytest.mark.parametrize("status", [500, 429])
def test_an_upload_that_fails_at_any_request_is_tried_again(hub, folder, status):
    count = None
    for failing in range(100):
        hub.repos.clear()
        hub.requests.clear()
        hub.refuse = lambda number, path, failing=failing: status if number == failing else None
        address, line = push_patiently(folder, "alice/my-digits", token=ALICE, waits=(0, 0))
        assert address and not line
        assert set(hub.files("alice/my-digits")) > {"model_index.json", "pipeline.py"}
        if failing >= len(hub.requests):
            break
        count = failing
    assert count > 4


def test_a_push_that_cannot_be_made_says_how_to_make_it_later(hub, folder):
    waited = []
    hub.refuse = lambda number, path: 503
    address, line = push_patiently(
        folder, "alice/my-digits", token=ALICE, branch="step-10", private=True, sleep=waited.append
    )
    assert address is None and waited == sorted(waited) and len(waited) == 4
    assert line.startswith("not pushed to alice/my-digits (")
    assert line.endswith(f"python -m diffusers_ext.hub push {folder} alice/my-digits --branch step-10 --private")
    hub.refuse = lambda number, path: None
    for token, folder_ in ((BOB, folder), (ALICE, folder / "nowhere"), (None, folder)):
        address, line = push_patiently(folder_, "alice/my-digits", token=token, sleep=waited.append)
        assert address is None and "not pushed" in line
    assert len(waited) == 4  # what no second try can mend is tried once


# The command.


def test_command_pushes_with_the_token_of_the_environment(hub, folder, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", ALICE)
    main(["push", str(folder), "my-digits", "--private", "--message", "Upload digits"])
    assert capsys.readouterr().out.startswith(f"pushed to {hub.url}/alice/my-digits/commit/")
    assert hub.repos["model", "alice/my-digits"].private and hub.titles("alice/my-digits")[-1] == "Upload digits"
    main(["push", str(folder), "my-digits", "--branch", "step-10"])
    assert "model_index.json" in hub.files("alice/my-digits", branch="step-10")


def test_command_says_in_a_line_what_is_wrong(hub, folder, monkeypatch, capsys):
    for arguments, message in (
        (["push", str(folder), "my-digits"], "there is none: pass `token`, set the environment variable HF_TOKEN"),
        (["push", str(folder / "nowhere"), "my-digits"], "must hold a saved pipeline or model"),
        (["push", str(folder), "a/b/c"], "a repo id must be"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(arguments)
    for arguments in (["push", str(folder), "my-digits", "--token", ALICE], [], ["pull"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)


def test_command_writes_code_into_a_folder(tmp_path, capsys):
    tiny_unet().save_pretrained(tmp_path)
    main(["code", str(tmp_path)])
    assert capsys.readouterr().out == f"written to {tmp_path}: modeling_diffusers_ext.py\n"
    assert (tmp_path / "modeling_diffusers_ext.py").read_text() == code_of_pipeline()
    tiny_stock_unet().save_pretrained(tmp_path / "stock")
    main(["code", str(tmp_path / "stock")])
    assert "holds nothing of diffusers_ext" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for name in ("empty", "mistyped"):
        with pytest.raises(SystemExit, match=f"{name} must be a folder of a saved pipeline or model"):
            main(["code", str(tmp_path / name)])
