"""Runs with statistics of the data, what follows them, and studies of them, each the whole command on tiny networks."""

import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

import diffusers_ext
from diffusers_ext import GaussianPriorModel, VAEModel
from diffusers_ext.commands import fit_prior, study, train_classifier, train_ddpm
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.evaluation.bits_per_dim import measure_bits_per_dim
from diffusers_ext.evaluation.guidance_comparison import add_networks
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.hub import cards
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.recipes.text_to_image import TextConfig
from diffusers_ext.recipes.training_path import build_scheduler
from diffusers_ext.trainer.run_folder import read_metrics
from runs import forget_accelerate


SMALL = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "train_batch_size": 8,
    "max_train_samples": 60,
    "max_train_steps": 2,
    "num_inference_steps": 2,
    "sample_columns": 1,
    "num_threads": 1,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One with means by label, a scale, and the bound of the data in its loss."""
    options = {"data_mean": "class", "data_scale": "overall", "objective": "hybrid", "label_dropout": 0.5}
    held_out = {"validation_split": "test", "validation_steps": 2, "max_validation_samples": 8, "logging_steps": 2}
    folder = tmp_path_factory.mktemp("runs") / "class"
    train_ddpm.main(train_ddpm.TrainConfig(**SMALL | options | held_out, output_dir=str(folder)))
    forget_accelerate()
    return folder


def load(folder):
    pipe = diffusers_ext.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_pipeline_of_a_run_has_its_statistics_and_clips_to_what_they_make_of_images(run):
    pipe, data = load(run), prepare_images("digits", max_samples=60)
    x = data.pixels[np.arange(60)].astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1
    means = np.stack([*(x[data.labels == label].mean(0) for label in range(10)), x.mean(0)])
    np.testing.assert_allclose(pipe.statistics.mean.numpy(), means, atol=1e-6)
    assert pipe.statistics.std.item() == pytest.approx(np.sqrt(np.mean((x - means[data.labels]) ** 2)), rel=1e-5)
    assert pipe.scheduler.config.clip_sample_range == pytest.approx(pipe.statistics.largest)
    images = pipe(class_labels=[3, 4], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 1) and np.isfinite(images).all()
    assert (run / "samples.png").stat().st_size and (run / "denoising.png").stat().st_size
    record = read_metrics(run / "metrics.jsonl")[-1]
    assert record["loss"] > 0 and record["val_loss"] > 0
    pixels = torch.from_numpy(data.pixels[np.arange(4)]).permute(0, 3, 1, 2)
    names = [str(label) for label in range(10)]
    found = measure_bits_per_dim(
        pipe, LabelledImages(pixels, torch.from_numpy(data.labels[:4]), names), num_terms=4, show_progress=False
    )
    assert found["by_label"] and found["variance"] == "learned_range" and found["bits_per_dim"] > 0


def test_a_run_goes_on_with_the_statistics_of_its_pipeline_and_not_with_those_of_its_data(run, tmp_path):
    small = {name: value for name, value in SMALL.items() if name not in ("block_out_channels", "layers_per_block")}
    on = small | {"pretrained_pipeline": str(run), "max_train_samples": 30, "output_dir": str(tmp_path / "on")}
    folder = train_ddpm.main(train_ddpm.TrainConfig(**on))
    forget_accelerate()
    began, gone_on = load(run), load(folder)
    assert gone_on.statistics.fingerprint() == began.statistics.fingerprint()
    assert gone_on.scheduler.config.clip_sample_range == pytest.approx(began.statistics.largest)
    with pytest.raises(ValueError, match="data_mean must be 'class', as it is of"):
        train_ddpm.TrainConfig(**on | {"data_mean": "overall"})
    with pytest.raises(ValueError, match="statistics must be of the denoiser's samples, .*: they are of other data"):
        train_ddpm.main(train_ddpm.TrainConfig(**on | {"resolution": (16,), "output_dir": str(tmp_path / "large")}))
    forget_accelerate()


def test_a_classifier_of_a_pipeline_learns_its_samples_and_fits_into_it_alone(run, tmp_path):
    options = {name: value for name, value in SMALL.items() if name not in ("num_inference_steps", "sample_columns")}
    config = train_classifier.TrainClassifierConfig(
        **options, pipeline=str(run), max_measured_samples=8, output_dir=str(tmp_path / "classifier")
    )
    train_classifier.main(config)
    forget_accelerate()
    pipe = load(run)
    classifier = diffusers_ext.NoisyClassifierModel.from_pretrained(tmp_path / "classifier")
    assert classifier.config.data_statistics == pipe.statistics.fingerprint()
    add_networks(pipe, None, classifier)
    other = load(run)
    other.register_modules(statistics=None)
    with pytest.raises(ValueError, match="trained on those of other data for a pipeline with none"):
        add_networks(other, None, classifier)
    with pytest.raises(ValueError, match="the weaker pipeline must have the statistics of the pipeline"):
        add_networks(load(run), other, None)


def test_a_fitted_prior_is_where_calls_start_by_default(run, tmp_path, capsys):
    words = ["--start_timestep", "300", "--by_label", "--num_inference_steps", "3", "--num_threads", "1"]
    folder = fit_prior.main(fit_prior.parse([str(run), *words, "--output_dir", str(tmp_path / "truncated")]))
    assert (
        "calls start at timestep 300 from a normal distribution of rank 64 for each label" in capsys.readouterr().out
    )
    pipe = load(folder)
    assert isinstance(pipe.prior, GaussianPriorModel) and pipe.prior.mean.shape == (11, 1, 8, 8)
    # Of normalised samples by the means of their labels: nothing is left of those.
    assert pipe.prior.mean.abs().max() < 1e-5
    point = pipe(class_labels=5, trajectory_steps=[0]).trajectory[0]
    assert point.timestep == 300
    assert load(run).prior is None
    for options, message in (
        ({}, "start_timestep must be given"),
        ({"start_timestep": 2000}, r"start_timestep must be an integer in \[0, 999\], got 2000"),
        ({"start_timestep": 9, "vae_prior": "runs/vae", "rank": 3}, "leave them or vae_prior out"),
        ({"start_timestep": 99, "vae_prior": str(tmp_path / "nothing")}, "cannot be loaded as an autoencoder"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_prior.main(fit_prior.FitPriorConfig(pipeline=str(run), num_threads=1, **options))


def test_the_card_lists_a_prior_fitted_in_place_and_no_figure_of_before(run, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    figure = cards.Figure("Fréchet distance", 1.25, 10, "ExtDDIMScheduler", 5, "evaluate.py runs/x")
    before = cards.add_figures(folder, [figure]).read_text()
    assert "`prior`" not in before and "model-index" in before
    words = ["--start_timestep", "600", "--rank", "2", "--num_threads", "1"]
    fit_prior.main(fit_prior.parse([str(folder), *words]))
    text = (folder / "README.md").read_text()
    assert "| `prior` | `diffusers_ext.GaussianPriorModel` | " in text
    assert "## Results\n\nNo figure was measured since calls start at timestep 600" in text
    assert "1.25" not in text and "model-index" not in text and "evaluate.py runs/x" not in text
    unchanged = ("## Data", "## Training", "## Use", "## Limitations")
    assert [after(text, heading) for heading in unchanged] == [after(before, heading) for heading in unchanged]
    table = text.partition("| component")[2].partition("\n\n")[0]
    assert table in cards.write_card(folder, data="as a new card has it").read_text()
    (folder / "README.md").write_text("Mine.\n")
    fit_prior.main(fit_prior.parse([str(folder), *words]))
    assert (folder / "README.md").read_text() == "Mine.\n"
    assert "is no card of diffusers_ext, and was left as it is" in capsys.readouterr().out


def after(text, heading):
    """A section of a card."""
    return text.partition(f"\n{heading}\n")[2].partition("\n## ")[0]


def test_latents_are_normalised_by_channel_beside_the_scale_of_their_autoencoder(tmp_path):
    torch.manual_seed(0)
    vae = VAEModel(8, 1, 1, block_out_channels=(8, 8), latent_channels=2, scaling_factor=1.7, shift_factor=0.2)
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    vae.save_pretrained(tmp_path / "vae")
    options = {"data_mean": "overall", "data_scale": "channel", "vae": str(tmp_path / "vae"), "random_flip": True}
    folder = train_ddpm.main(train_ddpm.TrainConfig(**SMALL | options, output_dir=str(tmp_path / "run")))
    forget_accelerate()
    pipe, vae = load(folder), vae.eval()
    assert pipe.statistics.std.shape == (2,) and not pipe.scheduler.config.clip_sample
    pixels = prepare_images("digits", max_samples=60).pixels[np.arange(4)]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    samples = pipe(class_labels=[1] * 4, image=images, strength=0, output_type="latent").images
    with torch.no_grad():
        latents = (vae.encode(2 * images - 1).latent_dist.mean - 0.2) * 1.7
        expected = (latents - pipe.statistics.mean) / pipe.statistics.std.view(1, 2, 1, 1)
        decoded = vae.decode(vae.encode(2 * images - 1).latent_dist.mean).sample
    torch.testing.assert_close(samples, expected, rtol=1e-3, atol=1e-4)
    again = pipe(class_labels=[1] * 4, image=images, strength=0, output_type="pt").images
    torch.testing.assert_close(again, (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-4)


def no_features(*args):
    """In the place of training a classifier, which takes long, is tested in test_evaluate.py, and needs gradients."""
    assert torch.is_grad_enabled()
    return None, None


@pytest.mark.parametrize("name", study.STUDIES)
@pytest.mark.filterwarnings("ignore")
def test_each_study_leaves_a_page_a_figure_and_numbers(run, name, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_EXT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "features_for", no_features)
    words = ["--num_data", "40", "--output_dir", str(tmp_path)]
    words += ["--num_levels", "3"] if name == "scaling" else ["--num_images", "20", "--num_inference_steps", "4"]
    words += ["--lengths", "10", "1000"] if name == "noise_end" else []
    page = study.main(study.parse([name, "--pipelines", str(run), *words]))
    text = page.read_text()
    assert page.name == f"{name}.md" and text.startswith("# ") and f"({name}.png)" in text
    assert (tmp_path / f"{name}.png").stat().st_size > 1000 and (tmp_path / f"{name}.json").is_file()
    assert "nan" not in text and len(text.split("| --- |")) > 1


@pytest.mark.filterwarnings("ignore")
def test_a_page_counts_the_images_that_were_there_and_not_those_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "features_for", no_features)
    assert "over 60 images; the figure" in ask_scaling([run], tmp_path, "--num_data", "99")
    words = ["--num_data", "99", "--lengths", "10", "--output_dir", str(tmp_path)]
    assert "L_T over 60 images" in study.main(study.parse(["noise_end", "--pipelines", str(run), *words])).read_text()


def test_labels_without_an_image_among_those_drawn_are_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "features_for", no_features)
    words = ["--num_images", "20", "--num_data", "2", "--num_inference_steps", "4", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match=r"got 2, of which none is of [0-9](, [0-9]){7,8}: give more by --num_data"):
        study.main(study.parse(["data_draws", "--pipelines", str(run), *words]))


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (
            diffusers_ext.FlowScheduler(),
            "must be of a path of betas, got the linear path of its FlowScheduler: .* --path vp",
        ),
        (
            diffusers.EulerDiscreteScheduler(),
            "must have a scheduler of this package, got EulerDiscreteScheduler: save it with",
        ),
    ],
)
def test_a_path_or_scheduler_without_a_chain_of_betas_is_named(run, scheduler, message):
    pipe = load(run)
    study.check_subject("runs/a", pipe)
    with pytest.raises(ValueError, match=f"runs/a {message}"):
        study.check_subject("runs/a", diffusers_ext.GuidedDiffusionPipeline(pipe.denoiser, scheduler))
    with pytest.raises(ValueError, match="runs/a must be a GuidedDiffusionPipeline, got a DDPMPipeline"):
        study.check_subject("runs/a", diffusers.DDPMPipeline(pipe.denoiser, diffusers.DDPMScheduler()))


@pytest.mark.parametrize(
    "name, option, value, needed",
    [
        ("scaling", "lengths", (50,), "noise_end"),
        ("scaling", "num_images", 7, "noise_end, data_draws or embedding"),
        ("scaling", "num_inference_steps", 7, "noise_end, data_draws or embedding"),
        ("embedding", "features", "runs/features", "noise_end or data_draws"),
        ("data_draws", "factors", (2.0,), "scaling"),
        ("noise_end", "num_levels", 3, "scaling"),
    ],
)
def test_options_of_another_study_are_refused(name, option, value, needed):
    with pytest.raises(ValueError, match=f"{option} has no meaning without study {needed}: give both or neither"):
        study.StudyConfig(study=name, pipelines=("runs/a",), **{option: value})


def ask_scaling(folders, output_dir, *words):
    """The page of the study that is soonest made."""
    words = ["--num_levels", "2", "--factors", "2", "--output_dir", str(output_dir), *words]
    return study.main(study.parse(["scaling", "--pipelines", *map(str, folders), *words])).read_text()


def test_pipelines_of_folders_with_one_name_are_both_studied_and_named_by_their_paths(run, tmp_path):
    other = tmp_path / "other" / run.name
    shutil.copytree(run, other)
    text = ask_scaling([run, other], tmp_path)
    assert f"| {run} |" in text and f"| {other} |" in text
    assert study.names_of(["runs/a", "other/a/", "runs/b", "."]) == ["runs/a", "other/a/", "b", Path.cwd().name]
    with pytest.raises(ValueError, match="pipelines must be different ones, got runs/a runs/a/"):
        study.StudyConfig(study="scaling", pipelines=("runs/a", "runs/a/"))


def test_the_betas_of_a_chain_of_another_length_can_be_asked_for():
    small = {"block_out_channels": (8, 16)}
    long = build_scheduler(DenoisingConfig(beta_schedule="linear", **small))
    options = {"beta_schedule": "linear", "num_train_timesteps": 50, "beta_reference_timesteps": 1000}
    short = build_scheduler(DenoisingConfig(**options, **small))
    torch.testing.assert_close(short.alphas_cumprod, long.alphas_cumprod[19::20], rtol=1e-5, atol=0)
    vp = build_scheduler(DenoisingConfig(path="vp", num_train_timesteps=50, **small))  # whose default it is
    torch.testing.assert_close(vp.alphas_cumprod, short.alphas_cumprod)
    with pytest.raises(ValueError, match="beta_reference_timesteps has no meaning without beta_schedule"):
        DenoisingConfig(beta_reference_timesteps=1000, **small)
    path, _, _ = train_classifier.load_path(train_classifier.TrainClassifierConfig(**options))
    assert path["beta_reference_timesteps"] == 1000


def test_means_by_label_are_refused_for_captions_and_unlabelled_images(tmp_path):
    with pytest.raises(ValueError, match="data_mean class is for labels, which captions are not"):
        TextConfig(data_mean="class")
    config = train_ddpm.TrainConfig(**SMALL, data_mean="class", unconditional=True, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="needs one label for each image, digits has no labels"):
        train_ddpm.main(config)
    forget_accelerate()
    assert not (tmp_path / "run").exists()
