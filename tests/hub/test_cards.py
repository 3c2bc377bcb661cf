import ast
import json
import re
import subprocess
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_ext import (
    DiTModel,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    FlowScheduler,
    GuidedDiffusionPipeline,
    UNetModel,
    VAEModel,
)
from diffusers_ext.commands import evaluate_vae
from diffusers_ext.evaluation import report
from diffusers_ext.hub.cards import (
    CALIBRATION_FILE,
    Figure,
    TrainingRun,
    add_figures,
    describe_machine,
    source_commit,
    write_card,
)
from diffusers_ext.hub.saved_folder import loading_lines, of_repository
from tiny import save_run, tiny_unet


FIGURE = Figure(
    "Fréchet distance, digits classifier",
    1.23456,
    1000,
    "ExtDDIMScheduler",
    50,
    "python evaluate.py runs/x",
    "Fréchet distance",
)


@pytest.fixture
def folder(tmp_path):
    return save_run(tmp_path / "my-digits")


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
    named = (result.metric_type, result.metric_name, result.metric_value)
    assert named == ("frechet_distance", "Fréchet distance", FIGURE.value)


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


def test_card_says_what_the_weights_began_as(folder):
    def card(**options):
        return ModelCard(write_card(folder, data="Digits.", **options).read_text(encoding="utf-8"))

    local = card(training=TrainingRun(origin=f"fine-tuned from `{folder}`", base_model=str(folder)))
    assert f"fine-tuned from `{folder}` with `diffusers_ext`" in local.text and local.data.base_model is None
    of_hub = card(training=TrainingRun(origin="fine-tuned from `alice/digits`", base_model="alice/digits"))
    assert of_hub.data.base_model == "alice/digits" and "from scratch" not in of_hub.text
    assert "trained from scratch with" in card(training=TrainingRun()).text
    assert "from scratch" not in card().text  # nobody has said so


def test_results_are_not_none_where_something_was_measured(folder):
    text = write_card(folder, data="Digits.", measured=["The label is the likeliest of 9 images in 50 %."]).read_text()
    assert "## Results\n\nThe label is the likeliest of 9 images in 50 %.\n\n## Use" in text
    (folder / CALIBRATION_FILE).write_text(json.dumps({"lines": ["Steps were chosen."]}))
    text = write_card(folder, data="Digits.").read_text()
    assert "## Results\n\nNo figure was measured beside those of the calibration below.\n\n## Use" in text
    (folder / CALIBRATION_FILE).unlink()


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
    with pytest.raises(ValueError, match="must hold a saved pipeline or model, but has no model_index.json"):
        write_card(tmp_path, data="Digits.")
    assert not (folder / "README.md").exists() and not (tmp_path / "README.md").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"value": float("nan")}, "must be finite, got nan"),
        ({"num_samples": 0}, "num_samples of .* must be at least 1, got 0"),
        ({"command": " "}, "a figure needs its command"),
        ({"name": None}, "the name of a metric must have at most 40 characters and no punctuation, got 'Fréchet dist"),
        ({"name": "a share " * 6}, "what it was measured on belongs into `metric`"),
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


def test_card_of_a_model_by_itself(tmp_path):
    """A model that no pipeline holds gets a card and lines that load it too."""
    model = tiny_unet()
    model.save_pretrained(tmp_path)
    figure = Figure("bits/dim", 1.5, 100, None, None, "measure.py")
    text = write_card(tmp_path, data="Digits.", repo_id="alice/unet", figures=[figure]).read_text(encoding="utf-8")
    assert f"| `model` | `diffusers_ext.UNetModel` | {sum(p.numel() for p in model.parameters()):,} |" in text
    assert f"```python\n{loading_lines('alice/unet', 'UNetModel')}\n```" in text
    assert "| bits/dim | 1.5 | 100 |  |  |\n" in text
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="is of a UNetModel, but there are no weights beside it"):
        write_card(tmp_path, data="Digits.")


def test_metrics_of_the_scripts_have_names():
    """And no two the same: the Hub tells them apart by these."""
    for script in (report, evaluate_vae):
        assert script.METRIC_NAMES.keys() == script.METRICS.keys()
        assert len(set(script.METRIC_NAMES.values())) == len(script.METRICS)
        for name in script.METRIC_NAMES.values():
            assert Figure("metric", 1.0, 1, None, None, "command", name).name == name


ROOT = Path(__file__).parents[2]
PUBLISHED = [
    path.parent for where in ("model_cards", "diffusers_ext/examples") for path in ROOT.glob(f"{where}/*/README.md")
]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_published_card_is_metadata_of_the_hub_and_says_what_each_picture_shows(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag in ("unconditional-image-generation", "text-to-image", "other")
    index = card.data.to_dict().get("model-index", [])
    assert len(index) == ("No figure was measured." not in card.text) and all(model["name"] for model in index)
    for result in (result for model in index for result in model["results"]):
        assert result["task"]["type"] == card.data.pipeline_tag and result["dataset"].keys() >= {"name", "type"}
        for metric in result["metrics"]:
            assert re.fullmatch(r"[a-z0-9_]+", metric["type"]) and Figure("m", 1.0, 1, None, None, "c", metric["name"])
            assert isinstance(metric["value"], float)
    for picture in folder.glob("*.png"):
        assert f"- `{picture.name}`: " in card.text or f"]({picture.name})" in card.text.split("## Calibration")[-1]
    vae = "VAEModel` trained" in card.text
    assert ("draws from the prior, which are not samples of the data" in card.text) == vae
    assert ("no sample of the data" in card.text.split("## Limitations")[1]) == vae


def test_card_says_the_ways_to_load_and_each_runs(folder, monkeypatch):
    """As it stands, where the folder is; the second in `test_remote_code.py` without the package."""
    text = write_card(folder, data="Digits.", pictures={"samples.png": "samples", "no.png": "?"}).read_text()
    assert "What the pictures show:\n\n- `samples.png`: samples\n\n| component" in text
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3 and "pip install diffusers_ext" in text and "`pipeline.py`" in text
    assert "trust_remote_code=True" in blocks[1] and "diffusers_ext" not in blocks[1]
    monkeypatch.chdir(folder.parent)
    for block, name in zip(blocks, ("pipeline", "pipeline", "denoiser"), strict=True):
        exec(block, found := {})
        assert isinstance(found[name], DiffusionPipeline | UNetModel)


def test_card_of_a_branch_loads_the_branch(folder):
    text = write_card(folder, data="Digits.", repo_id="alice/my-digits", revision="step-10").read_text()
    assert text.count('from_pretrained("alice/my-digits", ') == 3 and text.count('revision="step-10"') == 3


def test_what_others_have_named_stays_in_its_line_and_is_no_template(tmp_path):
    """Labels, files and metrics may be anybody's: a heading, a rule, template code or a mark that turns the text around."""
    hostile = ["a\n---\n# Heading", "{{ 7 * 7 }}{% for x in y %}", "\u202eeb ot\r\x1b[2J", "```\n<script>"]
    pipeline = GuidedDiffusionPipeline(tiny_unet(num_classes=4), ExtDDPMScheduler(), id2label=dict(enumerate(hostile)))
    pipeline.save_pretrained(tmp_path)
    figure = Figure("x\n| y", 1.0, 1, None, None, "python a.py '```\n# Heading'", "x")
    card = write_card(tmp_path, data="Noise.", figures=[figure], title="t\n# Heading").read_text()
    head, text = card.split("\n---\n", 1)
    assert "0 a --- # Heading, 1 {{ 7 * 7 }}{% for x in y %}, 2 eb ot  [2J, 3 ``` <script>." in text
    assert "\u202e" not in card and "\x1b" not in card
    assert not [line for line in text.splitlines() if line.startswith(("---", "# Heading"))][1:]
    assert yaml.safe_load(head.removeprefix("---\n"))["library_name"] == "diffusers"
    name = 'x")\nimport os\n("'
    assert ast.literal_eval(loading_lines(name).split("from_pretrained")[1]) == name


def unet(size=8, channels=1, **options):
    return UNetModel(size, channels, channels, block_out_channels=(8, 16), layers_per_block=1, **options)


def dit(channels=4, **options):
    return DiTModel(8, 4, channels, hidden_size=16, num_layers=1, num_attention_heads=2, **options)


def image_vae():
    return VAEModel(16, 3, 3, block_out_channels=(8, 16), layers_per_block=1, scaling_factor=0.5)


BETAS, FLOW = ExtDDIMScheduler(clip_sample=False), FlowScheduler()


@pytest.mark.parametrize(
    "parts, expected",
    [
        ({"denoiser": unet(), "scheduler": BETAS}, ["unet DDPMPipeline", "unet DDIMPipeline"]),
        ({"denoiser": unet(), "scheduler": FLOW}, ["unet DDPMPipeline"]),
        ({"denoiser": unet(num_classes=3, learned_unconditional=False), "scheduler": BETAS}, []),
        (
            {"denoiser": unet(8, 4), "scheduler": FLOW, "vae": image_vae()},
            ["unet LDMPipeline", "vae StableDiffusionPipeline", "vae DiTPipeline", "vqvae LDMPipeline"],
        ),
        ({"denoiser": dit(1, num_classes=3), "scheduler": BETAS}, []),
        (
            {"denoiser": dit(num_classes=3), "scheduler": BETAS, "vae": image_vae()},
            ["transformer DiTPipeline", "vae StableDiffusionPipeline", "vae DiTPipeline", "vqvae LDMPipeline"],
        ),
        (
            {"denoiser": dit(), "scheduler": BETAS, "vae": image_vae()},
            ["vae StableDiffusionPipeline", "vae DiTPipeline", "vqvae LDMPipeline"],
        ),
    ],
)
def test_card_names_the_pipelines_of_diffusers_that_take_the_parts(tmp_path, parts, expected):
    """And they do take those of them that need no other network."""
    folder = tmp_path / "run"
    GuidedDiffusionPipeline(**parts).save_pretrained(folder)
    text = write_card(folder, data="x").read_text(encoding="utf-8")
    named = []
    for line in text.partition("The weights by themselves")[2].splitlines():
        for place, pipelines in re.findall(
            r"`(unet|transformer|vae|vqvae)` of ((?:`\w+Pipeline`(?:, | and )?)+)", line
        ):
            named += [f"{place} {name}" for name in re.findall(r"`(\w+)`", pipelines)]
    assert named == expected
    for each in named:
        place, name = each.split()
        if place not in ("unet", "transformer"):
            continue
        networks = {"DiTPipeline": {"vae": parts.get("vae")}, "LDMPipeline": {"vqvae": parts.get("vae")}}.get(name, {})
        pipe = getattr(diffusers, name)(**{place: parts["denoiser"], "scheduler": parts["scheduler"]}, **networks)
        pipe.set_progress_bar_config(disable=True)
        arguments = {"class_labels": [1]} if name == "DiTPipeline" else {"batch_size": 1}
        images = pipe(**arguments, num_inference_steps=2, output_type="np").images
        assert images.shape[:3] == (1, 16, 16) if "vae" in parts else images.shape[:3] == (1, 8, 8)


def test_card_of_a_run_loads_it_from_where_it_was_made(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    place = Path(folder.parent.name, folder.name)
    text = write_card(place, data="x").read_text(encoding="utf-8")
    assert f"```python\n{loading_lines(place)}\n```" in text
    assert f"```python\n{loading_lines(folder.name)}\n```" in write_card(folder, data="x").read_text(encoding="utf-8")


@pytest.mark.parametrize("revision", [None, "tried"])
def test_card_of_a_folder_becomes_that_of_a_repository(folder, revision):
    here = write_card(folder, data='`x.from_pretrained("mine")`', revision="old").read_text(encoding="utf-8")
    there = write_card(
        folder, data='`x.from_pretrained("mine")`', repo_id="alice/it", revision=revision, title=folder.name
    )
    assert of_repository(here, "alice/it", revision) == there.read_text(encoding="utf-8")
