import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image

import diffusers_ext
from diffusers_ext import ExtDDPMScheduler, GuidedDiffusionPipeline
from diffusers_ext.hub import (
    Figure,
    TrainingRun,
    add_figures,
    describe_machine,
    loading_lines,
    prepare_repo,
    push_folder,
    source_commit,
    write_card,
)
from tiny import image_of, tiny_unet


ALICE, BOB = "hf_token_of_alice", "hf_token_of_bob"
FIGURE = Figure(
    "Fréchet distance, digits classifier", 1.23456, 1000, "ExtDDIMScheduler", 50, "python evaluate.py runs/x"
)


@pytest.fixture
def folder(tmp_path):
    """A saved pipeline, with what a training run leaves beside it."""
    folder = tmp_path / "my-digits"
    scheduler = ExtDDPMScheduler(timestep_spacing="trailing")
    pipeline = GuidedDiffusionPipeline(tiny_unet(num_classes=2), scheduler, id2label={0: "zero", 1: "one"})
    pipeline.save_pretrained(folder)
    (folder / "checkpoint-10" / "denoiser").mkdir(parents=True)
    (folder / "checkpoint-10" / "denoiser" / "model.safetensors").write_bytes(b"training state")
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_bytes(b"tensorboard")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    Image.new("L", (8, 8)).save(folder / "samples.png")
    return folder


# The card.


def test_card_says_what_is_known(folder):
    run = TrainingRun(
        "train.py --x", "0123abcd", seed=3, num_steps=400, seconds=200.4, hardware="2 CPU cores", options_file="o.yaml"
    )
    path = write_card(
        folder,
        data="Handwritten digits.",
        training=run,
        figures=[FIGURE],
        sample_grid=folder / "samples.png",
        repo_id="alice/my-digits",
        dataset_id="alice/digits",
        license="mit",
        tags=["ddpm"],
    )
    text = path.read_text(encoding="utf-8")
    for section in ("Overview", "Data", "Training", "Results", "Use", "Limitations"):
        assert f"\n## {section}\n\n" in text
    assert "![Samples](samples.png)" in text
    assert "| Commit | 0123abcd |\n| Seed | 3 |\n| Optimizer steps | 400 |\n| Time | 3 min 20 s |\n" in text
    assert "```bash\ntrain.py --x\n```\n\nEvery option is in [o.yaml](o.yaml).\n" in text
    assert "| Fréchet distance, digits classifier | 1.235 | 1000 | ExtDDIMScheduler | 50 |\n" in text
    assert "```bash\npython evaluate.py runs/x\n```" in text
    assert f"```python\n{loading_lines('alice/my-digits')}\n```" in text

    data = ModelCard.load(path).data
    assert (data.license, data.library_name, data.datasets) == ("mit", "diffusers", "alice/digits")
    assert data.tags == ["diffusers", "diffusers_ext", "ddpm"]
    [result] = data.eval_results
    assert (result.metric_name, result.metric_value) == (FIGURE.metric, FIGURE.value)


def test_figures_can_be_added_later_and_again(folder):
    """A card that gets its figures afterwards is the card that had them from the start."""
    keywords = {"data": "Digits.", "training": TrainingRun("train.py --x", seed=3), "dataset_id": "alice/digits"}
    expected = write_card(folder, figures=[FIGURE], **keywords).read_text(encoding="utf-8")
    other = Figure("precision", 0.5, 10, "DDIMScheduler", 5, "evaluate.py other")
    for figures in ([], [other]):
        path = write_card(folder, figures=figures, **keywords)
        assert add_figures(folder, [FIGURE]) == path
        assert path.read_text(encoding="utf-8") == expected


def test_figures_need_a_card_of_ours(folder):
    with pytest.raises(FileNotFoundError, match="write the card by write_card first"):
        add_figures(folder / "nowhere", [FIGURE])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    with pytest.raises(ValueError, match="has no section '## Results' followed by '## Use'"):
        add_figures(folder, [FIGURE])
    assert (folder / "README.md").read_text() == "---\nlicense: mit\n---\n# Mine\n"


def test_card_counts_the_parameters_of_each_component(folder):
    expected = sum(parameter.numel() for parameter in tiny_unet(num_classes=2).parameters())
    text = write_card(folder, data="Digits.").read_text(encoding="utf-8")
    assert f"| `denoiser` | `diffusers_ext.UNetModel` | {expected:,} |" in text
    assert "| `scheduler` | `diffusers_ext.ExtDDPMScheduler` |  |" in text


def test_card_names_the_labels(folder):
    assert "Labels: 0 zero, 1 one.\n" in write_card(folder, data="Digits.").read_text(encoding="utf-8")


def test_card_invents_nothing(folder):
    text = write_card(folder, data="Digits.").read_text(encoding="utf-8")
    assert "No figure was measured." in text
    assert "How it was trained was not recorded." in text
    for absent in ("None", "model-index", "![", "| Seed", "```bash", "|---|---|---|---|"):
        assert absent not in text
    assert ModelCard(text).data.license == "unknown"


@pytest.mark.parametrize(
    "command, shown",
    [
        ("HF_TOKEN=hf_AbCdEfGhIjKlMnOpQrStUv train.py", "HF_TOKEN=$HF_TOKEN train.py"),
        ("train.py --hub_token=short --seed 3", "train.py --hub_token=$HF_TOKEN --seed 3"),
        ("train.py --hub_token short", "train.py --hub_token $HF_TOKEN"),
        (
            "train.py --hub_model_id alice/hf_digits_of_many_people",
            "train.py --hub_model_id alice/hf_digits_of_many_people",
        ),
    ],
)
def test_card_hides_access_tokens(folder, command, shown):
    text = write_card(folder, data="Digits.", training=TrainingRun(command)).read_text(encoding="utf-8")
    assert f"```bash\n{shown}\n```" in text


def test_card_takes_in_a_sample_grid_from_elsewhere(folder, tmp_path):
    Image.new("L", (8, 8), 255).save(tmp_path / "grid.png")
    text = write_card(folder, data="Digits.", sample_grid=tmp_path / "grid.png").read_text(encoding="utf-8")
    assert "![Samples](grid.png)" in text
    assert (folder / "grid.png").read_bytes() == (tmp_path / "grid.png").read_bytes()


def test_card_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="sample_grid must be an image file, but .*no.png' does not exist"):
        write_card(folder, data="Digits.", sample_grid=folder / "no.png")
    with pytest.raises(ValueError, match="a repo id must be 'name' or 'namespace/name', got '/data/digits'"):
        write_card(folder, data="Digits.", dataset_id="/data/digits")
    with pytest.raises(ValueError, match="must hold a saved pipeline, but has no model_index.json"):
        write_card(tmp_path, data="Digits.")
    assert not (folder / "README.md").exists() and not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"value": float("nan")}, "must be finite, got nan"),
        ({"num_samples": 0}, "num_samples of .* must be at least 1, got 0"),
        ({"command": " "}, "a figure needs its command"),
    ],
)
def test_figure_must_be_measured(change, message):
    with pytest.raises(ValueError, match=message):
        Figure(**{**vars(FIGURE), **change})


def test_source_commit_is_that_of_this_checkout():
    git = subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True)
    if git.returncode == 0:
        assert source_commit().removesuffix(" (changed)") == git.stdout.strip()
    else:
        assert source_commit() is None


def test_describe_machine_names_torch():
    assert f"torch {torch.__version__}" in describe_machine()


# Pushing.


@pytest.mark.parametrize("library", [diffusers, diffusers_ext])
def test_pushed_pipeline_loads_from_the_hub(hub, folder, library):
    expected = image_of(GuidedDiffusionPipeline.from_pretrained(folder))
    push_folder(folder, "alice/my-digits", token=ALICE)
    pulled = library.DiffusionPipeline.from_pretrained("alice/my-digits")
    assert type(pulled) is GuidedDiffusionPipeline
    assert (image_of(pulled) == expected).all()


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
    assert (image_of(diffusers.DiffusionPipeline.from_pretrained("alice/my-digits")) == image_of(pipeline)).all()


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
