"""Real runs of the script, with a network as small as it gets."""

import csv
import math

import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from diffusers_ext import (
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    GuidedDiffusionPipeline,
    NoisyClassifierModel,
    UNetModel,
    VAEModel,
)
from diffusers_ext.diffusion.betas import make_betas
from diffusers_ext.diffusion.noising import NoiseSchedule
from diffusers_ext.options import parse_config
from diffusers_ext.recipes.classifier_objective import ClassifierObjective, accuracy_by_level
from diffusers_ext.schedulers.levels import describe_path
from diffusers_ext.trainer.run_folder import read_metrics
from mixture_oracle import MEANS, STDS, WEIGHTS, MixtureClassifier
from runs import metrics
from tiny import tiny_unet
from training.cache_latents import CacheConfig
from training.cache_latents import main as cache_latents
from training.train_classifier import TrainClassifierConfig, main


SMALL = {
    "block_out_channels": (8, 16),
    "train_batch_size": 32,
    "logging_steps": 5,
    "lr_warmup_steps": 5,
    "max_measured_samples": 200,
    "mixed_precision": "no",
}


def config_of(output_dir, **settings):
    return TrainClassifierConfig(**SMALL | {"output_dir": str(output_dir), "max_train_steps": 4} | settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on digits of a few seconds."""
    folder = tmp_path_factory.mktemp("run")
    main(
        config_of(
            folder,
            max_train_steps=150,
            learning_rate=3e-3,
            validation_split="test",
            block_out_channels=(16, 32),
        )
    )
    return folder


def test_a_run_learns_the_labels_where_the_noise_leaves_them(trained):
    with (trained / "accuracy.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert [row["timestep"] for row in (rows[0], rows[-1])] == [0, 999]
    assert rows[0]["accuracy"] > 0.4  # ten labels
    assert rows[-1]["accuracy"] < 0.3  # pure noise: guessing
    assert rows[-1]["cross_entropy"] == pytest.approx(math.log(10), abs=0.2)
    records = read_metrics(trained / "metrics.jsonl")
    assert records[-1]["accuracy_q1"] > records[-1]["accuracy_q4"]
    assert records[-1]["accuracy_q1"] > records[0]["accuracy_q1"]
    assert records[-1]["val_loss"] < math.log(10)
    assert (trained / "accuracy.png").stat().st_size > 1000 and (trained / "index.html").is_file()
    results = (trained / "README.md").read_text().partition("## Results")[2].partition("## Use")[0]
    assert "loss on held-out data of the split test was" in results and "The label is the likeliest of" in results
    assert "No figure" not in results and "`NoisyClassifierModel` trained from" in (trained / "README.md").read_text()


def test_what_it_saves_guides_a_pipeline_with_the_same_noise_levels(trained):
    model = NoisyClassifierModel.from_pretrained(trained)
    assert model.config.noise_schedule["beta_schedule"] == "cosine"
    pipe = GuidedDiffusionPipeline(tiny_unet(10), ExtDDIMScheduler(beta_schedule="cosine"), classifier=model)
    pipe.set_progress_bar_config(disable=True)
    pipe(class_labels=[3], num_inference_steps=2, classifier_scale=2.0)
    pipe.register_modules(scheduler=ExtDDIMScheduler())
    with pytest.raises(ValueError, match="trained on 'cosine'"):
        pipe(class_labels=[3], num_inference_steps=2, classifier_scale=2.0)


def test_its_gradient_leads_samples_to_the_label(trained):
    """Between digits as they are, in noise: a step up log p(label | x_t) raises that of other noise draws too."""
    model, schedule = NoisyClassifierModel.from_pretrained(trained).eval(), NoiseSchedule(make_betas("cosine", 1000))
    images = torch.tensor(load_digits().images[:64], dtype=torch.float32)[:, None] / 8 - 1
    target = torch.full((64,), 3)
    level = schedule.level(300, images)
    x_t = (level.alpha * images + level.sigma * torch.randn_like(images)).requires_grad_()
    log_p = model(x_t, 300).logits.log_softmax(1).gather(1, target[:, None])
    (gradient,) = torch.autograd.grad(log_p.sum(), x_t)
    with torch.no_grad():
        moved = model(x_t + 0.1 * gradient, 300).logits.log_softmax(1).gather(1, target[:, None])
    assert ((moved > log_p).float().mean()) > 0.95


def test_a_run_that_goes_on_is_the_run_that_was_not_stopped(tmp_path):
    main(config_of(tmp_path / "whole", max_train_steps=6))
    main(config_of(tmp_path / "parts", max_train_steps=6, checkpointing_steps=3))
    main(config_of(tmp_path / "parts", max_train_steps=6, resume_from_checkpoint="checkpoint-3"))
    one, other = (load_file(tmp_path / name / "diffusion_pytorch_model.safetensors") for name in ("whole", "parts"))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    # A line of the log is of the steps before and after the checkpoint.
    (line, end), others = metrics(tmp_path / "whole"), metrics(tmp_path / "parts")
    assert [line, end] == others
    assert line["step"] == 5 and {"accuracy_q1", "accuracy_q4"} <= line.keys()


def save_vae(folder, seed=0):
    torch.manual_seed(seed)
    vae = VAEModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), latent_channels=2)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae.register_to_config(scaling_factor=1.7, shift_factor=0.3)
    vae.save_pretrained(folder)
    return vae


def latent_pipeline(vae):
    denoiser = UNetModel(4, 2, 2, num_classes=10, block_out_channels=(8, 8), layers_per_block=1)
    return GuidedDiffusionPipeline(denoiser, ExtDDIMScheduler(beta_schedule="cosine", clip_sample=False), vae=vae)


def test_a_classifier_learns_the_latents_that_a_pipeline_makes(tmp_path):
    """Encoded at each batch by the pipeline's own VAE, or read from disk: the same, but for float16 on disk."""
    vae = save_vae(tmp_path / "vae")
    latent_pipeline(vae).save_pretrained(tmp_path / "pipeline")
    small = {"max_train_samples": 64, "max_measured_samples": 32, "logging_steps": 1, "max_train_steps": 2}
    folder = main(config_of(tmp_path / "run", pipeline=str(tmp_path / "pipeline"), **small))
    cache = CacheConfig(
        vae=str(tmp_path / "vae"), output_dir=str(tmp_path / "latents"), max_train_samples=64, mixed_precision="no"
    )
    cached = {"dataset_name": str(cache_latents(cache)), "vae": str(tmp_path / "vae")}
    other = main(config_of(tmp_path / "cached", **small | cached))
    losses, others = ([record["loss"] for record in read_metrics(path / "metrics.jsonl")] for path in (folder, other))
    assert losses == pytest.approx(others, rel=1e-3) and losses[0] != losses[1]
    assert (folder / "accuracy.csv").read_text().count("\n") == 21

    model = NoisyClassifierModel.from_pretrained(folder)
    assert model.config.in_channels == 2 and model.config.sample_size == 4
    pipe = GuidedDiffusionPipeline.from_pretrained(tmp_path / "pipeline", classifier=model)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[3], num_inference_steps=2, classifier_scale=2.0, output_type="np").images.shape == (
        1,
        8,
        8,
        1,
    )


def test_latents_that_do_not_fit_are_refused(tmp_path):
    vae = save_vae(tmp_path / "vae")
    save_vae(tmp_path / "other", seed=1)
    latent_pipeline(vae).save_pretrained(tmp_path / "latents")
    GuidedDiffusionPipeline(tiny_unet(10), ExtDDIMScheduler(beta_schedule="cosine")).save_pretrained(
        tmp_path / "pixels"
    )
    few = {"max_train_samples": 40}
    for settings, message in [
        ({"pipeline": "latents", "vae": "other"}, "vae must be that of the pipeline .*, which has another one"),
        ({"pipeline": "pixels", "vae": "vae"}, "vae must be that of the pipeline .*, which has none"),
        (
            {"vae": "vae", "resolution": (24,), "block_out_channels": (8, 8, 8, 8)},
            "sides of the latents must be multiples of 8, .*, got 12x12",
        ),
    ]:
        paths = {name: str(tmp_path / settings[name]) for name in ("pipeline", "vae") if name in settings}
        with pytest.raises(ValueError, match=message):
            main(config_of(tmp_path / "run", **few | settings | paths))


def test_noise_levels_are_taken_from_a_pipeline(tmp_path):
    scheduler = ExtDDPMScheduler(num_train_timesteps=500, beta_schedule="linear", beta_end=0.04)
    GuidedDiffusionPipeline(tiny_unet(10), scheduler).save_pretrained(tmp_path / "pipeline")
    folder = main(config_of(tmp_path / "run", pipeline=str(tmp_path / "pipeline"), max_train_steps=1))
    path = NoisyClassifierModel.from_pretrained(folder).config.noise_schedule
    assert path == describe_path(scheduler)
    assert path["num_train_timesteps"] == 500


def test_the_exact_classifier_has_the_accuracy_of_the_mixture():
    """By Monte Carlo over labels that are drawn, against the share of the likelier label at pure noise."""
    scheduler, generator = ExtDDPMScheduler(), torch.Generator().manual_seed(0)
    labels = (torch.rand(8000, generator=generator) < WEIGHTS[1]).long()
    draws = torch.randn(2, 8000, 2, generator=generator)
    x0 = torch.tensor(MEANS)[labels] + torch.tensor(STDS)[labels, None] * draws[0]

    class Exact(MixtureClassifier):
        def forward(self, sample, timestep):
            return type("Output", (), {"logits": super().forward(sample[..., None], timestep)[0]})()

    batch = {"images": x0, "noise": draws[1], "labels": labels}
    model = Exact(scheduler, torch.float32)
    rows = accuracy_by_level(model, [batch], scheduler.schedule, num_levels=5)
    assert [row["timestep"] for row in rows] == [0, 250, 500, 749, 999]
    assert rows[-1]["accuracy"] == pytest.approx(WEIGHTS[1], abs=0.02)
    entropy = -sum(weight * math.log(weight) for weight in WEIGHTS)
    assert rows[-1]["cross_entropy"] == pytest.approx(entropy, abs=0.02)
    accuracies = [row["accuracy"] for row in rows]
    assert accuracies[0] > 0.95 > accuracies[1] > accuracies[-1]

    objective = ClassifierObjective(scheduler.schedule)
    times = torch.rand(8000, dtype=torch.float64, generator=generator)
    loss = objective(model, batch | {"time": times})
    assert objective.metrics()["accuracy_q4"] == pytest.approx(WEIGHTS[1], abs=0.06)
    assert objective.metrics() == {}
    assert rows[0]["cross_entropy"] < loss.item() < rows[-1]["cross_entropy"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--pipeline", "runs/a", "--beta_schedule", "linear"], "pipeline and beta_schedule both say"),
        (["--beta_end", "0.03"], "beta_end has no meaning without beta_schedule linear, scaled_linear or sigmoid"),
        (["--unconditional"], "a classifier learns them"),
        (["--resolution", "9"], "resolution must be a multiple of 4"),
        (["--save_images_steps", "1"], "unknown option --save_images_steps"),
        (["--dropout", "1.5"], "dropout must be in [0, 1), got 1.5"),
        (["--layers_per_block", "0"], "layers_per_block must be at least 1, got 0"),
        (["--block_out_channels", "8", "0"], "block_out_channels must be at least 1, got 8 0"),
        (["--max_measured_samples", "0"], "max_measured_samples must be at least 1, got 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(words, message, capsys):
    with pytest.raises(SystemExit):
        parse_config(TrainClassifierConfig, words)
    assert message in capsys.readouterr().err
