"""Runs of the training script on each path: what they save, how they go on, and what is measured of them."""

import dataclasses
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

import diffusers_ext
from diffusers_ext import DiffusionPipeline, ExtDDIMScheduler, FlowScheduler, ScoreSDEScheduler
from diffusers_ext.data.sources import load_digits
from diffusers_ext.evaluation.bits_per_dim import measure_bits_per_dim
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.recipes.training_path import build_scheduler
from training.train_ddpm import TrainConfig, main


sys.path.insert(0, str(Path(__file__).parents[2] / "training"))
import reconstruct_ema
import train_classifier


SMALL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "train_batch_size": 8,
    "max_train_samples": 40,
    "num_inference_steps": 2,
    "sample_columns": 2,
    "logging_steps": 2,
    "num_train_timesteps": 20,
    "max_train_steps": 4,
    "checkpointing_steps": 2,
    "save_images_steps": 2,
    "mixed_precision": "no",
}
# The path, further options, the scheduler that is saved, and one of diffusers that samples the same network.
RUNS = {
    "ve": ({"timestep_sampling": "logit_normal"}, ScoreSDEScheduler, DPMSolverMultistepScheduler),
    "subvp": ({"loss_weighting": "likelihood", "timestep_sampling": "importance"}, ScoreSDEScheduler, None),
    "linear": ({}, FlowScheduler, FlowMatchEulerDiscreteScheduler),
    "learned": ({"schedule_features": 16, "fourier_features": (7, 8)}, ExtDDIMScheduler, DPMSolverMultistepScheduler),
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    options, *_ = RUNS[request.param]
    config = TrainConfig(
        **SMALL, path=request.param, output_dir=str(tmp_path_factory.mktemp("runs") / "run"), **options
    )
    return request.param, config, main(config)


def held_out():
    rows = list(load_digits("test"))[:6]
    images = torch.stack([torch.frombuffer(bytearray(row["image"].tobytes()), dtype=torch.uint8) for row in rows])
    return LabelledImages(images.view(6, 1, 8, 8), torch.tensor([row["label"] for row in rows]), list("0123456789"))


def test_it_saves_a_pipeline_of_its_path_with_pictures_and_a_card(run):
    name, _, folder = run
    _, cls, other = RUNS[name]
    for file in ("samples.png", "denoising.png", "loss_by_snr.png", "samples/step-0000002.png", "README.md"):
        assert (folder / file).stat().st_size > 0
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe.scheduler) is cls
    settings = {"class_labels": [1, 2], "num_inference_steps": 4, "output_type": "pt"}
    for scheduler in [None] if other is None else [None, other.__name__]:
        pipe = load_pipeline(str(folder), scheduler)
        pipe.set_progress_bar_config(disable=True)
        images = pipe(**settings, generator=torch.Generator().manual_seed(0)).images
        assert images.shape == (2, 1, 8, 8) and images.isfinite().all() and images.std() > 0


def test_a_scheduler_of_another_path_is_refused(run):
    name, _, folder = run
    other = "ExtDDIMScheduler" if name == "linear" else "FlowMatchEulerDiscreteScheduler"
    for wrong in (other, "EDMEulerScheduler"):
        with pytest.raises(ValueError, match=f"{wrong}"):
            load_pipeline(str(folder), wrong)


def test_it_goes_on_bit_by_bit(run, tmp_path):
    _, config, folder = run
    part = tmp_path / "part"
    shutil.copytree(folder / "checkpoint-2", part / "checkpoint-2")
    shutil.copy(folder / "metrics.jsonl", part)
    main(dataclasses.replace(config, output_dir=str(part), resume_from_checkpoint="latest"))
    for file in ("model", "average", "objective"):
        one, two = (load_file(each / "checkpoint-4" / f"{file}.safetensors") for each in (folder, part))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), file


def test_its_likelihood_is_measured_by_both_bounds(run):
    """The network is untrained and its output near 0, so that the bound is that of no prediction, and finite."""
    name, _, folder = run
    result = measure_bits_per_dim(load_pipeline(str(folder)), held_out(), num_flow_steps=2, show_progress=False)
    assert result["num_steps"] == 20 and result["variance"] == "fixed_large"  # without images to measure the best on
    assert 1 < result["bits_per_dim"] < 100 and result["flow_bits_per_dim"] == pytest.approx(
        result["flow_bits_per_dim"]
    )
    few = measure_bits_per_dim(load_pipeline(str(folder)), held_out(), num_steps=5, show_progress=False)
    assert few["num_steps"] == 5 and few["rate_by_timesteps"][-1]["last_timestep"] == 19


def test_a_classifier_is_trained_on_its_levels_and_guides_it(run, tmp_path):
    name, _, folder = run
    small = {"block_out_channels": (8, 16), "train_batch_size": 8, "max_train_samples": 40, "max_train_steps": 2}
    config = train_classifier.TrainClassifierConfig(
        **small, pipeline=str(folder), output_dir=str(tmp_path / "classifier"), max_measured_samples=8
    )
    classifier = diffusers_ext.NoisyClassifierModel.from_pretrained(train_classifier.main(config))
    pipe = load_pipeline(str(folder))
    pipe.register_modules(classifier=classifier, guider=diffusers_ext.ClassifierGuidance(classifier_scale=2.0))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[1, 2], num_inference_steps=3, output_type="pt").images
    assert images.isfinite().all()
    if name != "linear":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a table that ends before the noise
            pipe.register_modules(scheduler=ExtDDIMScheduler(num_train_timesteps=20))
        with pytest.raises(ValueError, match="the classifier must be trained on the scheduler's noise levels"):
            pipe(class_labels=[1, 2], num_inference_steps=3)


def test_an_average_made_afterwards_has_its_own_learned_schedule(tmp_path):
    options = {
        "path": "learned",
        "schedule_features": 8,
        "ema_std": 0.1,
        "ema_snapshot_steps": 4,
        "learning_rate": 0.01,
    }
    options |= {"max_train_steps": 40, "lr_warmup_steps": 2, "checkpointing_steps": 40, "save_images_steps": 40}
    run = main(TrainConfig(**SMALL | options | {"output_dir": str(tmp_path / "run"), "train_batch_size": 4}))
    made = {}
    for std in (0.1, 0.07):
        config = reconstruct_ema.ReconstructConfig(str(run), std, output_dir=str(tmp_path / str(std)))
        made[std] = load_pipeline(str(reconstruct_ema.main(config)))
    saved = load_pipeline(str(run))
    of = {name: pipe.scheduler.schedule.alpha_bar for name, pipe in (*made.items(), ("saved", saved))}
    start = build_scheduler(TrainConfig(**SMALL | options)).schedule.alpha_bar
    moved = (of["saved"].logit() - start.logit())[:-1].abs().max()
    assert moved > 0.02
    apart = {std: (of[std].logit() - of["saved"].logit())[:-1].abs().max() for std in made}
    assert apart[0.1] < 0.2 * apart[0.07]
    assert len(made[0.1].scheduler.config["_learned_timesteps"]) == 101
