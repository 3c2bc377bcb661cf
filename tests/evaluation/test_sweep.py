"""A pipeline by several samplers, numbers of steps and scales: each cell is what its settings make alone, and is made once."""

import json

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler

from diffusers_ext import ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel
from diffusers_ext.evaluation.evaluator import Evaluator
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.real_images import RealImages
from diffusers_ext.evaluation.spread import mean_and_spread, measure_over_seeds
from diffusers_ext.evaluation.subject import generate_for
from diffusers_ext.evaluation.sweep import Sweep, SweepOptions
from diffusers_ext.evaluation.sweep_results import SweepResults
from diffusers_ext.metrics.features import FeatureClassifierModel
from tiny import tiny_stock_unet


NAMES = ["dark", "grey", "bright"]
SETTINGS = {"num_images": 9, "batch_size": 4, "bf16": False}
REFERENCE = {"dataset_name": "shades", "dataset_split": "train", "num_images": 60}
pytestmark = pytest.mark.filterwarnings("ignore:the Fréchet distance of 128 features is unreliable")


def shades(channels=1, size=8):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    noise = torch.randint(-25, 26, (60, channels, size, size), generator=generator)
    images = LabelledImages((40 + 85 * labels.view(-1, 1, 1, 1) + noise).to(torch.uint8), labels, NAMES)
    return RealImages(images, None, "shades", "crop", ())


@pytest.fixture(scope="module")
def evaluator():
    torch.manual_seed(0)
    features = FeatureClassifierModel.for_images((1, 8, 8), NAMES).eval()
    return Evaluator(shades().train, features, num_reference=9, in_pixels=False)


def pipeline(seed=0):
    torch.manual_seed(seed)
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "num_classes": 3}
    unet = UNetModel(sample_size=8, in_channels=1, out_channels=1, **sizes)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = ExtDDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    return GuidedDiffusionPipeline(unet, scheduler, id2label=dict(enumerate(NAMES)))


def run(folder, evaluator, pipe=None, seeds=range(1), known=(), real=None, **options):
    swept = Sweep(pipe or pipeline(), real or shades(), SweepOptions(sweep=True, **options), SETTINGS, seeds)
    results = SweepResults(folder / "results.json", swept.describe(None, REFERENCE), "the command")
    results.rows, said = list(known), []
    swept.run(evaluator, results, said.append)
    return results, said


@pytest.fixture(scope="module")
def swept(evaluator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    schedulers = ("ExtDDIMScheduler", "HeunDiscreteScheduler")
    options = {"sweep_schedulers": schedulers, "sweep_steps": (1, 2), "sweep_guidance_scales": (1.0, 2.0)}
    return run(folder, evaluator, **options)[0]


def test_a_cell_is_the_set_of_images_that_its_settings_make_alone(swept, evaluator):
    images, labels, _ = generate_for(shades(), pipeline(), 9, num_inference_steps=2, guidance_scale=2.0)
    alone = evaluator.measure(images, labels)
    row = swept.find(scheduler="ExtDDIMScheduler", guidance_scale=2.0, num_inference_steps=2)
    assert {name: row[name] for name in alone} == pytest.approx(alone, rel=1e-3, abs=1e-6)
    assert len(swept.rows) == 8 and row["spread"] == {}


def test_calls_are_those_of_the_network(swept):
    calls = {(row["scheduler"], row["num_inference_steps"], row["guidance_scale"]): row["calls"] for row in swept.rows}
    for name, number in (("ExtDDIMScheduler", 2), ("HeunDiscreteScheduler", 3)):
        assert calls[name, 2, 1.0] == number and calls[name, 2, 2.0] == 2 * number


def test_all_cells_start_from_the_same_noise():
    """A single step of either ends at the x_0 that the network predicts from it."""
    names = ("ExtDDIMScheduler", "HeunDiscreteScheduler")
    swept = Sweep(pipeline(), shades(), SweepOptions(True, (1,), names), SETTINGS, range(1))
    (ours, _), (other, _) = (swept.generate(cell, 0) for cell in swept.cells)
    difference = (ours.int() - other.int()).abs()
    # Heun's starts at its largest sigma, and so from x_T with a little more than unit variance.
    assert difference.float().mean() < 2
    assert (ours.int() - swept.generate(swept.cells[0], 1)[0].int()).abs().float().mean() > 20


def test_the_table_and_the_figure_have_every_cell(swept):
    text = swept.path.with_suffix(".md").read_text()
    assert "| scheduler | guidance | steps | calls | Fréchet distance | label accuracy | kernel distance |" in text
    assert text.count("| HeunDiscreteScheduler |") == 4 and "| HeunDiscreteScheduler | 2 | 2 | 6 |" in text
    assert "9 images a cell, image i of each from the same noise. Against 60 images of shades, split train" in text
    assert swept.path.with_suffix(".png").stat().st_size > 10_000
    assert not list(swept.path.parent.glob(".partial*"))


def test_cells_that_are_there_are_not_measured_again(swept, evaluator):
    """One of them is marked, which a new measure would not be."""
    known = json.loads(swept.path.read_text())["results"]
    known[0]["frechet_distance"] = -1.0
    options = {"sweep_steps": (1, 3), "sweep_guidance_scales": (1.0,)}
    results, said = run(swept.path.parent / "more", evaluator, known=known, **options)
    assert said[0].endswith(f"in {results.path}") and len(results.rows) == 9
    assert (
        results.find(scheduler="ExtDDIMScheduler", guidance_scale=1.0, num_inference_steps=1)["frechet_distance"] == -1
    )
    again, _ = run(swept.path.parent / "again", evaluator, **options)
    assert again.rows[0]["frechet_distance"] > 0 and len(again.rows) == 2


def test_the_results_of_another_model_are_refused(swept):
    other = Sweep(pipeline(seed=1), shades(), SweepOptions(sweep=True), SETTINGS, range(1))
    with pytest.raises(ValueError, match="is of another networks_sha256, .* give --overwrite to start over"):
        SweepResults(swept.path, other.describe(None, REFERENCE), "the command").load()
    same = Sweep(pipeline(), shades(), SweepOptions(sweep=True), SETTINGS, range(1))
    assert len(SweepResults(swept.path, same.describe(None, REFERENCE), "the command").load()) == 8


def test_a_pipeline_of_diffusers_that_knows_one_sampler_is_sampled_by_all(tmp_path):
    """`DDIMPipeline` has DDIM in the place of any other."""
    unet, real = tiny_stock_unet(), shades(channels=3, size=16)
    size = unet.config.sample_size
    real = shades(channels=unet.config.in_channels, size=size)
    pipe = DDIMPipeline(unet, DDIMScheduler())
    evaluator = Evaluator(real.train, num_reference=9)
    schedulers = ("DDIMScheduler", "HeunDiscreteScheduler")
    results, _ = run(tmp_path, evaluator, pipe, real=real, sweep_schedulers=schedulers, sweep_steps=(2,))
    assert [row["calls"] for row in results.rows] == [2, 3]
    assert "| precision in pixels | recall in pixels |" in results.table()


def test_several_seeds_give_mean_and_standard_deviation(evaluator, tmp_path):
    def make(seed):
        images, labels, _ = generate_for(shades(), pipeline(), 9, num_inference_steps=1, seed=seed)
        return images, labels

    each = [evaluator.measure(*make(seed)) for seed in (3, 4, 5)]
    means, spread = measure_over_seeds(make, evaluator, range(3, 6))
    distances = torch.tensor([one["frechet_distance"] for one in each], dtype=torch.float64)
    assert means["frechet_distance"] == pytest.approx(distances.mean().item(), rel=1e-3)
    assert spread["frechet_distance"] == pytest.approx(distances.std().item(), rel=2e-2)
    assert means["num_images"] == 9 and "num_images" not in spread
    results, _ = run(tmp_path, evaluator, seeds=range(3, 6), sweep_steps=(1,))
    assert results.rows[0]["calls"] == 1 and results.rows[0]["spread"] == pytest.approx(spread, rel=5e-2, abs=1e-6)
    assert f"± {results.rows[0]['spread']['frechet_distance']:.2g} |" in results.table()


def test_measures_that_not_every_set_has_have_no_mean():
    means, spread = mean_and_spread([{"a": 1.0, "b": 2.0, "num": 4}, {"a": 3.0, "num": 4, "flag": True}])
    assert means == {"a": 2.0, "num": 4, "flag": True} and spread == {"a": pytest.approx(2**0.5)}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sweep_schedulers": ("UNetModel",)}, "scheduler must be a scheduler class .*, got UNetModel"),
        ({"sweep_schedulers": ("EDMEulerScheduler",)}, "EDMEulerScheduler"),
        ({"sweep_steps": (2, 1001)}, "cannot make 1001 steps"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_the_first_image(options, message):
    with pytest.raises(ValueError, match=message):
        Sweep(pipeline(), shades(), SweepOptions(sweep=True, **options), SETTINGS, range(1))


def test_a_file_of_another_command_is_not_read_as_results(tmp_path):
    path = tmp_path / "evaluation.json"
    for text, got in (('{"pipeline": "a", "generated": {}}', "pipeline, generated"), ("{}", "nothing")):
        path.write_text(text)
        with pytest.raises(
            ValueError, match=f"must have results of this command, made_with and results, got {got}: give"
        ):
            SweepResults(path, {}, "the command").load()
