"""Every block of the README, of `docs/` and of the model cards runs as printed, and every command elsewhere is a valid one.

Each document has a folder of its own to run in, with data and pipelines under the names that the document uses. Commands get
options appended that make them small (`SMALL`), and nothing else is changed. The blocks of Python of a document share their
names, as those of somebody who reads on do.
"""

import ast
import contextlib
import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from configparser import ConfigParser
from doctest import DocTestParser
from pathlib import Path

import datasets
import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    PNDMScheduler,
)
from PIL import Image

import diffusers_ext
from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, TextGuidedDiffusionPipeline
from diffusers_ext.__main__ import COMMANDS
from diffusers_ext.__main__ import main as command_main
from diffusers_ext.hub.__main__ import main as hub_main
from guided_diffusion_unet import GuidedDiffusionUNet
from lucidrains_unet import ReferenceUnet, diffusion_tables
from tiny import tiny_stock_unet, tiny_unet
from tiny_text import tiny_clip, tiny_stable_diffusion, tiny_text_unet, tiny_tokenizer


ROOT = Path(__file__).parents[1]
# The blocks of walk-throughs are pieces of scripts, which tests/test_walkthroughs.py runs.
WRITTEN = [
    path
    for folder in ("docs", "model_cards")
    for path in sorted((ROOT / folder).glob("**/*.md"))
    if path.parent.name != "walkthroughs"
]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(path.relative_to(ROOT).as_posix() for path in WRITTEN)]
SCRIPTS = sorted(
    str(path.relative_to(ROOT)) for folder in ("training", "benchmarks") for path in ROOT.glob(f"{folder}/*.py")
)

# What makes a command small, by its script. The last value that an option is given counts.
TRAINING = "--max_train_steps 2 --train_batch_size 2 --max_train_time 600 --num_threads 1"
SAMPLES = "--num_inference_steps 2 --sample_columns 2"
# A run by time ends calibrated, which takes as long as a tenth of that time, see tests/training/test_calibrate.py.
PLAIN = f"{TRAINING} {SAMPLES} --no-calibrate"
SMALL = {
    "training/train_ddpm.py --pretrained_pipeline": PLAIN,
    "training/train_text_to_image.py --pretrained_pipeline": f"{TRAINING} {SAMPLES}",
    "training/convert_checkpoint.py": "--image_size 16",
    "training/train_vae.py --pretrained_pipeline": f"{TRAINING} --sample_columns 2",
    "training/train_ddpm.py": f"{PLAIN} --block_out_channels 8 16 --layers_per_block 1",
    "training/train_ddpm.py --model dit": f"{PLAIN} --hidden_size 16 --num_layers 2 --num_attention_heads 2",
    "training/train_text_to_image.py": f"{TRAINING} {SAMPLES} --block_out_channels 8 16 --layers_per_block 1",
    "training/train_text_to_image.py --model dit": f"{TRAINING} {SAMPLES} --hidden_size 16 --num_layers 2 --num_attention_heads 2",
    "training/train_vae.py": f"{TRAINING} --sample_columns 2",
    "training/train_vae.py --architecture conv": f"{TRAINING} --sample_columns 2 --block_out_channels 8 8 8",
    "training/train_vae.py --architecture hierarchical": f"{TRAINING} --sample_columns 2 --block_out_channels 8 8 "
    "--max_train_samples 60",
    "training/train_classifier.py": f"{TRAINING} --max_measured_samples 4 --block_out_channels 8 16",
    "training/cache_latents.py": "--num_threads 1",
    "training/train_features.py": "--num_train_epochs 1 --num_threads 1",
    "training/evaluate.py": "--num_images 8 --num_inference_steps 2 --max_train_samples 60 --num_threads 1",
    "training/evaluate.py --num_seeds": "--num_images 6 --num_inference_steps 1 --num_seeds 2 --num_threads 1",
    "training/evaluate.py --sweep": "--num_images 6 --sweep_steps 1 --no-pixel_metrics --num_threads 1",
    "training/evaluate.py --bits_per_dim --num_flow_steps": "--num_images 6 --num_inference_steps 1 --num_threads 1 "
    "--num_likelihood_images 2 --num_likelihood_terms 2 --num_flow_steps 1 --no-pixel_metrics",
    "training/evaluate.py --bits_per_dim": "--num_images 8 --num_inference_steps 2 --max_train_samples 60 --num_threads 1 "
    "--num_likelihood_images 4 --num_likelihood_terms 4",
    "training/evaluate_vae.py": "--num_images 8 --num_likelihood_images 2 --num_samples 2 --num_threads 1",
    "training/compare_guidance.py": "--num_images 6 --num_inference_steps 5 --guidance_scales 1 2 --num_threads 1",
    "training/calibrate.py": "--max_time 1s --num_inference_steps 2 --max_train_samples 60 --num_threads 1",
    "training/distill.py": f"{TRAINING.replace('steps 2', 'steps 3')} --sample_columns 2",
    "training/fit_prior.py": "--num_inference_steps 2 --max_train_samples 60 --num_threads 1",
    "training/study.py noise_end": "--num_images 20 --num_data 40 --num_inference_steps 2 --lengths 10 1000 --max_train_samples 60 --num_threads 1",
    "training/study.py scaling": "--num_data 40 --max_train_samples 60 --num_threads 1",
    "training/study.py": "--num_images 20 --num_data 40 --num_inference_steps 2 --max_train_samples 60 --num_threads 1",
    "training/sample.py": "--num_images 4 --num_inference_steps 2 --num_threads 1",
    "training/sample_prompts.py": "--num_inference_steps 2 --guidance_scales 1 2",
    "benchmarks/train_stock.py": "--max_train_steps 1 --train_batch_size 1",
    "benchmarks/fuzz.py": "--num_schedulers 20 --num_options 5",
}

SCRIPT_OF = {
    name: f"training/{(command.module or '').rpartition('.')[2]}.py"
    for commands in COMMANDS.values()
    for name, command in commands.items()
}

# What a document takes for granted: cards of diffusion models begin with the autoencoder of another card, or with the
# features that they are measured in.
VAE = "python training/train_vae.py --dataset_name path/to/twemoji64 --architecture conv --output_dir runs/vae"
FEATURES = "python training/train_features.py --dataset_name path/to/italy_power_demand --output_dir runs/features-italy_power_demand"
BEFORE = {
    "model_cards/twemoji_latent/README.md": VAE,
    "model_cards/italy_power_demand/README.md": FEATURES,
}


def blocks_of(path):
    """`(language, content)` of each block of a Markdown file, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / path).read_text(), flags=re.MULTILINE | re.DOTALL)


def save_data(folder, splits, side, mode, with_texts=False):
    """Noise of three classes in parquet, with `image`, `label` and perhaps `text`."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    names = ["top", "shoe", "bag"]
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    for split, number in splits.items():
        pixels = generator.integers(256, size=(number, side, side, 3)).astype(np.uint8)
        labels = np.arange(number) % 3
        rows = {"image": [Image.fromarray(picture).convert(mode) for picture in pixels], "label": labels}
        if with_texts:
            rows["text"] = [f"{names[label]} {index}" for index, label in enumerate(labels)]
        features = datasets.Features(columns | ({"text": datasets.Value("string")} if with_texts else {}))
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")


def save_files(folder, side):
    """Pictures in a subfolder for each label."""
    for split, number in (("train", 12), ("test", 9)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for index in range(number):
                Image.effect_noise((side, side), 60).save(folder / split / label / f"{index}.png")


def save_sequences(folder, channels):
    """Arrays of two labels."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, number in (("train", 18), ("test", 9)):
        values = generator.normal(size=(number, 24, channels))
        np.savez(folder / f"{split}.npz", values=values, label=np.arange(number) % 2)


def save_stable_diffusion(folder):
    tiny_stable_diffusion(PNDMScheduler()).save_pretrained(folder)


def save_ddpm(folder):
    """An unconditional pipeline of diffusers."""
    DDPMPipeline(tiny_stock_unet(), DDPMScheduler()).save_pretrained(folder)


def save_pipelines():
    """Those that docstrings take for granted, one of labels and one of texts."""
    schedule = ExtDDIMScheduler(timestep_spacing="trailing")
    GuidedDiffusionPipeline(tiny_unet(num_classes=10), schedule).save_pretrained("runs/digits")
    tokenizer = tiny_tokenizer()
    parts = {"tokenizer": tokenizer, "text_encoder": tiny_clip(tokenizer)}
    TextGuidedDiffusionPipeline(tiny_text_unet(), schedule, **parts).save_pretrained("runs/twemoji64")


def save_checkpoint_of_guided_diffusion(file):
    torch.save(GuidedDiffusionUNet(num_head_channels=64).state_dict(), file)


def save_checkpoint_of_lucidrains(file):
    network = ReferenceUnet()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {f"model.{name}": value for name, value in network.state_dict().items()}
    state |= diffusion_tables(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    torch.save({"model": state, "ema": {f"ema_model.{name}": value for name, value in state.items()}}, file)


def save_text_encoder(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_clip(tokenizer).save_pretrained(folder)


# Data and models by the names that documents give them.
MATERIAL = {
    "path/to/images": lambda folder: save_files(folder, side=20),
    "path/to/captioned_images": lambda folder: save_data(folder, {"train": 12, "test": 9}, 32, "RGB", with_texts=True),
    "path/to/fashion_mnist": lambda folder: save_data(folder, {"train": 18, "validation": 9}, 28, "L"),
    "path/to/twemoji64": lambda folder: save_data(folder, {"train": 18, "test": 9}, 64, "RGB", with_texts=True),
    "path/to/sequences": lambda folder: save_sequences(folder, channels=2),
    "path/to/italy_power_demand": lambda folder: save_sequences(folder, channels=1),
    "path/to/64x64_diffusion.pt": save_checkpoint_of_guided_diffusion,
    "results/model-1.pt": save_checkpoint_of_lucidrains,
    "a/stable-diffusion": save_stable_diffusion,
    "path/to/all-MiniLM-L6-v2": save_text_encoder,
    "a/ddpm": save_ddpm,
}


class Desk:
    """A folder to run a document in, as from the root of a checkout.

    Args:
        text: What is there is what the text names; all of it for `None`.
    """

    def __init__(self, folder, text=None):
        self.folder = folder
        for name in ("training", "benchmarks", "constraints.txt", "setup.cfg"):
            (folder / name).symlink_to(ROOT / name)
        for name, save in MATERIAL.items():
            if text is None or name in text:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                save(folder / name)
        self.names = {"__name__": "document"}

    def run_bash(self, block):
        for line in block.replace("\\\n", " ").strip().splitlines():
            for command in line.split(" && "):
                self.run_command(shlex.split(command, comments=True))

    def run_command(self, words):
        match words:
            case ["python3", "-m", "venv", ".venv"] | [".", ".venv/bin/activate"]:
                pass  # as .ci/run does with these very lines
            case ["pip", "install", "-c", constraints, "-e", package]:
                extra = re.fullmatch(r"\.\[(\w+)\]", package)[1]
                assert (ROOT / constraints).is_file() and extra in read_extras()
            case ["pip", "wheel", "--no-deps", "--wheel-dir", "dist", "."]:
                pass  # as tests/test_packaging.py builds it
            case ["pip", "install", wheel] if wheel.startswith("dist/"):
                name = f"diffusers_ext-{diffusers_ext.__version__}-py3-none-any.whl"
                assert wheel.rstrip("]").split("[") == [f"dist/{name}", "train"]
            case ["python", "-m", "pytest", *options]:
                assert {option for option in options if option.startswith("-")} <= options_of_pytest()
                assert all((ROOT / option).exists() for option in options if option.startswith("tests/"))
            case ["python", "-m", "diffusers_ext.hub", *options]:
                with contextlib.redirect_stdout(io.StringIO()):
                    hub_main(options)
            case ["diffusers-ext", "demo", *options]:
                in_this_process(lambda: command_main(["demo", *options]), shlex.join(words))
            case ["diffusers-ext", name, *options] | ["python", "-m", "diffusers_ext", name, *options]:
                script = SCRIPT_OF[name]
                in_this_process(lambda: command_main([name, *options, *small(script, options)]), shlex.join(words))
            case ["accelerate", "launch", script, *options] | ["python", script, *options]:
                run_script(script, [*options, *small(script, options)])
            case _:
                raise AssertionError(f"no way is known to run {shlex.join(words)}")

    def run_python(self, block):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, "a block of the document", "exec"), self.names)


@functools.cache
def options_of_pytest():
    """With those of `tests/conftest.py`."""
    command = [sys.executable, "-m", "pytest", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", done.stdout))


def read_extras():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config["options.extras_require"]


def small(script, options):
    """What is appended to a command: all of it, or what its script has in the form that the options choose."""
    assert script in SMALL, f"say in SMALL how to make {script} small"
    for form, more in SMALL.items():
        if form.startswith(f"{script} ") and set(form.split()[1:]) <= set(options):
            return more.split()
    return SMALL[script].split()


def run_script(script, options):
    """As `in_this_process`. What `accelerate launch` adds is tested in tests/training/test_launcher.py."""
    argv, path = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [script, *map(str, options)], [str(Path(script).resolve().parent)]
    try:
        return in_this_process(lambda: runpy.run_path(script, run_name="__main__"), shlex.join([script, *options]))
    finally:
        sys.argv, sys.path[:] = argv, path


def in_this_process(work, command):
    """Since starting one takes longer than most of the commands; accelerate's state is as in a new one."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work()
    except SystemExit as exit:
        assert not exit.code, f"{command}: {printed.getvalue()[-2000:]}"
    finally:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    return printed.getvalue()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One for all documents, whose data are the same: features of them are trained once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def desk(tmp_path, monkeypatch, hub, request, cache):
    monkeypatch.setenv("HF_TOKEN", "hf_token_of_you")
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(cache))
    threads = torch.get_num_threads()
    bars = diffusers.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    monkeypatch.chdir(tmp_path)
    path = request.node.callspec.params["path"] if hasattr(request.node, "callspec") else None
    yield Desk(tmp_path, None if path is None else (ROOT / path).read_text() + BEFORE.get(path, ""))
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()
    if bars:
        diffusers.utils.logging.enable_progress_bar()


def run_blocks(desk, path):
    """Runs them all, and returns how many there are."""
    run = {"bash": desk.run_bash, "python": desk.run_python}
    blocks = blocks_of(path)
    for language, content in blocks:
        assert language in run, f"{path} has a block of {language or 'no language'}, which nothing runs"
        try:
            run[language](content)
        except BaseException as error:
            raise AssertionError(f"{path}: this block does not run\n\n{content}") from error
    return len(blocks)


@pytest.mark.parametrize("path", DOCUMENTS)
@pytest.mark.filterwarnings("ignore")
def test_the_blocks_of_a_document_run_as_printed(path, desk):
    if path in BEFORE:
        desk.run_bash(BEFORE[path])
    assert run_blocks(desk, path) == (ROOT / path).read_text().count("\n```") // 2


@pytest.mark.parametrize("path", ["README.md", "docs/start.md"])
def test_the_first_documents_say_how_long_each_block_takes(path):
    pieces = re.split(r"^```.*?^```$", (ROOT / path).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(pieces) > 2
    for text in pieces[:-1]:
        paragraph = re.sub(r"<!--.*?-->", "", text).strip().split("\n\n")[-1]
        assert re.search(r"\d (?:s|minutes?|min)\b", paragraph), paragraph


def commands_in(text, pattern):
    """`[script, options]` of the commands that a pattern finds in a text."""
    found = [shlex.split(match[1], comments=True) for match in re.finditer(pattern, text, flags=re.MULTILINE)]
    return [(script, options) for script, *options in found]


IN_DOCSTRINGS = r"^ *(?:python|accelerate launch) ((?:training|benchmarks)/\w+\.py.*)$"
IN_SENTENCES = r"`(?:python |accelerate launch )?((?:training|benchmarks)/\w+\.py(?: [^`]*)?)`"


@pytest.mark.filterwarnings("ignore")
def test_commands_in_docstrings_and_in_sentences_have_valid_options(desk):
    """They are read and checked as those of the blocks, and end there."""
    told = [command for script in SCRIPTS for command in commands_in(docstring_of(script), IN_DOCSTRINGS)]
    assert len(told) > 15
    save_pipelines()  # which a run can begin with
    told += [command for path in DOCUMENTS for command in commands_in((ROOT / path).read_text(), IN_SENTENCES)]
    for script, options in sorted({(script, tuple(options)) for script, options in told}):
        assert script in SCRIPTS
        for run in (option for option in options if option.startswith("runs/")):
            Path(run).mkdir(parents=True, exist_ok=True)  # some options are not needed where there is a folder
        if script.startswith("training/") and options:
            run_script(script, [*options, "--dry_run"])
        elif options:
            own = options[: options.index("--")] if "--" in options else options  # what follows is for another script
            assert options_in(shlex.join(own)) <= options_in(run_script(script, [help_of(script)])), (
                script,
                options,
            )


@pytest.mark.filterwarnings("ignore")
def test_options_in_sentences_are_those_of_a_script(desk):
    known = set().union(
        *(options_in(run_script(script, [help_of(script)])) for script in SCRIPTS if is_command(script))
    )
    known |= {"--quiet", "--help"}  # of `accelerate launch`, and of all
    known |= {"--config_file", "--num_processes", "--machine_rank", "--main_process_ip"}  # of `accelerate launch`
    known |= {"--cases"}  # of the tests
    known |= {"--private", "--message", "--branch"}  # of diffusers_ext.hub
    known |= {"--export", "--device", "--host", "--port", "--open"}  # of `diffusers-ext demo`
    for path in DOCUMENTS:
        text = re.sub(r"^```.*?^```$", "", (ROOT / path).read_text(), flags=re.MULTILINE | re.DOTALL)
        assert options_in(text) <= known, path


def help_of(script):
    return "--help-all" if script.startswith("training/") else "--help"


def docstring_of(script):
    return re.match(r'"""(.*?)"""', (ROOT / script).read_text(), flags=re.DOTALL)[1]


def is_command(script):
    return '__name__ == "__main__"' in (ROOT / script).read_text()


def options_in(text):
    return set(re.findall(r"(?<![\w-])--[a-z]\w*", text))


def examples_in(path):
    """Those of all docstrings of a file."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    return [each for node in nodes for each in DocTestParser().get_examples(ast.get_docstring(node) or "")]


@pytest.mark.filterwarnings("ignore")
def test_the_examples_of_docstrings_run(desk):
    save_pipelines()
    with_examples = [path for path in sorted((ROOT / "diffusers_ext").glob("**/*.py")) if ">>> " in path.read_text()]
    assert len(with_examples) >= 2
    for path in with_examples:
        names = {}
        for example in examples_in(path):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(example.source, str(path), "single"), names)
            assert printed.getvalue() == example.want, f"{path}: {example.source}"
