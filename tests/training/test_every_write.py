"""Each script, ended at a file that it writes, and what is left: the old, or the new, or what the same command goes on with.

One of the places of each script is tried here, and all of them, or each n-th, in one process and in two, by

    python -m pytest tests/training/test_every_write.py --every-write 1
"""

import hashlib
import json
import shutil
import socket

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import save_file

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, VAEModel
from diffusers_ext.atomic_files import LOCK, finish_replacing
from diffusers_ext.calibration import guidance
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.demo.space import export_space
from diffusers_ext.evaluation.feature_folders import FEATURES_FILE
from diffusers_ext.hub.__main__ import main as hub_command
from diffusers_ext.hub.cards import write_card
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.recipes.text_to_image import TextConfig
from diffusers_ext.trainer.run_folder import read_metrics
from every_write import ENDED, finish, start
from guided_diffusion_unet import GuidedDiffusionUNet
from runs import assert_same_run, forget_accelerate, trainer
from tiny import tiny_unet
from tiny_text import CAPTIONS, WIDTH, save_pictures
from training import (
    cache_latents,
    calibrate,
    compare_guidance,
    convert_checkpoint,
    distill,
    evaluate,
    evaluate_vae,
    fit_prior,
    reconstruct_ema,
    sample,
    study,
    train_classifier,
    train_ddpm,
    train_features,
    train_text_to_image,
    train_vae,
)


pytestmark = pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")
LABELS = ("cat", "dog")
# How far through the writes of the first script, and how much farther in each that follows: these lie evenly.
FIRST_PLACE, NEXT_PLACE = 0.31, 0.618
LOADED = ("model_index.json", "config.json", "scheduler_config.json", "latents.yaml", FEATURES_FILE)

RUN = {"train_batch_size": 4, "max_train_steps": 4, "checkpointing_steps": 2, "lr_warmup_steps": 1, "logging_steps": 1}
RUN |= {"checkpoints_total_limit": 1, "num_threads": 1, "mixed_precision": "no", "max_train_samples": 12}
NETWORK = {"block_out_channels": (8,), "layers_per_block": 1, "num_inference_steps": 1, "sample_columns": 1}
TEXTS = {"text_hidden_size": WIDTH, "text_num_layers": 1, "vocab_size": 300, "validation_prompts": ("red dot",)}


def train(module, config, **options):
    def work(material, folder):
        given = {name: value(material) if callable(value) else value for name, value in options.items()}
        module.main(config(**RUN | given | {"output_dir": str(folder), "resume_from_checkpoint": "latest"}))

    return work


def cache(material, folder):
    options = {"max_train_samples": 12, "shard_size": 5, "num_threads": 1, "mixed_precision": "no"}
    cache_latents.main(cache_latents.CacheConfig(vae=str(material / "vae"), output_dir=str(folder), **options))


def reconstruct(material, folder):
    """Another average, in the place of one that was made before."""
    options = {"overwrite_output_dir": True, "output_dir": str(folder)}
    reconstruct_ema.main(reconstruct_ema.ReconstructConfig(str(material / "run"), 0.07, **options))


def features(material, folder):
    options = {
        "dataset_name": str(material / "data"),
        "num_train_epochs": 1,
        "num_threads": 1,
        "mixed_precision": "no",
    }
    config = train_features.FeaturesConfig(output_dir=str(folder), overwrite_output_dir=True, **options)
    train_features.main(config)


def measured(material):
    return ("--dataset_name", str(material / "data"), "--features", str(material / "features"), "--num_threads", "1")


def convert(material, folder):
    options = {"image_size": 16, "num_heads": 2, "output_dir": str(folder)}
    convert_checkpoint.main(convert_checkpoint.ConvertConfig(str(material / "theirs.safetensors"), **options))


def fit(material, folder):
    options = {"start_timestep": 29, "num_inference_steps": 4, "num_threads": 1}
    fit_prior.main(fit_prior.FitPriorConfig(pipeline=str(folder), dataset_name=str(material / "data"), **options))


def choose(material, folder):
    more = ("--max_time", "1s", "--num_inference_steps", "4")
    calibrate.main(calibrate.parse([str(folder), *measured(material), *more]))


def measure(material, folder):
    more = ("--num_images", "4", "--num_inference_steps", "1", "--mixed_precision", "no", "--num_neighbours", "1")
    evaluate.main(evaluate.parse([str(folder), *measured(material), *more]))


def evaluate_vae_of(material, folder):
    more = ("--num_images", "4", "--num_likelihood_images", "2", "--num_samples", "2")
    evaluate_vae.main(evaluate_vae.parse([str(folder), *measured(material), *more]))


def compare(material, folder):
    more = ("--methods", "cfg", "--guidance_scales", "1", "2", "--mixed_precision", "no", "--num_images", "6")
    words = [str(material / "pipeline"), *measured(material), *more, "--num_inference_steps", "1"]
    compare_guidance.main(compare_guidance.parse([*words, "--output_dir", str(folder)]))


def sweep(material, folder):
    more = ("--sweep", "--sweep_steps", "1", "2", "--num_images", "4", "--mixed_precision", "no")
    evaluate.main(evaluate.parse([str(folder), *measured(material), *more, "--num_neighbours", "1"]))


def ask(material, folder):
    options = {"num_data": 8, "num_levels": 2, "factors": (0.5,), "num_threads": 1}
    given = {"pipelines": (str(material / "pipeline"),), "dataset_name": str(material / "data")}
    study.main(study.StudyConfig(study="scaling", output_dir=str(folder), **given, **options))


def draw(material, folder):
    options = {
        "num_images": 3,
        "num_inference_steps": 1,
        "num_threads": 1,
        "mixed_precision": "no",
        "denoising": "gif",
    }
    config = sample.SampleConfig(
        str(material / "pipeline"), output_dir=str(folder), overwrite_output_dir=True, num_animated=2, **options
    )
    sample.main(config)


def write_code(material, folder):
    hub_command(["code", str(folder)])


def export(material, folder):
    """A space in the folder, so that what is hidden beside it is looked at too."""
    if not (folder / "space").exists():
        export_space(str(material / "pipeline"), folder / "space", "0.1.0")


# The work, and what is in the folder before: for a run nothing, for others what they replace or add to.
SCRIPTS = {
    "train_ddpm": (train(train_ddpm, train_ddpm.TrainConfig, **NETWORK, ema_snapshot_steps=2), None),
    "train_vae": (
        train(
            train_vae, train_vae.TrainVAEConfig, architecture="mlp", latent_dim=2, hidden_dims=(8,), sample_columns=1
        ),
        None,
    ),
    "train_classifier": (
        train(
            train_classifier,
            train_classifier.TrainClassifierConfig,
            block_out_channels=(8,),
            max_measured_samples=8,
        ),
        None,
    ),
    "train_text_to_image": (
        train(
            train_text_to_image, TextConfig, **NETWORK, **TEXTS, dataset_name=lambda material: str(material / "shapes")
        ),
        None,
    ),
    "distill": (
        train(
            distill,
            distill.DistillConfig,
            **{"pipeline": lambda material: str(material / "teacher"), "teacher_steps": 4, "student_steps": 1},
            **{"dataset_name": lambda material: str(material / "data"), "max_train_steps": None, "steps_per_stage": 2},
            **{"checkpointing_steps": 1, "sample_columns": 1},
        ),
        None,
    ),
    "convert_checkpoint": (convert, None),
    "fit_prior": (fit, "pipeline"),
    "cache_latents": (cache, None),
    "reconstruct_ema": (reconstruct, "average"),
    "train_features": (features, "features"),
    "calibrate": (choose, "pipeline"),
    "evaluate": (measure, "pipeline"),
    "sample": (draw, None),
    "hub code": (write_code, "stock"),
    "demo --export": (export, None),
    "train_ddpm --push_to_hub": (
        train(
            train_ddpm,
            train_ddpm.TrainConfig,
            **NETWORK | {"push_to_hub": True, "push_to_hub_every": 1, "hub_token": "hf_token_of_alice"},
            **{"checkpoints_total_limit": None},
        ),
        None,
    ),
    "train_ddpm --lora_rank": (
        train(
            train_ddpm,
            train_ddpm.TrainConfig,
            **{"pretrained_pipeline": lambda material: str(material / "teacher"), "lora_rank": 2},
            **{"dataset_name": lambda material: str(material / "data"), "num_inference_steps": 1, "sample_columns": 1},
        ),
        None,
    ),
    "evaluate_vae": (evaluate_vae_of, "vae"),
    "evaluate --sweep": (sweep, "pipeline"),
    "compare_guidance": (compare, None),
    "study": (ask, None),
}
# Those after it write by the same functions as the ones before: with --every-write alone.
LAST_IN_THE_SUITE = "demo --export"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the forks compute, see `conftest.py`."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What the scripts work on."""
    folder = tmp_path_factory.mktemp("material")
    pixels = np.random.default_rng(0)
    for split, number in (("train", 8), ("test", 4)):
        for index, label in enumerate(LABELS):
            (folder / "data" / split / label).mkdir(parents=True)
            for i in range(number):
                picture = pixels.integers(60 + 100 * index, size=(8, 8)).astype(np.uint8)
                Image.fromarray(picture).save(folder / "data" / split / label / f"{i}.png")
    save_pictures(folder / "shapes", "train", CAPTIONS)
    torch.manual_seed(0)
    FeatureClassifierModel(8, 1, 2, label_names=list(LABELS)).save_pretrained(folder / "features")
    about = {"dataset_name": "data", "num_train_images": 16, "num_held_out_images": 8, "held_out_accuracy": 0.5}
    (folder / "features" / FEATURES_FILE).write_text(json.dumps(about))
    vae = VAEModel(8, 1, 1, block_out_channels=(8, 8), latent_channels=2, scaling_factor=1.7, shift_factor=0.3)
    vae.save_pretrained(folder / "vae")
    scheduler = ExtDDIMScheduler(timestep_spacing="trailing", num_train_timesteps=40, beta_reference_timesteps=1000)
    pipe = GuidedDiffusionPipeline(tiny_unet(num_classes=2), scheduler, id2label=dict(enumerate(LABELS)))
    pipe.save_pretrained(folder / "pipeline")
    write_card(folder / "pipeline", data="Noise.")
    pipe.scheduler.register_to_config(prediction_type="v_prediction")
    pipe.save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    save_file(GuidedDiffusionUNet(num_heads=2).state_dict(), folder / "theirs.safetensors")
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(folder / "stock")
    (folder / "pipeline" / "train_config.yaml").write_text("dataset_name: data\n")
    snapshots = {"max_train_samples": 12, "ema_snapshot_steps": 1, "max_train_steps": 12}
    child = start(lambda: train(train_ddpm, train_ddpm.TrainConfig, **NETWORK, **snapshots)(folder, folder / "run"))
    assert finish(child) == 0
    shutil.copytree(folder / "pipeline", folder / "average", ignore=shutil.ignore_patterns("README.md"))
    prepare_images("digits", max_samples=12)
    return folder


def state_of(folder):
    """What a folder is to whoever loads it: weights and configs by their names, and the log of a run."""
    files = [path for path in folder.rglob("*") if is_compared(path)]
    files = [path for path in files if not path.relative_to(folder).parts[0].startswith(".")]  # which nobody loads
    timed = ("seconds", "images_per_second")
    log = [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(folder / "metrics.jsonl")]
    return {str(path.relative_to(folder)): digest(path) for path in files}, log


def is_compared(path):
    is_image = "images" in path.parts and path.is_file()
    return path.suffix in (".safetensors", ".parquet") or path.name in LOADED or is_image


def digest(path):
    """Of a file; of a config without the folder that its network was loaded from."""
    content = path.read_bytes()
    if path.suffix == ".json":
        content = json.dumps({k: v for k, v in json.loads(content).items() if k != "_name_or_path"}).encode()
    return hashlib.sha256(content).hexdigest()


def difference(one, other):
    """The names of files, and the lines of the log, in which two states differ."""
    files = sorted(name for name in one[0].keys() | other[0].keys() if one[0].get(name) != other[0].get(name))
    return files + [line for line in one[1] + other[1] if (line in one[1]) != (line in other[1])]


def make(material, before, folder):
    if before is not None:
        shutil.copytree(material / before, folder)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_that_is_ended_at_a_write_goes_on_or_leaves_what_was_there(
    name, material, tmp_path, request, monkeypatch, hub
):
    step = request.config.getoption("every_write")
    if not step and name in list(SCRIPTS)[list(SCRIPTS).index(LAST_IN_THE_SUITE) + 1 :]:
        pytest.skip("with --every-write")
    for size in ("TIMED_IMAGES", "FEWEST_IMAGES"):  # of a calibration, beyond its time
        monkeypatch.setattr(guidance, size, 20)
    work, before = SCRIPTS[name]
    whole = make(material, before, tmp_path / "whole")
    old = state_of(whole)
    child = start(lambda: work(material, whole), folder=whole, number=-1, count_to=tmp_path / "count")
    assert finish(child) == 0
    total, new = int((tmp_path / "count").read_text()), state_of(whole)
    assert total > 3
    print(f"{total} places")  # which -rP shows
    place = (FIRST_PLACE + NEXT_PLACE * list(SCRIPTS).index(name)) % 1
    numbers = range(1, total + 1, step) if step else [1 + int(place * total)]
    for number in numbers:
        folder = make(material, before, tmp_path / f"ended-at-{number}")
        child = start(lambda folder=folder, number=number: work(material, folder), number, folder)
        assert finish(child) == ENDED, number
        if before is not None:
            finish_replacing(folder)  # as whatever loads it does first
            assert comparable(state_of(folder), name) in (comparable(old, name), comparable(new, name)), number
        for path in folder.rglob("*.json"):
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                json.loads(path.read_text())  # none is half a file
        if name == "convert_checkpoint":
            finish_replacing(folder)  # as the command does, which refuses then what is there already
        if name != "convert_checkpoint" or comparable(state_of(folder), name) != comparable(new, name):
            assert finish(start(lambda folder=folder: work(material, folder))) == 0, number
        assert difference(comparable(state_of(folder), name), comparable(new, name)) == [], number
        if "push_to_hub" in name:
            pushed = {"main", "checkpoint-2", "checkpoint-4"}
            assert set(hub.repos["model", f"alice/{folder.name}"].branches) == pushed, number
            assert not any((folder / "milestones").iterdir()), number
        # The file of a lock that nobody holds counts for nothing.
        assert [path.name for path in folder.glob(".*") if path.name not in (".cache", LOCK)] == [], number
        shutil.rmtree(folder)


def comparable(state, name):
    """Which timesteps and scales `calibrate` chooses follows from how far it comes in its time."""
    digests, log = state
    chosen = ("scheduler/scheduler_config.json", "model_index.json")
    return ({k: v for k, v in digests.items() if name != "calibrate" or k not in chosen}, log)


# Two processes.


SETTINGS = {"max_train_steps": 6, "checkpointing_steps": 2, "train_batch_size": 2, "checkpoints_total_limit": 2}


def in_two_processes(folder, places=(None, None), count_to=(None, None)):
    """A run in two processes, of which one may be ended at a place or count its places; their exit statuses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    data = prepare_images("digits", max_samples=20)

    def work():
        trainer(data, folder, resume_from_checkpoint="latest", **SETTINGS).train()

    children = []
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        environment = ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        watched = folder if places[rank] is not None or count_to[rank] is not None else None
        number = -1 if places[rank] is None else places[rank]
        children.append(start(work, number, watched, count_to[rank], environment))
    return [finish(child) for child in children]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_of_which_one_is_ended_at_a_write_go_on(rank, tmp_path, request):
    """The other ends too, by itself or by an error: it has lost the first."""
    step = request.config.getoption("every_write")
    if rank and not step:
        pytest.skip("the second process alone writes its random states; with --every-write")
    forget_accelerate()
    counts = [tmp_path / "count" if each == rank else None for each in range(2)]
    assert in_two_processes(tmp_path / "whole", count_to=counts) == [0, 0]
    total = int((tmp_path / "count").read_text())
    print(f"{total} places")  # which -rP shows
    for number in range(1, total + 1, step) if step else [int(0.6 * total)]:
        folder = tmp_path / f"ended-at-{number}"
        statuses = in_two_processes(folder, [number if each == rank else None for each in range(2)])
        assert statuses[rank] == ENDED and statuses[1 - rank] != ENDED, number
        assert in_two_processes(folder) == [0, 0], number
        assert_same_run(tmp_path / "whole", folder, 6)
        shutil.rmtree(folder)
